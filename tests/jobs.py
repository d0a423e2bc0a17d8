"""Trainings in tests: their rows of metrics, and what `find_or_train` makes of a config."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from orderrl.agents.agent import find_agent
from orderrl.backbones import Backbone
from orderrl.factory import open_backbone, section, setup_of, typed
from orderrl.runtime.job import Job
from orderrl.training import find_or_train


class Enough(Exception):
    """Ends a training in the middle."""


class Seen(Job):
    """A job whose rows are looked at as they come.

    Args:
        see: called with every row.
        until: the step whose row ends the training; None lets it go on.
        place: arguments of `Job`.
    """

    def __init__(self, see: Callable[[dict[str, float]], Any], until: int | None = None, *place: Any) -> None:
        super().__init__(*place)
        self.see, self.until = see, until

    def record(self, **metrics: float) -> None:
        super().record(**metrics)
        self.see(self.history[-1])
        if self.history[-1]["step"] == self.until:
            raise Enough


def logged(
    train: Callable[..., Any],
    *arguments: Any,
    see: Callable[[dict[str, float]], Any] = lambda row: None,
    until: int | None = None,
    **named: Any,
) -> list[dict[str, float]]:
    """Rows of metrics of a training; `see` is called with each of them, `until` is the step that ends it."""
    job = Seen(see, until)
    with suppress(Enough):
        train(*arguments, job=job, **named)
    return job.history


def trained(config: DictConfig, backbone: Backbone | None = None, **named: Any) -> Path:
    """The checkpoint in the cache that `orderrl.train` copies to its run."""
    name = config.agent.name
    setup = setup_of(config, backbone or open_backbone(config))
    return find_or_train(setup, name, typed(find_agent(name).config, section(config, "agent", "name")), **named)
