"""Tokenisers by name or path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orderrl.runtime.checkpoint import load_checkpoint, load_state, rebuild, save_checkpoint
from orderrl.runtime.devices import checked_device
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.registry import Registry
from orderrl.runtime.weights import missing_weights, read_state
from orderrl.tokenizers.kl import KLConfig, KLTokenizer
from orderrl.tokenizers.layers import StackConfig
from orderrl.tokenizers.patches import PatchTokenizer
from orderrl.tokenizers.protocol import Tokenizer
from orderrl.tokenizers.vq import VQConfig, VQTokenizer

_CH_MULT_8 = StackConfig(ch_mult=(1, 2, 2, 4))
PRESETS: dict[str, VQConfig | KLConfig] = {
    "vq16": VQConfig(),
    "vq8": VQConfig(encoder=_CH_MULT_8, decoder=_CH_MULT_8),
    "kl16": KLConfig(),
}
PATCHES = {f"patches{side}": side for side in (2, 4, 8)}
_PUBLISHED = {"vq16": "vq_ds16_c2i.pt of LlamaGen", "vq8": "vq_ds8_c2i.pt of LlamaGen", "kl16": "kl16.ckpt of MAR"}


def build_tokenizer(config: VQConfig | KLConfig, name: str) -> VQTokenizer | KLTokenizer:
    """A tokeniser of the given shape with fresh weights."""
    return VQTokenizer(config, name) if isinstance(config, VQConfig) else KLTokenizer(config, name)


def load_weights(tokenizer: VQTokenizer | KLTokenizer, state: Mapping[str, Tensor], path: Path | str) -> None:
    """Load a published state dict, every key of it but those that only training uses.

    Raises:
        ValueError: if keys are missing, unexpected or of another shape.
    """
    used = {key: value for key, value in state.items() if not key.startswith(tokenizer.UNUSED)}
    load_state(tokenizer, used, path)


@isolated_float32
def load_tokenizer(
    name: str | Path, path: str | Path | None = None, device: torch.device | str | None = None
) -> VQTokenizer | KLTokenizer:
    """A frozen tokeniser: eval mode, no gradients.

    Args:
        name: vq16, vq8 or kl16, with the path of the published weights; patches2, patches4 or patches8, which have
            none; small, with the path of a tokeniser written by
            `python -m orderrl.pretrain backbone=none tokenizer=small`; that path alone; a registered name, or the
            module:attribute of a function of the path that makes a tokeniser.
        path: the weights: .safetensors, .pt, .pth or .ckpt, or a hub name for published ones (`hf://OWNER/NAME/FILE`).
        device: where it runs; None is the CPU.

    Raises:
        ValueError: if the name or the device is unknown, a path is needed, or the file does not fit or is not finite.
        FileNotFoundError: if there is no such file.
    """
    name = str(name)
    where = None if device is None else checked_device(device)
    if name not in TOKENIZERS and path is None and (name.endswith(".safetensors") or Path(name).exists()):
        tokenizer: Any = _own(Path(name))
    elif TOKENIZERS.given(name) is not None:
        tokenizer = TOKENIZERS.find(name)(path)
    else:
        raise ValueError(
            f"tokenizer={name!r} is unknown; choose one of {', '.join(TOKENIZERS)}, module:attribute, or give the path "
            "of a .safetensors file written by pretrain"
        )
    if name not in TOKENIZERS.shipped and TOKENIZERS.given(name) is not None:
        if not all(isinstance(tokenizer, kind) for kind in (torch.nn.Module, Tokenizer)):
            raise ValueError(f"tokenizer {name!r} must give a torch.nn.Module with the members of `Tokenizer`")
        tokenizer.name = name  # token sets remember it
    tokenizer.eval().requires_grad_(False)
    return tokenizer if where is None else tokenizer.to(where)


def save_tokenizer(path: Path | str, tokenizer: VQTokenizer, description: Mapping[str, Any]) -> None:
    """Write a tokeniser as safetensors with its config and a description of its training."""
    described = {"kind": "tokenizer", "name": tokenizer.name, "model": tokenizer.config.to_dict(), **description}
    save_checkpoint(path, tokenizer.state_dict(), described)


def _published(name: str, path: str | Path | None) -> VQTokenizer | KLTokenizer:
    if path is None:
        raise missing_weights(f"tokenizer={name}", "tokenizer.path", _PUBLISHED[name])
    tokenizer = build_tokenizer(PRESETS[name], name)
    load_weights(tokenizer, read_state(path), path)
    return tokenizer


def _patches(name: str, path: str | Path | None) -> PatchTokenizer:
    if path is not None:
        raise ValueError(f"tokenizer={name} has no weights, got path={str(path)!r}; leave it out")
    return PatchTokenizer(PATCHES[name])


def _own(path: Path) -> VQTokenizer:
    tensors, description = load_checkpoint(path, "tokenizer")
    try:
        name, shape = str(description["name"]), description["model"]
        config = VQConfig(**shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: does not describe a VQ tokeniser ({error}); make it anew with "
            "`python -m orderrl.pretrain backbone=none tokenizer=small`"
        ) from error
    return rebuild(lambda: VQTokenizer(config, name), shape, tensors, path)


def _small(path: str | Path | None) -> VQTokenizer:
    if path is None:
        raise ValueError(
            "tokenizer=small needs tokenizer.path=FILE.safetensors; make one with "
            "`python -m orderrl.pretrain backbone=none tokenizer=small data=folder data.root=...`"
        )
    return _own(Path(path))


TOKENIZERS: Registry[Callable[[str | Path | None], Any]] = Registry(
    "tokenizer",
    "orderrl.tokenizers",
    {
        **{name: partial(_published, name) for name in PRESETS},
        **{name: partial(_patches, name) for name in PATCHES},
        "small": _small,
    },
    taken=("none",),
)
"""Functions of the weights' path, or None, that make a tokeniser: a module that is a `Tokenizer`."""
register_tokenizer = TOKENIZERS.register
