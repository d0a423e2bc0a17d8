"""Order statistics against loops over blocks, and against values known by hand."""

from __future__ import annotations

import math
from itertools import chain, pairwise

import pytest
import torch
from scipy import stats
from torch import Tensor

from orderrl.agents.orders import ORDERS
from orderrl.agents.play import Rollout
from orderrl.geometry import BlockGrid
from orderrl.metrics.order import (
    consecutive_distance,
    first_choice_entropy,
    order_agreement,
    visible_neighbours,
)
from tests.helpers import random_steps


def played(geometry: BlockGrid, episodes: list[list[list[int]]]) -> Rollout:
    """The record of given steps, without losses."""
    count, blocks, longest = len(episodes), geometry.num_blocks, max(map(len, episodes))
    visible = torch.zeros(longest + 1, count, blocks, dtype=torch.bool)
    step_of, rank_of = torch.zeros(2, count, blocks, dtype=torch.int64)
    for row, steps in enumerate(episodes):
        for moment, step in enumerate(steps):
            visible[moment + 1 :, row, step] = True
            step_of[row, step] = moment
            rank_of[row, step] = torch.arange(len(step))
    zeros = torch.zeros(longest + 1, count, blocks)
    return Rollout(zeros, visible, step_of, rank_of, torch.zeros(count, 1), torch.zeros(count), 0.0, geometry)


def one_by_one(order: Tensor) -> list[list[int]]:
    return [[block] for block in order.tolist()]


@pytest.fixture(params=[(1,), (1, 2, 4)], ids=str)
def episodes(request: pytest.FixtureRequest) -> list[list[list[int]]]:
    return [random_steps(12, request.param, seed) for seed in range(6)]


GRID = BlockGrid(6, 8, 2)  # 3 x 4 blocks: rows and columns differ


def slow_share(geometry: BlockGrid, steps: list[list[int]]) -> list[float]:
    """Share of visible 8-neighbours, block by block."""
    shown: set[int] = set()
    shares = []
    for step in steps:
        for block in step:
            row, column = divmod(block, geometry.columns)
            near = [
                r * geometry.columns + c
                for r in range(row - 1, row + 2)
                for c in range(column - 1, column + 2)
                if 0 <= r < geometry.rows and 0 <= c < geometry.columns and (r, c) != (row, column)
            ]
            shares.append(len(shown.intersection(near)) / len(near))
        shown.update(step)
    return shares


def test_shares_of_visible_neighbours_are_counted(episodes: list[list[list[int]]]) -> None:
    expected = torch.tensor([slow_share(GRID, steps) for steps in episodes])
    torch.testing.assert_close(visible_neighbours(played(GRID, episodes)), expected)


def test_order_lists_blocks_as_they_were_revealed(episodes: list[list[list[int]]]) -> None:
    assert played(GRID, episodes).order.tolist() == [list(chain(*steps)) for steps in episodes]


def test_distances_are_between_centres_of_blocks_that_follow_each_other(episodes: list[list[list[int]]]) -> None:
    orders = [list(chain(*steps)) for steps in episodes]
    expected = []
    for order in orders:
        places = [divmod(block, 4) for block in order]
        expected.append(sum(math.dist(a, b) for a, b in pairwise(places)) / 11)
    torch.testing.assert_close(consecutive_distance(torch.tensor(orders), GRID), torch.tensor(expected))


def test_raster_and_column_major_are_as_by_hand() -> None:
    """12 blocks in 3 rows: 9 steps of 1 and 2 jumps of sqrt(10); the first and the last block are corners."""
    raster = ORDERS["raster"](GRID)[None]
    assert consecutive_distance(raster, GRID).item() == pytest.approx((9 + 2 * math.sqrt(10)) / 11)
    share = visible_neighbours(played(GRID, [one_by_one(raster[0])]))[0]
    assert share[0] == 0 and share[1] == pytest.approx(1 / 5) and share[-1] == 1
    together = visible_neighbours(played(GRID, [[list(range(12))]]))
    assert (together == 0).all()  # blocks of one step do not see each other


def test_every_pair_of_neighbours_is_visible_to_one_of_them() -> None:
    """Whatever the order, one block a step: shares weighted by numbers of neighbours sum to the pairs."""
    record = played(GRID, [random_steps(12, (1,), seed) for seed in range(4)])
    degree = (GRID.touching.sum(1) - 1).float()
    pairs = (visible_neighbours(record) * degree[record.order]).sum(1)
    torch.testing.assert_close(pairs, torch.full((4,), degree.sum().item() / 2))


def test_entropy_of_the_first_choice() -> None:
    def starting(blocks: list[int]) -> Rollout:
        rest = [[b, *(x for x in range(12) if x != b)] for b in blocks]
        return played(GRID, [[[b] for b in order] for order in rest])

    assert first_choice_entropy(starting([5, 5, 5])) == 0
    assert first_choice_entropy(starting(list(range(12)))) == pytest.approx(math.log(12))
    assert first_choice_entropy(starting([1, 1, 7, 3])) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))


def test_agreement_of_orders_is_spearmans() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 5, 12, generator=generator).argsort(-1)
    expected = [
        stats.spearmanr(a.argsort().numpy(), b.argsort().numpy()).statistic for a, b in zip(first, second, strict=True)
    ]
    torch.testing.assert_close(order_agreement(first, second), torch.tensor(expected))
    assert (order_agreement(first, first) - 1).abs().max() < 1e-12
    assert (order_agreement(first, first.flip(1)) + 1).abs().max() < 1e-12


def test_a_grid_of_one_block_has_no_neighbours() -> None:
    assert visible_neighbours(played(BlockGrid(2, 2, 2), [[[0]]])).tolist() == [[0.0]]
