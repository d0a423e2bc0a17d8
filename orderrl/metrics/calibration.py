"""Agreement of a planner's scores with the hindsight oracle, on a shared set of states."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor


class Calibration(NamedTuple):
    """Means over states.

    Attributes:
        top1: share of states whose first-ranked block is the oracle's.
        spearman: rank correlation of scores and oracle utilities over hidden blocks; None without scores.
        regret: max_a U - U(first-ranked block), nats per image token.
    """

    top1: float
    spearman: float | None
    regret: float


def calibrate(first: Tensor, scores: Tensor | None, utility: Tensor, hidden: Tensor) -> Calibration:
    """Compare a policy's choices with the oracle's utilities.

    Args:
        first: (n,) int64, the first-ranked block of each state.
        scores: (n, B), or None if the policy has none.
        utility: (n, B) float32, oracle U, nats per image token.
        hidden: (n, B) bool, the candidates.
    """
    best = utility.masked_fill(~hidden, -torch.inf)
    chosen = utility.gather(1, first[:, None])[:, 0]
    spearman = None
    if scores is not None:
        pairs = zip(scores.numpy(), utility.numpy(), hidden.numpy(), strict=True)
        values = [float(spearmanr(s[h], u[h]).statistic) for s, u, h in pairs if np.ptp(s[h]) > 0]
        spearman = float(np.mean(values)) if values else None
    return Calibration(
        (first == best.argmax(-1)).float().mean().item(), spearman, (best.amax(-1) - chosen).mean().item()
    )
