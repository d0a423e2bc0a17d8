"""Agreement of a planner's scores with the value of blocks, on a shared set of states.

The value is the utility U by the hindsight oracle, which knows the hidden tokens; regret is also measured against
lookahead, the expected utility over the backbone's own draws, which is what a policy without hindsight can reach.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor

from orderrl.agents.policies import Lookahead, all_scores
from orderrl.backbones.protocol import Backbone
from orderrl.data import TokenSet
from orderrl.envs.core import CoreConfig, NextBlockCore

if TYPE_CHECKING:
    from tensordict import TensorDict

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """Scores as predictions of utilities, over all candidates of all states.

    Scores have no unit, so they are first mapped to nats by the one line, utility = slope * score + intercept, that
    fits all candidates of all states best (least squares). The predictions so made are cut into bins of equal numbers.
    """

    predicted: list[float]  # mean prediction in each bin, nats per image token, ascending
    actual: list[float]  # mean utility in each bin, nats per image token
    count: list[int]  # candidates in each bin
    # expected calibration error: mean over bins of |predicted - actual|, weighted by their candidates, nats per image
    # token. A score that knows nothing is mapped to the mean and has none: read it beside `r2`
    error: float
    r2: float  # share of the variance of the utilities that the line explains
    slope: float  # of the line
    intercept: float  # of the line

    def plain(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


class Calibration(NamedTuple):
    """Agreement in each of m states; what needs scores is None without them."""

    top1: Tensor  # (m,) bool, whether the first-ranked block is the oracle's
    regret: Tensor  # (m,) float32, max_a U - U(first-ranked block), nats per image token
    # spearman, kendall: (m,) float64, rank correlations (tau-b) of scores and utilities over hidden blocks; NaN where
    # all scores are equal
    spearman: Tensor | None = None
    kendall: Tensor | None = None
    # (m,) float32, standard deviation of the scores over hidden blocks, in their own unit
    score_std: Tensor | None = None
    reliability: Reliability | None = None  # of the scores as predictions; None also if all of them are equal


def calibrate(first: Tensor, scores: Tensor | None, utility: Tensor, hidden: Tensor) -> Calibration:
    """Compare a policy's choices with utilities.

    Args:
        first: (m,) int64, the first-ranked block of each state.
        scores: (m, B), or None if the policy has none.
        utility: (m, B) float32, nats per image token.
        hidden: (m, B) bool, the candidates, two in each state at least.
    """
    loss = regret(first, utility, hidden)
    top1 = first == utility.masked_fill(~hidden, -torch.inf).argmax(-1)
    if scores is None:
        return Calibration(top1, loss)
    spread = torch.stack([row[candidates].std(correction=0) for row, candidates in zip(scores, hidden, strict=True)])
    return Calibration(
        top1,
        loss,
        rank_correlation(scores, utility, hidden),
        rank_correlation(scores, utility, hidden, "kendalltau"),
        spread,
        reliability(scores[hidden].double().numpy(), utility[hidden].double().numpy()),
    )


def regret(first: Tensor, utility: Tensor, hidden: Tensor) -> Tensor:
    """max_a U(a) - U(first-ranked block), (m,), nats per image token; arguments as in `calibrate`."""
    return utility.masked_fill(~hidden, -torch.inf).amax(-1) - utility.gather(1, first[:, None])[:, 0]


def rank_correlation(scores: Tensor, utility: Tensor, hidden: Tensor, name: str = "spearmanr") -> Tensor:
    """A rank correlation of SciPy over the hidden blocks of each state, (m,) float64; NaN where all scores are equal.

    Arguments as in `calibrate`; the name is that of a function in `scipy.stats`.
    """
    correlate, values = getattr(scipy.stats, name), []
    for score, value, candidates in zip(scores.numpy(), utility.numpy(), hidden.numpy(), strict=True):
        score, value = score[candidates], value[candidates]
        varied = np.ptp(score) > 0 and np.ptp(value) > 0  # SciPy warns of constants
        values.append(float(correlate(score, value).statistic) if varied else np.nan)
    return torch.tensor(values, dtype=torch.float64)


def reliability(scores: NDArray[np.float64], utility: NDArray[np.float64], bins: int = BINS) -> Reliability | None:
    """Reliability of scores (c,) of candidates as predictions of their utilities (c,); None if all of one are equal.

    At most so many bins are made; scores that are equal share one.
    """
    if np.ptp(scores) == 0:
        return None
    line = scipy.stats.linregress(scores, utility)
    predicted = line.intercept + line.slope * scores
    if np.ptp(predicted) == 0:  # utilities that are all equal
        return None
    edges = np.unique(np.quantile(predicted, np.linspace(0, 1, bins + 1)))
    sums, edges, number = scipy.stats.binned_statistic(predicted, [predicted, utility], "sum", bins=edges)
    count = np.bincount(number, minlength=len(edges) + 1)[1 : len(edges)]
    filled = count > 0
    means = sums[:, filled] / count[filled]
    error = np.abs(means[0] - means[1]) @ count[filled] / len(scores)
    return Reliability(
        means[0].tolist(),
        means[1].tolist(),
        count[filled].tolist(),
        float(error),
        float(line.rvalue**2),
        float(line.slope),
        float(line.intercept),
    )


class LookaheadUtility(NamedTuple):
    """Expected utility over the backbone's own draws in some of the shared states."""

    rows: Tensor  # (k,) int64, which states
    utility: Tensor  # (k, B) float32, nats per image token
    draws: int  # of each block


def lookahead_utility(
    backbone: Backbone, data: TokenSet, states: TensorDict, count: int, draws: int, seed: int = 0
) -> LookaheadUtility:
    """Score the candidates of some states by lookahead (label kind "expected").

    With few draws the scores are noisy, and the largest of them is too large: regret against them does not reach 0.

    Args:
        states: labelled contexts, batch (m,), sorted by length; keys image, order, length.
        count: how many of them, evenly spread over the lengths; all if there are fewer.
        draws: K >= 1 of each block; costs K packed forwards.
    """
    rows = torch.linspace(0, len(states) - 1, min(count, len(states))).round().long()
    core = NextBlockCore(backbone, data, len(rows), CoreConfig(strict=True), seed)
    core.reset(index=states["image"][rows])
    core.show(states["order"][rows], states["length"][rows])
    return LookaheadUtility(rows, all_scores(Lookahead(draws), core).cpu(), draws)
