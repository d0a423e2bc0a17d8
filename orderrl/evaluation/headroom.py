"""The headroom of a planner: how much of the gains do places explain, how much content, and what is hindsight?

Predictors are compared with the hindsight oracle in the same states, of images that none of them has seen. They predict
the utility U of every hidden block, and how much every two hidden blocks tell about each other, their dependence
(G[a, b] + G[b, a]) / 2:

- planners cloned on labels (target "pairs") that see ever more, `LEVELS`;
- lookahead, which needs no training: expected gains over the backbone's own draws.

A planner that reads content has headroom above "class"; what lookahead with many draws does not explain is hindsight,
as far as the backbone is calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from orderrl.agents.bc import Config as CloningConfig
from orderrl.agents.bc import clone
from orderrl.backbones import Backbone
from orderrl.data import TokenSet
from orderrl.envs.observation import labelled
from orderrl.evaluation.ablations import moments_by_image, pooled_r2
from orderrl.evaluation.protocol import EvaluationProtocol
from orderrl.evaluation.row_entries import state_mean
from orderrl.evaluation.settings import HeadroomConfig
from orderrl.geometry import BlockGrid
from orderrl.metrics.calibration import rank_correlation, regret
from orderrl.metrics.statistics import bootstrap_sums, sums_difference
from orderrl.oracle import Contexts, LabelConfig, label_contexts, utilities
from orderrl.planner import OrderHead, PlannerConfig
from orderrl.runtime.progress import progress

if TYPE_CHECKING:
    from tensordict import TensorDict

LEVELS = ("positions", "class", "content")
"""What a planner sees: which blocks are visible, and where; the class label too; hidden states and entropies too."""


class Prediction(NamedTuple):
    """What a predictor says in m states, each in a unit of its own."""

    utility: Tensor  # (m, B), of every block
    dependence: Tensor  # (m, B, B), symmetric, of every two blocks

    def rows(self, rows: Tensor) -> Prediction:
        """What it says in some of the states, given by their numbers, int64."""
        return Prediction(self.utility[rows], self.dependence[rows])


def oracle_prediction(gains: Tensor, geometry: BlockGrid) -> Prediction:
    """Utilities, nats per image token, and dependences, nats, of gains (m, B, B)."""
    return Prediction(utilities(gains, geometry), (gains + gains.mT) / 2)


# ---------------------------------------------------------------------- predictors


def clone_level(
    level: str, labels: TensorDict, geometry: BlockGrid, shape: PlannerConfig, config: CloningConfig, seed: int = 0
) -> OrderHead:
    """Clone a planner that sees what one of `LEVELS` names, from contexts as `label_contexts` stores them.

    The level decides `content` and `pairs` of the shape. The target is "pairs", which keeps the weights with the least
    held-out error; the seed is that of weights, split and batches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        planner = OrderHead(replace(shape, content=level == "content", pairs=True))
    clone(planner, _as_seen(level, labels), geometry, replace(config, target="pairs"), seed)
    return planner


@torch.no_grad()
def level_prediction(level: str, planner: OrderHead, states: TensorDict) -> Prediction:
    """What a planner of a level says in labelled states, batch (m,)."""
    output = planner(_as_seen(level, labelled(states)).to(planner.position.device))
    return Prediction(output.scores.cpu(), output.dependence.cpu())


def _as_seen(level: str, states: TensorDict) -> TensorDict:
    """States whose images all have one class, at the level that does not see it."""
    if level != "positions":
        return states
    return states.clone(recurse=False).update({"label": torch.zeros_like(states["label"])})


def lookahead_prediction(
    backbone: Backbone, data: TokenSet, states: TensorDict, draws: int, seed: int = 0
) -> Prediction:
    """Expected gains over the backbone's own draws (label kind "expected") in labelled contexts.

    K draws of each block cost K packed forwards.
    """
    config = LabelConfig(contexts=len(states), kind="expected", samples=draws, seed=seed)
    contexts = Contexts(torch.arange(len(states)), states["image"], states["order"], states["length"])
    parts = label_contexts(backbone, data.tokens, data.labels, config, contexts)
    by_length = torch.cat([part["gains"] for part in parts])
    gains = torch.empty_like(by_length)
    gains[states["length"].argsort(stable=True)] = by_length
    return oracle_prediction(gains, backbone.geometry)


# ---------------------------------------------------------------------- comparison


def headroom(
    predictions: Mapping[str, Prediction], states: TensorDict, geometry: BlockGrid, resamples: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Compare predictions with the hindsight oracle.

    Args:
        predictions: by name; the levels, in their order, before all others.
        states: labelled contexts of images that no predictor has seen, batch (m,), the same for all.
        resamples: bootstrap resamples; states of an image stay together.

    Returns:
        For each prediction a dict of predictor; states, how many; r2_utility and r2_dependence, shares of the oracle's
        variance over all candidates (pairs of candidates) of all states that the best line explains, each a dict of
        mean, low, high; above, the predictor that it is compared with ("positions" for "class", else "class"; None for
        the first), and gain_utility and gain_dependence, the differences of the shares, paired; spearman and regret
        (nats per image token) against the oracle's utilities, means over states with intervals, as in the table of an
        evaluation; no spearman where fewer than two images have one.
    """
    oracle = oracle_prediction(states["gains"], geometry)
    hidden, image = ~states["visible"], states["image"]
    pairs = hidden[:, :, None] & hidden[:, None] & ~torch.eye(geometry.num_blocks, dtype=torch.bool)
    sums = {
        name: {
            "utility": moments_by_image(found.utility, oracle.utility, hidden, image),
            "dependence": moments_by_image(
                found.dependence.flatten(1), oracle.dependence.flatten(1), pairs.flatten(1), image
            ),
        }
        for name, found in predictions.items()
    }
    entries = []
    for name, found in predictions.items():
        above = {"positions": None, "class": "positions"}.get(name, "class")  # lookahead sees the class
        entry: dict[str, Any] = {"predictor": name, "states": len(states), "above": above}
        for key, mine in sums[name].items():
            entry[f"r2_{key}"] = asdict(bootstrap_sums(mine, pooled_r2, resamples, seed=seed))
            entry[f"gain_{key}"] = None
            if above is not None:
                entry[f"gain_{key}"] = asdict(sums_difference(mine, sums[above][key], pooled_r2, resamples, seed))
        first = found.utility.masked_fill(~hidden, -torch.inf).argmax(-1)
        per_state = {
            "spearman": rank_correlation(found.utility, oracle.utility, hidden),
            "regret": regret(first, oracle.utility, hidden),
        }
        for key, values in per_state.items():
            entry |= state_mean(key, values, image, resamples, seed)
        entries.append(entry)
    return entries


def measure_headroom(p: EvaluationProtocol, labels: TensorDict, config: HeadroomConfig) -> list[dict[str, Any]]:
    """Clone the levels, look ahead, and compare in the shared states, see `headroom`.

    Labels are of other images than the shared states. Lookahead is slow, so it is compared in some of the states, and
    the levels in these once more.
    """
    states, backbone, geometry = p.states, p.backbone, p.backbone.geometry
    assert states is not None
    shape = PlannerConfig.for_backbone(backbone)
    cloning = CloningConfig(target="pairs", steps=config.steps, passes=None)
    draws = config.draws if backbone.vocab_size else []  # lookahead needs token probabilities
    with progress(len(LEVELS) * config.steps + len(draws), "headroom", "steps") as advance:
        # planners that see ever more
        predictions = {}
        for level in LEVELS:
            planner = clone_level(level, labels, geometry, shape, cloning, p.seed)
            advance(config.steps, level)
            predictions[level] = level_prediction(level, planner, states)
        entries = headroom(predictions, states, geometry, p.config.resamples, p.seed)
        if not draws:
            return entries
        # lookahead, in some of the states
        rows = torch.linspace(0, len(states) - 1, min(config.lookahead_states, len(states))).round().long()
        predictions = {name: found.rows(rows) for name, found in predictions.items()}
        for count in draws:
            name = f"lookahead:{count}"
            predictions[name] = lookahead_prediction(backbone, p.data, states[rows], count, p.seed)
            advance(note=name)
    return entries + headroom(predictions, states[rows], geometry, p.config.resamples, p.seed)
