"""Rewards in hindsight: images that a policy generated, revealed once more with everything known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orderrl.data import TokenSet
from orderrl.envs.config import CoreConfig

if TYPE_CHECKING:
    from orderrl.envs.core import NextBlockCore


def replay_return(core: NextBlockCore, rows: Tensor) -> Tensor:
    """Returns of finished episodes, from a core in mode "teacher" that reveals their images in the same steps.

    Args:
        rows: (m,) int64 sub-environments whose images are complete, on the core's device.

    Returns:
        (m,) float32, nats per image token; every step that revealed something is charged.
    """
    images = core.data.holding(core.tokens[rows].cpu(), core.labels[rows].cpu())
    costs = None if core.step_cost is None else core.step_cost[rows]
    return replay(core, images, core.reveal_step[rows], core.reveal_rank[rows], costs)


def replay(
    core: NextBlockCore, images: TokenSet, reveal_step: Tensor, reveal_rank: Tensor, step_cost: Tensor | None = None
) -> Tensor:
    """Returns of images under the steps that revealed them, (m,) float32, nats per image token.

    Args:
        core: gives backbone and reward.
        images: m finished ones.
        reveal_step: (m, B) int64, the step that revealed each block; void steps are skipped numbers.
        reveal_rank: (m, B) int64, its place in the action of that step.
        step_cost: (m,) float32, what a step cost each image, where the reward's is a range.
    """
    sizes = torch.nn.functional.one_hot(reveal_step).sum(1)  # (m, steps)
    largest = int(sizes.max())
    config = CoreConfig(budgets=tuple(range(1, largest + 1)), reward=core.config.reward)
    teacher = type(core)(core.backbone, images, len(images), config)
    teacher.reset(index=torch.arange(len(images)), step_cost=step_cost)
    total = torch.zeros(len(images), dtype=torch.float32, device=core.device)
    places = torch.arange(largest, device=core.device)
    for step in range(sizes.shape[1]):
        count = sizes[:, step]  # zero where the step was void
        acting = (count > 0) & ~teacher.visible.all(-1)
        rank = torch.where(reveal_step == step, reveal_rank, largest)
        blocks = rank.argsort(dim=1, stable=True)[:, :largest]
        # a row without a step here is given a void action: its reward is dropped below
        blocks = torch.where((places < count[:, None]), blocks, 0)
        actions = torch.cat([blocks, (count - 1).clamp_min(0)[:, None]], 1) if teacher.multi else blocks[:, 0]
        actions = torch.where(acting[:, None] if teacher.multi else acting, actions, -1)
        total += torch.where(acting, teacher.step(actions).reward, 0.0)
    return total
