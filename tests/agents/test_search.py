"""Search of fixed schedules: losses kept in the mean, costs by hand, agreement with enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orderrl.agents.play import roll_out
from orderrl.agents.policies import RankingPolicy, fixed_order
from orderrl.agents.schedules import growing
from orderrl.agents.search import (
    SearchConfig,
    anneal,
    fit_mean_losses,
    record_losses,
    schedule_cost,
    search_schedule,
)
from tests.agents.helpers import tiny_core
from tests.helpers import tiny_backbone, tiny_images


class Pairs(nn.Module):
    """A loss model with a known table: each visible block takes from each hidden one."""

    def __init__(self, blocks: int, seed: int = 0) -> None:
        super().__init__()
        self.table = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(seed))

    def forward(self, visible: Tensor) -> Tensor:
        return 5 - visible.float() @ self.table


def compositions(total: int, budgets: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All sequences of budgets that sum to `total`."""
    if total == 0:
        yield ()
    for budget in budgets:
        if budget <= total:
            for rest in compositions(total - budget, budgets):
                yield (budget, *rest)


def steps_of(sizes: tuple[int, ...]) -> Tensor:
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def test_recorded_losses_are_those_of_a_rollout() -> None:
    """Schedules of different lengths, on more schedules than images, in batches of any size."""
    backbone = tiny_backbone()
    images, policies = tiny_images(backbone), [((2, 1, 4, 2), (1, 2, 4)), ((4, 4, 1), (1, 4))]
    order = torch.rand(len(images) + 2, 9, generator=torch.Generator().manual_seed(0)).argsort(1)
    step = torch.stack([steps_of(policies[row % 2][0]) for row in range(len(order))])
    visible, excess, start = record_losses(backbone, images, order, step, batch=3)
    again = record_losses(backbone, images, order, step, batch=len(order))
    assert sorted(visible.tolist()) == sorted(again[0].tolist())
    assert excess.sum().item() == pytest.approx(again[1].sum().item(), rel=1e-4)
    total, empty = 0.0, torch.zeros(9)
    for row in range(len(order)):
        sizes, budgets = policies[row % 2]
        policy = RankingPolicy(fixed_order(order[row]), backbone.geometry, budgets, growing(budgets, sizes))
        core = tiny_core(budgets=budgets, num_envs=1, backbone=backbone, data=images)
        losses = roll_out(core, policy, torch.Generator(), torch.tensor([row % len(images)])).losses[:, 0]
        total += (losses[:-1] - losses[0]).sum().item()
        empty += losses[0] / len(order)
    assert len(visible) == sum(len(policies[row % 2][0]) for row in range(len(order)))
    assert excess.sum().item() == pytest.approx(total, rel=1e-4)
    assert torch.allclose(start, empty, atol=1e-4)


def test_the_loss_model_finds_the_mean_of_noisy_losses() -> None:
    truth = Pairs(6)
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(20_000, 6, generator=generator) < 0.5
    loss = truth(visible) + torch.randn(20_000, 6, generator=generator)
    model = fit_mean_losses(visible, loss, SearchConfig(width=64, epochs=4))
    error = (model(visible) - truth(visible))[~visible]
    assert error.square().mean() < 0.02


def test_the_cost_is_the_code_length_of_the_schedule() -> None:
    """Against blocks charged one by one, and against a rollout of the same schedule on one image."""
    model, order, sizes = Pairs(6), torch.tensor([4, 0, 2, 5, 1, 3]), (2, 1, 3)
    expected, visible, place = 0.0, torch.zeros(6, dtype=torch.bool), 0
    for size in sizes:
        blocks = order[place : place + size]
        expected += model(visible)[blocks].sum().item()
        visible[blocks] = True
        place += size
    cost = schedule_cost(model, order[None], steps_of(sizes)[None], 0.5)
    assert cost.item() == pytest.approx(expected + 1.5, rel=1e-5)


@pytest.mark.parametrize("step_cost", [0.0, 0.6, 3.0])
def test_annealing_agrees_with_enumeration(step_cost: float) -> None:
    model, budgets = Pairs(5, seed=1), (1, 2)
    orders = torch.tensor(list(itertools.permutations(range(5))))
    best = min(
        schedule_cost(model, orders, steps_of(sizes).expand_as(orders), step_cost).min().item()
        for sizes in compositions(5, budgets)
    )
    config = SearchConfig(moves=500, chains=16)
    order, step, cost = anneal(model, 5, budgets, step_cost, config, torch.Generator().manual_seed(0))
    assert (order.sort(1).values == torch.arange(5)).all()
    assert torch.allclose(cost, schedule_cost(model, order, step, step_cost))
    assert cost.min().item() == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize(("blocks", "budgets"), [(9, (2, 4)), (9, (1, 2, 4)), (5, (1,)), (3, (4,))])
def test_only_the_last_step_is_cut_short(blocks: int, budgets: tuple[int, ...]) -> None:
    _, steps, _ = anneal(
        Pairs(blocks), blocks, budgets, 0.1, SearchConfig(moves=50, chains=4), torch.Generator().manual_seed(0)
    )
    for step in steps:
        sizes = torch.bincount(step).tolist()
        assert sum(sizes) == blocks and set(sizes[:-1]) <= set(budgets)
        assert sizes[-1] in budgets or sizes[-1] < min(budgets)


@pytest.mark.parametrize("budgets", [(1, 2), (2, 4)])
def test_a_searched_schedule_plays_legally_and_the_same_on_every_image(budgets: tuple[int, ...]) -> None:
    backbone = tiny_backbone()
    config = SearchConfig(episodes=8, epochs=1, moves=20, chains=4)
    schedule = search_schedule(backbone, tiny_images(backbone), budgets, 0.1, config)
    policy = schedule.policy(backbone.geometry, budgets)
    core = tiny_core(budgets=budgets, num_envs=3)  # strict: an illegal action raises
    rollout = roll_out(core, policy, torch.Generator(), torch.arange(3))
    assert (rollout.reveal_step == rollout.reveal_step[0]).all()
    assert (rollout.reveal_rank == rollout.reveal_rank[0]).all()


@pytest.mark.parametrize(("values", "match"), [({"episodes": 0}, "episodes"), ({"temperature": 0.0}, "temperature")])
def test_wrong_values_are_named(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SearchConfig(**values)
