"""Backbones by name or path."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from orderrl.backbones.protocol import Backbone
from orderrl.backbones.transformer import OrderRobustTransformer, TransformerConfig
from orderrl.checkpoint import load_checkpoint, load_state, save_checkpoint

WEIGHTS = Path(__file__).parent.parent / "weights"
_REGISTRY: dict[str, Callable[[], Backbone]] = {}


def register_backbone(name: str, build: Callable[[], Backbone]) -> None:
    """Make `load_backbone(name)` call `build`.

    Raises:
        ValueError: if the name is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f"a backbone named {name!r} is registered already; choose another name")
    _REGISTRY[name] = build


def backbone_names() -> list[str]:
    """Registered names."""
    return sorted(_REGISTRY)


def load_backbone(name_or_path: str | Path, device: torch.device | str | None = None) -> Backbone:
    """A frozen backbone: eval mode, no gradients.

    Args:
        name_or_path: a registered name or a checkpoint file written by `python -m orderrl.pretrain`.
        device: where it runs; None is the CPU.

    Raises:
        ValueError: if the name is unknown, or the file is not a whole checkpoint of a backbone.
    """
    name = str(name_or_path)
    if name in _REGISTRY:
        backbone = _REGISTRY[name]()
    elif name.endswith(".safetensors") or Path(name).exists():
        backbone = _from_file(Path(name))
    else:
        raise ValueError(
            f"backbone={name!r} is unknown; choose one of {', '.join(backbone_names())} or give the path of a "
            ".safetensors checkpoint"
        )
    if isinstance(backbone, torch.nn.Module):
        backbone.eval().requires_grad_(False)
        if device is not None:
            backbone.to(device)
    return backbone


def save_backbone(path: Path, backbone: OrderRobustTransformer, description: dict[str, Any]) -> None:
    """Write a backbone as safetensors with its config and a description of its training."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in backbone.state_dict().items()}
    save_checkpoint(path, tensors, {"kind": "backbone", "model": backbone.config.to_dict(), **description})


def with_block_size(backbone: OrderRobustTransformer, block_size: int) -> OrderRobustTransformer:
    """The same weights on another block grid; block_size = the grid's side is plain raster token order."""
    other = OrderRobustTransformer(replace(backbone.config, block_size=block_size))
    other.load_state_dict(backbone.state_dict())
    other.to(next(backbone.parameters()).device)
    return other.eval().requires_grad_(False)


def weights_fingerprint(module: torch.nn.Module) -> str:
    """Hash of a module's state dict: names and bytes."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def backbone_fingerprint(backbone: Backbone) -> str:
    """Hash of a backbone's block grid and weights; labels and planners remember it.

    Raises:
        TypeError: if the backbone has no state dict to hash.
    """
    if not isinstance(backbone, torch.nn.Module):
        raise TypeError(f"backbone of type {type(backbone).__name__} must be a torch.nn.Module to be fingerprinted")
    return hashlib.sha256(f"{backbone.geometry}:{weights_fingerprint(backbone)}".encode()).hexdigest()[:16]


def _from_file(path: Path) -> OrderRobustTransformer:
    tensors, description = load_checkpoint(path, "backbone")
    try:
        config = TransformerConfig(**description["model"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: does not describe an OrderRobustTransformer ({error}); make the checkpoint anew with "
            "`python -m orderrl.pretrain`"
        ) from error
    backbone = OrderRobustTransformer(config)
    load_state(backbone, tensors, path)
    return backbone


for _name in ("digits", "digits_raster"):
    register_backbone(_name, lambda name=_name: _from_file(WEIGHTS / f"{name}.safetensors"))  # type: ignore[misc]
