"""No network at all: the pixels of a small square are a continuous token, for masked models without a tokeniser."""

from einops import rearrange
from torch import Tensor, nn

from orderrl.tokenizers.layers import latent_grid, to_pixels, to_unit_range


class PatchTokenizer(nn.Module):
    """Square patches as tokens of 3 · side² values in [-1, 1]; decoding encoded images gives them back exactly.

    Args:
        side: of a patch, pixels.
    """

    vocab_size = None

    def __init__(self, side: int) -> None:
        super().__init__()
        self.name, self.downsampling, self.token_dim = f"patches{side}", side, 3 * side**2

    @property
    def fingerprint(self) -> str:
        """There are no weights: the name says everything."""
        return self.name

    def encode(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) uint8 or in [-1, 1], multiples of the side -> (n, N, 3 · side²) float32, by channels."""
        side = self.downsampling
        latent_grid(images.shape[-2], images.shape[-1], side)
        return rearrange(to_unit_range(images), "n c (h p) (w q) -> n (h w) (c p q)", p=side, q=side)

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(n, N, 3 · side²) of a grid (rows, columns) -> (n, 3, H, W) uint8."""
        rows, side = grid[0], self.downsampling
        return to_pixels(rearrange(tokens.float(), "n (h w) (c p q) -> n c (h p) (w q)", h=rows, p=side, q=side))
