"""Images drawn by the backbone in the order that a policy chooses."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from orderrl.agents.policies import Policy, ReferencePolicy
from orderrl.backbones import Backbone, Sampling
from orderrl.data import TokenSet
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.metrics.planning import act


@dataclass(frozen=True)
class Generated:
    """Generated images.

    Attributes:
        tokens: (n, N) int64.
        labels: (n,) int64, the classes conditioned on.
        reveal_step: (n, B) int64, the step that revealed each block.
        seconds: wall time, policy included.
    """

    tokens: Tensor
    labels: Tensor
    reveal_step: Tensor
    seconds: float


@torch.no_grad()
def generate_images(
    backbone: Backbone,
    data: TokenSet,
    policy: Policy | ReferencePolicy,
    budgets: tuple[int, ...],
    labels: Tensor,
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int = 250,
    advance: Callable[[float], None] | None = None,
) -> Generated:
    """Generate one image for each label.

    Args:
        backbone: draws the tokens.
        data: names the shape of the images; none of them is read.
        policy: chooses the blocks.
        budgets: of the environment.
        labels: (n,) int64 classes.
        sampling: how tokens are drawn; None is temperature 1 and no filter.
        seed: image i is drawn with seed + i, whatever the batch.
        batch_size: images at once.
        advance: told how many images are done.
    """
    config = CoreConfig("generate", budgets, sampling=sampling or Sampling(), strict=True, hindsight=False)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    parts: list[NextBlockCore] = []
    for rows in torch.arange(len(labels)).split(batch_size):
        core = NextBlockCore(backbone, data, len(rows), config, seed + int(rows[0]))
        core.reset(labels=labels[rows])
        while not bool(core.visible.all()):
            core.step(act(policy, core, generator))
        parts.append(core)
        if advance is not None:
            advance(len(rows))
    return Generated(
        torch.cat([core.tokens.cpu() for core in parts]),
        torch.cat([core.labels.cpu() for core in parts]),
        torch.cat([core.reveal_step.cpu() for core in parts]),
        time.perf_counter() - start,
    )


def balanced_labels(count: int, num_classes: int) -> Tensor:
    """Classes in turn, (count,) int64."""
    return torch.arange(count) % num_classes
