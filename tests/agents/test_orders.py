"""Hand-made orders: permutations with the shape that their names promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orderrl.agents.orders import ORDERS
from orderrl.geometry import BlockGrid

GRIDS = [(4, 4), (3, 5), (8, 8), (1, 6), (6, 1), (1, 1)]


def grid(rows: int, columns: int) -> BlockGrid:
    return BlockGrid(2 * rows, 2 * columns, 2)


def path(name: str, geometry: BlockGrid) -> Tensor:
    """(row, column) of the blocks in the order of their reveal, (B, 2)."""
    return geometry.centres[ORDERS[name](geometry)].long()


def steps_between(path: Tensor) -> Tensor:
    """Manhattan distance of consecutive blocks."""
    return (path[1:] - path[:-1]).abs().sum(-1)


@pytest.mark.parametrize("shape", GRIDS)
@pytest.mark.parametrize("name", ORDERS)
def test_every_order_is_a_permutation_and_always_the_same(name: str, shape: tuple[int, int]) -> None:
    geometry = grid(*shape)
    order = ORDERS[name](geometry)
    assert order.dtype == torch.int64
    assert order.sort().values.tolist() == list(range(geometry.num_blocks))
    torch.manual_seed(1)
    assert torch.equal(order, ORDERS[name](geometry))


@pytest.mark.parametrize("shape", GRIDS)
@pytest.mark.parametrize("name", ["zigzag", "spiral_in", "spiral_out"])
def test_consecutive_blocks_of_a_path_share_a_side(name: str, shape: tuple[int, int]) -> None:
    assert (steps_between(path(name, grid(*shape))) == 1).all()


@pytest.mark.parametrize("shape", GRIDS)
def test_rows_columns_and_diagonals(shape: tuple[int, int]) -> None:
    geometry = grid(*shape)
    rows, columns = shape
    assert path("raster", geometry).tolist() == [[r, c] for r in range(rows) for c in range(columns)]
    others = ("mirrored_raster", "flipped_raster", "reversed_raster")
    right, bottom, back = (ORDERS[name](geometry).view(shape) for name in others)
    blocks = torch.arange(geometry.num_blocks).view(shape)
    assert torch.equal(right, blocks.flip(1)) and torch.equal(bottom, blocks.flip(0))
    assert torch.equal(back, blocks.flip(0, 1))
    assert path("column_major", geometry).tolist() == [[r, c] for c in range(columns) for r in range(rows)]
    assert (path("zigzag", geometry)[:, 0].diff() >= 0).all()
    diagonal = path("diagonal", geometry).sum(-1)
    assert (diagonal.diff() >= 0).all()


@pytest.mark.parametrize("shape", GRIDS)
def test_staggered_rows_come_after_all_their_upper_neighbours(shape: tuple[int, int]) -> None:
    geometry = grid(*shape)
    place = {tuple(block): i for i, block in enumerate(path("staggered", geometry).tolist())}
    for (row, column), here in place.items():
        before = [(row, column - 1), (row - 1, column - 1), (row - 1, column), (row - 1, column + 1)]
        assert all(place[block] < here for block in before if block in place)
    apart = path("staggered", geometry) @ torch.tensor([2, 1])
    assert (apart.diff() >= 0).all()  # blocks of one wave may be drawn together


@pytest.mark.parametrize("shape", GRIDS)
def test_spiral_runs_around_the_edge_first_and_ends_inside(shape: tuple[int, int]) -> None:
    geometry = grid(*shape)
    spiral = path("spiral_in", geometry)
    last = torch.tensor(shape) - 1
    from_edge = torch.minimum(spiral, last - spiral).amin(-1)
    assert (from_edge.diff() >= 0).all()
    assert spiral[0].tolist() == [0, 0]
    assert torch.equal(path("spiral_out", geometry), spiral.flip(0))


@pytest.mark.parametrize("shape", GRIDS)
def test_centre_starts_in_the_middle_and_grows_outwards(shape: tuple[int, int]) -> None:
    geometry = grid(*shape)
    middle = (torch.tensor(shape) - 1) / 2
    distance = (path("centre", geometry) - middle).norm(dim=-1)
    assert distance[0] == distance.min()
    assert (distance.cummax(0).values - distance < 0.3).all()  # the perturbation only breaks ties and near-ties


@pytest.mark.parametrize("shape", GRIDS)
def test_stride_two_reveals_even_rows_and_columns_first(shape: tuple[int, int]) -> None:
    stride = path("stride2", grid(*shape))
    even = ((stride % 2) == 0).all(-1)
    assert even[: int(even.sum())].all()


@pytest.mark.parametrize("name", ["stride2", "multiscale"])
def test_four_blocks_a_step_never_touch(name: str) -> None:
    geometry = grid(4, 4)
    for four in ORDERS[name](geometry).view(-1, 4):
        touching = geometry.touching[four][:, four]
        assert touching.sum() == 4  # each only itself


@pytest.mark.parametrize("size", [4, 8])
def test_multiscale_fills_coarse_lattices_first(size: int) -> None:
    """Its first quarter is the lattice of every second block, and that quarter is multiscale again."""
    order = path("multiscale", grid(size, size))
    quarter = order[: size**2 // 4]
    assert (quarter % 2 == 0).all()
    assert torch.equal(quarter // 2, path("multiscale", grid(size // 2, size // 2)))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_multiscale_reveals_a_chequerboard_first(size: int) -> None:
    half = path("multiscale", grid(size, size))[: size**2 // 2]
    assert (half.sum(-1) % 2 == 0).all()


def test_halton_spreads_its_first_blocks() -> None:
    """Each quadrant and each third gets its share of the first blocks, as low discrepancy asks."""
    order = path("halton", grid(6, 6))
    first = order[:12]
    assert ((first[:, 0] < 3).sum() - 6).abs() <= 1
    assert all(((first[:, 1] // 2 == third).sum() - 4).abs() <= 1 for third in range(3))


def test_fixed_random_is_no_simple_order() -> None:
    geometry = grid(4, 4)
    others = [tuple(make(geometry).tolist()) for name, make in ORDERS.items() if name != "fixed_random"]
    assert tuple(ORDERS["fixed_random"](geometry).tolist()) not in others
