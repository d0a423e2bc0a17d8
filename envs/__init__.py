"""The environment `orderrl/NextBlock-v0`: one batched core and its three faces."""

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
