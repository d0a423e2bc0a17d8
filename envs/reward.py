"""What a reveal is worth: the two objectives and their forms (design, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from orderrl.geometry import BlockGrid
from orderrl.oracle import WEIGHTS, distance_weights
from orderrl.runtime.random import Stream, keyed_uniform
from orderrl.runtime.registry import Registry
from orderrl.runtime.values import Settings, at_least, member_of, one_of, positive, setting

FORMS = ("future_loss", "charged")
ILLEGAL_REWARD = -0.1


class Step(NamedTuple):
    """A step of M episodes, as an objective sees it.

    Attributes:
        utility: (M,) U(a|S) times N: what the reveal lowers the losses of the blocks that stay hidden by, weighted.
        before, after: (M, B) block losses given S_t and S_{t+1}, nats; `after` is zero where visible.
        revealed, visible: (M, B) bool, the blocks of this step, and those visible after it.
        geometry: the block grid.
    """

    utility: Tensor
    before: Tensor
    after: Tensor
    revealed: Tensor
    visible: Tensor
    geometry: BlockGrid


OBJECTIVES: Registry[Callable[[Step], Tensor]] = Registry(
    "objective",
    "orderrl.objectives",
    {
        "context": lambda step: step.utility * (1 - step.visible.float().mean(-1)),
        "likelihood": lambda step: step.utility,
    },
)
"""What a step is worth before its cost, (M,) nats per image."""
register_objective = OBJECTIVES.register


@dataclass(frozen=True)
class RewardConfig(Settings):
    """What the environment pays for.

    Objective "context" pays U(a|S) * (1 - |S + a| / B) (fact 2), "likelihood" pays U(a|S) under the parallel block
    sampler (fact 1). Form "future_loss" pays U itself; "charged" pays -1/N times the losses of the revealed blocks,
    which differs from U by a potential and needs only their chains. Weight "far" is Algorithm 2 of the plan. Other
    objectives and weights are those that users register.
    """

    objective: str = setting(
        "context",
        "What is rewarded: context (useful context first), likelihood (short code length) or an own objective",
        member_of(OBJECTIVES),
    )
    form: str = setting(
        "future_loss",
        "Form of the reward: future_loss, or charged (the same policies are optimal; objective likelihood and weight "
        "uniform only)",
        one_of(FORMS),
    )
    weight: str = setting(
        "uniform", "Weight of the reward: uniform, far (far structure counts) or an own one", member_of(WEIGHTS)
    )
    sigma: float = setting(1.5, "Reach of weight far, in blocks", positive())
    step_cost: float | tuple[float, float] = setting(
        0.0,
        "Cost of a planner step, nats per image; [LOW,HIGH] draws one for every episode, log-uniformly, and the "
        "planner sees it",
        at_least(0),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(limits := self.step_cost, list | tuple):
            if not 0 < limits[0] < limits[1]:
                raise ValueError(
                    f"step_cost must be a number or a range (low, high) with 0 < low < high, got {tuple(limits)}"
                )
            object.__setattr__(self, "step_cost", tuple(limits))  # a list in configs
        if self.form == "charged" and (self.objective != "likelihood" or self.weight != "uniform"):
            raise ValueError(
                "form='charged' equals the utility up to a potential only for objective='likelihood' and "
                f"weight='uniform', got objective={self.objective!r}, weight={self.weight!r}"
            )

    @property
    def step_cost_range(self) -> tuple[float, float] | None:
        """The range that episodes draw their cost of a step from; None if it is one number."""
        return self.step_cost if isinstance(self.step_cost, tuple) else None

    @property
    def typical_step_cost(self) -> float:
        """The cost of a step, of a range its geometric mean: the median of what is drawn. Nats per image."""
        return math.sqrt(math.prod(self.step_cost)) if isinstance(self.step_cost, tuple) else self.step_cost


CHEAPEST = RewardConfig(objective="likelihood", form="charged")
"""What is paid where nobody looks: it needs no context losses."""


def drawn_step_cost(config: RewardConfig, seeds: Tensor, episode: Tensor) -> Tensor:
    """What a step costs in some episodes: log-uniform in the config's range, (m,) float32, nats per image.

    Args:
        config: its step_cost is a range.
        seeds, episode: (m,) int64; the draw depends on nothing else.
    """
    assert config.step_cost_range is not None
    low, high = config.step_cost_range
    drawn = low * (high / low) ** keyed_uniform((Stream.STEP_COST, seeds, episode))
    return drawn.float().clamp(low, high)  # rounding may not leave the range


def chosen_step_cost(config: RewardConfig, cost: Tensor | float, count: int) -> Tensor:
    """Costs that a caller chose for `count` episodes, in the config's range: (count,) float32, nats per image."""
    if config.step_cost_range is None:
        raise ValueError(
            f"step_cost={cost} can be chosen for an episode only if the environment's step_cost is a range (low, "
            f"high); it is {config.step_cost}"
        )
    given = cost if isinstance(cost, Tensor) else torch.as_tensor(np.asarray(cost))
    if given.dtype == torch.bool or given.is_complex():
        raise ValueError(f"step_cost must be numbers, got {cost!r}")
    chosen = given.to(torch.float32)
    low, high = torch.tensor(config.step_cost_range, dtype=torch.float32)  # rounded as the costs are
    if chosen.shape not in [(), (1,), (count,)] or not bool(((chosen.cpu() >= low) & (chosen.cpu() <= high)).all()):
        raise ValueError(
            f"step_cost must be one number or {count} in the range {config.step_cost_range}, got {chosen.tolist()}"
        )
    return chosen.expand(count)


def future_loss_reduction(before: Tensor, after: Tensor, hidden: Tensor, weights: Tensor | None = None) -> Tensor:
    """U(a | S) * N: what a reveal lowers the losses of the blocks that stay hidden by.

    Args:
        before: (M, B) block losses given S, nats.
        after: (M, B) block losses given S and a, nats.
        hidden: (M, B) bool, hidden after the reveal.
        weights: (M, B) w(b, a); None is 1.

    Returns:
        (M,) nats per image.
    """
    drop = torch.where(hidden, before - after, 0.0)
    return (drop if weights is None else drop * weights).sum(-1)


def set_weights(pair_weights: Tensor, revealed: Tensor) -> Tensor:
    """w(b, a) of a revealed set: the weight to its nearest member.

    Args:
        pair_weights: (B, B), growing with distance.
        revealed: (M, B) bool, the members of a.

    Returns:
        (M, B): the smallest weight over the members; 1 where nothing was revealed.
    """
    masked = torch.where(revealed[:, :, None], pair_weights.to(revealed.device), torch.inf)  # (M, a, b)
    return masked.amin(1).nan_to_num(posinf=1.0)


class Reward:
    """Reward of a batch of reveals.

    Args:
        config: what is paid for.
        geometry: the block grid.
    """

    def __init__(self, config: RewardConfig, geometry: BlockGrid) -> None:
        self.config = config
        self.geometry = geometry
        self.pair_weights = distance_weights(geometry, config.weight, config.sigma)

    def __call__(
        self,
        before: Tensor,
        after: Tensor | None,
        revealed: Tensor,
        visible: Tensor,
        step_cost: Tensor | None = None,
    ) -> Tensor:
        """Reward of one step.

        Args:
            before: (M, B) losses given S_t, nats; for form "charged" only those of revealed blocks are read.
            after: (M, B) losses given S_{t+1}, nats, zero where visible; not read for form "charged".
            revealed: (M, B) bool, the blocks of this step.
            visible: (M, B) bool, visible after this step.
            step_cost: (M,) what the step costs each episode, nats per image; None is the config's number.

        Returns:
            (M,) float32, nats per image token.
        """
        if self.config.form == "charged":
            value = -torch.where(revealed, before, 0.0).sum(-1)
        else:
            assert after is not None
            weights = None if self.config.weight == "uniform" else set_weights(self.pair_weights, revealed)
            utility = future_loss_reduction(before, after, ~visible, weights)
            value = OBJECTIVES.find(self.config.objective)(
                Step(utility, before, after, revealed, visible, self.geometry)
            )
            if not isinstance(value, Tensor) or value.shape != utility.shape:
                raise ValueError(
                    f"objective {self.config.objective!r} must give a tensor of shape {tuple(utility.shape)}, nats per "
                    f"image, got {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
                )
        cost = self.config.step_cost if step_cost is None else step_cost
        if isinstance(cost, tuple):
            raise ValueError(f"step_cost must be given for every episode: the config's is the range {cost}")
        return (value - cost) / self.geometry.num_tokens
