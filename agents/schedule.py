"""Imitation of the best fixed schedule: the same blocks in every step of all images.

It is the start of the published planner for code length on the digits (`start_target=schedule`). Fitted Q learns
budgets along an order that is known; the search finds the order too, and with it shorter codes in fewer steps
(measured in docs/laboratory.md, digits).
"""

from dataclasses import dataclass
from typing import Any

from orderrl.agents.agent import Agent
from orderrl.agents.imitation import ImitationConfig, imitated
from orderrl.agents.search import SearchConfig, require_code_length, searched
from orderrl.factory import Setup
from orderrl.planner import OrderHead
from orderrl.runtime.job import Job
from orderrl.runtime.values import Settings, setting


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """How the schedule is found and imitated; the large entropy bonus keeps PPO exploring."""

    search: SearchConfig = setting(SearchConfig(), "How the schedule is found")
    imitation: ImitationConfig = setting(ImitationConfig(entropy_coeff=0.4), "How the planner learns it")


def train(setup: Setup, config: Config, job: Job) -> OrderHead:
    """Search the best fixed schedule for the environment, then imitate it."""
    schedule = searched(setup, config.search, job)
    return imitated(setup, schedule.policy(setup.backbone.geometry, setup.environment.budgets), config.imitation, job)


def _describe(setup: Setup, config: Config) -> dict[str, Any]:
    """Of a range of step costs one is searched for."""
    return {"env": setup.environment_settings | {"step_cost": setup.environment.reward.typical_step_cost}}


AGENT = Agent(
    Config,
    train,
    check=lambda setup, config: require_code_length(setup, "agent=schedule searches"),
    describe=_describe,
    alone=True,
)
