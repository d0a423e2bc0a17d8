"""Replays recorded runs of LlamaGen's VQ tokeniser."""

from typing import Any

import torch
from torch import Tensor

from orderrl.tokenizers.registry import load_weights
from orderrl.tokenizers.vq import VQConfig, VQTokenizer
from orderrl.verification.family import recorded_stack
from orderrl.verification.fixture import Fixture

_DEFAULT_CH_MULT = (1, 1, 2, 2, 4)
_FIXED = {"in_channels": 3, "out_channels": 3, "norm_type": "group"}


def config_of(fixture: Fixture) -> VQConfig:
    """The shape that the published constructor's arguments and the fixture's overrides describe."""
    arguments = fixture.arguments
    stacks: dict[str, Any] = {}
    for part in ("encoder", "decoder"):
        known = {"ch_mult": arguments.get(f"{part}_ch_mult", _DEFAULT_CH_MULT)}
        known |= {"dropout": arguments.get("dropout_p", 0.0)}
        overrides = fixture.description["config"].get(f"{part}_overrides") or {}
        stacks[part] = recorded_stack(known | overrides, _FIXED)
    names = ("codebook_size", "codebook_embed_dim", "codebook_l2_norm", "z_channels")
    return VQConfig(**{name: arguments[name] for name in names if name in arguments}, **stacks)


@torch.no_grad()
def replay(fixture: Fixture) -> dict[str, Tensor]:
    """Compute every recorded output with our tokeniser under the recorded weights and inputs."""
    model = VQTokenizer(config_of(fixture)).eval()
    load_weights(model, fixture.weights, fixture.path)
    model = model.to(fixture.device)
    found: dict[str, Tensor] = {}
    latents = model.latents(fixture.inputs["image"])  # (n, e, h, w)
    quant, indices = model.quantise(latents)
    found |= {"encoder_out": latents, "quant": quant}
    found["indices"] = model.encode(fixture.inputs["image"]).view(indices.flatten(1).shape)
    found["decoded_recon"] = model.pixels(model.quantize.lookup(indices).movedim(-1, 1))
    if "codes" in fixture.inputs:
        codes = fixture.inputs["codes"]
        entry = model.quantize.lookup(codes.view(len(codes), *_grid(fixture, codes, latents))).movedim(-1, 1)
        found |= {"codebook_entry": entry, "decoded_codes": model.pixels(entry)}
    return {name: found[name].reshape(value.shape) for name, value in fixture.outputs.items() if name in found}


def _grid(fixture: Fixture, codes: Tensor, latents: Tensor) -> tuple[int, int]:
    """Rows and columns of the recorded codes: as looked up if that is recorded, else those of the image."""
    entry = fixture.outputs.get("codebook_entry", latents)
    height, width = entry.shape[-2:]
    if height * width * len(codes) != codes.numel():
        raise ValueError(f"{fixture.path}: codes {tuple(codes.shape)} do not fit a grid of {height}x{width}")
    return height, width
