"""From the keyword arguments of `gym.make` to a core."""

from pathlib import Path

import torch

from orderrl.backbones.protocol import Backbone, backbone_device
from orderrl.backbones.registry import load_backbone
from orderrl.backbones.sampling import Sampling
from orderrl.data import TokenSet, load_split
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.reward import RewardConfig


def build_core(
    num_envs: int,
    backbone: str | Path | Backbone = "digits",
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
    seed: int | None = None,
    device: torch.device | str | None = None,
) -> NextBlockCore:
    """Build the core that all faces share; the arguments are documented at `NextBlockEnv`."""
    if isinstance(backbone, str | Path):
        backbone = load_backbone(backbone, device=device)
    elif device is not None and not _same_device(torch.device(device), backbone_device(backbone)):
        raise ValueError(
            f"device={str(device)!r} contradicts the backbone, which lies on {str(backbone_device(backbone))!r}; move "
            "it there with backbone.to(device), or leave device out"
        )
    if isinstance(data, str):
        data = load_split(data, split)
    reward = RewardConfig(objective, form, weight, sigma, step_cost)
    config = CoreConfig(mode, budgets, reward, sampling or Sampling(), strict)
    return NextBlockCore(backbone, data, num_envs, config, seed)


def require_render_mode(mode: str | None) -> None:
    """Raise ValueError unless the Gymnasium faces know a render mode."""
    if mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode={mode!r} is unknown; choose 'rgb_array' or None")


def _same_device(wanted: torch.device, actual: torch.device) -> bool:
    """Whether a device is meant; one without a number means any of its kind."""
    return wanted.type == actual.type and wanted.index in (None, actual.index)
