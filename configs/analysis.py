"""The keys of `analyze` itself."""

from __future__ import annotations

from dataclasses import dataclass

from orderrl.configs.commands import Cached
from orderrl.evaluation.settings import HeadroomConfig
from orderrl.runtime.values import at_least, setting


@dataclass(frozen=True, kw_only=True)
class Analyze(Cached):
    """Analyse planners on held-out images."""

    injected: list[int] = setting(
        [1, 2, 4], "Numbers of best-scored blocks whose true tokens are revealed at once", at_least(1)
    )
    headroom: HeadroomConfig | None = setting(
        {}, "How much of the gains places, class, content and lookahead explain; null leaves it out"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.injected:
            raise ValueError("injected must not be empty, got []")
