"""Fitted Q iteration: what schedules along an order cost, and the budgets that a planner learns from it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from orderrl.agents.fitted_q import Config as FittedQConfig
from orderrl.agents.fitted_q import best_schedules, budget_loss, costs_to_go, fit_budgets, legal_ends, record_order
from orderrl.agents.play import roll_out
from orderrl.agents.policies import PlannerPolicy
from orderrl.agents.search import FixedSchedule
from tests.agents.helpers import tiny_core, tiny_planner
from tests.helpers import tiny_backbone, tiny_images
from tests.jobs import logged

BLOCKS = 9
ORDER = torch.tensor([3, 8, 1, 0, 6, 5, 2, 7, 4])


def played(count: int = 6) -> TensorDict:
    backbone = tiny_backbone()
    return record_order(backbone, tiny_images(backbone), ORDER, count, batch=4)


def every_schedule(blocks: int, budgets: tuple[int, ...]) -> list[list[int]]:
    """All lists of budgets that reveal a number of blocks; the smallest budget may be cut short at the end."""
    if not blocks:
        return [[]]
    legal = [k for k in budgets if k <= blocks] or [blocks]
    return [[k, *rest] for k in legal for rest in every_schedule(blocks - k, budgets)]


def cost_of(cost: Tensor, sizes: list[int], place: int = 0) -> float:
    """Nats of one image (B, B) for steps of some sizes from a place on, each charged on its own."""
    total = 0.0
    for size in sizes:
        total += cost[place, place + size - 1].item()
        place += size
    return total


def random_costs(count: int, blocks: int, seed: int = 0) -> Tensor:
    losses = torch.rand(count, blocks, blocks, generator=torch.Generator().manual_seed(seed))
    return losses.triu().cumsum(-1)


@pytest.mark.parametrize(
    ("sizes", "budgets"),
    [
        ((1,) * BLOCKS, (1,)),
        ((2, 1, 4, 2), (1, 2, 4)),
        ((2, 4, 2, 1), (2, 4)),  # the last step is cut short
        ((1, 8), (1, 8)),
        ((BLOCKS,), (BLOCKS,)),
    ],
)
def test_recorded_costs_price_every_schedule_as_the_environment_does(
    sizes: tuple[int, ...], budgets: tuple[int, ...]
) -> None:
    core = tiny_core(budgets=budgets, num_envs=6)
    policy = FixedSchedule(ORDER, sizes).policy(core.geometry, budgets)
    code_length = roll_out(core, policy, torch.Generator(), torch.arange(6)).decode_nll
    priced = torch.tensor([cost_of(cost, list(sizes)) for cost in played()["cost"]])
    torch.testing.assert_close(priced, code_length, rtol=1e-4, atol=1e-4)


def test_recorded_observations_are_the_environments() -> None:
    core, seen = tiny_core(num_envs=6), played()
    core.reset(index=torch.arange(6))
    for place, block in enumerate(ORDER):
        observation = core.observation()
        for key, value in observation.items():
            close = 2e-3 if key == "hidden" else 1e-4  # hidden states are halves
            torch.testing.assert_close(seen[key][:, place].to(value.dtype), value, rtol=close, atol=close)
        core.step(block.expand(6))


@pytest.mark.parametrize("budgets", [(1, 2, 3), (2, 4), (3, 5)])
def test_the_costs_of_the_best_budgets_are_those_of_the_best_schedule(budgets: tuple[int, ...]) -> None:
    """With preferences that are minus the costs themselves, backward induction finds what enumeration finds."""
    blocks, step_cost = 7, torch.tensor([0.3, 0.05])
    cost = random_costs(2, blocks)
    preference = torch.zeros(2, blocks, len(budgets))
    for _ in range(blocks):  # the last places are right after one pass, the first after all
        preference = -costs_to_go(preference, cost, budgets, step_cost)
    spent = costs_to_go(preference, cost, budgets, step_cost)
    legal = legal_ends(blocks, budgets)[1]
    for image, place in itertools.product(range(2), range(blocks)):
        best = min(
            cost_of(cost[image], sizes, place) + step_cost[image].item() * len(sizes)
            for sizes in every_schedule(blocks - place, budgets)
        )
        assert spent[image, place][legal[place]].min().item() == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("budgets", [(1, 2, 3), (2, 4), (3, 5)])
def test_the_best_fixed_schedules_are_those_of_enumeration(budgets: tuple[int, ...]) -> None:
    cost = random_costs(3, 7)
    found = best_schedules(cost, budgets)
    schedules = every_schedule(7, budgets)
    assert set(found) == {len(sizes) for sizes in schedules}
    for steps, (nats, sizes) in found.items():
        assert list(sizes) in schedules and cost_of(cost.mean(0), list(sizes)) == pytest.approx(nats, rel=1e-5)
        others = [cost_of(cost.mean(0), other) for other in schedules if len(other) == steps]
        assert nats == pytest.approx(min(others), rel=1e-5)


def test_the_budgets_that_follow_are_the_preferred_ones() -> None:
    budgets, cost = (1, 2, 4), random_costs(3, 8)
    preference = torch.tensor([0.0, 2.0, 1.0]).expand(3, 8, 3)  # two blocks wherever two are left
    spent = costs_to_go(preference, cost, budgets, torch.full((3,), 0.5))
    for image in range(3):
        for place, sizes in enumerate([[4, 2, 2], [2, 2, 2, 1], [4, 2], [1, 2, 2], [1, 2, 1]]):
            expected = cost_of(cost[image], sizes, place) + 0.5 * len(sizes)
            assert spent[image, place, budgets.index(sizes[0])].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("budgets", [(1, 2, 4), (2, 4), (4,)])
def test_legal_budgets_are_the_environments(budgets: tuple[int, ...]) -> None:
    """Place by place, wherever budgets lead; the smallest is cut short at the end."""
    ends, legal = legal_ends(BLOCKS, budgets)
    for place in range(BLOCKS):
        core = tiny_core(budgets=budgets, num_envs=len(budgets))
        core.reset()
        core.show(ORDER.expand(len(budgets), -1), torch.full((len(budgets),), place))
        assert torch.equal(legal[place], core.budget_mask()[0])
        listed = ORDER[place:].repeat(BLOCKS)[: budgets[-1]]
        chosen = torch.where(legal[place], torch.arange(len(budgets)), 0)  # an illegal one would raise
        core.step(torch.cat([listed.expand(len(budgets), -1), chosen[:, None]], 1))
        assert torch.equal(core.visible.sum(1)[legal[place]], ends[place][legal[place]])


def test_the_budget_loss_is_zero_at_the_costs_and_counts_legal_differences_alone() -> None:
    spent, temperature = torch.rand(6, BLOCKS, 3) * 9, 0.5
    legal = legal_ends(BLOCKS, (1, 2, 4))[1]
    exact = -spent / temperature + torch.randn(6, BLOCKS, 1)  # what all budgets of a state share says nothing
    assert budget_loss(exact, spent, legal, temperature).item() == pytest.approx(0, abs=1e-6)
    assert torch.equal(
        budget_loss(torch.where(legal, exact, 99.0), spent, legal, temperature),
        budget_loss(torch.where(legal, exact, 0.0), spent, legal, temperature),
    )
    off = exact.clone()
    off[:, 2, 1] += 1 / temperature  # one nat, in every image
    spread = (spent[:, 2, 1] - spent[:, 2, 0]).std()
    expected = (1 / spread**2 / legal[:, 1:].sum()).item()
    assert budget_loss(off, spent, legal, temperature).item() == pytest.approx(expected, rel=1e-3)


def test_a_planner_learns_the_order_and_the_budget_that_content_asks_for() -> None:
    """Images of class 0 want single blocks, those of class 1 as many as there are."""
    budgets, seen = (1, 2, 4), played(12)
    losses = torch.full((12, BLOCKS, BLOCKS), 1.0).triu()
    dependent = seen["label"][:, :1, None] == 0
    apart = torch.arange(BLOCKS) - torch.arange(BLOCKS)[:, None]
    seen["cost"] = torch.where(dependent & (apart > 0), losses + 5 * apart, losses).cumsum(-1)
    planner = tiny_planner(noisy=False, num_budgets=3)
    config = FittedQConfig(steps=200, batch_size=12, learning_rate=1e-2)
    rows = logged(fit_budgets, planner, seen, ORDER, budgets, 3.0, config)
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["agreement"] == 1
    core = tiny_core(budgets=budgets, num_envs=12)
    rollout = roll_out(core, PlannerPolicy(planner, budgets), torch.Generator(), torch.arange(12))
    assert torch.equal(rollout.order, ORDER.expand(12, -1))
    careful = seen["label"][:, 0] == 0
    assert (rollout.steps[careful] == BLOCKS).all() and rollout.steps[~careful].float().mean() < 4  # 3 are the fewest


def test_the_step_cost_that_a_planner_sees_moves_its_budgets() -> None:
    budgets, seen = (1, 2, 4), played(12)
    planner = tiny_planner(noisy=False, num_budgets=3, step_cost_range=(0.01, 10.0))
    config = FittedQConfig(steps=200, batch_size=12, learning_rate=1e-2)
    fit_budgets(planner, seen, ORDER, budgets, (0.01, 10.0), config)
    steps = []
    for step_cost in (0.01, 10.0):
        core = tiny_core(budgets=budgets, num_envs=12)
        policy = PlannerPolicy(planner.at_step_cost(step_cost), budgets)
        steps.append(roll_out(core, policy, torch.Generator(), torch.arange(12)).steps.float().mean().item())
    assert steps[0] > steps[1] == 3


def test_it_is_determined_by_its_seed() -> None:
    def rows(seed: int) -> list[dict[str, float]]:
        planner = tiny_planner(noisy=False, num_budgets=3)
        return logged(fit_budgets, planner, played(), ORDER, (1, 2, 4), 0.5, FittedQConfig(steps=4), seed)

    assert rows(0) == rows(0) != rows(1)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"images": 0}, "images"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"temperature": 0.0}, "temperature"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_wrong_values_are_named(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FittedQConfig(**values)


def test_an_order_that_repeats_a_block_is_refused() -> None:
    backbone = tiny_backbone()
    with pytest.raises(ValueError, match="illegal"):
        record_order(backbone, tiny_images(backbone), ORDER.clone().index_fill(0, torch.tensor([1]), 3), 2)


def test_a_planner_without_content_needs_no_hidden_states() -> None:
    backbone = tiny_backbone()
    seen = record_order(backbone, tiny_images(backbone), ORDER, 6, content=False)
    assert "hidden" not in seen
    planner = tiny_planner(noisy=False, num_budgets=3, content=False)
    rows = logged(fit_budgets, planner, seen, ORDER, (1, 2, 4), 0.5, FittedQConfig(steps=2, batch_size=4))
    assert len(rows) == 2
