"""From an image folder to a token set by the commands."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from orderrl.data import load_split
from orderrl.data.encode import tokenize_folder
from orderrl.data.folder import FolderConfig, list_images
from orderrl.pretrain import find_or_make_tokens, pretrain
from orderrl.runtime.config import compose
from orderrl.tokenize import tokenize
from orderrl.tokenizers import load_tokenizer
from tests.tokenizers.helpers import image_folder, save_tiny_vq, tiny_vq

ALONE = ["backbone=none", "data=folder", "tokenizer=small"]  # trains the tokeniser and no backbone
TRAINING = [
    *("tokenizer.training.steps=2", "tokenizer.training.batch_size=4", "tokenizer.training.evaluate_every=1"),
    *("tokenizer.model.codebook_size=16", "tokenizer.model.z_channels=32"),
]


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    root = image_folder(tmp_path / "images", per_class=10)
    return [f"data.root={root}", "data.image_size=8"]


@pytest.fixture
def trained(tmp_path: Path, data: list[str]) -> Path:
    """A tokeniser trained for two steps."""
    return pretrain(
        compose(
            "pretrain",
            [
                *ALONE,
                *data,
                *TRAINING,
                f"output_dir={tmp_path / 'runs'}",
                f"cache_dir={tmp_path / 'cache'}",
            ],
        )
    )


def test_the_commands_lead_from_images_to_a_token_set(
    tmp_path: Path, data: list[str], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {"results.json", "metrics.jsonl", "config.yaml"} <= {path.name for path in trained.parent.iterdir()}
    made = [f"tokenizer.path={trained}", f"output={tmp_path / 'set'}", "data.flips=true"]
    tokenize(compose("tokenize", ["data=folder", *data, "tokenizer=small", *made]))
    said = capsys.readouterr().out
    assert "images/s" in said and "backbone 14, planner 4, test 2" in said
    config = compose("pretrain", ["data=tokens", f"data.path={tmp_path / 'set'}"])
    sizes = {split: len(load_split(config.data.name, split)) for split in ("backbone", "planner", "test")}
    assert sizes == {"backbone": 28, "planner": 4, "test": 2}
    test = load_split(config.data.name, "test")
    assert torch.equal(test.images(test.tokens), load_tokenizer(trained).decode(test.tokens, (2, 2)))


def test_tokens_of_a_config_are_made_once_with_their_tokeniser(tmp_path: Path, data: list[str]) -> None:
    where = [f"cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'runs'}"]
    config = compose("pretrain", [*ALONE[1:], *data, *TRAINING, *where])
    folder = find_or_make_tokens(config)
    runs = list((tmp_path / "runs" / "pretrain").iterdir())
    assert find_or_make_tokens(config) == folder and len(load_split(f"tokens:{folder}", "backbone")) == 14
    assert list((tmp_path / "runs" / "pretrain").iterdir()) == runs and len(runs) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["tokenizer=small"], r"needs tokenizer\.path=FILE"),
        (["tokenizer=none"], "tokenizer='none' is unknown"),
        (["data=digits", "tokenizer=small", "tokenizer.path={path}"], "data=digits is no image folder"),
        (["data.root={root}", "data.image_size=7", "tokenizer=small", "tokenizer.path={path}"], "multiples of 2"),
    ],
)
def test_what_cannot_be_tokenised_is_refused(tmp_path: Path, changes: list[str], message: str) -> None:
    names = {"path": save_tiny_vq(tmp_path / "t.safetensors"), "root": image_folder(tmp_path / "images")}
    overrides = [f"output={tmp_path / 'set'}", *(change.format(**names) for change in changes)]
    with pytest.raises(ValueError, match=message):
        tokenize(compose("tokenize", overrides))


def test_published_tokenisers_are_not_trained(data: list[str]) -> None:
    with pytest.raises(ValueError, match="train tokenizer=small"):
        pretrain(
            compose(
                "pretrain",
                [*ALONE, *data, "tokenizer=vq16", "tokenizer.path=x.pt"],
            )
        )


def test_a_folder_of_broken_files_is_refused(tmp_path: Path, data: list[str]) -> None:
    for path in (tmp_path / "images").glob("*/*.png"):
        path.write_text("broken")
    overrides = [*data, *TRAINING, f"output_dir={tmp_path / 'runs'}"]
    with pytest.raises(ValueError, match="cannot be read as an image"):
        pretrain(compose("pretrain", [*ALONE, *overrides]))
    with pytest.raises(ValueError, match="hardly any file can be read"):
        pretrain(compose("pretrain", [*ALONE, *overrides, "data.skip_broken=true"]))


def test_an_image_size_that_the_tokeniser_cannot_halve_is_refused(tmp_path: Path, data: list[str]) -> None:
    with pytest.raises(ValueError, match=r"data\.image_size=9 must be a multiple of 4"):
        pretrain(compose("pretrain", [*ALONE, *data, *TRAINING, "data.image_size=9"]))


# -- images that change -----------------------------------------------------------------------------------------------

CHANGES = ("replaced", "replaced at the same time and size", "one more", "one less", "a class less", "renamed")


def change(root: Path, how: str) -> None:
    """Change an image folder of the classes cat, cow and dog."""
    file = root / "cat" / "03.png"
    if how == "replaced":
        file.write_bytes((root / "dog" / "05.png").read_bytes())
    elif how == "replaced at the same time and size":
        state, content = file.stat(), bytearray(file.read_bytes())
        content[-20] ^= 1  # of the pixels; their checksum is wrong now, but nothing reads it here
        file.write_bytes(content)
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif how == "one more":
        (root / "cat" / "99.png").write_bytes(file.read_bytes())
    elif how == "one less":
        file.unlink()
    elif how == "a class less":
        shutil.rmtree(root / "cow")
    else:
        file.rename(root / "cat" / "zz.png")


@pytest.mark.parametrize("how", CHANGES)
def test_changed_images_have_another_version_and_are_refused_in_an_output(tmp_path: Path, how: str) -> None:
    root = image_folder(tmp_path / "images", per_class=10, classes=("cat", "cow", "dog"))
    source, weights = FolderConfig(str(root), image_size=8), save_tiny_vq(tmp_path / "t.safetensors")
    tokenize_folder(tiny_vq(), source, tmp_path / "set", weights)
    before, stamps = list_images(source).version, [path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()]
    change(root, how)
    assert list_images(source).version != before
    with pytest.raises(
        ValueError, match=r"images (changed|new|gone), such as (cat|cow)/.*choose another output"
    ) as error:
        tokenize_folder(tiny_vq(), source, tmp_path / "set", weights)
    assert "\n" not in str(error.value)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()] == stamps


def test_the_same_images_elsewhere_or_touched_are_the_same(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", per_class=10)
    shutil.copytree(root, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.png"):
        os.utime(path, (1, 1))
    assert list_images(FolderConfig(str(root))).version == list_images(FolderConfig(str(tmp_path / "copy"))).version


def test_changed_images_get_new_tokens_and_a_new_tokeniser_in_the_cache(tmp_path: Path, data: list[str]) -> None:
    where = [f"cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path / 'runs'}"]
    config = compose("pretrain", [*ALONE[1:], *data, *TRAINING, *where])
    folders = [find_or_make_tokens(config)]
    for change_images in (lambda path: path.write_bytes((path.parent / "01.png").read_bytes()), Path.unlink):
        change_images(tmp_path / "images" / "cat" / "00.png")
        folders.append(find_or_make_tokens(config))
    assert len(set(folders)) == 3
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 3
    assert sum(len(load_split(f"tokens:{folders[2]}", split)) for split in ("backbone", "planner", "test")) == 19


def test_another_tokeniser_at_the_same_path_gets_other_tokens(tmp_path: Path, data: list[str]) -> None:
    """Found by its weights, not by its path."""
    path = tmp_path / "t.safetensors"
    config = compose("pretrain", [
        "data=folder", *data, "tokenizer=small", f"tokenizer.path={path}", f"cache_dir={tmp_path / 'cache'}",
    ])  # fmt: skip
    folders = []
    for seed in (0, 1, 0):
        save_tiny_vq(path, seed=seed)
        folders.append(find_or_make_tokens(config))
    assert folders[0] == folders[2] != folders[1]


def test_the_commands_say_how_many_classes_there_are(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images" / ".cache").mkdir()
    path = save_tiny_vq(tmp_path / "t.safetensors")
    arguments = [*data, "tokenizer=small"]
    tokenize(compose("tokenize", [*arguments, f"tokenizer.path={path}", f"output={tmp_path / 'set'}"]))
    assert "classes: 2 (cat, dog)" in (printed := capsys.readouterr().out) and "1 hidden: .cache/" in printed
    where = [f"output_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"]
    pretrain(compose("pretrain", [*ALONE, *data, *TRAINING, *where]))
    assert "classes: 2 (cat, dog)" in (printed := capsys.readouterr().out) and "1 hidden: .cache/" in printed
