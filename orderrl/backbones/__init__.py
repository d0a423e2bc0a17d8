"""Backbones: the protocol, the published families, loading and checking."""

from typing import TYPE_CHECKING

from orderrl.runtime.lazy import lazily

if TYPE_CHECKING:
    from orderrl.backbones.arpg import ARPG
    from orderrl.backbones.check import check_backbone
    from orderrl.backbones.llamagen import RasterTransformer, TransformerConfig
    from orderrl.backbones.protocol import Backbone, BlockLosses, Drawing
    from orderrl.backbones.randar import OrderRobustTransformer
    from orderrl.backbones.registry import (
        backbone_fingerprint,
        backbone_names,
        build_backbone,
        load_backbone,
        published_names,
        register_backbone,
        save_backbone,
        with_block_size,
    )
    from orderrl.backbones.sampling import Sampling

__all__ = [
    "ARPG",
    "Backbone",
    "BlockLosses",
    "Drawing",
    "OrderRobustTransformer",
    "RasterTransformer",
    "Sampling",
    "TransformerConfig",
    "backbone_fingerprint",
    "backbone_names",
    "build_backbone",
    "check_backbone",
    "load_backbone",
    "published_names",
    "register_backbone",
    "save_backbone",
    "with_block_size",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "orderrl.backbones.arpg": ("ARPG",),
        "orderrl.backbones.check": ("check_backbone",),
        "orderrl.backbones.llamagen": ("RasterTransformer", "TransformerConfig"),
        "orderrl.backbones.protocol": ("Backbone", "BlockLosses", "Drawing"),
        "orderrl.backbones.randar": ("OrderRobustTransformer",),
        "orderrl.backbones.registry": (
            "backbone_fingerprint",
            "backbone_names",
            "build_backbone",
            "load_backbone",
            "published_names",
            "register_backbone",
            "save_backbone",
            "with_block_size",
        ),
        "orderrl.backbones.sampling": ("Sampling",),
    },
)
