"""What an environment is, and what a step of it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from orderrl.backbones.sampling import Sampling
from orderrl.envs.reward import RewardConfig

MODES = ("teacher", "generate")


@dataclass(frozen=True)
class CoreConfig:
    """What an environment is, apart from backbone, data and seed.

    Attributes:
        mode: "teacher" reveals true tokens, "generate" lets the backbone draw them.
        budgets: how many blocks an action may reveal; ascending.
        reward: what is paid for.
        sampling: how tokens are drawn in mode "generate".
        strict: raise on an illegal action instead of voiding the step.
        hindsight: in mode "generate", replay finished images for their return; off, the reward is 0.
    """

    mode: str = "teacher"
    budgets: tuple[int, ...] = (1,)
    reward: RewardConfig = field(default_factory=RewardConfig)
    sampling: Sampling = field(default_factory=Sampling)
    strict: bool = False
    hindsight: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "budgets", tuple(int(k) for k in self.budgets))
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        if not self.budgets or list(self.budgets) != sorted(set(self.budgets)) or self.budgets[0] < 1:
            raise ValueError(f"budgets must be ascending positive numbers of blocks, got {self.budgets}")


class Transition(NamedTuple):
    """What a step gave, each (M,).

    Attributes:
        reward: float32, nats per image token.
        terminated: bool, the image is complete.
        truncated: bool, 2 * B steps are used up.
        illegal: bool, the step was void.
    """

    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    illegal: Tensor
