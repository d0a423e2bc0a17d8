"""Agents by name: what `train agent=NAME` looks up, and how a module adds one.

An agent is one module. It holds a dataclass `Config` of its settings, a function `train(setup, config, job)` that
returns the planner, and says in an `AGENT` what it learns from:

    @dataclass(frozen=True, kw_only=True)
    class Config(Settings):
        steps: int = setting(100, "Optimiser steps", at_least(1))

    def train(setup: Setup, config: Config, job: Job) -> OrderHead:
        planner = OrderHead(setup.planner)
        for step in job.steps(config.steps, "training", planner=planner):
            ...
            job.log(loss=...)
        return planner

    AGENT = Agent(Config, train)

`register_agent("mine", AGENT)` adds it, an entry point of the group "orderrl.agents" adds it for every process, and
`agent=my_module:AGENT` takes it as it is; nothing else of the package has to know it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from orderrl.backbones.registry import TrainableBackbone
from orderrl.factory import Setup
from orderrl.planner import OrderHead
from orderrl.runtime.job import Job
from orderrl.runtime.registry import Registry


class Trained(NamedTuple):
    """A planner and what else was made with it.

    Attributes:
        planner: the planner.
        backbone: a backbone of its own, which it fits instead of the one that it learnt with; None if there is none.
        outcome: what was measured; None if there is nothing to say.
    """

    planner: OrderHead
    backbone: TrainableBackbone | None = None
    outcome: dict[str, Any] | None = None


@dataclass(frozen=True)
class Agent:
    """What training needs to know of an agent.

    Attributes:
        config: the dataclass of its settings.
        train: makes the planner.
        environment: whether it learns in `setup.environment`; if not, it learns one block a step, useful context first.
        start: whether it starts from another planner, `setup.start`; its settings then hold `start`, and `start_target`
            or those of the clone that it takes.
        label_sets: finds or makes the labels that it learns from, `setup.label_sets`; its last argument trains a
            planner of the same agent with another setup and config, and returns its file. None if it needs no labels.
        judged: whether it may ask the classifier that the settings of labels describe.
        check: refuses what it cannot learn, before anything that takes long.
        idle: settings that have no effect beside the others, which do not determine the planner.
        describe: what else determines it, beside or instead of what `orderrl.training.describe` says.
        scores_alone: whether it can train planners that score blocks and do no more (network orderhead), and those that
            read the states of visible blocks, which environments do not show.
        alone: whether the main process does everything, because nothing can be shared out.
    """

    config: type[Any]
    train: Callable[[Setup, Any, Job], OrderHead | Trained]
    environment: bool = True
    start: bool = False
    label_sets: Callable[[Setup, Any, Callable[[Setup, Any], Path]], tuple[Path, ...]] | None = None
    judged: bool = False
    check: Callable[[Setup, Any], Any] = lambda setup, config: None
    idle: Callable[[Any], list[str]] = lambda config: []
    describe: Callable[[Setup, Any], dict[str, Any]] = lambda setup, config: {}
    scores_alone: bool = False
    alone: bool = False

    @property
    def reads_labels(self) -> bool:
        """Whether the settings of labels have an effect: on what it learns from, or on the planner it starts from."""
        return self.label_sets is not None or self.start or self.judged


def _check(name: str, agent: Any) -> None:
    if not isinstance(agent, Agent) or not is_dataclass(agent.config):
        raise ValueError(
            f"agent {name!r} must be an Agent(Config, train) with a dataclass Config, got {type(agent).__name__}"
        )


_SHIPPED = ("bc", "ppo", "grpo", "fitted_q", "schedule", "imitation", "joint", "ste")
AGENTS: Registry[Agent] = Registry(
    "agent", "orderrl.agents", {name: f"orderrl.agents.{name}:AGENT" for name in _SHIPPED}, _check
)
register_agent = AGENTS.register


def find_agent(name: str) -> Agent:
    """The agent of a name; ValueError if there is none."""
    return AGENTS.find(name, "agent.name")
