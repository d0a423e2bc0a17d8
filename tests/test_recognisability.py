"""Progressive recognisability and the area under a step curve."""

import pytest
import torch
from torch import Tensor

from orderrl.classifier import load_classifier
from orderrl.data import load_split
from orderrl.data.pictures import hide_blocks
from orderrl.geometry import BlockGrid
from orderrl.metrics.recognisability import area_over_fraction, progressive_recognisability

GRID = BlockGrid(8, 8, 2)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_split("digits", "test")
    return data.images(data.tokens[:60]), data.labels[:60]


def growing(count: int, seed: int = 0) -> Tensor:
    """(17, count, 16): blocks revealed one by one in a random order for each image."""
    rank = torch.rand(count, 16, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return rank[None] < torch.arange(17)[:, None, None]


def test_agrees_with_classifying_each_moment_alone(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    classifier, visible = load_classifier("digits"), growing(60)
    found = progressive_recognisability(classifier, GRID, images, labels, visible, batch_size=37)
    for moment in (0, 5, 16):
        logits = classifier(hide_blocks(images, visible[moment], GRID))
        torch.testing.assert_close(found.confidence[moment], logits.softmax(-1)[torch.arange(60), labels])
        assert torch.equal(found.correct[moment], logits.argmax(-1) == labels)


def test_hidden_pixels_do_not_matter_and_visible_ones_do(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    classifier, visible = load_classifier("digits"), growing(60)[8:9]
    base = progressive_recognisability(classifier, GRID, images, labels, visible).confidence
    noise = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    shown = hide_blocks(images, visible[0], GRID) == images
    elsewhere = torch.where(shown, images, noise)
    torch.testing.assert_close(
        progressive_recognisability(classifier, GRID, elsewhere, labels, visible).confidence, base
    )
    assert not torch.allclose(progressive_recognisability(classifier, GRID, noise, labels, visible).confidence, base)


def test_recognition_grows_on_average_and_ends_near_certainty(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    found = progressive_recognisability(load_classifier("digits"), GRID, images, labels, growing(60))
    start, half, end = found.confidence.mean(1)[[0, 8, 16]].tolist()
    assert start < half < end
    assert end > 0.95
    assert found.correct[16].float().mean() > 0.95


def test_area_of_a_constant_is_the_constant_whatever_the_schedule() -> None:
    fraction = torch.rand(9, 5, generator=torch.Generator().manual_seed(0)).sort(0).values
    fraction[0] = 0
    torch.testing.assert_close(area_over_fraction(torch.ones(9, 5), fraction), torch.ones(5).double())


def test_value_is_held_until_the_next_moment() -> None:
    values = torch.tensor([[0.2], [0.6], [1.0]])
    area = area_over_fraction(values, torch.tensor([[0.0], [0.25], [1.0]]))
    assert area.item() == pytest.approx(0.25 * 0.2 + 0.75 * 0.6)


def test_finished_images_may_repeat_their_last_moment() -> None:
    values, fraction = torch.tensor([[0.1], [0.5]]), torch.tensor([[0.0], [0.5]])
    padded = area_over_fraction(torch.cat([values, values[-1:]]), torch.cat([fraction, fraction[-1:]]))
    torch.testing.assert_close(padded, area_over_fraction(values, fraction))


def test_earlier_recognition_and_only_that_earns_area() -> None:
    fraction = torch.linspace(0, 1, 5)[:, None].expand(5, 2)
    early_late = torch.tensor([[0, 0], [1, 0], [1, 0], [1, 1], [1, 1]]).bool()
    early, late = area_over_fraction(early_late, fraction).tolist()
    assert (early, late) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("fraction", "message"),
    [
        ([[0.1], [1.0]], "must start at 0"),
        ([[0.0], [1.1]], "stay within 1"),
        ([[0.0], [0.5], [0.4]], "never fall"),
        ([[0.0, 0.0]], r"\(T, n\)"),
    ],
)
def test_bad_fractions_are_named(fraction: list[list[float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        area_over_fraction(torch.ones(len(fraction), 1), torch.tensor(fraction))


def test_shapes_that_do_not_fit_are_named(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    with pytest.raises(ValueError, match=r"visible must have shape \(T, n, B\).*\(17, 3, 16\)"):
        progressive_recognisability(load_classifier("digits"), GRID, images, labels, growing(3))
