"""Image folders: splits, crops, and files that cannot be read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orderrl.data.folder import (
    FolderConfig,
    centre_crop,
    cut,
    folder_config,
    list_images,
    read_views,
    split_rows,
    ten_crops,
)
from tests.tokenizers.helpers import image_folder


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# -- splits -----------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_complete_stratified_and_fixed_by_the_seed() -> None:
    labels = torch.randint(0, 7, (503,), generator=torch.Generator().manual_seed(0))
    rows = split_rows(labels, 0.1, 0.25, seed=3)
    assert torch.equal(torch.cat(list(rows.values())).sort().values, torch.arange(503))
    shares = {"test": 0.1, "planner": 0.25, "backbone": 0.65}
    for split, share in shares.items():
        assert abs(len(rows[split]) - share * 503) <= 1.5
        for label in range(7):
            assert abs((labels[rows[split]] == label).sum() - share * (labels == label).sum()) <= 2
    again, other = split_rows(labels, 0.1, 0.25, seed=3), split_rows(labels, 0.1, 0.25, seed=4)
    assert all(torch.equal(rows[split], again[split]) for split in rows)
    assert not torch.equal(rows["test"], other["test"])


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_even_shares_are_met_exactly(share: float) -> None:
    labels = torch.arange(10).repeat_interleave(30)
    rows = split_rows(labels, share, share, seed=0)
    assert len(rows["test"]) == len(rows["planner"]) == round(300 * share)
    assert labels[rows["test"]].bincount().tolist() == [round(30 * share)] * 10


def test_a_share_of_zero_is_empty() -> None:
    rows = split_rows(torch.zeros(5, dtype=torch.int64), 0.0, 0.0, seed=0)
    assert [len(rows[split]) for split in ("backbone", "planner", "test")] == [5, 0, 0]


def test_the_folder_is_listed_by_class_and_each_image_once(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", per_class=10)
    images = list_images(FolderConfig(str(root)))
    splits = images.splits
    assert images.classes == ["cat", "dog"] and images.present is None and not images.left_out
    names = [name for part in splits.values() for name in part.names]
    assert sorted(names) == sorted(path.relative_to(root).as_posix() for path in root.glob("*/*.png"))
    assert {split: len(part) for split, part in splits.items()} == {"backbone": 14, "planner": 4, "test": 2}
    for part in splits.values():
        assert [name.startswith("dog") for name in part.names] == part.labels.bool().tolist()


def test_test_images_may_have_a_folder_of_their_own(tmp_path: Path) -> None:
    root, test_root = image_folder(tmp_path / "a", 5), image_folder(tmp_path / "b", 3)
    splits = list_images(FolderConfig(str(root), test_root=str(test_root))).splits
    assert {split: len(part) for split, part in splits.items()} == {"backbone": 8, "planner": 2, "test": 6}
    assert splits["test"].root == test_root
    other = image_folder(tmp_path / "c", 3, classes=("cat", "cow"))
    with pytest.raises(ValueError, match=r"same classes.*cow, dog"):
        list_images(FolderConfig(str(root), test_root=str(other)))


def test_missing_folders_and_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.root=.*nowhere"):
        list_images(FolderConfig(str(tmp_path / "nowhere")))
    for values, message in (
        ({"crop": "five"}, "centre, ten"),
        ({"crop": "ten", "flips": True}, "mirror images"),
        ({"crop": "ten", "crop_ranges": (0.9,)}, "at least 1"),
        ({"test_share": 0.6, "planner_share": 0.4}, "leave images"),
        ({"image_size": 0}, "image_size"),
        ({"workers": -1}, "workers"),
    ):
        with pytest.raises(ValueError, match=message):
            FolderConfig(root="x", **values)
    with pytest.raises(ValueError, match="data=digits is no image folder"):
        folder_config({"name": "digits"})


# -- crops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 23), (40, 17), (70, 65)])
def test_the_centre_crop_is_the_middle_of_the_scaled_image(height: int, width: int) -> None:
    image, size = picture(height, width), 16
    expected = np.array(image)
    while min(expected.shape[:2]) >= 2 * size:  # halve: means of 2x2 pixels
        h, w = expected.shape[0] // 2, expected.shape[1] // 2
        expected = np.array(Image.fromarray(expected).resize((w, h), Image.Resampling.BOX))
    scale = size / min(expected.shape[:2])
    h, w = round(expected.shape[0] * scale), round(expected.shape[1] * scale)
    expected = np.array(Image.fromarray(expected).resize((w, h), Image.Resampling.BICUBIC))
    top, left = (h - size) // 2, (w - size) // 2
    assert np.array_equal(np.array(centre_crop(image, size)), expected[top : top + size, left : left + size])


def test_a_square_image_of_the_right_size_is_left_as_it_is() -> None:
    assert np.array_equal(np.array(centre_crop(picture(16, 16), 16)), np.array(picture(16, 16)))


def test_ten_crops_are_corners_centre_and_their_mirror_images() -> None:
    image = picture(30, 41)
    whole = np.array(centre_crop(image, 22))  # int(20 * 1.1)
    crops = [np.array(crop) for crop in ten_crops(image, 20, 1.1)]
    corners = [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)]
    expected = [side[top : top + 20, left : left + 20] for side in (whole, whole[:, ::-1]) for top, left in corners]
    assert len(crops) == 10 and all(np.array_equal(a, b) for a, b in zip(crops, expected, strict=True))


def test_only_backbone_images_have_more_than_the_plain_centre_crop() -> None:
    image = picture(20, 20)
    centre = torch.from_numpy(np.array(centre_crop(image, 16))).permute(2, 0, 1)
    for config, views in (
        (FolderConfig("x", image_size=16), 1),
        (FolderConfig("x", image_size=16, flips=True), 2),
        (FolderConfig("x", image_size=16, crop="ten", crop_ranges=(1.1, 1.3)), 20),
    ):
        assert cut(image, config, "backbone").shape == (views, 3, 16, 16) and config.views == views
        for split in ("planner", "test"):
            assert torch.equal(cut(image, config, split), centre[None])
    flipped = cut(image, FolderConfig("x", image_size=16, flips=True), "backbone")
    assert torch.equal(flipped[1], centre.flip(-1))


# -- reading ----------------------------------------------------------------------------------------------------------


def broken_folder(root: Path) -> Path:
    """Three good images, one truncated, one that is text."""
    image_folder(root, per_class=5, classes=("cat",))
    whole = (root / "cat" / "01.png").read_bytes()
    (root / "cat" / "01.png").write_bytes(whole[: len(whole) // 2])
    (root / "cat" / "03.png").write_text("not an image")
    return root


def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path: Path) -> None:
    config = FolderConfig(str(broken_folder(tmp_path / "x")), image_size=8, test_share=0, planner_share=0)
    images = list_images(config).splits["backbone"]
    with pytest.raises(ValueError, match=r"01\.png: cannot be read.*skip_broken=true") as caught:
        list(read_views(images, range(5), config, 1))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="2 such files"):
        list(read_views(images, range(5), config, 5))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_files_that_cannot_be_read_may_be_left_out(tmp_path: Path, batch_size: int) -> None:
    config = FolderConfig(
        str(broken_folder(tmp_path / "x")), image_size=8, test_share=0, planner_share=0, skip_broken=True
    )
    images = list_images(config).splits["backbone"]
    batches = list(read_views(images, range(5), config, batch_size))
    assert [row for rows, _ in batches for row in rows] == [0, 2, 4]
    assert torch.cat([views for _, views in batches]).shape == (3, 1, 3, 8, 8)


@pytest.mark.slow
def test_reading_in_other_processes_changes_nothing(tmp_path: Path) -> None:
    root = str(image_folder(tmp_path / "x", per_class=5))
    both = []
    for workers in (0, 1):
        config = FolderConfig(root, image_size=8, test_share=0, planner_share=0, workers=workers)
        images = list_images(config).splits["backbone"]
        both.append(torch.cat([views for _, views in read_views(images, range(10), config, 3)]))
    assert torch.equal(*both)
