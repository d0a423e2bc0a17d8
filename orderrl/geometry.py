"""Grid geometry: which tokens form a block, where blocks lie, which touch each other."""

from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from orderrl.runtime.isolation import isolated
from orderrl.runtime.values import at_least, check_fields

MOST_TOKENS = 2**16  # of an image


@dataclass(frozen=True)
class BlockGrid:
    """An H x W token grid cut into square blocks of p x p tokens.

    Tokens are numbered in raster order over the grid, blocks in raster order over the grid of
    blocks, and the tokens inside a block again in raster order.

    Args:
        height: H, tokens.
        width: W, tokens.
        block_size: p, tokens; it must divide H and W.

    Raises:
        ValueError: if a size is not positive or the blocks do not divide the grid.
    """

    height: int
    width: int
    block_size: int

    def __post_init__(self) -> None:
        check_fields(self, at_least(1, "height", "width", "block_size"))
        if self.height * self.width > MOST_TOKENS:
            raise ValueError(f"height={self.height} x width={self.width} are more than {MOST_TOKENS} tokens")
        if self.height % self.block_size or self.width % self.block_size:
            raise ValueError(
                f"block_size={self.block_size} must divide the token grid {self.height}x{self.width}; "
                f"choose a common divisor of {self.height} and {self.width}"
            )

    @property
    def rows(self) -> int:
        """Rows of blocks."""
        return self.height // self.block_size

    @property
    def columns(self) -> int:
        """Columns of blocks."""
        return self.width // self.block_size

    @property
    def num_tokens(self) -> int:
        """N = H * W."""
        return self.height * self.width

    @property
    def num_blocks(self) -> int:
        """B, the number of blocks."""
        return self.rows * self.columns

    @property
    def tokens_per_block(self) -> int:
        """p * p."""
        return self.block_size**2

    @cached_property
    @isolated
    def block_tokens(self) -> Tensor:
        """(B, p*p) int64: raster positions of each block's tokens, in raster order inside the block."""
        positions = torch.arange(self.num_tokens).view(self.height, self.width)
        p = self.block_size
        return rearrange(positions, "(r p) (c q) -> (r c) (p q)", p=p, q=p)

    @cached_property
    @isolated
    def token_block(self) -> Tensor:
        """(N,) int64: the block that each raster position belongs to."""
        owner = torch.empty(self.num_tokens, dtype=torch.int64)
        owner[self.block_tokens.flatten()] = torch.arange(self.num_blocks).repeat_interleave(self.tokens_per_block)
        return owner

    @cached_property
    @isolated
    def centres(self) -> Tensor:
        """(B, 2) float32: (row, column) of each block on the grid of blocks, in blocks."""
        index = torch.arange(self.num_blocks)
        return torch.stack([index // self.columns, index % self.columns], dim=-1).float()

    @cached_property
    @isolated
    def distances(self) -> Tensor:
        """(B, B) float32: Euclidean distance between block centres, in blocks."""
        return torch.cdist(self.centres, self.centres, compute_mode="donot_use_mm_for_euclid_dist")

    @cached_property
    @isolated
    def touching(self) -> Tensor:
        """(B, B) bool: True where two blocks are the same or 8-neighbours."""
        offset = (self.centres[:, None] - self.centres[None]).abs()
        return offset.amax(-1) <= 1

    def write(self, tokens: Tensor, blocks: Tensor, values: Tensor) -> Tensor:
        """A copy of images (M, N) or (M, N, C) with blocks (M, K) replaced by values (M, K, p*p) or (M, K, p*p, C)."""
        positions = self.block_tokens.to(tokens.device)[blocks].flatten(1)
        values = values.flatten(1, 2)
        return tokens.scatter(1, positions.view(positions.shape + (1,) * (values.ndim - 2)).expand_as(values), values)

    def token_order(self, block_order: Tensor) -> Tensor:
        """Token order of a block order: (..., B) -> (..., N) int64, raster inside each block."""
        return self.block_tokens.to(block_order.device)[block_order].flatten(-2)
