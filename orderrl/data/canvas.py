"""Digits at random places on a larger empty grid: a layout that only the context reveals.

`canvas`: 12x12 tokens with the 17 grey levels of `digits`, one digit each. Where it lies says nothing about which digit
it is, so a planner that looks at what is visible knows more than one that sees positions alone.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from orderrl.data.digits import HEIGHT as DIGIT
from orderrl.data.digits import augment_digits, digits_as_collected
from orderrl.data.token_set import TokenSet
from orderrl.runtime.isolation import isolated

HEIGHT = WIDTH = 12
PLACES = {"backbone": 1, "planner": 4, "test": 1}  # canvases of every digit
_SEED = 20


def load_canvas_split(split: str) -> TokenSet:
    """One split of the canvases, (n, 144) int64: every digit of the split of `digits` at `PLACES` places.

    Args:
        split: "backbone" (1,000 canvases), "planner" (2,000, four of each digit) or "test" (297), in stratified order.

    Raises:
        ValueError: if the split is unknown.
    """
    digits = digits_as_collected(split)
    generator = torch.Generator().manual_seed(_SEED + list(PLACES).index(split))
    tokens = place(digits.tokens.repeat_interleave(PLACES[split], 0), generator)
    labels = digits.labels.repeat_interleave(PLACES[split], 0)
    return replace(digits, name="canvas", tokens=tokens, labels=labels, height=HEIGHT, width=WIDTH).shuffled()


def place(levels: Tensor, generator: torch.Generator) -> Tensor:
    """Put each image's ink at a random place of an empty canvas, all places equally likely.

    Grey levels (n, h * w) -> (n, 144) int64. The images are square and fit the canvas; what is above 0 is ink.
    """
    side = round(levels.shape[1] ** 0.5)
    images = levels.view(-1, side, side)
    uniform = torch.rand(2, len(images), generator=generator, dtype=torch.float32)
    corners = []
    for inked, line in zip(_inked_lines(images), uniform, strict=True):
        first, length = _extent(inked)
        corners.append(first - (line * (HEIGHT - length + 1)).long())
    return _window(functional.pad(images, (0, WIDTH - side, 0, HEIGHT - side)), corners, HEIGHT)


@isolated
def augment_canvas(tokens: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """`augment_digits` of the digit on each canvas, and another place: grey levels (n, 144) int64 -> the same."""
    return place(augment_digits(_digits(tokens), generator, strength), generator)


def _digits(canvases: Tensor) -> Tensor:
    """Digits in the middle of their own image, what `place` placed: (n, 144) -> (n, 64)."""
    images = canvases.view(-1, HEIGHT, WIDTH)
    extents = [_extent(inked) for inked in _inked_lines(images)]
    return _window(images, [first - (DIGIT - length) // 2 for first, length in extents], DIGIT)


def _inked_lines(images: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows and which columns of images (n, h, w) hold ink: (n, h) and (n, w) bool."""
    return (images > 0).any(2), (images > 0).any(1)


def _extent(inked: Tensor) -> tuple[Tensor, Tensor]:
    """First line and number of lines from the first to the last with ink, (n,) each; all lines where there is none."""
    first = inked.int().argmax(1)
    return first, inked.shape[1] - inked.flip(1).int().argmax(1) - first


def _window(images: Tensor, corners: list[Tensor], side: int) -> Tensor:
    """Cut `side` rows and columns from each image, from its corner (row, column) on and around its edges."""
    rows, columns = ((torch.arange(side) + corner[:, None]) % images.shape[1] for corner in corners)
    return images[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1)
