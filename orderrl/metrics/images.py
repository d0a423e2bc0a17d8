"""Sets of images for the metrics: tensors, and folders of files."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from orderrl.data import TokenSet
from orderrl.data.images import EXTENSIONS, describe_left_out, find_images, image_size, read_image
from orderrl.runtime.sources import printable


class TensorImages(Dataset[Tensor]):
    """uint8 images (n, 3, H, W) as the data set that torch-fidelity reads."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.cpu()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class ImageFolder(Dataset[Tensor]):
    """All images of a folder and its sub-folders, by name: (3, H, W) uint8. They are read when they are asked for.

    They are found and read as those of data sets, see `orderrl.data.images`.

    Args:
        folder: holds images, all of one size.

    Raises:
        ValueError: if the folder has no images, an image cannot be read, or their sizes differ.
    """

    def __init__(self, folder: Path) -> None:
        names, left_out = find_images(folder)
        self.files = [folder / name for name in names]
        self.left_out = describe_left_out(left_out)  # what else there is, in a line; "" if nothing
        if not self.files:
            raise ValueError(f"{folder} holds no images ({', '.join(EXTENSIONS)})")
        first = image_size(self.files[0])
        for path in self.files:
            if (size := image_size(path)) != first:
                raise ValueError(
                    f"the images of {folder} must have one size, but {printable(self.files[0].name)} has "
                    f"{first[0]}x{first[1]} pixels and {printable(path.name)} has {size[0]}x{size[1]}; crop them first"
                )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(read_image(self.files[index]))).permute(2, 0, 1)


class TokenImages(Dataset[Tensor]):
    """Images of token sets of one size, one set after the other: (3, H, W) uint8 on the CPU.

    They are decoded when they are asked for, on the device; None is the CPU.
    """

    def __init__(self, parts: Sequence[TokenSet], device: torch.device | None = None) -> None:
        self.parts, self.device = list(parts), device
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """Images by their numbers; those of a set are decoded together (PyTorch's loaders ask for whole batches)."""
        found: dict[int, Tensor] = {}
        for number, part in enumerate(self.parts):
            start = self._ends[number - 1] if number else 0
            mine = [index for index in indices if start <= index < self._ends[number]]
            if mine:
                tokens = part.tokens[torch.tensor(mine) - start]
                found |= zip(mine, part.images(tokens, self.device), strict=True)
        return [found[index] for index in indices]


def save_images(images: Tensor, folder: Path, labels: Tensor | None = None) -> None:
    """Write images as PNG into a new or empty folder: 000000.png, 000001.png, …, or with labels LABEL/000000.png, ….

    Labels have leading zeros where some have more digits, so that torchvision's `ImageFolder` finds them in order.
    With labels in ascending order the files, sorted by path, are in the order of the images: torch-fidelity then reads
    them as they were scored (`--samples-find-deep`).

    Args:
        images: (n, 3, H, W) uint8.
        labels: (n,) int64, at least 0.

    Raises:
        ValueError: if images are not uint8 (n >= 1, 3, H, W), labels do not fit them, or the folder holds files.
    """
    check_images(images)
    if labels is not None and (labels.shape != images.shape[:1] or bool((labels < 0).any())):
        raise ValueError(f"labels must have shape ({len(images)},) and be at least 0, got {tuple(labels.shape)}")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"folder={str(folder)!r} must be empty, or its files would be taken for samples")
    parents = [folder] * len(images)
    if labels is not None:
        digits = len(str(int(labels.max())))
        parents = [folder / f"{label:0{digits}d}" for label in labels.tolist()]
        for parent in set(parents):
            parent.mkdir()
    for number, (image, parent) in enumerate(zip(images.permute(0, 2, 3, 1).cpu().numpy(), parents, strict=True)):
        Image.fromarray(image).save(parent / f"{number:06d}.png")


def check_images(images: Tensor) -> None:
    """Refuse, by dtype and shape, what is not uint8 (n, 3, H, W) with n >= 1."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(
            "images must be uint8 images of shape (n, 3, H, W) with n >= 1, "
            f"got {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        )
