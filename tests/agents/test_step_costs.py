"""PPO in an environment whose step cost is a range: one planner learns what every cost asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from orderrl.agents.play import roll_out
from orderrl.agents.policies import PlannerPolicy
from orderrl.agents.ppo import PPO
from orderrl.agents.ppo import Config as PPOConfig
from orderrl.planner import OrderHead
from tests.agents.helpers import mid_episode, tiny_core, tiny_env, tiny_planner

RANGE = (0.1, 10.0)
SMALL: dict[str, Any] = {"num_envs": 8, "frames_per_batch": 144, "minibatch_size": 48, "group_size": 1}
SMALL |= {"sharpness": 5.0, "spacing": 4.0, "critic_learning_rate": 1e-3}


def make_ppo(
    planner: OrderHead, step_cost: float | tuple[float, float] = RANGE, iterations: int = 1, **changes: Any
) -> PPO:
    config = PPOConfig(iterations=iterations, **(SMALL | changes))
    env = tiny_env(
        privileged=config.privileged_critic,
        budgets=(1, 2),
        num_envs=config.num_envs,
        objective="likelihood",
        step_cost=step_cost,
    )
    return PPO(planner, env, config)


def test_a_start_without_costs_becomes_a_planner_that_sees_them() -> None:
    """It begins as the start would in an environment of one cost, whatever cost it sees."""
    start = tiny_planner(num_budgets=2)
    ranged, one = make_ppo(start), make_ppo(start, 0.5)
    assert ranged.planner.config.step_cost_range == ranged.critic.config.step_cost_range == RANGE
    assert one.planner.config.step_cost_range is None
    observation = mid_episode(tiny_core((1, 2))).observation()
    expected = one.planner(observation)
    for cost in (0.1, 3.0):
        observation["step_cost"] = torch.full((4, 1), cost)
        found = ranged.planner(observation)
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.budget_logits, expected.budget_logits)


def test_planner_and_critic_learn_from_the_cost() -> None:
    ppo = make_ppo(tiny_planner(num_budgets=2))
    ppo.train()
    for part in (ppo.planner, ppo.critic):
        assert part.project_step_cost is not None and (part.project_step_cost.weight != 0).all()


def test_a_start_that_sees_costs_goes_on_at_the_environments_one() -> None:
    start = tiny_planner(num_budgets=2, step_cost_range=RANGE)
    assert start.project_step_cost is not None
    with torch.no_grad():
        start.project_step_cost.weight.normal_(generator=torch.Generator().manual_seed(0))
    ppo = make_ppo(start, 0.5, spacing=None)
    observation = mid_episode(tiny_core((1, 2))).observation()
    expected = start.at_step_cost(0.5)(observation)
    assert torch.equal(ppo.planner(observation).scores, expected.scores)
    with pytest.raises(ValueError, match="outside the range"):
        make_ppo(start, 20.0)


class Priced:
    """A reward without noise: every block beyond a step's first one costs 1 nat, and a step what it costs.

    Two blocks in a step are cheaper than two steps where a step costs more than 1 nat.
    """

    def __call__(self, before: Tensor, after: Tensor, revealed: Tensor, visible: Tensor, step_cost: Tensor) -> Tensor:
        return -(step_cost + revealed.sum(-1) - 1) / 36


def test_dear_steps_are_fewer() -> None:
    """Costs of 0.1 to 10 nats around the one at which it makes no difference."""
    episodes = {"num_envs": 32, "frames_per_batch": 288, "group_size": 4, "minibatch_size": 96}
    learning = {"learning_rate": 3e-3, "gae_lambda": 1.0, "privileged_critic": False}
    ppo = make_ppo(tiny_planner(noisy=False), iterations=12, **episodes, **learning)
    ppo.env.core.reward = Priced()  # type: ignore[assignment]
    ppo.train()
    steps = []
    for cost in (0.1, 1.0, 10.0):
        policy = PlannerPolicy(ppo.planner.at_step_cost(cost), (1, 2), deterministic=False)
        record = roll_out(tiny_core((1, 2), num_envs=12), policy, torch.Generator().manual_seed(0))
        steps.append(record.steps.mean().item())
    assert steps[0] > steps[1] > steps[2] and steps[0] > steps[2] + 1
