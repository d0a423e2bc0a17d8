"""The headroom of a planner, on gains whose cause is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from orderrl.agents.bc import Config as BCConfig
from orderrl.evaluation.headroom import (
    LEVELS,
    Prediction,
    clone_level,
    headroom,
    level_prediction,
    lookahead_prediction,
    oracle_prediction,
)
from orderrl.geometry import BlockGrid
from orderrl.oracle import LabelConfig, label_contexts, random_contexts, utilities
from orderrl.planner import PlannerConfig
from tests.helpers import tiny_backbone, tiny_images

GRID = BlockGrid(4, 4, 2)  # B = 4
CLASSES, WIDTH = 2, 6
SHAPE = PlannerConfig(4, WIDTH, CLASSES, dim=16, stem=1, heads=2, latents=1)
CLONING = BCConfig(steps=140, batch_size=128, learning_rate=3e-2, weight_decay=0.0, evaluate_every=70)


def planted(cause: str, images: int, seed: int) -> TensorDict:
    """Labelled contexts, 12 of each image; the gains depend on what `cause` names and on which blocks are visible."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.arange(images).repeat_interleave(12)
    order = torch.rand(len(image), 4, generator=generator).argsort(1)
    length = torch.randint(3, (len(image),), generator=generator)
    visible = order.argsort(1) < length[:, None]
    label = torch.randint(CLASSES, (images,), generator=generator)[image]
    hidden = torch.randn(len(image), 4, WIDTH, generator=generator) * ~visible[..., None]
    entropy = torch.randn(len(image), 4, generator=generator) * ~visible
    places = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1))
    strength = {
        "positions": places[0].expand(len(image), -1, -1),
        "class": places[label],
        "content": entropy[:, :, None] + entropy[:, None],
    }[cause]
    both = ~visible[:, :, None] & ~visible[:, None] & ~torch.eye(4, dtype=torch.bool)
    parts = {
        "image": image, "order": order, "length": length, "label": label, "visible": visible, "hidden": hidden,
        "entropy": entropy, "loss": (~visible).float(), "gains": strength * both,
    }  # fmt: skip
    return TensorDict(parts, batch_size=[len(image)])


@pytest.mark.parametrize("cause", LEVELS)
def test_planted_cause_is_recovered(cause: str) -> None:
    labels, states = planted(cause, 60, seed=2), planted(cause, 30, seed=3)
    predictions = {}
    for level in LEVELS:
        planner = clone_level(level, labels, GRID, SHAPE, CLONING)
        predictions[level] = level_prediction(level, planner, states)
    entries = {entry["predictor"]: entry for entry in headroom(predictions, states, GRID, resamples=200)}
    known = LEVELS.index(cause)
    for number, level in enumerate(LEVELS):
        for key in ("utility", "dependence"):
            share = entries[level][f"r2_{key}"]["mean"]
            assert share > 0.8 if number >= known else share < 0.45, (level, key, share)
            if number:
                gain = entries[level][f"gain_{key}"]
                assert gain["low"] > 0.3 if number == known else abs(gain["mean"]) < 0.15, (level, key, gain)
    assert [entries[level]["above"] for level in LEVELS] == [None, "positions", "class"]


def test_a_planner_of_positions_sees_neither_class_nor_content() -> None:
    labels = planted("class", 8, seed=0)
    planner = clone_level("positions", labels, GRID, SHAPE, BCConfig(steps=4, batch_size=16, evaluate_every=2))
    states = planted("class", 5, seed=1)
    other = states.clone()
    other["label"], other["hidden"], other["entropy"] = 1 - states["label"], -states["hidden"], states["entropy"] + 1
    found, same = (level_prediction("positions", planner, seen) for seen in (states, other))
    assert torch.equal(found.utility, same.utility) and torch.equal(found.dependence, same.dependence)
    assert labels["label"].any() and states["label"].any()  # what others see is untouched


@pytest.fixture
def states() -> TensorDict:
    return planted("content", 20, seed=5)


def entry_of(prediction: Prediction, states: TensorDict) -> dict[str, Any]:
    anchor = oracle_prediction(states["gains"], GRID)
    (_, found) = headroom({"class": anchor, "lookahead:1": prediction} | {"positions": anchor}, states, GRID, 200)[:2]
    return found


def test_the_oracle_explains_everything_in_any_unit(states: TensorDict) -> None:
    oracle = oracle_prediction(states["gains"], GRID)
    found = entry_of(Prediction(3 * oracle.utility + 1, 5 * oracle.dependence - 2), states)
    for key in ("utility", "dependence"):
        assert found[f"r2_{key}"]["mean"] == pytest.approx(1)
        assert found[f"gain_{key}"]["mean"] == pytest.approx(0, abs=1e-9)
    assert found["spearman"] == pytest.approx(1) and found["regret"] == 0
    assert torch.equal(oracle.utility, utilities(states["gains"], GRID, torch.ones(4, 4)))


def test_a_prediction_that_says_nothing_explains_nothing(states: TensorDict) -> None:
    hidden = ~states["visible"]
    nothing = Prediction(hidden.float(), torch.ones(len(states), 4, 4))
    found = entry_of(nothing, states)
    for key in ("utility", "dependence"):
        assert found[f"r2_{key}"]["mean"] == 0 and found[f"gain_{key}"]["mean"] == pytest.approx(-1)
    assert "spearman" not in found  # it ranks nothing
    assert found["regret"] > 0


def direct_r2(predicted: Tensor, truth: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([predicted, truth]))[0, 1] ** 2)


def test_shares_are_squared_correlations_over_hidden_blocks_and_pairs(states: TensorDict) -> None:
    noise = torch.Generator().manual_seed(0)
    oracle, hidden = oracle_prediction(states["gains"], GRID), ~states["visible"]
    parts = (part + torch.randn(part.shape, generator=noise) for part in oracle)
    utility, dependence = parts
    dependence = (dependence + dependence.mT) / 2
    found = entry_of(Prediction(utility, dependence), states)
    pairs = hidden[:, :, None] & hidden[:, None] & ~torch.eye(4, dtype=torch.bool)
    assert found["r2_utility"]["mean"] == pytest.approx(direct_r2(utility[hidden], oracle.utility[hidden]), rel=1e-5)
    assert found["r2_dependence"]["mean"] == pytest.approx(
        direct_r2(dependence[pairs], oracle.dependence[pairs]), rel=1e-5
    )


def test_lookahead_keeps_the_states_in_their_order() -> None:
    backbone = tiny_backbone(4, 4)
    data, blocks = tiny_images(backbone), 4
    config = LabelConfig(contexts=14)
    contexts = random_contexts(config, len(data), blocks)
    parts = [
        TensorDict(part, batch_size=[len(part["image"])])
        for part in label_contexts(backbone, data.tokens, data.labels, config, contexts)
    ]
    states = TensorDict.cat(parts)[torch.randperm(14, generator=torch.Generator().manual_seed(1))]
    found = lookahead_prediction(backbone, data, states, draws=2)
    hidden = ~states["visible"]
    assert ((found.utility != 0) == hidden).all()
    pairs, off_diagonal = hidden[:, :, None] & hidden[:, None], ~torch.eye(blocks, dtype=torch.bool)
    assert ((found.dependence != 0) == pairs)[:, off_diagonal].all()
    assert torch.equal(found.utility, lookahead_prediction(backbone, data, states, draws=2).utility)
    assert not torch.equal(found.utility, lookahead_prediction(backbone, data, states, draws=2, seed=1).utility)
