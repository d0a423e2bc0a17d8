"""What trainings share: which parameters decay, and how the learning rate rises and falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

LAST_FACTOR = 0.02  # of the peak learning rate, at the end


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then a cosine to 2 %.

    Args:
        step: from 0.
        steps: of the whole training.
        warmup: steps of the warm-up.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return LAST_FACTOR + (1 - LAST_FACTOR) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def parameter_groups(
    module: nn.Module, weight_decay: float, undecayed: Sequence[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Groups for an optimiser: matrices with weight decay; vectors, and what is named `undecayed`, without."""
    apart = {id(parameter) for parameter in undecayed}
    matrices = [p for p in module.parameters() if p.ndim > 1 and id(p) not in apart]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": [*vectors, *undecayed], "weight_decay": 0.0},
    ]
