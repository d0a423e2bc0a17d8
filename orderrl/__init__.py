"""OrderRL: next-block selection for image generators as a reinforcement-learning problem.

A frozen, order-robust image generator (the backbone) is wrapped as an environment in which an action names the next
blocks to reveal; planners learn the order. Importing the package registers ``orderrl/NextBlock-v0`` with Gymnasium and
does not load PyTorch; the names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import gymnasium

from orderrl.runtime import renamed

if TYPE_CHECKING:
    from orderrl.backbones import check_backbone, load_backbone
    from orderrl.runtime.config import compose

__version__ = "0.1.0"
__all__ = ["__version__", "check_backbone", "compose", "load_backbone"]

_LAZY = {
    "check_backbone": "orderrl.backbones",
    "compose": "orderrl.runtime.config",
    "load_backbone": "orderrl.backbones",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module at its first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


renamed.install()
gymnasium.register(
    id="orderrl/NextBlock-v0",
    entry_point="orderrl.envs.gymnasium:NextBlockEnv",
    vector_entry_point="orderrl.envs.vector:NextBlockVectorEnv",
)
