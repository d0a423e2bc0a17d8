"""Episodes played by a policy: `play`, the one loop over environment steps, and `roll_out`, which records them.

A `Rollout` holds the context losses before every step. Every planning metric (gain, area, code length, far-context
gain) is a function of it, so any number of objectives is read off one rollout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orderrl.agents.policies import Policy, ReferencePolicy, check_policy
from orderrl.envs.core import NextBlockCore, Transition
from orderrl.geometry import BlockGrid
from orderrl.runtime.isolation import isolated

if TYPE_CHECKING:
    from tensordict import TensorDictBase

Record = Callable[[Tensor, Transition], None]
"""(actions, what they led to), called after every step; the core holds the state after it."""


@dataclass(frozen=True)
class Rollout:
    """A policy's trajectories on n images."""

    losses: Tensor  # (T + 1, n, B) float32, block losses before each step and at the end, nats; 0 where visible
    visible: Tensor  # (T + 1, n, B) bool, at the same moments
    reveal_step: Tensor  # (n, B) int64, the step that revealed each block
    reveal_rank: Tensor  # (n, B) int64, its place in the action of that step
    tokens: Tensor  # (n, N) int64
    labels: Tensor  # (n,) int64
    seconds: float  # wall time, policy included
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
    """Actions of a policy for a core's current states; a policy with a memory forgets episodes that ended."""
    if hasattr(policy, "reset") and bool((core.books.step_count == 0).any()):
        policy.reset(core.step_count == 0)
    if isinstance(policy, ReferencePolicy):
        return policy.act(core)
    actions = policy(seen_by(policy, core), generator)
    if not isinstance(actions, Tensor):
        raise ValueError(f"policy must return a torch.Tensor of int64 actions, got {type(actions).__name__}")
    return actions


def seen_by(policy: Policy, core: NextBlockCore) -> TensorDictBase:
    """The observation of a core's states with what a policy asks for; hidden tokens have no influence on any of it."""
    observation = core.observation()
    if getattr(policy, "reads_tokens", False):
        observation["tokens"] = visible_tokens(core)
    if getattr(policy, "reads_visible_states", False):
        blocks = torch.arange(core.geometry.num_blocks, device=core.device).expand(core.num_envs, -1)
        states, _ = core.backbone.observe(core.prefix, blocks)
        observation["hidden"] = torch.where(core.visible[..., None], states.float(), observation["hidden"])
    return observation


def visible_tokens(core: NextBlockCore) -> Tensor:
    """Tokens of a core's states: (M, N) int64 with -1 where hidden, or continuous ones (M, N, C) with 0 there."""
    visible = core.visible[:, core.geometry.token_block.to(core.device)]
    if core.tokens.is_floating_point():
        return core.tokens.where(visible[..., None], 0.0)
    return core.tokens.where(visible, -1)


@isolated
@torch.no_grad()
def play(
    core: NextBlockCore,
    policy: Policy | ReferencePolicy,
    generator: torch.Generator | None = None,
    *,
    steps: int | None = None,
    restart: bool = False,
    record: Record | None = None,
) -> None:
    """Play the episodes of a core from where they stand; `core.reset` comes before.

    Args:
        core: its sub-environments act side by side; those that are finished ignore their actions.
        policy: chooses actions; an illegal one raises if the core is strict.
        generator: the policy's source of randomness; None makes one.
        steps: planner steps at most; None plays until all episodes are finished.
        restart: whether finished episodes begin anew, in a step of their own; `steps` is then given.

    Raises:
        ValueError: if it is no policy, returns anything but actions, or an illegal one on a strict core.
    """
    check_policy(getattr(policy, "__name__", type(policy).__name__), policy)
    generator = torch.Generator() if generator is None else generator
    left = 2 * core.geometry.num_blocks if steps is None else steps
    while left and (restart or not bool(core.books.finished.all())):
        actions = act(policy, core, generator)
        transition = core.step(actions, restart=core.books.finished if restart else None)
        if record is not None:
            record(actions, transition)
        left -= 1


def scripted(actions: Iterable[Tensor]) -> Policy:
    """The policy that plays given actions, one step's after the other, whatever it sees."""
    remaining = iter(actions)

    def policy(observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        return next(remaining)

    return policy


@isolated
@torch.no_grad()
def roll_out(
    core: NextBlockCore, policy: Policy | ReferencePolicy, generator: torch.Generator, index: Tensor | None = None
) -> Rollout:
    """Run a policy to the end of all episodes of a core.

    Args:
        core: in mode "teacher" with context losses, or in mode "generate" (losses are then zero).
        policy: chooses actions; an illegal one raises if the core is strict.
        index: (M,) images; None draws them.

    Raises:
        ValueError: if the policy returns anything but actions, an illegal one on a strict core, or does not finish.
    """
    start = time.perf_counter()
    core.reset(index=index)
    losses, visible = [core.losses.clone()], [core.visible.clone()]

    def record(actions: Tensor, transition: Transition) -> None:
        losses.append(core.losses.clone())
        visible.append(core.visible.clone())

    play(core, policy, generator, record=record)
    if not bool(core.books.visible.all()):
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
