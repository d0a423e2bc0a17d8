"""From the keyword arguments of `gym.make` to a core."""

from __future__ import annotations

import torch

from orderrl.backbones.protocol import Backbone
from orderrl.backbones.registry import load_backbone
from orderrl.backbones.sampling import Sampling
from orderrl.data import TokenSet, load_split
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.reward import RewardConfig


def build_core(
    num_envs: int,
    backbone: str | Backbone = "digits",
    data: str | TokenSet = "digits",
    split: str = "planner",
    mode: str = "teacher",
    budgets: tuple[int, ...] = (1,),
    objective: str = "context",
    form: str = "future_loss",
    weight: str = "uniform",
    sigma: float = 1.5,
    step_cost: float | tuple[float, float] = 0.0,
    sampling: Sampling | None = None,
    strict: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> NextBlockCore:
    """Build the core that all faces share; the arguments are documented at `NextBlockEnv`."""
    if isinstance(backbone, str):
        backbone = load_backbone(backbone, device=device)
    if isinstance(data, str):
        data = load_split(data, split)
    reward = RewardConfig(objective, form, weight, sigma, step_cost)
    config = CoreConfig(mode, tuple(budgets), reward, sampling or Sampling(), strict)
    return NextBlockCore(backbone, data, num_envs, config, seed)
