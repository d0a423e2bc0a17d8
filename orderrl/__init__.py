"""OrderRL: next-block selection for image generators as a reinforcement-learning problem.

A frozen, order-robust image generator (the backbone) is wrapped as an environment in which an action names the next
blocks to reveal; planners learn the order. Importing the package registers ``orderrl/NextBlock-v0`` with Gymnasium and
does not load PyTorch; the names below are imported when they are first used. Those that begin with ``register_`` add
parts of one's own, see docs/extend.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import gymnasium

from orderrl.runtime import renamed
from orderrl.runtime.lazy import lazily

if TYPE_CHECKING:
    from orderrl.backbones import check_backbone, load_backbone
    from orderrl.runtime.config import compose

__version__ = "0.1.0"
__all__ = ["__version__", "check_backbone", "compose", "load_backbone"]

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
        "orderrl.metrics.feature_names": ("register_extractor",),
        "orderrl.oracle": ("register_weight",),
        "orderrl.runtime.config": ("compose",),
        "orderrl.runtime.loggers": ("register_logger",),
        "orderrl.runtime.registry": ("trust",),
        "orderrl.tokenizers.registry": ("register_tokenizer",),
    },
)
renamed.install()
gymnasium.register(
    id="orderrl/NextBlock-v0",
    entry_point="orderrl.envs.gymnasium:NextBlockEnv",
    vector_entry_point="orderrl.envs.vector:NextBlockVectorEnv",
)
