"""Gymnasium spaces of `orderrl/NextBlock-v0` and the conversion of observations to NumPy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from orderrl.backbones.protocol import Backbone

if TYPE_CHECKING:
    from tensordict import TensorDictBase

_SLACK = 1e-3  # relative, for rounding


def hidden_bound(backbone: Backbone) -> np.ndarray:
    """Largest absolute value of each channel of a hidden state, (D,) float32.

    What the backbone says, or sqrt(D) times the weight of its final RMSNorm.
    """
    if hasattr(backbone, "hidden_bound"):
        stated: np.ndarray = backbone.hidden_bound.cpu().float().numpy()
        return stated * (1 + _SLACK) + _SLACK
    bound = np.full(backbone.hidden_size, math.sqrt(backbone.hidden_size), dtype=np.float32)
    norm = getattr(backbone, "norm", None)
    if isinstance(norm, torch.nn.RMSNorm) and norm.weight is not None:
        bound = bound * norm.weight.detach().abs().cpu().float().numpy()
    return bound * (1 + _SLACK) + _SLACK


def entropy_bounds(backbone: Backbone) -> tuple[float, float]:
    """Range of the entropy channel: what the backbone says, or 0 to the logarithm of the vocabulary."""
    low, high = getattr(backbone, "entropy_bounds", None) or (0.0, math.log(backbone.vocab_size))
    return low, high * (1 + _SLACK)


def observation_space(
    backbone: Backbone, budgets: tuple[int, ...], step_cost_range: tuple[float, float] | None = None
) -> spaces.Dict:
    """Space of a single observation; `step_cost_range` where every episode draws its own cost of a step."""
    b = backbone.geometry.num_blocks
    bound = np.broadcast_to(hidden_bound(backbone), (b, backbone.hidden_size))
    parts: dict[str, spaces.Space[Any]] = {
        "hidden": spaces.Box(-bound, bound, dtype=np.float32),
        "entropy": spaces.Box(*entropy_bounds(backbone), (b,), np.float32),
        "visible": spaces.MultiBinary(b),
        "label": spaces.Discrete(backbone.num_classes),
        "fraction": spaces.Box(0.0, 1.0, (1,), np.float32),
        "action_mask": spaces.MultiBinary(b),
    }
    if budgets != (1,):
        parts["budget_mask"] = spaces.MultiBinary(len(budgets))
    if step_cost_range is not None:
        parts["step_cost"] = spaces.Box(*step_cost_range, (1,), np.float32)
    return spaces.Dict(parts)


def action_space(backbone: Backbone, budgets: tuple[int, ...]) -> spaces.Discrete | spaces.MultiDiscrete:
    """`Discrete(B)` for budgets == (1,), else `MultiDiscrete([B] * K + [number of budgets])`."""
    b = backbone.geometry.num_blocks
    if budgets == (1,):
        return spaces.Discrete(b)
    return spaces.MultiDiscrete([b] * budgets[-1] + [len(budgets)])


def to_numpy(observation: TensorDictBase) -> dict[str, np.ndarray]:
    """A batched observation as NumPy arrays in the dtypes of the space."""
    return {key: _array(value) for key, value in observation.items()}


def _array(value: Tensor) -> np.ndarray:
    array = value.detach().cpu().numpy()
    return array.astype(np.int8) if array.dtype == np.bool_ else array


def flat_mask(observation: TensorDictBase, largest_budget: int) -> Tensor:
    """Masks as maskable-action libraries read them, (M, B) or (M, K*B + number of budgets) bool.

    The block mask stands once for every place of the ranked list. Distinctness of the blocks inside
    one action is not expressible there; a repeated block is an illegal action.
    """
    mask = observation["action_mask"]
    if "budget_mask" not in observation:
        return mask
    return torch.cat([mask.repeat(1, largest_budget), observation["budget_mask"]], dim=-1)
