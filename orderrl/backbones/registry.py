"""Backbones by name or path."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from orderrl.backbones.arpg import ARPG
from orderrl.backbones.chains import ChainBackbone
from orderrl.backbones.cpu_linear import pack_weights as set_packing
from orderrl.backbones.layers import TransformerBlock
from orderrl.backbones.llamagen import RasterTransformer, TransformerConfig
from orderrl.backbones.mar_backbone import MaskedConfig, MaskedTransformer
from orderrl.backbones.memory import Packing
from orderrl.backbones.origin import Origin
from orderrl.backbones.presets import PRESETS
from orderrl.backbones.protocol import Backbone, backbone_device
from orderrl.backbones.randar import OrderRobustTransformer
from orderrl.runtime.checkpoint import load_checkpoint, rebuild, save_checkpoint
from orderrl.runtime.devices import checked_device, default_dtype
from orderrl.runtime.distributed import print_once
from orderrl.runtime.finite import OVERFLOW, require_finite
from orderrl.runtime.hub import files_beside, hub_file
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.registry import Registry
from orderrl.runtime.weights import HUB, load_weights, local_path, missing_weights, weights_fingerprint

WEIGHTS = Path(__file__).parent.parent / "weights"
TrainableBackbone = OrderRobustTransformer | RasterTransformer | ARPG | MaskedTransformer
Model = TypeVar("Model", bound=TrainableBackbone)
# Not the modes that record CUDA graphs: a layer's entries are kept, and its next run would overwrite them.
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
_FAMILIES: dict[str, tuple[type[Any], type[Any]]] = {
    "llamagen": (RasterTransformer, TransformerConfig),
    "randar": (OrderRobustTransformer, TransformerConfig),
    "arpg": (ARPG, TransformerConfig),
    "mar": (MaskedTransformer, MaskedConfig),
}


def _shipped(name: str) -> Backbone:
    return _from_file(WEIGHTS / f"{name}.safetensors")


BACKBONES: Registry[Callable[[], Backbone]] = Registry(
    "backbone",
    "orderrl.backbones",
    {name: partial(_shipped, name) for name in ("digits", "digits_raster", "digits_mar", "canvas")},
    taken=(*PRESETS, "small", "none", "cifar_mar"),
)
register_backbone = BACKBONES.register


def backbone_names() -> list[str]:
    """Registered names."""
    return sorted(BACKBONES)


@isolated_float32
def load_backbone(
    name_or_path: str | Path,
    path: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    shape: Mapping[str, Any] | None = None,
    memory_gb: float | None = None,
    compile: str | None = None,
    pack_weights: bool = True,
    cuda_graph: bool | None = None,
) -> Backbone:
    """A frozen backbone: eval mode, no gradients.

    Args:
        name_or_path: a registered name, the module:attribute of a function that makes a backbone, a checkpoint that
            `python -m orderrl.pretrain` wrote, `hf://OWNER/NAME[@REVISION]` for one on the Hub, or a published model
            (`published_names`), which needs `path`.
        path: weights of a published model: .safetensors (also the index of shards), .pt, .pth, or
            `hf://OWNER/NAME[@REVISION]/FILE`.
        device: where it runs; None is the CPU.
        dtype: of the parameters: float32, bfloat16 or float16; None leaves them, and makes published models float32;
            "auto" is bfloat16 on GPUs that have it, elsewhere None.
        shape: values of a published model's configuration to replace, such as block_size.
        memory_gb: what the activations of one forward may take, 10^9 bytes; None is what is free. Results do not depend
            on it.
        compile: `torch.compile` mode of the layers; None is eager. Needs a compiler, and minutes at the first call.
        pack_weights: on CPUs, keep a second copy of the weights in the layout that their products read fastest; results
            agree up to floating-point summation.
        cuda_graph: on CUDA, draw a block as one recorded graph: None records shapes that come again and draws eagerly
            where it cannot, with a warning; True records all and fails where it cannot; False never.

    Raises:
        ValueError: if the name or the device is unknown, or the weights are missing, damaged, not finite or of another
            model.
        FileNotFoundError: if there is no such file.
    """
    name = str(name_or_path)
    where = None if device is None else checked_device(device)
    dtype = default_dtype(where or torch.device("cpu")) if dtype == "auto" else dtype
    if name in PRESETS:
        if path is None:
            raise missing_weights(f"backbone {name!r}", "path", PRESETS[name].weights)
        backbone: Backbone = build_backbone(name, dtype=dtype or torch.float32, shape=shape)
        load_weights(_module(backbone), path)
    elif path is not None or shape:
        raise ValueError(f"path and shape belong to published models, {name!r} is none of {', '.join(PRESETS)}")
    elif name.startswith(HUB):
        backbone = _from_hub(name)
    elif name not in BACKBONES and (name.endswith(".safetensors") or Path(name).exists()):
        backbone = _from_file(Path(name))
    elif BACKBONES.given(name) is not None:
        build: Any = BACKBONES.find(name)
        backbone = build if hasattr(build, "context_loss") and not isinstance(build, type) else build()
        if not hasattr(backbone, "context_loss"):
            raise ValueError(f"backbone {name!r} must be a function that gives a backbone, it gives {backbone!r:.60}")
    else:
        raise ValueError(
            f"backbone={name!r} is unknown; choose one of {', '.join(backbone_names() + published_names())}, "
            "module:attribute, or give the path of a .safetensors checkpoint"
        )
    if isinstance(backbone, torch.nn.Module):
        backbone.eval().requires_grad_(False)
        if dtype is not None:
            _cast(backbone, as_dtype(dtype))
        require_finite(path or name, backbone.state_dict(), OVERFLOW)
        if where is not None:
            backbone.to(where)
        set_packing(backbone, pack_weights)
    if memory_gb is not None:
        if not hasattr(backbone, "packing"):
            raise ValueError(f"memory_gb={memory_gb}: a backbone of type {type(backbone).__name__} bounds no forward")
        backbone.packing = Packing(memory_gb)
    if compile is not None:
        _compile_layers(backbone, compile)
    _choose_graphs(backbone, cuda_graph, compile is not None)
    return backbone


def _choose_graphs(backbone: Backbone, wanted: bool | None, compiled: bool) -> None:
    """Say whether blocks are drawn as CUDA graphs; refuse what is asked for and not possible."""
    device = backbone_device(backbone)
    able = isinstance(backbone, ChainBackbone)
    if wanted and not (able and device.type == "cuda" and not compiled):
        raise ValueError(
            f"cuda_graph=true needs a backbone of the RandAR or ARPG family, device=cuda and compile=null; got a "
            f"{type(backbone).__name__} on {device}" + (", compiled" if compiled else "")
        )
    if isinstance(backbone, ChainBackbone):
        backbone.graphs.wanted = False if compiled else wanted


def _compile_layers(backbone: Backbone, mode: str) -> None:
    """Compile what every layer does to chains."""
    layers = [part for part in _module(backbone).modules() if isinstance(part, TransformerBlock)]
    if not layers:
        raise ValueError(f"compile={mode!r} is for backbones of the LlamaGen family: RandAR and LlamaGen")
    if mode not in COMPILE_MODES:
        raise ValueError(f"compile={mode!r} is unknown; choose one of {', '.join(COMPILE_MODES)} or null")
    for layer in layers:
        layer.chain = torch.compile(layer.chain, mode=mode, dynamic=True)  # type: ignore[method-assign]


def build_backbone(
    name: str, *, dtype: torch.dtype | str = torch.float32, shape: Mapping[str, Any] | None = None
) -> TrainableBackbone:
    """A published model with random weights, on the current default device.

    Args:
        name: of `published_names`.
        dtype: of the parameters.
        shape: values of the configuration to replace.

    Raises:
        ValueError: if the name or a value is unknown.
    """
    if name not in PRESETS:
        raise ValueError(f"backbone={name!r} is no published model; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(as_dtype(dtype))
    try:
        return new_backbone(preset.family, {**preset.shape, **(shape or {})})
    finally:
        torch.set_default_dtype(before)


def published_names() -> list[str]:
    """Names of published models."""
    return list(PRESETS)


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating dtype by name: float32, bfloat16 or float16."""
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if isinstance(dtype, torch.dtype) and dtype in allowed.values():
        return dtype
    if dtype not in allowed:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(allowed)}")
    return allowed[str(dtype)]


def save_backbone(path: Path, backbone: TrainableBackbone, description: dict[str, Any]) -> None:
    """Write a backbone as safetensors with its family, its config and a description of its training."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in backbone.state_dict().items()}
    family = next(name for name, (model, _) in _FAMILIES.items() if type(backbone) is model)
    config = {"kind": "backbone", "family": family, "model": backbone.config.to_dict(), **description}
    save_checkpoint(path, tensors, config)


@isolated_float32
def with_block_size(backbone: Model, block_size: int) -> Model:
    """The same weights on another block grid; block_size = the grid's side is plain raster token order."""
    other: Any = type(backbone)(replace(backbone.config, block_size=block_size))  # type: ignore[arg-type]
    other.load_state_dict(backbone.state_dict())
    parameter = next(backbone.parameters())
    _cast(other, parameter.dtype)
    other.to(parameter.device)
    frozen: Model = other.eval().requires_grad_(False)
    return frozen


def backbone_fingerprint(backbone: Backbone) -> str:
    """Hash of a backbone's block grid, configuration (if it has one) and weights; labels and planners remember it.

    Raises:
        TypeError: if the backbone has no state dict to hash.
    """
    if not isinstance(backbone, torch.nn.Module):
        raise TypeError(f"backbone of type {type(backbone).__name__} must be a torch.nn.Module to be fingerprinted")
    what = f"{backbone.geometry}:{getattr(backbone, 'config', None)}:{weights_fingerprint(backbone)}"
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def require_made_for(path: Path | str, description: Mapping[str, Any], backbone: Backbone) -> None:
    """Refuse a planner for a backbone of other data; of other weights for the same data, say so in a line.

    It has learnt to read the hidden states of one backbone. Files of older versions do not say whose.

    Args:
        path: of the planner, for the message.
        description: what its file says.
        backbone: that it is to read.

    Raises:
        ValueError: naming what both were trained on.
    """
    made, here = description.get("backbone"), backbone_fingerprint(backbone)
    if made is None or made == here:
        return
    data, own = description.get("data"), getattr(backbone, "trained_on", None)
    moved = str(data).startswith("tokens:") and str(own).startswith("tokens:")  # the same set in another folder?
    if data is not None and own is not None and data != own and not moved:
        raise ValueError(
            f"{path}: a planner for a backbone of {data} ({made}) cannot read one of {own} ({here}); use the backbone "
            "that it was trained with, or train one for this backbone with `python -m orderrl.train agent=bc`"
        )
    print_once(
        f"{path}: a planner for backbone {made} reads {here}, other weights or another dtype than it was trained with"
    )


def _from_file(path: Path) -> TrainableBackbone:
    tensors, description = load_checkpoint(path, "backbone")
    try:
        family, shape = description.get("family", "randar"), description["model"]
        config = backbone_config(family, shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: does not describe a backbone ({type(error).__name__}: {error})") from error
    backbone: TrainableBackbone = rebuild(lambda: _FAMILIES[family][0](config), shape, tensors, path)
    backbone.origin, data = Origin.of(description, path), description.get("data")
    backbone.trained_on = data if isinstance(data, str) else None
    return backbone


def _from_hub(name: str) -> TrainableBackbone:
    """A backbone of the Hub, on this machine with what belongs to it."""
    backbone = _from_file(hub_file(name, "backbone"))
    folder = name.rpartition("/")[0] if name.endswith(".safetensors") else name
    for beside in files_beside({} if backbone.origin is None else backbone.origin.described()):
        local_path(f"{folder}/{beside}")
    return backbone


def new_backbone(family: str, shape: Mapping[str, Any]) -> TrainableBackbone:
    """An untrained backbone.

    Args:
        family: "llamagen", "randar", "arpg" or "mar".
        shape: arguments of the family's configuration.

    Raises:
        ValueError: if the family or an argument is unknown, or a value is not allowed.
    """
    config = backbone_config(family, shape)
    return _FAMILIES[family][0](config)


def backbone_config(family: str, shape: Mapping[str, Any]) -> TransformerConfig | MaskedConfig:
    """The configuration of an untrained backbone; arguments and errors as of `new_backbone`."""
    if family not in _FAMILIES:
        raise ValueError(f"family={family!r} is unknown; choose one of {', '.join(_FAMILIES)}")
    try:
        return _FAMILIES[family][1](**shape)
    except TypeError as error:
        raise ValueError(f"shape of a {family} backbone: {error}") from error


def _module(backbone: Backbone) -> torch.nn.Module:
    assert isinstance(backbone, torch.nn.Module)
    return backbone


def _cast(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Parameters alone: rotary tables stay in float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
