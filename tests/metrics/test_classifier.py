"""The shipped classifiers: accurate, shaped as torch-fidelity needs them, and reproducible."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orderrl import compose
from orderrl.data import load_split
from orderrl.data.pictures import HIDDEN_GREY, hide_blocks
from orderrl.evaluation.settings import EvalConfig, eval_config
from orderrl.evaluation.table import raster_backbones
from orderrl.geometry import BlockGrid
from orderrl.metrics.classifier import (
    CLASSIFIERS,
    Classifier,
    classifier_accuracy,
    load_classifier,
    own_classifier,
    random_visible,
    save_classifier,
    train_classifier,
)
from orderrl.runtime.finite import NotFiniteError

GRID = BlockGrid(8, 8, 2)
NAMES = list(CLASSIFIERS)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_reach_97_percent_on_the_test_split(name: str) -> None:
    assert classifier_accuracy(load_classifier(name), load_split(name, "test")) >= 0.97


@pytest.mark.parametrize(("name", "least"), [("digits", 0.8), ("canvas", 0.7)])
def test_shipped_classifier_still_knows_most_half_revealed_images(name: str, least: float) -> None:
    test = load_split(name, "test")
    half = torch.rand(len(test), 16, generator=torch.Generator().manual_seed(1)).argsort(1) < 8
    assert classifier_accuracy(load_classifier(name), test, half) >= least


@pytest.mark.parametrize("name", NAMES)
def test_nothing_revealed_gives_no_confidence(name: str) -> None:
    side = CLASSIFIERS[name].side
    images = torch.full((1, 3, side, side), HIDDEN_GREY, dtype=torch.uint8)
    assert load_classifier(name)(images).softmax(-1).max() < 0.9


@pytest.mark.parametrize("name", NAMES)
def test_features_and_logits_have_their_shapes_and_the_head_connects_them(name: str) -> None:
    classifier = load_classifier(name)
    data = load_split(name, "test")
    images = data.images(data.tokens[:5])
    features = classifier.features(images)
    assert features.shape == (5, 64)
    torch.testing.assert_close(classifier(images), classifier.head(features))


def test_data_sets_of_one_kind_of_images_share_a_classifier() -> None:
    for data in ("digits", "digits_patches", "canvas"):
        name = own_classifier(data)
        assert name is not None
        images = load_split(data, "test")
        assert images.images(images.tokens[:1]).shape[-2:] == (CLASSIFIERS[name].side,) * 2
    assert own_classifier("tokens:photographs") is None


def test_evaluations_take_what_ships_with_their_data() -> None:
    features = {"digits": "orderrl-digits", "digits_patches": "orderrl-digits", "canvas": "orderrl-canvas"}
    for data, own in features.items():
        assert EvalConfig().feature_name(data) == own
        assert raster_backbones(["own"], data) == (["digits_raster"] if data == "digits" else [])
    assert EvalConfig(features=None).feature_name("tokens:photographs") is None
    with pytest.raises(ValueError, match="no feature extractor ships for data 'tokens:photographs'"):
        eval_config({}, compose("evaluate", ["data=tokens", "data.path=photographs"]).data.name)


@pytest.mark.parametrize("name", NAMES)
def test_training_is_reproducible_and_depends_on_the_seed(name: str) -> None:
    first, again, other = (train_classifier(name, seed=seed, steps=3, batch_size=8) for seed in (0, 0, 1))
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert not torch.equal(first.head.weight, other.head.weight)


def test_training_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_classifier(steps=1, batch_size=4)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", NAMES)
def test_saved_classifier_loads_unchanged(name: str, tmp_path: Path) -> None:
    classifier = Classifier(CLASSIFIERS[name]).eval()
    save_classifier(classifier, tmp_path / "c.safetensors")
    loaded = load_classifier(name, tmp_path / "c.safetensors")
    side = CLASSIFIERS[name].side
    images = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8)
    torch.testing.assert_close(loaded(images), classifier(images))


def test_weights_of_another_classifier_are_refused(tmp_path: Path) -> None:
    save_classifier(Classifier(CLASSIFIERS["canvas"]), tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"c\.safetensors"):
        load_classifier("digits", tmp_path / "c.safetensors")


def test_hide_blocks_keeps_visible_pixels_and_greys_the_others() -> None:
    images = torch.randint(0, 100, (7, 3, 8, 8), dtype=torch.uint8)
    visible = torch.rand(7, 16) < 0.5
    hidden = hide_blocks(images, visible, GRID).flatten(-2)[..., GRID.block_tokens]  # (n, 3, B, p*p)
    mask = visible[:, None, :, None].expand_as(hidden)
    assert torch.equal(hidden[mask], images.flatten(-2)[..., GRID.block_tokens][mask])
    assert (hidden[~mask] == HIDDEN_GREY).all()


def test_hide_blocks_works_on_pixels_finer_than_tokens() -> None:
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    visible = torch.ones(1, 16, dtype=torch.bool)
    visible[0, 5] = False  # second row, second column of blocks
    hidden = hide_blocks(images, visible, GRID) == HIDDEN_GREY
    assert hidden[..., 8:16, 8:16].all()
    assert hidden.sum() == 3 * 8 * 8


def test_half_of_the_training_images_show_everything() -> None:
    visible = random_visible(4000, GRID, torch.Generator().manual_seed(0))
    assert visible.any(1).all()
    complete = visible.all(1).float().mean().item()
    assert 0.5 <= complete < 0.57  # 1/2, and 1/16 of the other half


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_classifier("letters"), "name='letters'.*digits, canvas"),
        (lambda: train_classifier("letters"), "name='letters'.*digits, canvas"),
        (lambda: train_classifier(steps=0), "steps must be at least 1, got 0"),
        (lambda: load_classifier("digits")(torch.zeros(2, 3, 8, 8)), r"uint8 of shape \(n, 3, 8, 8\), got float32"),
        (lambda: load_classifier("digits")(torch.zeros(2, 1, 8, 8).byte()), r"got uint8 \(2, 1, 8, 8\)"),
        (lambda: load_classifier("canvas")(torch.zeros(2, 3, 8, 8).byte()), r"\(n, 3, 12, 12\), got uint8"),
        (lambda: hide_blocks(torch.zeros(3, 9, 8), torch.ones(16).bool(), GRID), "9x8 pixels"),
        (lambda: hide_blocks(torch.zeros(3, 8, 8), torch.ones(4).bool(), GRID), "B=16 entries"),
    ],
)
def test_bad_input_is_named(call: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_training_ends_at_the_first_loss_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([1.0, 2.0, float("nan"), 1.0])
    monkeypatch.setattr(
        "orderrl.metrics.classifier.F.cross_entropy", lambda logits, _: next(losses) * logits.sum().square()
    )
    with pytest.raises(NotFiniteError, match="step 2: loss is nan; the training diverged"):
        train_classifier("digits", steps=4, batch_size=2)
