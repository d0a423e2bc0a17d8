"""Backbones: the protocol, the order-robust transformer, loading and checking."""

from orderrl.backbones.check import check_backbone
from orderrl.backbones.protocol import Backbone, BlockLosses
from orderrl.backbones.registry import (
    backbone_fingerprint,
    backbone_names,
    load_backbone,
    register_backbone,
    save_backbone,
    with_block_size,
)
from orderrl.backbones.sampling import Sampling
from orderrl.backbones.transformer import OrderRobustTransformer, TransformerConfig

__all__ = [
    "Backbone",
    "BlockLosses",
    "OrderRobustTransformer",
    "Sampling",
    "TransformerConfig",
    "backbone_fingerprint",
    "backbone_names",
    "check_backbone",
    "load_backbone",
    "register_backbone",
    "save_backbone",
    "with_block_size",
]
