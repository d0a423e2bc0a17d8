"""Parts that the convolutional autoencoders share: ResNet block, attention, resampling, and how pixels are scaled.

The autoencoders of VQGAN (Esser et al., 2021), latent diffusion (Rombach et al., 2022) and their descendants LlamaGen
and MAR are built from these parts; attribute names are those of the published weights. Notable: GroupNorm with 32
groups and eps 1e-6, swish, downsampling that pads right and bottom only, nearest-neighbour upsampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderrl.runtime.values import at_least, between, check_fields

GROUPS = 32
MOST_RESOLUTIONS = 10  # 512 pixels along a side of a token
EPS = 1e-6


@dataclass(frozen=True)
class StackConfig:
    """Shape of an encoder or a decoder; the defaults are those of the published 16-fold models.

    Attributes:
        ch: channels at full resolution; a multiple of 32.
        ch_mult: factor on `ch` at every resolution, from full to lowest; each further one halves height and width.
        num_res_blocks: ResNet blocks at a resolution, at least 1 in an encoder; a decoder has one more.
        dropout: dropout rate in training.
        resamp_with_conv: resample with a learnt convolution; false averages down and repeats up.
        resolution: nominal image side that `attn_resolutions` refers to, whatever images are fed (KL only).
        attn_resolutions: nominal sides at which every ResNet block is followed by attention (KL only; VQ has attention
            at its lowest resolution).
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    dropout: float = 0.0
    resamp_with_conv: bool = True
    resolution: int = 256
    attn_resolutions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_fields(
            self,
            at_least(1, "ch", "ch_mult", "resolution", "attn_resolutions"),
            at_least(0, "num_res_blocks"),
            between("[0, 1)", "dropout"),
        )
        for name in ("ch_mult", "attn_resolutions"):  # lists in configs
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.ch % GROUPS:
            raise ValueError(f"ch={self.ch} must be a multiple of {GROUPS}, the groups of GroupNorm")
        if not 1 <= len(self.ch_mult) <= MOST_RESOLUTIONS:
            raise ValueError(f"ch_mult={list(self.ch_mult)} must have 1 to {MOST_RESOLUTIONS} factors")

    @property
    def factor(self) -> int:
        """Pixels along a side of a latent position."""
        return int(2 ** (len(self.ch_mult) - 1))

    @property
    def widths(self) -> list[int]:
        """Channels at every resolution, from full to lowest."""
        return [self.ch * factor for factor in self.ch_mult]


def stack_config(values: StackConfig | dict[str, Any]) -> StackConfig:
    """A `StackConfig` from itself or from its plain values.

    Raises:
        ValueError: for an unknown key.
    """
    if isinstance(values, StackConfig):
        return values
    unknown = sorted(values.keys() - StackConfig.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(
            f"encoder and decoder have no key {', '.join(unknown)}; "
            f"keys are {', '.join(StackConfig.__dataclass_fields__)}"
        )
    return StackConfig(**values)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm as in the published weights."""
    return nn.GroupNorm(GROUPS, channels, eps=EPS)


def conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class ResnetBlock(nn.Module):
    """Norm, swish, convolution, twice, beside a shortcut: (n, in, H, W) -> (n, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv(in_channels, out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention over all positions, beside a shortcut: (n, C, H, W) -> (n, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (n, H·W, C)
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Half the height and width, with zeros at the right and bottom edge: (n, C, H, W) -> (n, C, H/2, W/2)."""

    def __init__(self, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "conv"):
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the height and width by repeating pixels, then a convolution: (n, C, H, W) -> (n, C, 2H, 2W)."""

    def __init__(self, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        if with_conv:
            self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x) if hasattr(self, "conv") else x


def to_unit_range(images: Tensor) -> Tensor:
    """Pixels as the encoders want them: (n, 3, H, W) uint8, or floating point in [-1, 1] -> the latter.

    Raises:
        ValueError: for another shape, or for values outside [-1, 1].
        TypeError: for another dtype.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (n, 3, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point in [-1, 1], got {images.dtype}")
    if images.numel() and images.abs().max() > 1 + 1e-4:
        raise ValueError(f"floating-point images must lie in [-1, 1], got values up to {images.abs().max().item():.3g}")
    return images


def to_pixels(images: Tensor) -> Tensor:
    """(n, 3, H, W) floating point, clamped to [-1, 1], as uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def latent_grid(height: int, width: int, factor: int) -> tuple[int, int]:
    """Rows and columns of latent positions of an image.

    Raises:
        ValueError: if the factor divides the height or width not.
    """
    if height % factor or width % factor or not height or not width:
        raise ValueError(f"images of {height}x{width} pixels can't be encoded; both must be multiples of {factor}")
    return height // factor, width // factor
