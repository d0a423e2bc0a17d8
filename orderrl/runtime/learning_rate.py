"""How learning rates change in training: two schedules with a warm-up and a cosine."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

_LAST = 0.02  # share of the peak at the end of `warmed_cosine`


def one_cycle(
    optimizer: torch.optim.Optimizer, steps: int, peaks: float | list[float], warmup: float = 0.11
) -> OneCycleLR:
    """The one-cycle policy of small trainings: up to the peak along a cosine, then down to almost nothing.

    Args:
        optimizer: its groups' learning rates are set.
        peaks: highest learning rate, or one for each group.
        warmup: share of the steps that rise. 0.11 and not 0.1: a rise of exactly one step would divide by zero.
    """
    return OneCycleLR(optimizer, peaks, steps, pct_start=warmup)


def warmed_cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> LambdaLR:
    """A linear rise over `warmup` steps to the optimizer's learning rate, then a cosine to 2 % of it."""
    return LambdaLR(optimizer, lambda step: warmed_cosine_factor(step, steps, warmup))


def warmed_cosine_factor(step: int, steps: int, warmup: int) -> float:
    """Share of the peak at a step of `warmed_cosine`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return _LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
