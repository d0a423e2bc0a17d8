"""Hand-made block orders, by name (each a permutation of the blocks)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from orderrl.geometry import BlockGrid
from orderrl.runtime.registry import Registry

OTHER_POLICIES = (
    *("random", "low_entropy", "high_entropy", "fitted", "confidence", "hindsight_confidence", "lookahead", "native"),
    *("oracle", "newest", "published", "token_raster", "self", "own"),
)
"""Names that tables and commands have for what is no order."""
FIXED_SEED = 0  # of orders that are random but the same for every image


def _by_key(geometry: BlockGrid, key: Callable[[int, int], tuple[float, ...]]) -> Tensor:
    """Blocks sorted by a key of (row, column)."""
    columns = geometry.columns
    return torch.tensor(sorted(range(geometry.num_blocks), key=lambda b: key(b // columns, b % columns)))


def raster(geometry: BlockGrid) -> Tensor:
    """Row by row."""
    return torch.arange(geometry.num_blocks)


def mirrored_raster(geometry: BlockGrid) -> Tensor:
    """Row by row from the top, every row from the right."""
    return _by_key(geometry, lambda r, c: (r, -c))


def flipped_raster(geometry: BlockGrid) -> Tensor:
    """Row by row from the bottom, every row from the left."""
    return _by_key(geometry, lambda r, c: (-r, c))


def reversed_raster(geometry: BlockGrid) -> Tensor:
    """Raster order backwards."""
    return raster(geometry).flip(0)


def column_major(geometry: BlockGrid) -> Tensor:
    """Column by column."""
    return _by_key(geometry, lambda r, c: (c, r))


def zigzag(geometry: BlockGrid) -> Tensor:
    """Row by row, every second row backwards."""
    return _by_key(geometry, lambda r, c: (r, -c if r % 2 else c))


def diagonal(geometry: BlockGrid) -> Tensor:
    """Along the anti-diagonals from the top left."""
    return _by_key(geometry, lambda r, c: (r + c, r))


def staggered(geometry: BlockGrid) -> Tensor:
    """Every row two blocks behind the row above, so that a block comes after its left, upper and upper right neighbour.

    The order of wavefront parallel processing in video coding (HEVC; Chi et al., 2012).
    """
    return _by_key(geometry, lambda row, column: (2 * row + column, row))


def spiral_in(geometry: BlockGrid) -> Tensor:
    """Around the edge, then inwards."""
    grid = np.arange(geometry.num_blocks).reshape(geometry.rows, geometry.columns)
    order: list[int] = []
    while grid.size:
        order += grid[0].tolist()
        grid = np.rot90(grid[1:])
    return torch.tensor(order)


def spiral_out(geometry: BlockGrid) -> Tensor:
    """From the centre outwards: the reverse of `spiral_in`."""
    return spiral_in(geometry).flip(0)


def blockwise(geometry: BlockGrid) -> Tensor:
    """Square tiles row by row, raster inside each; their side is a quarter of the grid's, at least 2."""
    side = max(2, geometry.rows // 4)
    return _by_key(geometry, lambda row, column: (row // side, column // side, row, column))


def stride2(geometry: BlockGrid) -> Tensor:
    """Every second row and column first, then the three remaining phases."""
    phase = {(0, 0): 0, (0, 1): 1, (1, 0): 2, (1, 1): 3}
    return _by_key(geometry, lambda r, c: (phase[r % 2, c % 2], r, c))


def centre(geometry: BlockGrid) -> Tensor:
    """By distance to the centre, with a small fixed perturbation that breaks ties."""
    generator = torch.Generator().manual_seed(FIXED_SEED)
    middle = torch.tensor([(geometry.rows - 1) / 2, (geometry.columns - 1) / 2], dtype=torch.float32)
    distance = (geometry.centres - middle).norm(dim=-1)
    noise = torch.rand(geometry.num_blocks, generator=generator, dtype=torch.float32)
    return (distance + 0.3 * noise).argsort(stable=True)


def fixed_random(geometry: BlockGrid) -> Tensor:
    """One random permutation for all images."""
    return torch.randperm(geometry.num_blocks, generator=torch.Generator().manual_seed(FIXED_SEED))


def multiscale(geometry: BlockGrid) -> Tensor:
    """Coarse to fine: the order of Bayer's dither matrix, so any prefix is spread evenly (Bayer, 1973)."""

    def place(row: int, column: int) -> tuple[float, ...]:
        digits = []
        bit = 1
        while bit < max(geometry.rows, geometry.columns):
            r, c = bool(row & bit), bool(column & bit)
            digits.append(float({(0, 0): 0, (1, 1): 1, (0, 1): 2, (1, 0): 3}[r, c]))
            bit *= 2
        return tuple(digits)

    return _by_key(geometry, place)


def halton(geometry: BlockGrid) -> Tensor:
    """Blocks as a Halton sequence (bases 2 and 3) visits them (Besnier et al., 2025)."""
    from scipy.stats import qmc  # takes long to import

    order: dict[int, None] = {}
    sequence = qmc.Halton(d=2, scramble=False)
    while len(order) < geometry.num_blocks:
        for y, x in sequence.random(geometry.num_blocks):
            order.setdefault(int(y * geometry.rows) * geometry.columns + int(x * geometry.columns))
    return torch.tensor(list(order))


_SHIPPED = (
    *(raster, mirrored_raster, flipped_raster, reversed_raster, column_major, zigzag, diagonal, staggered, spiral_in),
    *(spiral_out, blockwise, stride2, centre, fixed_random, multiscale, halton),
)
ORDERS: Registry[Callable[[BlockGrid], Tensor]] = Registry(
    "order", "orderrl.orders", {order.__name__: order for order in _SHIPPED}, taken=OTHER_POLICIES
)
register_order = ORDERS.register


def block_order(name: str, geometry: BlockGrid, key: str = "") -> Tensor:
    """The order of a name, (B,) int64.

    Args:
        name: of `ORDERS`, or module:attribute.
        geometry: the block grid.
        key: of the setting that holds the name, for messages.

    Raises:
        ValueError: if there is none, or it does not hold every block once.
    """
    order = ORDERS.find(name, key)(geometry)
    blocks = geometry.num_blocks
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or order.sort().values.tolist() != [*range(blocks)]:
        raise ValueError(
            f"order {name!r} must give every block of 0..{blocks - 1} once, as an int64 tensor ({blocks},)"
        )
    return order
