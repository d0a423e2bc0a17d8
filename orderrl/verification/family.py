"""What recorded models have in common: those of the LlamaGen family (LlamaGen, RandAR, ARPG), and tokenisers."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from orderrl.backbones.llamagen import TransformerConfig
from orderrl.runtime.checkpoint import load_state
from orderrl.tokenizers.layers import StackConfig, stack_config
from orderrl.verification.fixture import Fixture

Model = TypeVar("Model", bound=nn.Module)

LABELS = "cls_embedding.embedding_table.weight"
# Arguments that change what is computed, with the only value that our models know.
_FIXED = {"cls_token_num": 1, "model_type": "c2i", "ffn_dim_multiplier": None, "rope_base": 10000, "norm_eps": 1e-5}


def family_config(fixture: Fixture, one_block: bool = False) -> TransformerConfig:
    """Our configuration for the published `ModelArgs`; `block_size` is there the number of tokens.

    Args:
        one_block: the whole image is one block (raster models); else blocks are single tokens.

    Raises:
        ValueError: if an argument has a value that our models do not know.
    """
    arguments = fixture.arguments
    for name, known in (_FIXED | {"n_kv_head": arguments["n_head"]}).items():
        if arguments.get(name) not in (None, known):
            raise ValueError(f"{fixture.path}: {name}={arguments[name]!r} is not supported, only {known!r}")
    side = math.isqrt(arguments["block_size"])
    if side**2 != arguments["block_size"]:
        raise ValueError(f"{fixture.path}: block_size={arguments['block_size']} tokens are no square grid")
    return TransformerConfig(
        side,
        side,
        block_size=side if one_block else 1,
        vocab_size=arguments["vocab_size"],
        num_classes=arguments["num_classes"],
        dim=arguments["dim"],
        layers=arguments["n_layer"],
        heads=arguments["n_head"],
        multiple_of=arguments["multiple_of"],
    )


def load_recorded(model: Model, fixture: Fixture) -> Model:
    """The model with exactly the recorded weights, each used once; frozen, on the fixture's device."""
    weights = dict(fixture.weights)
    table = weights.get(LABELS)
    if table is not None and fixture.arguments.get("class_dropout_prob") == 0:
        # published models without class dropout have no row for the dropped label; nothing reads ours
        weights[LABELS] = torch.cat([table, torch.zeros_like(table[:1])])
    load_state(model, weights, fixture.path)
    return model.eval().requires_grad_(False).to(fixture.device)


def recorded_stack(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> StackConfig:
    """Shape of an encoder or decoder, without what only says again how all of these are built (`fixed`)."""
    return stack_config({key: value for key, value in values.items() if key not in fixed or fixed[key] != value})
