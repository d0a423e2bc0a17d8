"""Canvases: the ink of their digits, at places that are all equally likely."""

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from orderrl.data import AUGMENTATIONS, TokenSet, augment_canvas, load_canvas_split, load_digits_split
from orderrl.data.canvas import HEIGHT, PLACES, WIDTH, place

SPLITS = list(PLACES)


def ink(tokens: Tensor) -> Tensor:
    """The ink of square images inside its own bounding box, everything after it 0: (n, N) -> (n, 8, 8)."""
    side = round(tokens.shape[1] ** 0.5)
    cut = torch.zeros(len(tokens), 8, 8, dtype=torch.int64)
    for row, image in enumerate(tokens.view(-1, side, side)):
        inked = image.nonzero()
        (top, left), (bottom, right) = inked.amin(0).tolist(), inked.amax(0).tolist()
        box = image[top : bottom + 1, left : right + 1]
        cut[row, : box.shape[0], : box.shape[1]] = box
    return cut


def counted(data: TokenSet) -> Counter[tuple[int, bytes]]:
    """How often every digit with its class is there, wherever it lies."""
    inked = ink(data.tokens)
    return Counter((int(label), row.numpy().tobytes()) for label, row in zip(data.labels, inked, strict=True))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("split", SPLITS)
def test_a_canvas_is_its_digit_at_another_place(split: str) -> None:
    canvases, digits, times = load_canvas_split(split), load_digits_split(split), PLACES[split]
    assert len(canvases) == times * len(digits) and canvases.tokens.shape[1] == HEIGHT * WIDTH
    assert counted(canvases) == {image: times * count for image, count in counted(digits).items()}
    assert torch.equal(load_canvas_split(split).tokens, canvases.tokens)
    assert canvases.name == "canvas" and canvases.split == split
    assert (canvases.height, canvases.width, canvases.vocab_size, canvases.num_classes) == (12, 12, 17, 10)


def test_splits_hold_different_digits() -> None:
    seen = [{row.numpy().tobytes() for row in ink(load_canvas_split(split).tokens)} for split in SPLITS]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


def test_the_places_of_a_planner_digit_differ() -> None:
    canvases = load_canvas_split("planner").tokens
    assert len(canvases.unique(dim=0)) > 0.9 * len(canvases)  # equal by chance alone; a digit has 25 places or more


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 5), (3, 2), (1, 1)])
def test_all_places_are_equally_likely(height: int, width: int) -> None:
    rows, columns = HEIGHT - height + 1, WIDTH - width + 1
    count = 60 * rows * columns
    image = torch.zeros(8, 8, dtype=torch.int64)
    image[8 - height :, :width] = torch.arange(1, height * width + 1).view(height, width)  # its first level is 1
    placed = place(image.flatten().expand(count, -1), generator())
    found = (placed == 1).nonzero()[:, 1]  # one corner in every canvas
    assert len(found) == count
    counts = torch.bincount(found, minlength=HEIGHT * WIDTH).view(HEIGHT, WIDTH)
    assert counts[:rows, :columns].sum() == count  # the whole digit lies on the canvas
    assert chisquare(counts[:rows, :columns].flatten().numpy()).pvalue > 1e-3


def test_images_without_ink_give_empty_canvases() -> None:
    assert not place(torch.zeros(5, 64, dtype=torch.int64), generator()).any()
    assert not augment_canvas(torch.zeros(5, 144, dtype=torch.int64), generator(), 1.0).any()


def test_augmentation_without_strength_moves_the_digit_and_nothing_else() -> None:
    canvases = load_canvas_split("test").tokens
    moved = augment_canvas(canvases, generator(), 0.0)
    assert torch.equal(ink(moved), ink(canvases))
    assert (moved != canvases).any(1).float().mean() > 0.9


def test_augmentation_changes_half_of_the_digits_and_keeps_them_on_the_canvas() -> None:
    canvases = load_canvas_split("test").tokens
    changed = augment_canvas(canvases, generator(), 1.0)
    assert changed.shape == canvases.shape and changed.dtype == torch.int64
    assert int(changed.min()) >= 0 and int(changed.max()) <= 16
    deformed = (ink(changed) != ink(canvases)).flatten(1).any(1).float().mean()
    assert 0.3 < deformed < 0.7
    assert torch.equal(changed, augment_canvas(canvases, generator(), 1.0))
    assert AUGMENTATIONS["canvas"] is augment_canvas


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="split='train' is unknown; choose one of backbone, planner, test"):
        load_canvas_split("train")
