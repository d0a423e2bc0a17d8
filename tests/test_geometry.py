"""The block grid: what belongs together, what is near, and that cutting and joining lose nothing."""

import itertools

import pytest
import torch

from orderrl.geometry import BlockGrid

GRIDS = [BlockGrid(4, 6, 2), BlockGrid(6, 6, 2), BlockGrid(3, 5, 1), BlockGrid(6, 3, 3)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_partition_the_grid(grid: BlockGrid) -> None:
    assert grid.num_blocks * grid.tokens_per_block == grid.num_tokens
    assert sorted(grid.block_tokens.flatten().tolist()) == list(range(grid.num_tokens))
    for position, block in enumerate(grid.token_block.tolist()):
        row, column = divmod(position, grid.width)
        assert block == (row // grid.block_size) * grid.columns + column // grid.block_size
        assert position in grid.block_tokens[block]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tokens_inside_a_block_are_in_raster_order(grid: BlockGrid) -> None:
    assert torch.equal(grid.block_tokens, grid.block_tokens.sort(1).values)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_token_order_names_every_token_block_by_block(grid: BlockGrid) -> None:
    blocks = torch.stack([torch.randperm(grid.num_blocks) for _ in range(3)])
    order = grid.token_order(blocks)
    assert order.shape == (3, grid.num_tokens)
    assert torch.equal(order.sort(1).values, torch.arange(grid.num_tokens).expand(3, -1))
    assert torch.equal(grid.token_block[order], blocks.repeat_interleave(grid.tokens_per_block, 1))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_distance_and_touching(grid: BlockGrid) -> None:
    for a, b in itertools.product(range(grid.num_blocks), repeat=2):
        rows, columns = abs(a // grid.columns - b // grid.columns), abs(a % grid.columns - b % grid.columns)
        assert grid.distances[a, b].item() == pytest.approx((rows**2 + columns**2) ** 0.5)
        assert bool(grid.touching[a, b]) == (max(rows, columns) <= 1)


@pytest.mark.parametrize(
    ("sizes", "message"), [((6, 8, 4), "block_size=4"), ((0, 4, 1), "height"), ((4, 4, 0), "size")]
)
def test_impossible_grids_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockGrid(*sizes)
