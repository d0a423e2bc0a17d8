"""VQ tokenisers of LlamaGen: images as grids of indices into a codebook.

The encoder halves the image a few times, each position is replaced by its nearest code, and the decoder mirrors the
encoder (Esser et al., 2021; Sun et al., 2024). Notable: code vectors and latents are L2-normalised both in the search
and at lookup (Yu et al., 2022), attention stands at the lowest resolution and in the middle only, and the decoder's
stages are stored from low to high resolution. State-dict keys are the published ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderrl.runtime.cache import fingerprint
from orderrl.runtime.values import at_least, check_fields, setting
from orderrl.runtime.weights import weights_fingerprint
from orderrl.tokenizers.layers import (
    Decoder,
    Encoder,
    Names,
    StackConfig,
    TwoStacks,
    latent_grid,
    to_pixels,
    to_unit_range,
)

NAMES = Names("res", "conv_blocks", "conv_blocks", ("0", "1", "2"), up_from_top=False)
_SEARCH_ROWS = 4096  # positions compared with the whole codebook at once


@dataclass(frozen=True)
class VQConfig(TwoStacks):
    """Shape of a VQ tokeniser; the defaults are LlamaGen's VQ-16."""

    codebook_size: int = setting(16384, "Number of codes", at_least(1))
    codebook_embed_dim: int = setting(8, "Length of a code vector", at_least(1))
    codebook_l2_norm: bool = setting(True, "Compare and look up codes of unit length")
    z_channels: int = setting(256, "Channels between encoder and decoder", at_least(1))
    encoder: StackConfig = setting(StackConfig(), "Shape of the encoder")
    decoder: StackConfig = setting(StackConfig(), "Shape of the decoder, of as many resolutions")

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_stacks()


def _attention(config: StackConfig) -> list[bool]:
    """At the lowest resolution alone."""
    return [level == len(config.ch_mult) - 1 for level in range(len(config.ch_mult))]


class Codebook(nn.Module):
    """Code vectors, the search for the nearest one, and the lookup."""

    def __init__(self, size: int, dim: int, l2_norm: bool) -> None:
        super().__init__()
        self.l2_norm = l2_norm
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)
        if l2_norm:
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)

    def vectors(self) -> Tensor:
        """The codes as they are compared and looked up, (V, e): of unit length if the codebook is normalised."""
        return self.normalised(self.embedding.weight)

    def normalised(self, vectors: Tensor) -> Tensor:
        """(..., e) vectors, of unit length if the codebook is normalised."""
        return F.normalize(vectors, dim=-1) if self.l2_norm else vectors

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """Index of the nearest code by squared distance, the first if several are: (..., e) -> (...) int64."""
        codes = self.vectors()
        size = codes.pow(2).sum(1)  # (V,)
        flat = self.normalised(latents).reshape(-1, latents.shape[-1])
        parts = [(x.pow(2).sum(1, True) + size - 2 * (x @ codes.T)).argmin(1) for x in flat.split(_SEARCH_ROWS)]
        return torch.cat(parts).view(latents.shape[:-1])

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors: (...) int64 -> (..., e)."""
        return self.vectors()[indices]


class VQTokenizer(nn.Module):
    """Images to code indices and back, see `orderrl.tokenizers.Tokenizer`."""

    UNUSED = "quantize.codebook_used"  # a training statistic that published files carry

    def __init__(self, config: VQConfig, name: str = "vq") -> None:
        super().__init__()
        self.config, self.name = config, name
        self.downsampling = config.encoder.factor
        self.vocab_size = config.codebook_size
        self.token_dim = config.codebook_embed_dim
        self.encoder = Encoder(config.encoder, config.z_channels, _attention(config.encoder), NAMES)
        self.decoder = Decoder(config.decoder, config.z_channels, _attention(config.decoder), NAMES)
        self.quantize = Codebook(config.codebook_size, config.codebook_embed_dim, config.codebook_l2_norm)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that determine shape and weights."""
        return fingerprint([self.config.to_dict(), weights_fingerprint(self)])

    def latents(self, images: Tensor) -> Tensor:
        """Before quantisation and normalisation: (n, 3, H, W) in [-1, 1] -> (n, e, h, w)."""
        return self.quant_conv(self.encoder(images))

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (n, e, h, w) as their nearest codes, with a straight-through gradient, and indices (n, h, w)."""
        x = self.quantize.normalised(latents.movedim(1, -1))  # (n, h, w, e)
        indices = self.quantize.nearest(latents.movedim(1, -1))
        codes = x + (self.quantize.lookup(indices) - x).detach()
        return codes.movedim(-1, 1), indices

    def pixels(self, codes: Tensor) -> Tensor:
        """Decode code vectors, not clamped: (n, e, h, w) -> (n, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(codes))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Tokens of images.

        Args:
            images: (n, 3, H, W) uint8, or floating point in [-1, 1].

        Returns:
            (n, N) int64 in [0, vocab_size), raster order, N = H·W / downsampling².

        Raises:
            ValueError: if height or width is not a multiple of the downsampling, or values lie outside [-1, 1].
        """
        images = to_unit_range(images).to(self.quant_conv.weight)
        latent_grid(images.shape[2], images.shape[3], self.downsampling)
        return self.quantize.nearest(self.latents(images).movedim(1, -1)).flatten(1)

    @torch.no_grad()
    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images of tokens.

        Args:
            tokens: (n, N) int64 in [0, vocab_size), raster order.
            grid: rows and columns of tokens, rows · columns = N.

        Returns:
            (n, 3, H, W) uint8.

        Raises:
            ValueError: if the shape does not fit the grid, or a token lies outside the codebook.
        """
        if tokens.ndim != 2 or tokens.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"tokens must have shape (n, {grid[0] * grid[1]}) on grid {grid}, got {tuple(tokens.shape)}"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise ValueError(
                f"tokens must lie in [0, {self.vocab_size}), got {int(tokens.min())} to {int(tokens.max())}"
            )
        codes = self.quantize.lookup(tokens.to(self.quant_conv.weight.device).long().unflatten(1, grid))
        return to_pixels(self.pixels(codes.movedim(-1, 1)))
