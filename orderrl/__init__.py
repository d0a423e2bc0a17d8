"""OrderRL: next-block selection for image generators as a reinforcement-learning problem.

A frozen, order-robust image generator (the backbone) is wrapped as an environment in which an action names the next
blocks to reveal; planners learn the order. Importing the package registers ``orderrl/NextBlock-v0`` with Gymnasium and
does not load PyTorch; the names below are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import gymnasium

from orderrl.runtime import renamed
from orderrl.runtime.lazy import lazily

if TYPE_CHECKING:
    from orderrl.agents.agent import register_agent
    from orderrl.agents.orders import register_order
    from orderrl.agents.policies import register_policy
    from orderrl.backbones import check_backbone, load_backbone, register_backbone
    from orderrl.data import register_data
    from orderrl.envs.reward import register_objective
    from orderrl.evaluation.columns import register_metric
    from orderrl.metrics.features import register_extractor
    from orderrl.oracle import register_weight
    from orderrl.runtime.config import compose
    from orderrl.tokenizers import register_tokenizer

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "check_backbone",
    "compose",
    "load_backbone",
    "register_agent",
    "register_backbone",
    "register_data",
    "register_extractor",
    "register_metric",
    "register_objective",
    "register_order",
    "register_policy",
    "register_tokenizer",
    "register_weight",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "orderrl.agents.agent": ("register_agent",),
        "orderrl.agents.orders": ("register_order",),
        "orderrl.agents.policies": ("register_policy",),
        "orderrl.backbones": ("check_backbone", "load_backbone", "register_backbone"),
        "orderrl.data": ("register_data",),
        "orderrl.envs.reward": ("register_objective",),
        "orderrl.evaluation.columns": ("register_metric",),
        "orderrl.metrics.features": ("register_extractor",),
        "orderrl.oracle": ("register_weight",),
        "orderrl.runtime.config": ("compose",),
        "orderrl.tokenizers": ("register_tokenizer",),
    },
)
renamed.install()
gymnasium.register(
    id="orderrl/NextBlock-v0",
    entry_point="orderrl.envs.gymnasium:NextBlockEnv",
    vector_entry_point="orderrl.envs.vector:NextBlockVectorEnv",
)
