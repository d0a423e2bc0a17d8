"""Sets of images for the metrics: tensors, and folders of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


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

    Args:
        folder: holds .png, .jpg, .jpeg, .webp or .bmp files, all of one size.

    Raises:
        ValueError: if the folder has no images, an image can't be read, or their sizes differ.
    """

    def __init__(self, folder: Path) -> None:
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
        if not self.files:
            raise ValueError(f"{folder} holds no images ({', '.join(EXTENSIONS)})")
        first = _size(self.files[0])
        for path in self.files:
            if (size := _size(path)) != first:
                raise ValueError(
                    f"the images of {folder} must have one size, but {self.files[0].name} has {first[0]}x{first[1]} "
                    f"pixels and {path.name} has {size[0]}x{size[1]}; crop them first"
                )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        try:
            with Image.open(self.files[index]) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{self.files[index]} can't be read as an image ({error})") from error


def _size(path: Path) -> tuple[int, int]:
    """Width and height, from the head of the file."""
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} can't be read as an image ({error})") from error


def save_images(images: Tensor, folder: Path) -> None:
    """Write (n, 3, H, W) uint8 images as 000000.png, 000001.png, … into a new or empty folder.

    Raises:
        ValueError: if images are not uint8 (n >= 1, 3, H, W) or the folder holds files.
    """
    check_images(images, "images", at_least=1)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"folder={str(folder)!r} must be empty, or its files would be taken for samples")
    for number, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        Image.fromarray(image).save(folder / f"{number:06d}.png")


def check_images(images: Tensor, name: str, at_least: int = 2) -> None:
    """Refuse what is not uint8 (n, 3, H, W) with n >= at_least.

    Raises:
        ValueError: naming the argument, its dtype and shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) < at_least:
        raise ValueError(
            f"{name} must be uint8 images of shape (n, 3, H, W) with n >= {at_least}, "
            f"got {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        )
