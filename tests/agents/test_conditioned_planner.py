"""A planner that sees what a step costs: one planner for every cost until it is trained, a family of them after."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from orderrl.planner import OrderHead, PlannerConfig, load_planner, save_planner
from tests.agents.helpers import mid_episode, tiny_core, tiny_planner

RANGE = (0.05, 2.0)
COSTS = (0.05, 0.2, 1.0, 2.0)


def observe(step_cost: float | None = None) -> TensorDict:
    """States of a few images, of an environment that tells a cost or of one that does not."""
    observation = mid_episode(tiny_core(num_envs=4)).observation()
    if step_cost is not None:
        observation["step_cost"] = torch.full((4, 1), step_cost)
    return observation


def trained() -> OrderHead:
    """A planner whose projection of the cost is no longer zero."""
    planner = tiny_planner(num_budgets=2, step_cost_range=RANGE, reasoning_steps=1)
    assert planner.project_step_cost is not None
    with torch.no_grad():
        for parameter in planner.project_step_cost.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    return planner


def parts(planner: OrderHead, observation: TensorDict) -> tuple[Tensor, ...]:
    output = planner(observation)
    return output.scores, output.budget_logits, output.value


@pytest.mark.parametrize("noisy", [True, False])
def test_until_it_is_trained_it_is_the_planner_that_it_came_from(noisy: bool) -> None:
    start = tiny_planner(num_budgets=2, noisy=noisy)
    copy = start.with_budgets(2, RANGE)
    assert copy.config.step_cost_range == RANGE and start.config.step_cost_range is None
    expected = parts(start, observe())
    for cost in COSTS:
        assert all(torch.equal(a, b) for a, b in zip(parts(copy, observe(cost)), expected, strict=True))


def test_gradients_reach_the_projection_of_the_cost() -> None:
    planner = tiny_planner(num_budgets=2).with_budgets(2, RANGE)
    planner(observe(0.3)).budget_logits[:, 0].sum().backward()
    assert planner.project_step_cost is not None and planner.project_step_cost.weight.grad is not None
    assert (planner.project_step_cost.weight.grad != 0).all()


def test_a_planner_at_one_cost_is_the_planner_that_sees_it() -> None:
    planner = trained()
    logits = []
    for cost in COSTS:
        alone = planner.at_step_cost(cost)
        assert alone.config.step_cost_range is None
        found = parts(alone, observe())
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, parts(planner, observe(cost)), strict=True))
        logits.append(found[1])
    assert all(not torch.allclose(one, other, atol=1e-3) for one, other in pairwise(logits))
    assert planner.config.step_cost_range == RANGE  # it is a copy that was changed


def test_another_range_changes_what_costs_are_allowed_and_nothing_else() -> None:
    planner = trained()
    wider = planner.with_budgets(2, (0.01, 7.0))
    for cost in COSTS:
        one, other = parts(planner, observe(cost)), parts(wider, observe(cost))
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one, other, strict=True))
    wider.at_step_cost(7.0)
    assert planner.with_budgets(3).config.step_cost_range == RANGE
    again = planner.with_budgets(2, RANGE).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in planner.state_dict().items())


@pytest.mark.parametrize("cost", [0.04, 2.01, 0.0, -1.0])
def test_costs_outside_the_range_are_refused(cost: float) -> None:
    with pytest.raises(ValueError, match=r"outside the range .* 0\.05 to 2 nats per image"):
        trained().at_step_cost(cost)


def test_a_planner_of_one_cost_can_not_be_told_another() -> None:
    with pytest.raises(ValueError, match=r"not trained on a range of step costs .*env.step_cost=\[LOW,HIGH\]"):
        tiny_planner().at_step_cost(0.5)


def test_it_must_be_told() -> None:
    with pytest.raises(ValueError, match=r"in the range \(0.05, 2.0\) and needs one.*@cost0.5"):
        trained()(observe())


def test_saving_keeps_the_range(tmp_path: Path) -> None:
    planner = trained()
    save_planner(tmp_path / "planner.safetensors", planner, {})
    loaded, _ = load_planner(tmp_path / "planner.safetensors")
    assert loaded.config == planner.config and loaded.config.step_cost_range == RANGE
    one, other = parts(planner, observe(0.3)), parts(loaded, observe(0.3))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("limits", [(0.0, 1.0), (2.0, 1.0)])
def test_impossible_ranges_are_refused(limits: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="step_cost_range must be"):
        PlannerConfig(9, 32, 3, step_cost_range=limits)
