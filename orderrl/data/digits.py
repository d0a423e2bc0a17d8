"""scikit-learn digits as token images.

`digits`: 8x8 tokens whose 17 grey levels are the tokens themselves. `digits_patches`: 4x4 continuous tokens, each the
2x2 grey levels of a patch in [-1, 1], for masked models.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from orderrl.data.token_set import TokenSet
from orderrl.runtime.isolation import isolated

HEIGHT = WIDTH = 8
LEVELS = 17
NUM_CLASSES = 10
PATCH = 2
SPLITS = {"backbone": 1000, "planner": 500, "test": 297}


@cache
def _collected() -> tuple[NDArray[np.float64], NDArray[np.int64], dict[str, list[int]]]:
    """scikit-learn's images (n, 64) and labels (n,), and the rows of every split: stratified, fixed and disjoint."""
    from sklearn.datasets import load_digits  # takes long to import
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(range(len(labels)), test_size=SPLITS["test"], stratify=labels, random_state=0)
    backbone, planner = train_test_split(rest, test_size=SPLITS["planner"], stratify=labels[rest], random_state=0)
    return images, labels, {"backbone": sorted(backbone), "planner": sorted(planner), "test": sorted(test)}


def load_digits_split(split: str) -> TokenSet:
    """One split of the 1,797 digits, in stratified order.

    Args:
        split: "backbone" (1,000 images), "planner" (500) or "test" (297).

    Raises:
        ValueError: if the split is unknown.
    """
    return digits_as_collected(split).shuffled()


def digits_as_collected(split: str) -> TokenSet:
    """`load_digits_split` in scikit-learn's own order, writer by writer."""
    images, labels, rows = _collected()
    if split not in rows:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(rows)}")
    return TokenSet(
        name="digits",
        split=split,
        tokens=torch.from_numpy(images[rows[split]]).long(),
        labels=torch.from_numpy(labels[rows[split]]).long(),
        height=HEIGHT,
        width=WIDTH,
        vocab_size=LEVELS,
        num_classes=NUM_CLASSES,
        class_names=tuple(map(str, range(NUM_CLASSES))),
    )


def load_patches_split(split: str) -> TokenSet:
    """One split of the digits as continuous tokens, (n, 16, 4) float32 in [-1, 1]; splits as in `load_digits_split`."""
    digits = load_digits_split(split)
    kind: Any = {"name": "digits_patches", "vocab_size": 0, "token_dim": PATCH**2, "decoder": patches_to_images}
    kind |= {"height": HEIGHT // PATCH, "width": WIDTH // PATCH}
    return replace(digits, tokens=_to_patches(digits.tokens), **kind)


def _to_patches(levels: Tensor) -> Tensor:
    """Grey levels (n, 64) -> (n, 16, 4) float32 in [-1, 1]."""
    scaled = levels.float() / (LEVELS - 1) * 2 - 1
    return rearrange(scaled, "n (r p c q) -> n (r c) (p q)", r=HEIGHT // PATCH, p=PATCH, c=WIDTH // PATCH)


def _to_levels(patches: Tensor) -> Tensor:
    """The inverse of `_to_patches`, rounded to the nearest level: (n, 16, 4) -> (n, 64) int64."""
    scaled = rearrange(patches, "n (r c) (p q) -> n (r p c q)", r=HEIGHT // PATCH, p=PATCH)
    return ((scaled + 1) / 2 * (LEVELS - 1)).round().clamp(0, LEVELS - 1).long()


def patches_to_images(patches: Tensor) -> Tensor:
    """Continuous tokens (n, 16, 4) -> (n, 3, 8, 8) uint8, every pixel at the nearest grey level."""
    grey = _to_levels(patches).view(-1, 1, HEIGHT, WIDTH).float() * (255 / (LEVELS - 1))
    return grey.round().to(torch.uint8).expand(-1, 3, -1, -1)


@isolated
def augment_patches(patches: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """`augment_digits` of continuous tokens (n, 16, 4)."""
    return _to_patches(augment_digits(_to_levels(patches), generator, strength))


@isolated
def augment_digits(tokens: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Mild augmentation: a small random rotation, scale, shear and shift of half of the images.

    Grey levels (n, 64) int64 -> the same. Strength 1 is up to 9 degrees, 9 % scale and shear, and 0.4 pixels shift
    (uniform); 0 is none.
    """
    n = len(tokens)
    angle, scale_y, scale_x, shear, shift_y, shift_x = (
        (2 * torch.rand(6, n, generator=generator, dtype=torch.float32) - 1)
        * strength
        * torch.tensor([0.16, 0.09, 0.09, 0.09, 0.1, 0.1], dtype=torch.float32)[:, None]
    )
    chosen = torch.rand(n, generator=generator, dtype=torch.float32) < 0.5
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([(1 + scale_x) * cos, shear - sin, shift_x], -1),
            torch.stack([sin, (1 + scale_y) * cos, shift_y], -1),
        ],
        dim=1,
    )
    images = tokens.view(n, 1, HEIGHT, WIDTH).float()
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    moved = moved.round().clamp(0, LEVELS - 1).long().view(n, -1)
    return torch.where(chosen[:, None], moved, tokens)
