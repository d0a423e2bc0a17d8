"""One tiny backbone of every family, with large random weights so that every token in sight matters."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from orderrl.backbones.registry import TrainableBackbone, new_backbone
from orderrl.data import TokenSet

CAUSAL = {"vocab_size": 7, "num_classes": 3, "dim": 32, "layers": 2, "heads": 2}
MASKED = {
    "vae_embed_dim": 3,
    "class_num": 3,
    "encoder_embed_dim": 32,
    "encoder_depth": 2,
    "encoder_num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "buffer_size": 2,
    "diffloss_d": 2,
    "diffloss_w": 32,
    "num_sampling_steps": 6,
    "loss_draws": 3,
}
FAMILIES = ("llamagen", "randar", "arpg", "mar")
ORDER_ROBUST = FAMILIES[1:]


@cache
def tiny(family: str, height: int = 4, width: int = 4, block_size: int = 2) -> Any:
    """A frozen backbone of a family; raster models are square and of one block."""
    grid = {"height": height, "width": width, "block_size": height if family == "llamagen" else block_size}
    backbone: TrainableBackbone = new_backbone(family, grid | (MASKED if family == "mar" else CAUSAL))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15 if family == "mar" else 0.3, generator=generator)
    return backbone.requires_grad_(False).eval()


def images(backbone: Any, count: int = 6, seed: int = 0) -> TokenSet:
    """Random images that fit a backbone."""
    generator = torch.Generator().manual_seed(seed)
    grid = backbone.geometry
    shape = (count, grid.num_tokens)
    tokens: Tensor
    if backbone.vocab_size:
        tokens = torch.randint(backbone.vocab_size, shape, generator=generator)
    else:
        tokens = torch.randn(*shape, backbone.token_dim, generator=generator)
    labels = torch.randint(backbone.num_classes, (count,), generator=generator)
    channels = 0 if backbone.vocab_size else backbone.token_dim
    return TokenSet(
        "tiny",
        "test",
        tokens,
        labels,
        grid.height,
        grid.width,
        backbone.vocab_size,
        backbone.num_classes,
        channels,
        decoder=None if backbone.vocab_size else _grey,
    )


def _grey(tokens: Tensor) -> Tensor:
    """Continuous tokens of a 4x4 grid as grey pixels."""
    grey = (tokens.mean(-1).unflatten(-1, (4, 4)).clamp(-1, 1) * 127 + 128).to(torch.uint8)
    return grey[:, None].expand(-1, 3, -1, -1)


def block_orders(backbone: Any, count: int, seed: int = 1) -> Tensor:
    """Random block orders (count, B)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, backbone.geometry.num_blocks, generator=generator).argsort(1)
