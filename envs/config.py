"""What an environment is, and what a step of it gives."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from orderrl.backbones.sampling import Sampling
from orderrl.envs.reward import RewardConfig
from orderrl.runtime.values import at_least, check_fields, one_of, setting

MODES = ("teacher", "generate")


@dataclass(frozen=True)
class CoreConfig:
    """What an environment is, apart from backbone, data and seed."""

    mode: str = "teacher"  # "teacher" reveals true tokens, "generate" lets the backbone draw them
    budgets: tuple[int, ...] = (1,)  # how many blocks an action may reveal; ascending
    reward: RewardConfig = field(default_factory=RewardConfig)  # what is paid for
    sampling: Sampling = field(default_factory=Sampling)  # how tokens are drawn in mode "generate"
    strict: bool = False  # raise on an illegal action instead of voiding the step
    hindsight: bool = True  # in mode "generate", replay finished images for their return; off, the reward is 0

    def __post_init__(self) -> None:
        check_fields(self, one_of(MODES, "mode"), at_least(1, "budgets"))
        object.__setattr__(self, "budgets", tuple(int(k) for k in self.budgets))
        if not self.budgets or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"budgets must be one or more ascending numbers of blocks, got {list(self.budgets)}")

    def require_blocks(self, blocks: int) -> None:
        """Raise ValueError if a budget exceeds the blocks of an image."""
        if self.budgets[-1] > blocks:
            raise ValueError(
                f"budgets={self.budgets} exceed the {blocks} blocks of the image; use budgets up to {blocks}"
            )


@dataclass(frozen=True)
class EnvConfig(RewardConfig):
    """The config group `env`: what planners learn in."""

    budgets: tuple[int, ...] = setting((1,), "Numbers of blocks that a step may reveal", at_least(1))

    def __post_init__(self) -> None:
        super().__post_init__()
        CoreConfig(budgets=self.budgets)


def checked_env(budgets: Any, **reward: Any) -> EnvConfig:
    """The environment of the config group `env`; budgets of a policy that is still to come (null) are left open."""
    return EnvConfig(budgets=(1,) if budgets is None else budgets, **reward)


class Transition(NamedTuple):
    """What a step gave, each (M,)."""

    reward: Tensor  # float32, nats per image token
    terminated: Tensor  # bool, the image is complete
    truncated: Tensor  # bool, 2 * B steps are used up
    illegal: Tensor  # bool, the step was void
