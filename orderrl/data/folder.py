"""Folders of images, one sub-folder a class: their splits, their crops, and reading them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from orderrl.values import at_least, between, check_fields, one_of

if TYPE_CHECKING:  # torchvision takes long to import, and most users of token sets never need it
    from torchvision.datasets import ImageFolder

SPLITS = ("backbone", "planner", "test")
CROPS = ("centre", "ten")
_EPS = 1e-9  # shares are decimal fractions: 0.1 * 30 must count as 3


@dataclass(frozen=True)
class FolderConfig:
    """Which images, and what is cut out of them.

    Attributes:
        root: folder with one sub-folder of images for every class (torchvision's ImageFolder).
        test_root: the same with images of the test split; None takes `test_share` of `root`.
        image_size: side of the square crops, pixels.
        crop: "centre", or "ten" (the four corners, the centre, and their mirror images).
        crop_ranges: of ten crops: the image is first cut to `range · image_size`; every range gives ten crops.
        flips: adds the mirror image of a centre crop.
        test_share: share of `root` in the test split.
        planner_share: share of `root` in the planner split; the rest is the backbone's.
        split_seed: which images go where.
        skip_broken: leave out images that can't be read instead of stopping.
        workers: processes that read images; 0 reads in this one.
    """

    root: str
    test_root: str | None = None
    image_size: int = 256
    crop: str = "centre"
    crop_ranges: tuple[float, ...] = (1.1,)
    flips: bool = False
    test_share: float = 0.1
    planner_share: float = 0.2
    split_seed: int = 0
    skip_broken: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            one_of(CROPS, "crop"),
            at_least(1, "image_size", "crop_ranges"),
            at_least(0, "workers", "split_seed"),
            between("[0, 1)", "test_share", "planner_share"),
        )
        object.__setattr__(self, "crop_ranges", tuple(float(value) for value in self.crop_ranges))
        if self.crop == "ten" and self.flips:
            raise ValueError("flips=true is for crop=centre; crop=ten holds its mirror images already")
        if self.crop == "ten" and not self.crop_ranges:
            raise ValueError("crop_ranges=[] must be one or more numbers of at least 1")
        if self.test_share + self.planner_share >= 1:
            raise ValueError(
                f"test_share={self.test_share} and planner_share={self.planner_share} must leave images "
                "for the backbone"
            )

    @property
    def views(self) -> int:
        """Crops and flips of a backbone image; images of the other splits have one view, the centre crop."""
        if self.crop == "ten":
            return 10 * len(self.crop_ranges)
        return 2 if self.flips else 1


def folder_config(values: dict[str, Any]) -> FolderConfig:
    """A `FolderConfig` from the plain values of the config group `data`.

    Raises:
        ValueError: if the group is not that of an image folder.
    """
    known = {field.name for field in fields(FolderConfig)}
    if values.get("name") != "folder" or values.keys() - known - {"name"}:
        raise ValueError(f"data={values.get('name')} is no image folder; use data=folder data.root=FOLDER")
    return FolderConfig(**{key: value for key, value in values.items() if key != "name"})


# -- which images -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSplit:
    """Images of one split.

    Attributes:
        split: its name.
        root: the folder that `names` are relative to.
        names: file names, "class/name.ext".
        labels: (n,) int64, index into the class names.
    """

    split: str
    root: Path
    names: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.names)


def split_rows(labels: Tensor, test_share: float, planner_share: float, seed: int) -> dict[str, Tensor]:
    """Disjoint, stratified splits.

    Images are shuffled within their class; going through the classes one after another, every split takes images at
    even intervals. So a class of m images gives it `share · m` of them, up to one, and the whole set `share · n`.

    Args:
        labels: (n,) int64.
        test_share, planner_share: shares of all images; the rest is the backbone's.
        seed: of the shuffling.

    Returns:
        Rows of each split, sorted, int64.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    order = shuffled[labels[shuffled].argsort(stable=True)]  # by class, shuffled within
    test = _every(len(order), test_share)
    rest = order[~test]
    planner = _every(len(rest), planner_share / (1 - test_share))
    rows = {"backbone": rest[~planner], "planner": rest[planner], "test": order[test]}
    return {split: part.sort().values for split, part in rows.items()}


def _every(count: int, share: float) -> Tensor:
    """(count,) bool, True for `share` of the places, evenly spread."""
    reached = ((torch.arange(count + 1, dtype=torch.float64) + 0.5) * share + _EPS).floor()
    return reached.diff() > 0


def list_images(config: FolderConfig) -> tuple[list[str], dict[str, ImageSplit]]:
    """Class names, and the images of every split in the folder's order.

    Raises:
        FileNotFoundError: if a folder is missing or a class has no images.
        ValueError: if the folders of `root` and `test_root` have different classes.
    """
    folder = _image_folder(config.root, "root")
    labels = torch.tensor(folder.targets, dtype=torch.int64)
    test_share = 0.0 if config.test_root is not None else config.test_share
    rows = split_rows(labels, test_share, config.planner_share, config.split_seed)
    splits = {split: _image_split(split, folder, part) for split, part in rows.items()}
    if config.test_root is not None:
        other = _image_folder(config.test_root, "test_root")
        if other.classes != folder.classes:
            different = sorted(set(other.classes) ^ set(folder.classes))
            raise ValueError(
                f"data.root={config.root} and data.test_root={config.test_root} must have the same classes; "
                f"only one has {', '.join(different[:5])}"
            )
        splits["test"] = _image_split("test", other, torch.arange(len(other)))
    return list(folder.classes), splits


def _image_folder(root: str, key: str) -> ImageFolder:
    path = Path(root).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"data.{key}={root} is no folder; it must hold one sub-folder of images for every class"
        )
    from torchvision.datasets import ImageFolder

    return ImageFolder(str(path))


def _image_split(split: str, folder: ImageFolder, rows: Tensor) -> ImageSplit:
    root = Path(folder.root)
    samples = [folder.samples[row] for row in rows.tolist()]
    names = [Path(path).relative_to(root).as_posix() for path, _ in samples]
    return ImageSplit(split, root, names, torch.tensor([label for _, label in samples], dtype=torch.int64))


# -- what is cut out of them ------------------------------------------------------------------------------------------


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of an image, scaled so that its shorter side has `size` pixels.

    As in ADM (Dhariwal and Nichol, 2021) and what followed: halved by box filter while the shorter side has at least
    twice the size, then scaled with a bicubic filter, then cut.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def ten_crops(image: Image.Image, size: int, crop_range: float) -> list[Image.Image]:
    """Ten crops of the centre square of side `crop_range · size`, as LlamaGen extracts them.

    LlamaGen uses range 1.1, and 1.05 for a second set. Order: top left, top right, bottom left, bottom right, centre,
    then the same of the mirror image (torchvision's TenCrop).
    """
    from torchvision.transforms import TenCrop

    return list(TenCrop(size)(centre_crop(image, int(size * crop_range))))


def cut(image: Image.Image, config: FolderConfig, split: str) -> Tensor:
    """All views of an image that belong to a split: (V, 3, S, S) uint8; V = `config.views` for the backbone, else 1."""
    if split != "backbone" or config.crop == "centre":
        views = [centre_crop(image, config.image_size)]
        if split == "backbone" and config.flips:
            views.append(views[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    else:
        views = [crop for r in config.crop_ranges for crop in ten_crops(image, config.image_size, r)]
    return torch.stack([torch.from_numpy(np.array(view)).permute(2, 0, 1) for view in views])


# -- reading them -----------------------------------------------------------------------------------------------------


def read_image(path: Path) -> Image.Image:
    """An RGB image.

    Raises:
        ValueError: if the file is missing, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).replace(str(path), "the file").split()) or type(error).__name__
        raise ValueError(
            f"{path}: cannot be read as an image ({reason}); repair or remove it, or set data.skip_broken=true"
        ) from error


class _Views(Dataset[tuple[Tensor | None, str]]):
    """Views of some images of a split; None and the reason where an image can't be read."""

    def __init__(self, images: ImageSplit, rows: Sequence[int], config: FolderConfig) -> None:
        self.images, self.rows, self.config = images, rows, config

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor | None, str]:
        path = self.images.root / self.images.names[self.rows[i]]
        try:
            return cut(read_image(path), self.config, self.images.split), ""
        except ValueError as error:
            return None, str(error)


def read_views(
    images: ImageSplit, rows: Sequence[int], config: FolderConfig, batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Views of images, batch by batch.

    Args:
        images: a split.
        rows: which of its images, in which order.
        config: the crops, and whether broken files are left out.
        batch_size: images a batch.

    Yields:
        The rows that were read and their views, (k, V, 3, S, S) uint8. A batch without any is left out.

    Raises:
        ValueError: for a file that can't be read, by name, unless `config.skip_broken`.
    """
    loader = DataLoader(
        _Views(images, rows, config), batch_size=batch_size, num_workers=config.workers, collate_fn=list
    )
    for number, batch in enumerate(loader):
        here = rows[number * batch_size : number * batch_size + len(batch)]
        broken = [reason for views, reason in batch if views is None]
        if broken and not config.skip_broken:
            raise ValueError(broken[0] + (f" ({len(broken)} such files in this batch)" if len(broken) > 1 else ""))
        kept = [(row, views) for row, (views, _) in zip(here, batch, strict=True) if views is not None]
        if kept:
            yield [row for row, _ in kept], torch.stack([views for _, views in kept])
