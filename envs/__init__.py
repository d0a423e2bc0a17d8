"""The environment `orderrl/NextBlock-v0`: one batched core and its three faces."""

from typing import TYPE_CHECKING

from orderrl.runtime.lazy import lazily

if TYPE_CHECKING:
    from orderrl.envs.core import CoreConfig, NextBlockCore, Transition
    from orderrl.envs.gymnasium import NextBlockEnv
    from orderrl.envs.reward import RewardConfig
    from orderrl.envs.torchrl import NextBlockTorchRLEnv
    from orderrl.envs.vector import NextBlockVectorEnv

__all__ = [
    "CoreConfig",
    "NextBlockCore",
    "NextBlockEnv",
    "NextBlockTorchRLEnv",
    "NextBlockVectorEnv",
    "RewardConfig",
    "Transition",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "orderrl.envs.core": ("CoreConfig", "NextBlockCore", "Transition"),
        "orderrl.envs.gymnasium": ("NextBlockEnv",),
        "orderrl.envs.reward": ("RewardConfig",),
        "orderrl.envs.torchrl": ("NextBlockTorchRLEnv",),
        "orderrl.envs.vector": ("NextBlockVectorEnv",),
    },
)
