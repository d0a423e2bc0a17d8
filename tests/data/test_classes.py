"""Folders that hold images of some of a model's classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from orderrl.data import load_token_set
from orderrl.data.classes import class_ids
from orderrl.data.encode import tokenize_folder
from orderrl.data.folder import FolderConfig, list_images
from tests.tokenizers.helpers import image_folder, save_tiny_vq, tiny_vq


def test_imagenet_folders_have_the_ids_of_published_models() -> None:
    ids, names = class_ids("imagenet")
    assert len(names) == 1000 and names == sorted(names)
    known = {"n01440764": 0, "n02099601": 207, "n02123045": 281, "n15075141": 999}  # tench, retriever, cat, paper
    assert {name: ids[name] for name in known} == known


@pytest.mark.parametrize("suffix", [".txt", ".json"])
def test_ids_come_from_a_file(tmp_path: Path, suffix: str) -> None:
    ids = {"golden retriever": 4, "cat": 1}
    file = tmp_path / f"ids{suffix}"
    file.write_text(json.dumps(ids) if suffix == ".json" else "golden retriever\t4\n\ncat   1\n")
    assert class_ids(str(file)) == (ids, ["class 0", "cat", "class 2", "class 3", "golden retriever"])
    assert len(class_ids(str(file), 9)[1]) == 9


@pytest.mark.parametrize(
    ("name", "content", "num_classes", "message"),
    [
        ("a.txt", "cat", None, 'lines "FOLDER ID"'),
        ("a.txt", "cat one", None, 'lines "FOLDER ID"'),
        ("a.txt", "", None, "holds no class"),
        ("a.txt", "cat 1\ncat 2", None, "names a folder twice"),
        ("a.txt", "cat 1\ndog 1", None, "cat and dog have the id 1"),
        ("a.txt", "cat -1", None, "between 0 and"),
        ("a.txt", "cat 5", 5, "between 0 and 4"),
        ("a.txt", "cat 99999999999", None, "more than the 1048576"),
        ("a.json", "[1, 2]", None, "an object of ids"),
        ("a.json", '{"cat": "1"}', None, "an id is no integer"),
        ("a.json", '{"cat": true}', None, "an id is no integer"),
        ("a.json", "{", None, "an object of ids"),
    ],
)
def test_files_of_another_form_are_refused(
    tmp_path: Path, name: str, content: str, num_classes: int | None, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        class_ids(str(tmp_path / name), num_classes)
    assert "\n" not in str(caught.value)


def test_what_is_neither_imagenet_nor_a_file_is_refused(tmp_path: Path) -> None:
    for classes in ("imagenett", str(tmp_path)):
        with pytest.raises(ValueError, match="is neither imagenet nor a file"):
            class_ids(classes)
    with pytest.raises(ValueError, match="must be 1000"):
        class_ids("imagenet", 10)
    with pytest.raises(ValueError, match="goes with classes=FILE"):
        FolderConfig("x", num_classes=10)


def test_a_token_set_of_some_classes_has_the_models_number_and_ids(tmp_path: Path) -> None:
    synsets = ("n02099601", "n01440764", "n02123045")
    root = image_folder(tmp_path / "images", per_class=10, classes=synsets)
    (root / "n15075141").mkdir()  # empty: allowed here
    test_root = image_folder(tmp_path / "test", per_class=2, classes=synsets[:1])
    source = FolderConfig(str(root), str(test_root), "imagenet", image_size=8)
    images = list_images(source)
    assert images.present == [0, 207, 281] and "classes: 3 of 1000 (n01440764, " in images.describe()
    assert "1 class folder without images: n15075141" in images.describe()
    folder = tokenize_folder(tiny_vq(), source, tmp_path / "set", save_tiny_vq(tmp_path / "t.safetensors"))
    data = load_token_set(folder, "planner")
    assert data.num_classes == 1000 and data.present == (0, 207, 281) and data.classes.tolist() == [0, 207, 281]
    assert set(data.labels.tolist()) == {0, 207, 281}
    assert data.class_names is not None and data.class_names[207] == "n02099601"
    assert load_token_set(folder, "test").labels.tolist() == [207, 207]
    assert torch.equal(data.first(3).classes, data.classes)


def test_folders_without_an_id_are_refused_and_wordnet_ids_are_pointed_out(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", per_class=10, classes=("n02099601", "n99999999"))
    with pytest.raises(ValueError, match=r"data\.classes has no id for the folders n99999999"):
        list_images(FolderConfig(str(root), classes="imagenet"))
    assert "for a model of ImageNet set data.classes=imagenet" in list_images(FolderConfig(str(root))).describe()
    assert "imagenet" not in list_images(FolderConfig(str(image_folder(tmp_path / "b")))).describe()
