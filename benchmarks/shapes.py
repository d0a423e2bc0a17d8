"""The models that are measured, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from orderrl.backbones import Backbone, RasterTransformer, build_backbone, load_backbone
from orderrl.backbones.check import random_tokens
from orderrl.backbones.llamagen import TransformerConfig
from orderrl.backbones.registry import new_backbone
from orderrl.data import TokenSet, load_split

LLAMAGEN_B = {"vocab_size": 16384, "num_classes": 1000, "dim": 768, "layers": 12, "heads": 12, "multiple_of": 256}
GRID = {"height": 16, "width": 16, "block_size": 4}


@dataclass(frozen=True)
class Shape:
    """A backbone and images for it.

    Attributes:
        name: as on the command line.
        make: builds the backbone with a dtype.
        batch: images or episodes at once, unless the suite says otherwise.
    """

    name: str
    make: Callable[[str], Backbone]
    batch: int

    def images(self, backbone: Backbone, count: int) -> TokenSet:
        """Real digits, or random tokens where the weights are random too."""
        if self.name == "digits":
            return load_split("digits", "planner")
        tokens = random_tokens(backbone, count, torch.Generator().manual_seed(0))
        labels = torch.arange(count) % backbone.num_classes
        grid = backbone.geometry
        sizes = grid.height, grid.width, backbone.vocab_size, backbone.num_classes
        return TokenSet(self.name, "random", tokens, labels, *sizes)


def _random(family: str, shape: dict[str, Any]) -> Callable[[str], Backbone]:
    def make(dtype: str) -> Backbone:
        torch.manual_seed(0)
        backbone: Any = new_backbone(family, GRID | shape)
        for name, parameter in backbone.named_parameters():
            if name in ("output.weight", "head.weight"):  # which start at zero
                torch.nn.init.normal_(parameter, std=0.02)
        return frozen(backbone, dtype)

    return make


def _published(name: str) -> Callable[[str], Backbone]:
    return lambda dtype: frozen(build_backbone(name), dtype)


def frozen(module: Any, dtype: str) -> Any:
    """Parameters in a dtype; rotary tables stay in float32."""
    for parameter in module.eval().requires_grad_(False).parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return module


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("digits", lambda dtype: load_backbone("digits", dtype=dtype), batch=256),
        Shape("llamagen-b", _random("randar", LLAMAGEN_B), batch=8),
        Shape("arpg-b", _random("arpg", LLAMAGEN_B), batch=8),
        Shape("randar-l", _published("randar_l"), batch=4),
        Shape("randar-xl", _published("randar_xl"), batch=64),
    )
}


def raster_twin(backbone: Any) -> RasterTransformer:
    """The published LlamaGen of the same size: no instruction tokens, one token a step."""
    c = backbone.config
    config = TransformerConfig(
        c.height, c.width, c.height, c.vocab_size, c.num_classes, c.dim, c.layers, c.heads, c.multiple_of
    )
    torch.manual_seed(0)
    model = RasterTransformer(config)
    torch.nn.init.normal_(model.output.weight, std=0.02)
    dtype = str(next(backbone.parameters()).dtype).removeprefix("torch.")
    return frozen(model.to(backbone.rope.device), dtype)
