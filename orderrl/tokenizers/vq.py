"""VQ tokenisers of LlamaGen: images as grids of indices into a codebook.

The encoder halves the image a few times, each position is replaced by its nearest code, and the decoder mirrors the
encoder (Esser et al., 2021; Sun et al., 2024). Notable: code vectors and latents are L2-normalised both in the search
and at lookup (Yu et al., 2022), attention stands at the lowest resolution and in the middle only, and the decoder's
stages are stored from low to high resolution. State-dict keys are the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderrl.backbones.registry import weights_fingerprint
from orderrl.runtime.cache import fingerprint
from orderrl.runtime.values import at_least, check_fields
from orderrl.tokenizers.layers import (
    AttnBlock,
    Downsample,
    ResnetBlock,
    StackConfig,
    Upsample,
    conv,
    group_norm,
    latent_grid,
    stack_config,
    to_pixels,
    to_unit_range,
)

UNUSED_KEYS = ("quantize.codebook_used",)  # a training statistic that published files carry
_SEARCH_ROWS = 4096  # positions compared with the whole codebook at once


@dataclass(frozen=True)
class VQConfig:
    """Shape of a VQ tokeniser; the defaults are LlamaGen's VQ-16.

    Attributes:
        codebook_size: number of codes, V.
        codebook_embed_dim: length of a code vector, e.
        codebook_l2_norm: normalise codes and latents to unit length.
        z_channels: channels between encoder and decoder.
        encoder, decoder: their shapes; both must have the same number of resolutions.
    """

    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    codebook_l2_norm: bool = True
    z_channels: int = 256
    encoder: StackConfig = field(default_factory=StackConfig)
    decoder: StackConfig = field(default_factory=StackConfig)

    def __post_init__(self) -> None:
        check_fields(self, at_least(1, "codebook_size", "codebook_embed_dim", "z_channels"))
        for name in ("encoder", "decoder"):
            object.__setattr__(self, name, stack_config(getattr(self, name)))
        if self.encoder.factor != self.decoder.factor:
            raise ValueError(
                f"encoder.ch_mult={list(self.encoder.ch_mult)} and decoder.ch_mult={list(self.decoder.ch_mult)} "
                "must have the same length"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `VQConfig(**values)` takes."""
        return asdict(self)


class _Stage(nn.Module):
    """ResNet blocks of one resolution, with attention after each where wanted, then resampling."""

    def __init__(self, widths: list[int], attention: bool, config: StackConfig) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.res = nn.ModuleList(ResnetBlock(before, after, config.dropout) for before, after in pairs)
        self.attn = nn.ModuleList(AttnBlock(after) for _, after in pairs if attention)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


def _middle(channels: int, config: StackConfig) -> nn.ModuleList:
    block = ResnetBlock(channels, channels, config.dropout)
    return nn.ModuleList([block, AttnBlock(channels), ResnetBlock(channels, channels, config.dropout)])


class VQEncoder(nn.Module):
    """(n, 3, H, W) -> (n, z_channels, H/f, W/f)."""

    def __init__(self, config: StackConfig, z_channels: int) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = conv(3, config.ch)
        self.conv_blocks = nn.ModuleList()  # from high to low resolution
        for level, width in enumerate(widths):
            before = widths[level - 1] if level else config.ch
            stage = _Stage([before] + [width] * config.num_res_blocks, level == len(widths) - 1, config)
            if level < len(widths) - 1:
                stage.downsample = Downsample(width, config.resamp_with_conv)
            self.conv_blocks.append(stage)
        self.mid = _middle(widths[-1], config)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv(widths[-1], z_channels)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for layer in (*self.conv_blocks, *self.mid):
            h = layer(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class VQDecoder(nn.Module):
    """(n, z_channels, h, w) -> (n, 3, h·f, w·f)."""

    def __init__(self, config: StackConfig, z_channels: int) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = conv(z_channels, widths[-1])
        self.mid = _middle(widths[-1], config)
        self.conv_blocks = nn.ModuleList()  # from low to high resolution
        before = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            stage = _Stage([before] + [width] * (config.num_res_blocks + 1), level == len(widths) - 1, config)
            if level:
                stage.upsample = Upsample(width, config.resamp_with_conv)
            self.conv_blocks.append(stage)
            before = width
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv(widths[0], 3)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.conv_in(latents)
        for layer in (*self.mid, *self.conv_blocks):
            h = layer(h)
        return self.conv_out(F.silu(self.norm_out(h)))


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
    """Images to code indices and back.

    Args:
        config: the shape.
        name: what it is called in files and messages.

    Attributes:
        downsampling: pixels along a side of a token.
        vocab_size: number of codes.
        token_dim: length of a code vector.
    """

    def __init__(self, config: VQConfig, name: str = "vq") -> None:
        super().__init__()
        self.config, self.name = config, name
        self.downsampling = config.encoder.factor
        self.vocab_size = config.codebook_size
        self.token_dim = config.codebook_embed_dim
        self.encoder = VQEncoder(config.encoder, config.z_channels)
        self.decoder = VQDecoder(config.decoder, config.z_channels)
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
        """Replace latents by their nearest codes, with a straight-through gradient.

        Args:
            latents: (n, e, h, w).

        Returns:
            The codes (n, e, h, w) and their indices (n, h, w) int64.
        """
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
            ValueError: if height or width is no multiple of the downsampling, or values lie outside [-1, 1].
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


def used_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict without what plays no role in using the model."""
    return {key: value for key, value in state.items() if key not in UNUSED_KEYS}
