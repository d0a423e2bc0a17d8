"""Planning metrics of a policy on true images: gain, area, code length, far-context gain.

`roll_out` runs a policy in mode "teacher" and records the context losses before every step; every metric is a
function of that record, so any number of objectives is read off one rollout.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from orderrl.agents.policies import Policy, ReferencePolicy
from orderrl.envs.core import NextBlockCore
from orderrl.geometry import BlockGrid
from orderrl.runtime.isolation import isolated


@dataclass(frozen=True)
class Rollout:
    """A policy's trajectories on n images.

    Attributes:
        losses: (T + 1, n, B) float32, block losses before each step and at the end, nats; 0 where visible.
        visible: (T + 1, n, B) bool, at the same moments.
        reveal_step: (n, B) int64, the step that revealed each block.
        reveal_rank: (n, B) int64, its place in the action of that step.
        tokens: (n, N) int64; labels: (n,) int64.
        seconds: wall time, policy included.
        geometry: the block grid.
    """

    losses: Tensor
    visible: Tensor
    reveal_step: Tensor
    reveal_rank: Tensor
    tokens: Tensor
    labels: Tensor
    seconds: float
    geometry: BlockGrid

    @property
    def steps(self) -> Tensor:
        """(n,) float: planner steps of each image."""
        return self.reveal_step.amax(1).float() + 1

    @property
    def fraction(self) -> Tensor:
        """(T + 1, n) float: revealed share."""
        return self.visible.float().mean(-1)

    @property
    def gains(self) -> Tensor:
        """(T, n) float: U of every step, nats per image token; 0 after the end."""
        stays = ~self.visible[1:]
        drop = torch.where(stays, self.losses[:-1] - self.losses[1:], 0.0)
        return drop.sum(-1) / self.geometry.num_tokens

    @property
    def start_loss(self) -> Tensor:
        """(n,) float: sum over blocks of the loss given nothing, nats per image token."""
        return self.losses[0].sum(-1) / self.geometry.num_tokens

    @property
    def decode_nll(self) -> Tensor:
        """(n,) float: code length under the parallel block sampler with this schedule, nats per image."""
        return self.losses.gather(0, self.reveal_step[None])[0].sum(-1)

    @property
    def likelihood_return(self) -> Tensor:
        """(n,) float: sum of U, nats per image token."""
        return self.gains.sum(0)

    @property
    def gain_auc(self) -> Tensor:
        """(n,) float: information-gain AUC, area under gain against revealed fraction over the loss at the start."""
        area = (self.gains * (1 - self.fraction[1:])).sum(0)
        return area / self.start_loss

    @property
    def far_gain_sums(self) -> Tensor:
        """(2, n) float: gain from blocks that do not touch the revealed ones, and from all, nats per image."""
        revealed = self.visible[1:] & ~self.visible[:-1]  # (T, n, B)
        near = (revealed.float() @ self.geometry.touching.float().to(revealed.device)) > 0
        drop = torch.where(~self.visible[1:], self.losses[:-1] - self.losses[1:], 0.0)
        return torch.stack([drop.masked_fill(near, 0.0).sum((0, 2)), drop.sum((0, 2))])

    @property
    def far_gain(self) -> float:
        """Far-context gain: share of U (ratio of sums) from blocks that do not touch the revealed ones."""
        far, total = self.far_gain_sums.sum(1)
        return (far / total).item()

    @property
    def order(self) -> Tensor:
        """(n, B) int64: blocks in the order in which they were revealed; inside a step as the action listed them."""
        return (self.reveal_step * self.geometry.num_blocks + self.reveal_rank).argsort(1)

    def gain_curve(self, fractions: Tensor) -> Tensor:
        """Gain summed up to revealed fractions (F,) -> (F, n), nats per token; a step counts once it is complete."""
        summed = torch.cat([torch.zeros_like(self.gains[:1]), self.gains.cumsum(0)])
        reached = self.fraction[:, None] <= fractions[None, :, None] + 1e-6  # (T + 1, F, n)
        moment = reached.sum(0).clamp_min(1) - 1
        return summed.gather(0, moment)


@isolated
def act(policy: Policy | ReferencePolicy, core: NextBlockCore, generator: torch.Generator) -> Tensor:
    """Actions of a policy for a core's current states."""
    if isinstance(policy, ReferencePolicy):
        return policy.act(core)
    actions = policy(core.observation(), generator)
    if not isinstance(actions, Tensor):
        raise ValueError(f"policy must return a torch.Tensor of int64 actions, got {type(actions).__name__}")
    return actions


@isolated
@torch.no_grad()
def roll_out(
    core: NextBlockCore, policy: Policy | ReferencePolicy, generator: torch.Generator, index: Tensor | None = None
) -> Rollout:
    """Run a policy to the end of all episodes of a core.

    Args:
        core: in mode "teacher" with context losses, or in mode "generate" (losses are then zero).
        policy: chooses actions; an illegal one raises if the core is strict.
        generator: the policy's source of randomness.
        index: (M,) images; None draws them.

    Raises:
        ValueError: if the policy returns anything but actions, an illegal one on a strict core, or does not finish.
    """
    start = time.perf_counter()
    core.reset(index=index)
    losses, visible = [core.losses.clone()], [core.visible.clone()]
    for _ in range(2 * core.geometry.num_blocks):
        core.step(act(policy, core, generator))
        losses.append(core.losses.clone())
        visible.append(core.visible.clone())
        if bool(core.visible.all()):
            break
    if not bool(core.visible.all()):
        raise ValueError(
            f"policy left blocks hidden after {2 * core.geometry.num_blocks} steps, its actions were illegal; reveal "
            "only blocks of observation['action_mask']"
        )
    seconds = time.perf_counter() - start
    return Rollout(
        torch.stack(losses),
        torch.stack(visible),
        core.reveal_step.clone(),
        core.reveal_rank.clone(),
        core.tokens.clone(),
        core.labels.clone(),
        seconds,
        core.geometry,
    )
