"""What the convolutional autoencoders share: encoder and decoder, their parts, and how pixels are scaled.

The autoencoders of VQGAN (Esser et al., 2021), latent diffusion (Rombach et al., 2022) and their descendants LlamaGen
and MAR are built from these parts; attribute names are those of the published weights. Notable: GroupNorm with 32
groups and eps 1e-6, swish, downsampling that pads right and bottom only, nearest-neighbour upsampling.
"""

from collections import OrderedDict
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderrl.runtime.values import at_least, between, check_fields, setting

GROUPS = 32
MOST_RESOLUTIONS = 10  # 512 pixels along a side of a token
EPS = 1e-6


@dataclass(frozen=True)
class StackConfig:
    """Shape of an encoder or a decoder; the defaults are those of the published 16-fold models."""

    ch: int = setting(128, "Channels at full resolution, a multiple of 32", at_least(1))
    ch_mult: tuple[int, ...] = setting(
        (1, 1, 2, 2, 4), "Factor on `ch` at every resolution; each further one halves height and width", at_least(1)
    )
    num_res_blocks: int = setting(2, "ResNet blocks at a resolution; a decoder has one more", at_least(0))
    # shapes of the published models alone, no settings
    dropout: float = 0.0  # rate in training
    resamp_with_conv: bool = True  # resample with a learnt convolution; false averages down and repeats up
    resolution: int = 256  # nominal image side that `attn_resolutions` refers to, whatever images are fed
    attn_resolutions: tuple[int, ...] = ()  # nominal sides at which every ResNet block is followed by attention (KL)

    def __post_init__(self) -> None:
        check_fields(self, at_least(1, "resolution", "attn_resolutions"), between("[0, 1)", "dropout"))
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


class TwoStacks:
    """What the configurations of both autoencoders share: an encoder and a decoder of equally many resolutions."""

    encoder: StackConfig
    decoder: StackConfig

    def check_stacks(self) -> None:
        """Make `StackConfig`s of plain values, which come from files, and refuse a pair that does not fit."""
        for name in ("encoder", "decoder"):
            object.__setattr__(self, name, stack_config(getattr(self, name)))
        if self.encoder.factor != self.decoder.factor:
            raise ValueError(
                f"encoder.ch_mult={list(self.encoder.ch_mult)} and decoder.ch_mult={list(self.decoder.ch_mult)} "
                "must have the same length"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values that the constructor takes."""
        return asdict(self)  # type: ignore[call-overload]  # of the dataclasses that inherit this


def stack_config(values: StackConfig | dict[str, Any]) -> StackConfig:
    """A `StackConfig` from itself or from its plain values, unknown ones refused."""
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


class Names(NamedTuple):
    """What published weights call the parts of an encoder and a decoder."""

    blocks: str  # the ResNet blocks of a stage
    down: str  # the stages of the encoder
    up: str  # the stages of the decoder
    # the first ResNet block, the attention and the second ResNet block at the lowest resolution
    middle: tuple[str, str, str]
    up_from_top: bool  # whether the decoder's stages are stored from high to low resolution, against their order of use


class Stage(nn.Module):
    """ResNet blocks of one resolution, with attention after each where wanted, then resampling."""

    def __init__(self, widths: list[int], attention: bool, dropout: float, blocks: str) -> None:
        super().__init__()
        pairs = list(pairwise(widths))
        self.blocks = blocks
        self.add_module(blocks, nn.ModuleList(ResnetBlock(before, after, dropout) for before, after in pairs))
        self.attn = nn.ModuleList(AttnBlock(after) for _, after in pairs if attention)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(getattr(self, self.blocks)):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


def _middle(channels: int, config: StackConfig, names: Names) -> nn.Sequential:
    first, second = (ResnetBlock(channels, channels, config.dropout) for _ in range(2))
    return nn.Sequential(OrderedDict(zip(names.middle, (first, AttnBlock(channels), second), strict=True)))


class Encoder(nn.Module):
    """(n, 3, H, W) -> (n, out_channels, H/f, W/f).

    Args:
        out_channels: of the latents.
        attention: for every resolution, from full to lowest, whether its stage has attention.
        names: of its parts.
    """

    def __init__(self, config: StackConfig, out_channels: int, attention: list[bool], names: Names) -> None:
        super().__init__()
        widths = config.widths
        self.names = names
        self.conv_in = conv(3, config.ch)
        stages = nn.ModuleList()  # from high to low resolution
        for level, width in enumerate(widths):
            before = widths[level - 1] if level else config.ch
            stage = Stage([before] + [width] * config.num_res_blocks, attention[level], config.dropout, names.blocks)
            if level < len(widths) - 1:
                stage.downsample = Downsample(width, config.resamp_with_conv)
            stages.append(stage)
        self.add_module(names.down, stages)
        self.mid = _middle(widths[-1], config, names)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv(widths[-1], out_channels)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for stage in getattr(self, self.names.down):
            h = stage(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """(n, in_channels, h, w) -> (n, 3, h·f, w·f); arguments as of `Encoder`."""

    def __init__(self, config: StackConfig, in_channels: int, attention: list[bool], names: Names) -> None:
        super().__init__()
        widths = config.widths
        self.names = names
        self.conv_in = conv(in_channels, widths[-1])
        self.mid = _middle(widths[-1], config, names)
        stages = []  # from low to high resolution
        before = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            blocks = config.num_res_blocks + 1
            stage = Stage([before] + [width] * blocks, attention[level], config.dropout, names.blocks)
            if level:
                stage.upsample = Upsample(width, config.resamp_with_conv)
            stages.append(stage)
            before = width
        self.add_module(names.up, nn.ModuleList(reversed(stages) if names.up_from_top else stages))
        self.norm_out = group_norm(widths[0])
        self.conv_out = conv(widths[0], 3)

    def forward(self, latents: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latents))
        stages = getattr(self, self.names.up)
        for stage in reversed(stages) if self.names.up_from_top else stages:
            h = stage(h)
        return self.conv_out(F.silu(self.norm_out(h)))


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
    """Rows and columns of latent positions; ValueError if height or width is not a multiple of the factor."""
    if height % factor or width % factor or not height or not width:
        raise ValueError(f"images of {height}x{width} pixels cannot be encoded; both must be multiples of {factor}")
    return height // factor, width // factor
