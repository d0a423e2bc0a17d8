"""Folders of images, one sub-folder a class: their splits, their crops, and reading them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from orderrl.data.classes import IMAGENET, class_ids, look_like_synsets
from orderrl.data.images import describe_left_out, find_images, read_image
from orderrl.runtime.sources import file_versions, printable
from orderrl.runtime.terminal import shorten
from orderrl.runtime.values import at_least, between, check_fields, one_of, setting

SPLITS = ("backbone", "planner", "test")
CROPS = ("centre", "ten")
LONGEST = 8  # times the shorter side: what is scaled of an image
_EPS = 1e-9  # shares are decimal fractions: 0.1 * 30 must count as 3


@dataclass(frozen=True)
class FolderConfig:
    """Data set: images in one sub-folder for every class, and what is cut out of them."""

    root: str = setting(MISSING, "Folder with one sub-folder of images for every class (torchvision's ImageFolder)")
    test_root: str | None = setting(
        None, "Folder of the same classes with the test images; null takes test_share of root"
    )
    classes: str | None = setting(
        None,
        "Class ids of a model for the folders, of which some may be missing: imagenet (WordNet ids), or a file of "
        'lines "FOLDER ID" or .json; null numbers the folders by name',
    )
    num_classes: int | None = setting(
        None, "Number of classes of the model, for classes=FILE; null is the largest id + 1", at_least(1)
    )
    image_size: int = setting(256, "Side of the square crops, pixels", at_least(1))
    crop: str = setting(
        "centre", "Crop: centre, or ten (corners, centre and mirror images; for the backbone split)", one_of(CROPS)
    )
    crop_ranges: tuple[float, ...] = setting(
        (1.1,),
        "Sides that ten crops are cut from, in image sizes; each gives ten crops (LlamaGen: 1.1 and 1.05)",
        at_least(1),
    )
    flips: bool = setting(False, "Mirror images of centre crops too, for the backbone split")
    test_share: float = setting(0.1, "Share of root in the test split, by class", between("[0, 1)"))
    planner_share: float = setting(
        0.2, "Share of root in the planner split, by class; the rest is the backbone's", between("[0, 1)")
    )
    split_seed: int = setting(0, "Seed of which images go into which split", at_least(0))
    skip_broken: bool = setting(False, "Leave out images that cannot be read, and list them")
    workers: int = setting(0, "Processes that read images; 0 reads in this one", at_least(0))

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "crop_ranges", tuple(float(value) for value in self.crop_ranges))
        if self.crop == "ten" and self.flips:
            raise ValueError("flips=true is for crop=centre; crop=ten holds its mirror images already")
        if self.crop == "ten" and not self.crop_ranges:
            raise ValueError("crop_ranges=[] must be one or more numbers of at least 1")
        if self.classes is None and self.num_classes is not None:
            raise ValueError(f"num_classes={self.num_classes} goes with classes=FILE; without it, folders are counted")
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
    """A `FolderConfig` from the plain values of the config group `data`; ValueError if that is of no image folder."""
    known = {field.name for field in fields(FolderConfig)}
    if values.get("name") != "folder" or values.keys() - known - {"name"}:
        raise ValueError(f"data={values.get('name')} is no image folder; use data=folder data.root=FOLDER")
    return FolderConfig(**{key: value for key, value in values.items() if key != "name"})


def crops(config: FolderConfig) -> dict[str, Any]:
    """Plain values that determine which images go where and what is cut out of them, apart from the images."""
    images = ("root", "test_root", "classes", "num_classes", "skip_broken", "workers")
    return {key: value for key, value in asdict(config).items() if key not in images}


# -- which images -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSplit:
    """Images of one split."""

    split: str
    root: Path  # the folder that `names` are relative to
    names: list[str]  # file names, "class/name.ext"
    labels: Tensor  # (n,) int64, index into the class names
    # what tells every file from another one under its name, see `orderrl.runtime.sources.file_versions`
    versions: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def part(self, split: str, rows: Tensor) -> "ImageSplit":
        """Some of the images, rows (m,) int64, as a split of their own."""
        names, versions = ([values[row] for row in rows.tolist()] for values in (self.names, self.versions))
        return ImageSplit(split, self.root, names, self.labels[rows], versions)


def split_rows(labels: Tensor, test_share: float, planner_share: float, seed: int) -> dict[str, Tensor]:
    """Disjoint, stratified splits.

    Images are shuffled within their class; going through the classes one after another, every split takes images at
    even intervals. So a class of m images gives it `share · m` of them, up to one, and the whole set `share · n`.

    Args:
        labels: (n,) int64.
        test_share, planner_share: shares of all images; the rest is the backbone's.

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


@dataclass(frozen=True)
class Images:
    """The images of a configuration."""

    classes: list[str]  # class names by label
    splits: dict[str, ImageSplit]  # the images of every split, in the folder's order
    # labels that have images, ascending, where the folders hold some of the classes of a model
    # (`FolderConfig.classes`); None is all
    present: list[int] | None
    left_out: dict[str, list[str]]  # names of what is no image of a class, by the reason

    @property
    def table(self) -> str:
        """A line for every image: split, label, file name and version, with tabs between; names as by `printable`."""
        lines = ["split\tlabel\tfile\tversion"]
        for split in SPLITS:
            part = self.splits[split]
            rows = zip(part.labels.tolist(), part.names, part.versions, strict=True)
            lines += [f"{split}\t{label}\t{printable(name)}\t{version}" for label, name, version in rows]
        return "\n".join(lines) + "\n"

    @property
    def version(self) -> str:
        """Digest of the table: another one when any image is new, gone, changed or of another class or split."""
        return hashlib.sha256(self.table.encode()).hexdigest()

    def describe(self) -> str:
        """How many classes and images there are, and what was left out: one or more lines."""
        labels = range(len(self.classes)) if self.present is None else self.present
        names = [self.classes[label] for label in labels]
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        total = f" of {len(self.classes)}" if self.present is not None else ""
        counts = ", ".join(f"{split} {len(part)}" for split, part in self.splits.items())
        lines = [f"classes: {len(names)}{total} ({shown})", f"images: {counts}"]
        if self.left_out:
            lines.append(f"left out: {describe_left_out(self.left_out)}")
        if self.present is None and len(names) < 1000 and look_like_synsets(names):
            lines.append(f"folders are called by WordNet ids; for a model of ImageNet set data.classes={IMAGENET}")
        return "\n".join(lines)


def list_images(config: FolderConfig) -> Images:
    """The images of every split, and what their classes are called.

    Raises:
        FileNotFoundError: if a folder is missing or a class has no images.
        ValueError: if the folders of `root` and `test_root` have different classes, or a folder is no class of
            `config.classes`.
    """
    known = None if config.classes is None else class_ids(config.classes, config.num_classes)
    classes, found, left_out = _class_folders(config.root, "root", known)
    test_share = 0.0 if config.test_root is not None else config.test_share
    rows = split_rows(found.labels, test_share, config.planner_share, config.split_seed)
    splits = {split: found.part(split, part) for split, part in rows.items()}
    if config.test_root is not None:
        others, splits["test"], skipped = _class_folders(config.test_root, "test_root", known)
        if others != classes:
            different = sorted(set(others) ^ set(classes))
            raise ValueError(
                f"data.root={config.root} and data.test_root={config.test_root} must have the same classes; "
                f"only one has {', '.join(different[:5])}"
            )
        left_out = {key: left_out.get(key, []) + skipped.get(key, []) for key in left_out | skipped}
    present = None if known is None else torch.cat([part.labels for part in splits.values()]).unique().tolist()
    return Images(classes, splits, present, left_out)


def _class_folders(
    root: str, key: str, known: tuple[dict[str, int], list[str]] | None
) -> tuple[list[str], ImageSplit, dict[str, list[str]]]:
    """Class names, all images below a folder as one split "test", and the names of what is left out, by the reason.

    Args:
        key: of the configuration, that named it.
        known: what `class_ids` gives, for folders of which some may be missing or empty; None numbers those there are.
    """
    path = Path(root).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"data.{key}={root} is no folder; it must hold one sub-folder of images for every class"
        )
    # Images count in class folders alone.
    found, left_out = find_images(path)
    names = [name for name in found if "/" in name]
    if loose := [name for name in found if "/" not in name]:
        left_out["in no class folder"] = loose
    of_images = [name.partition("/")[0] for name in names]
    walked = {f"{entry.name}/": entry.name for entry in path.iterdir() if entry.is_dir()}
    folders = sorted(walked[name] for name in walked.keys() - {name for part in left_out.values() for name in part})
    empty = sorted(set(folders) - set(of_images))
    if not names:
        raise FileNotFoundError(f"data.{key}={root} holds no sub-folder with images; it must hold one for every class")
    if known is None:
        if empty:
            raise FileNotFoundError(
                f"data.{key}={root}: class folders without images: {shorten([*map(printable, empty)], 5)}; remove "
                "them, or number the classes with data.classes"
            )
        ids, classes = {name: number for number, name in enumerate(folders)}, list(map(printable, folders))
    else:
        ids, classes = known
        if empty:
            left_out["class folder without images"] = empty
        if strange := [name for name in folders if name not in ids and name not in empty]:
            named = shorten([*map(printable, strange)], 5)
            raise ValueError(f"data.{key}={root}: data.classes has no id for the folders {named}")
    labels = torch.tensor([ids[name] for name in of_images], dtype=torch.int64)
    images = ImageSplit("test", path, names, labels, file_versions([path / name for name in names]))
    return classes, images, left_out


# -- what is cut out of them ------------------------------------------------------------------------------------------


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of an image, scaled so that its shorter side has `size` pixels.

    As in ADM (Dhariwal and Nichol, 2021) and what followed: halved by box filter while the shorter side has at least
    twice the size, then scaled with a bicubic filter, then cut. Of an image that is longer than eight times its shorter
    side the middle alone is scaled, so that memory does not grow with its length.
    """
    image = _shortened(image, LONGEST * min(image.size))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _shortened(image: Image.Image, longest: int) -> Image.Image:
    """The middle of an image, of at most `longest` pixels a side, or one more where that keeps the centre."""
    cut_off = [max(0, length - longest) // 2 for length in image.size]
    return image.crop((cut_off[0], cut_off[1], image.width - cut_off[0], image.height - cut_off[1]))


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


class _Views(Dataset[tuple[Tensor | None, str]]):
    """Views of some images of a split; None and the reason where an image cannot be read."""

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
        rows: which of its images, in which order.
        config: the crops, and whether broken files are left out.

    Yields:
        The rows that were read and their views, (k, V, 3, S, S) uint8. A batch without any is left out.

    Raises:
        ValueError: for a file that cannot be read, by name, unless `config.skip_broken`.
    """
    loader = DataLoader(
        _Views(images, rows, config), batch_size=batch_size, num_workers=config.workers, collate_fn=list
    )
    for number, batch in enumerate(loader):
        here = rows[number * batch_size : number * batch_size + len(batch)]
        broken = [reason for views, reason in batch if views is None]
        if broken and not config.skip_broken:
            more = f" ({len(broken)} such files in this batch)" if len(broken) > 1 else ""
            raise ValueError(f"{broken[0]}; repair or remove it, or set data.skip_broken=true{more}")
        kept = [(row, views) for row, (views, _) in zip(here, batch, strict=True) if views is not None]
        if kept:
            yield [row for row, _ in kept], torch.stack([views for _, views in kept])
