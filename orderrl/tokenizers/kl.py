"""KL autoencoder of MAR: images as grids of continuous tokens.

The autoencoder of latent diffusion (Rombach et al., 2022) with the weights trained for MAR (Li et al., 2024). Notable:
the encoder has attention at one nominal resolution and the decoder in its middle only; the decoder's stages are indexed
by level, so `up.0` is the highest resolution; the factor 0.2325 belongs to the tokens, not to the autoencoder: it is
applied in `encode` and undone in `decode`. State-dict keys are the published ones.
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
from orderrl.runtime.values import at_least, check_fields, positive
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

SCALE = 0.2325  # of the published KL-16: makes the tokens' standard deviation about 1
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class KLConfig:
    """Shape of a KL autoencoder; the defaults are MAR's KL-16.

    Attributes:
        embed_dim: channels of a token, C.
        use_variational: whether the encoder gives variances; otherwise every log-variance is 1.
        scale: factor from posterior to tokens.
        encoder, decoder: their shapes; both must have the same number of resolutions.
    """

    embed_dim: int = 16
    use_variational: bool = True
    scale: float = SCALE
    encoder: StackConfig = field(default_factory=lambda: StackConfig(attn_resolutions=(16,)))
    decoder: StackConfig = field(default_factory=StackConfig)

    def __post_init__(self) -> None:
        check_fields(self, at_least(1, "embed_dim"), positive("scale"))
        for name in ("encoder", "decoder"):
            object.__setattr__(self, name, stack_config(getattr(self, name)))
        if self.encoder.factor != self.decoder.factor:
            raise ValueError(
                f"encoder.ch_mult={list(self.encoder.ch_mult)} and decoder.ch_mult={list(self.decoder.ch_mult)} "
                "must have the same length"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `KLConfig(**values)` takes."""
        return asdict(self)


class _Stage(nn.Module):
    """ResNet blocks of one resolution, with attention after each where wanted, then resampling."""

    def __init__(self, widths: list[int], attention: bool, config: StackConfig) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.block = nn.ModuleList(ResnetBlock(before, after, config.dropout) for before, after in pairs)
        self.attn = nn.ModuleList(AttnBlock(after) for _, after in pairs if attention)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


class _Middle(nn.Module):
    """ResNet block, attention, ResNet block."""

    def __init__(self, channels: int, config: StackConfig) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, config.dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def _has_attention(config: StackConfig, level: int) -> bool:
    return config.resolution // 2**level in config.attn_resolutions


class KLEncoder(nn.Module):
    """(n, 3, H, W) -> (n, 2 z_channels, H/f, W/f)."""

    def __init__(self, config: StackConfig, z_channels: int) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = conv(3, config.ch)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[level - 1] if level else config.ch
            stage = _Stage([before] + [width] * config.num_res_blocks, _has_attention(config, level), config)
            if level < len(widths) - 1:
                stage.downsample = Downsample(width, config.resamp_with_conv)
            self.down.append(stage)
        self.mid = _Middle(widths[-1], config)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv(widths[-1], 2 * z_channels)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for stage in self.down:
            h = stage(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class KLDecoder(nn.Module):
    """(n, z_channels, h, w) -> (n, 3, h·f, w·f)."""

    def __init__(self, config: StackConfig, z_channels: int) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = conv(z_channels, widths[-1])
        self.mid = _Middle(widths[-1], config)
        stages = []
        for level, width in enumerate(widths):
            before = widths[min(level + 1, len(widths) - 1)]
            stage = _Stage([before] + [width] * (config.num_res_blocks + 1), _has_attention(config, level), config)
            if level:
                stage.upsample = Upsample(width, config.resamp_with_conv)
            stages.append(stage)
        self.up = nn.ModuleList(stages)  # from high to low resolution, run backwards
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv(widths[0], 3)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latents))
        for stage in reversed(self.up):
            h = stage(h)
        return self.conv_out(F.silu(self.norm_out(h)))


@dataclass(frozen=True)
class Posterior:
    """Independent normal distributions of latents.

    Attributes:
        moments: (n, 2e, h, w), mean then log-variance as the encoder gives them.
    """

    moments: Tensor

    @property
    def mean(self) -> Tensor:
        """(n, e, h, w)."""
        return self.moments.chunk(2, dim=1)[0]

    @property
    def logvar(self) -> Tensor:
        """(n, e, h, w), clamped to [-30, 20]."""
        return self.moments.chunk(2, dim=1)[1].clamp(*LOGVAR_RANGE)

    def sample(self, noise: Tensor) -> Tensor:
        """The latents that standard normal noise (n, e, h, w) stands for."""
        return self.mean + (self.logvar / 2).exp() * noise

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence from the standard normal, nats per image, (n,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum((1, 2, 3))


class KLTokenizer(nn.Module):
    """Images to continuous tokens and back.

    Args:
        config: the shape.
        name: what it is called in files and messages.

    Attributes:
        downsampling: pixels along a side of a token.
        vocab_size: None, tokens are continuous.
        token_dim: channels of a token.
    """

    def __init__(self, config: KLConfig, name: str = "kl") -> None:
        super().__init__()
        self.config, self.name = config, name
        self.downsampling = config.encoder.factor
        self.vocab_size: int | None = None
        self.token_dim = e = config.embed_dim
        self.encoder = KLEncoder(config.encoder, e)
        self.decoder = KLDecoder(config.decoder, e)
        self.quant_conv = nn.Conv2d(2 * e, 2 * e if config.use_variational else e, 1)
        self.post_quant_conv = nn.Conv2d(e, e, 1)

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that determine shape and weights."""
        return fingerprint([self.config.to_dict(), weights_fingerprint(self)])

    def posterior(self, images: Tensor) -> Posterior:
        """Distribution of the latents, not scaled: (n, 3, H, W) in [-1, 1] -> (n, e, h, w) each."""
        moments = self.quant_conv(self.encoder(images))
        if not self.config.use_variational:
            moments = torch.cat([moments, torch.ones_like(moments)], 1)
        return Posterior(moments)

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode latents that are not scaled, not clamped: (n, e, h, w) -> (n, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled tokens of images: the posterior's mean, or its sample under given noise.

        Args:
            images: (n, 3, H, W) uint8, or floating point in [-1, 1].
            noise: (n, N, C) standard normal; None takes the mean.

        Returns:
            (n, N, C) floating point, raster order, N = H·W / downsampling².

        Raises:
            ValueError: if height or width is no multiple of the downsampling, values lie outside [-1, 1], or the
                noise has another shape.
        """
        images = to_unit_range(images).to(self.quant_conv.weight)
        grid = latent_grid(images.shape[2], images.shape[3], self.downsampling)
        posterior = self.posterior(images)
        if noise is None:
            return self.config.scale * posterior.mean.flatten(2).transpose(1, 2)
        want = (len(images), grid[0] * grid[1], self.token_dim)
        if noise.shape != want:
            raise ValueError(f"noise must have shape {want}, got {tuple(noise.shape)}")
        latents = posterior.sample(noise.to(images).transpose(1, 2).unflatten(2, grid))
        return self.config.scale * latents.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images of tokens.

        Args:
            tokens: (n, N, C) floating point, scaled, raster order.
            grid: rows and columns of tokens, rows · columns = N.

        Returns:
            (n, 3, H, W) uint8.

        Raises:
            ValueError: if the shape does not fit.
        """
        want = (grid[0] * grid[1], self.token_dim)
        if tokens.ndim != 3 or tokens.shape[1:] != want:
            raise ValueError(f"tokens must have shape (n, {want[0]}, {want[1]}), got {tuple(tokens.shape)}")
        latents = tokens.to(self.quant_conv.weight).transpose(1, 2).unflatten(2, grid) / self.config.scale
        return to_pixels(self.pixels(latents))


def used_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state dict without the training loss's own weights."""
    return {key: value for key, value in state.items() if not key.startswith("loss.")}
