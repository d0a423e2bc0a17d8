"""What the rest of the package asks of a tokeniser."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Tokenizer(Protocol):
    """Images to tokens and back; discrete (a codebook) or continuous."""

    name: str  # what it is called in files and messages
    downsampling: int  # pixels along a side of a token
    vocab_size: Any  # int, number of token values; None for continuous tokens
    token_dim: int  # length of the vector that a token stands for

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that determine shape and weights."""

    def encode(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) uint8 or in [-1, 1] -> tokens (n, N) int64, or (n, N, token_dim) if continuous; raster order."""

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens of a grid (rows, columns) -> (n, 3, H, W) uint8."""
