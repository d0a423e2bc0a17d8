"""Progressive recognisability, its classifiers and what they are shown, and the area under a step curve."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor
from torch.nn import functional as F

from orderrl.agents import schedules
from orderrl.agents.play import Rollout, roll_out
from orderrl.agents.policies import RankingPolicy, uniform_random
from orderrl.backbones import OrderRobustTransformer, Sampling
from orderrl.data import TokenSet, load_split
from orderrl.data.pictures import hide_blocks
from orderrl.geometry import BlockGrid
from orderrl.metrics.classifier import load_classifier
from orderrl.metrics.recognisability import (
    Recogniser,
    area_over_fraction,
    at_fractions,
    classified,
    complete,
    make_recogniser,
    recognise,
)
from tests.agents.helpers import tiny_core
from tests.helpers import tiny_backbone, tiny_images

GRID = BlockGrid(8, 8, 2)
TINY = "test_resnet"  # timm's own model for tests, 0.5 M parameters


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_split("digits", "test")
    return data.images(data.tokens[:60]), data.labels[:60]


def progressive(classifier: Any, images: Tensor, labels: Tensor, visible: Tensor, batch_size: int = 1024) -> Any:
    """Confidence and correctness, (T, n) each, of images whose hidden blocks are grey."""
    moments = [classified(classifier, hide_blocks(images, mask, GRID), labels, batch_size) for mask in visible]
    return [torch.stack(parts) for parts in zip(*moments, strict=True)]


def growing(count: int, seed: int = 0) -> Tensor:
    """(17, count, 16): blocks revealed one by one in a random order for each image."""
    rank = torch.rand(count, 16, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return rank[None] < torch.arange(17)[:, None, None]


def test_agrees_with_classifying_all_images_at_once(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    classifier, visible = load_classifier("digits"), growing(60)
    confidence, correct = progressive(classifier, images, labels, visible, batch_size=37)
    for moment in (0, 5, 16):
        logits = classifier(hide_blocks(images, visible[moment], GRID))
        torch.testing.assert_close(confidence[moment], logits.softmax(-1)[torch.arange(60), labels])
        assert torch.equal(correct[moment], logits.argmax(-1) == labels)


def test_hidden_pixels_do_not_matter_and_visible_ones_do(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    classifier, visible = load_classifier("digits"), growing(60)[8:9]
    base, _ = progressive(classifier, images, labels, visible)
    noise = torch.randint(0, 256, images.shape, dtype=torch.uint8)
    shown = hide_blocks(images, visible[0], GRID) == images
    elsewhere = torch.where(shown, images, noise)
    torch.testing.assert_close(progressive(classifier, elsewhere, labels, visible)[0], base)
    assert not torch.allclose(progressive(classifier, noise, labels, visible)[0], base)


def test_recognition_grows_on_average_and_ends_near_certainty(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    confidence, correct = progressive(load_classifier("digits"), images, labels, growing(60))
    start, half, end = confidence.mean(1)[[0, 8, 16]].tolist()
    assert start < half < end
    assert end > 0.95
    assert correct[16].float().mean() > 0.95


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


def test_values_are_held_between_moments() -> None:
    values = torch.tensor([[0.1, 0.2], [0.5, 0.6], [0.9, 0.9]])
    fraction = torch.tensor([[0.0, 0.0], [0.25, 0.5], [1.0, 1.0]])
    found = at_fractions(values, fraction, torch.tensor([0.0, 0.25, 0.4, 0.5, 1.0]))
    assert torch.equal(found, torch.tensor([[0.1, 0.2], [0.5, 0.2], [0.5, 0.2], [0.5, 0.6], [0.9, 0.9]]))


# ---------------------------------------------------------------------- classifiers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in the layout of timm's, with ten classes."""
    path = tmp_path_factory.mktemp("timm") / "tiny.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model(TINY, num_classes=10).state_dict(), path)
    return path


def test_a_timm_model_classifies_as_timm_does(checkpoint: Path, digits: tuple[Tensor, Tensor]) -> None:
    recogniser = make_recogniser(f"timm:{TINY}:{checkpoint}", load_split("digits", "test"))
    assert recogniser is not None
    model = timm.create_model(TINY, num_classes=10)
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    config = resolve_model_data_config(model)
    images = F.interpolate(
        digits[0].float() / 255,
        config["input_size"][1:],
        mode=config["interpolation"],
        align_corners=False,
        antialias=True,
    )
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = model.eval()((images.clamp(0, 1) - mean) / std)
    torch.testing.assert_close(recogniser.classify(digits[0]), expected, atol=1e-4, rtol=1e-4)
    confidence, _ = classified(recogniser.classify, *digits)
    torch.testing.assert_close(confidence, expected.softmax(-1)[torch.arange(60), digits[1]])
    assert "timm:" in recogniser.described and "grey" in recogniser.described


def test_the_shipped_classifier_is_that_of_its_data_set_alone(digits: tuple[Tensor, Tensor]) -> None:
    data = load_split("digits", "test")
    recogniser = make_recogniser("own", data)
    assert recogniser is not None and recogniser.name == "digits"
    assert torch.equal(recogniser.classify(digits[0]), load_classifier("digits")(digits[0]))
    assert make_recogniser("own", replace(data, name="photographs")) is None
    assert make_recogniser(None, data) is None


@pytest.mark.parametrize(
    ("name", "fill", "message"),
    [
        ("resnet", "grey", "classifier='resnet' is unknown; choose one of own, digits, canvas, timm:MODEL"),
        ("own", "noise", "hidden_fill='noise' is unknown; choose one of grey, completion"),
        ("timm:resnet_tiny", "grey", "timm has no model 'resnet_tiny'"),
        (f"timm:{TINY}:nowhere.pth", "grey", "the checkpoint file nowhere.pth does not exist"),
    ],
)
def test_unknown_classifiers_are_refused(name: str | None, fill: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_recogniser(name, load_split("digits", "test"), fill)


def test_a_classifier_of_other_classes_is_refused(checkpoint: Path) -> None:
    data = replace(load_split("digits", "test"), num_classes=11)
    with pytest.raises(ValueError, match="has 10 classes, but data 'digits' has 11"):
        make_recogniser(f"timm:{TINY}:{checkpoint}", data)


# ---------------------------------------------------------------------- completion


@pytest.fixture(scope="module")
def played() -> tuple[OrderRobustTransformer, TokenSet, Rollout]:
    """Four images revealed in random orders in steps of 1, 4 and 4 blocks."""
    backbone = tiny_backbone()
    policy = RankingPolicy(uniform_random, backbone.geometry, (1, 4), schedules.growing((1, 4), (1, 4, 4)))
    rollout = roll_out(tiny_core((1, 4)), policy, torch.Generator().manual_seed(0), torch.arange(4))
    return backbone, tiny_images(backbone), rollout


def visible_tokens(rollout: Rollout, moment: int) -> Tensor:
    return rollout.visible[moment][:, rollout.geometry.token_block]


def test_completions_keep_what_is_visible_and_draw_the_rest(
    played: tuple[OrderRobustTransformer, TokenSet, Rollout],
) -> None:
    backbone, data, rollout = played
    for moment in range(4):
        tokens, shown = complete(backbone, data, rollout, moment), visible_tokens(rollout, moment)
        assert torch.equal(tokens[shown], rollout.tokens[shown])
        assert moment == 3 or (tokens != rollout.tokens)[~shown].float().mean() > 0.5  # five values, drawn anew
        assert tokens.min() >= 0 and tokens.max() < 5
    assert torch.equal(complete(backbone, data, rollout, 3), rollout.tokens)


def test_completions_do_not_read_hidden_tokens(played: tuple[OrderRobustTransformer, TokenSet, Rollout]) -> None:
    backbone, data, rollout = played
    shown = visible_tokens(rollout, 2)
    other = replace(rollout, tokens=torch.where(shown, rollout.tokens, (rollout.tokens + 1) % 5))
    assert torch.equal(complete(backbone, data, other, 2), complete(backbone, data, rollout, 2))
    assert not torch.equal(complete(backbone, data, rollout, 2, seed=1), complete(backbone, data, rollout, 2))


def test_completions_do_not_know_the_class(played: tuple[OrderRobustTransformer, TokenSet, Rollout]) -> None:
    backbone, data, rollout = played
    other = replace(rollout, labels=(rollout.labels + 1) % 3)
    assert torch.equal(complete(backbone, data, other, 0), complete(backbone, data, rollout, 0))


def test_completions_are_drawn_in_raster_order_given_the_visible_part(
    played: tuple[OrderRobustTransformer, TokenSet, Rollout],
) -> None:
    """Nearly greedy draws of one image against a loop over its hidden blocks without the environment."""
    backbone, data, rollout = played
    greedy = Sampling(top_k=1)
    fast = complete(backbone, data, rollout, 1, greedy)
    for row in range(4):
        tokens, label = rollout.tokens[row : row + 1].clone(), torch.tensor([backbone.num_classes])
        shown = rollout.order[row, :1].tolist()
        for block in [b for b in range(9) if b not in shown]:
            prefix = backbone.start(label)
            seen = torch.tensor([shown])
            prefix = backbone.extend(prefix, tokens, seen, torch.tensor([len(shown)]))
            now = torch.tensor([[block]])
            drawn = backbone.decode(prefix, now, torch.full((1, 1, 4), 0.5, dtype=torch.float64), greedy).tokens
            tokens = rollout.geometry.write(tokens, now, drawn)
            shown.append(block)
        assert torch.equal(fast[row], tokens[0])


def test_recognition_of_completions_is_that_of_the_completed_images(
    played: tuple[OrderRobustTransformer, TokenSet, Rollout],
) -> None:
    backbone, data, rollout = played

    def classify(images: Tensor) -> Tensor:
        return images.float().mean((2, 3)) / 40  # three "classes", known by the mean of any pixel

    recogniser = Recogniser("mean", classify, "completion")
    found = recognise(recogniser, rollout, data, lambda moment: complete(backbone, data, rollout, moment))
    assert found.confidence.shape == found.correct.shape == (4, 4)
    for moment in range(4):
        logits = classify(data.images(complete(backbone, data, rollout, moment)))
        torch.testing.assert_close(found.confidence[moment], logits.softmax(-1)[torch.arange(4), rollout.labels])
    grey = recognise(Recogniser("mean", classify), rollout, data, lambda moment: pytest.fail("not asked for"))
    torch.testing.assert_close(grey.confidence[-1], found.confidence[-1])
