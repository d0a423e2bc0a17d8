"""All registries, and how a test leaves them as it found them."""

from __future__ import annotations

from typing import Any

import pytest

from orderrl.agents.agent import AGENTS
from orderrl.agents.orders import ORDERS
from orderrl.agents.policies import POLICIES
from orderrl.backbones.registry import BACKBONES
from orderrl.data import DATA
from orderrl.envs.reward import OBJECTIVES
from orderrl.evaluation.columns import METRICS
from orderrl.metrics.feature_names import EXTRACTORS
from orderrl.oracle import WEIGHTS
from orderrl.runtime.loggers import LOGGERS
from orderrl.runtime.registry import Registry
from orderrl.tokenizers.registry import TOKENIZERS

REGISTRIES: list[Registry[Any]] = [
    *(ORDERS, POLICIES, OBJECTIVES, WEIGHTS, METRICS, AGENTS, BACKBONES, TOKENIZERS, DATA, EXTRACTORS, LOGGERS),
]


def keep_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test register what it likes: afterwards it is gone."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "members", dict(registry.members))
