"""Recorded RandAR transformers."""

import re

import torch
from torch import Tensor
from torch.nn import functional as F

from orderrl.backbones.published import randar_sampler
from orderrl.backbones.randar import OrderRobustTransformer
from orderrl.backbones.sampling import Sampling
from orderrl.verification.family import family_config, load_recorded
from orderrl.verification.fixture import Fixture


def replay(fixture: Fixture) -> dict[str, Tensor]:
    """Every output of a RandAR fixture, by name."""
    model = load_recorded(OrderRobustTransformer(family_config(fixture)), fixture)
    tokens, labels, order = (fixture.inputs[name] for name in ("idx", "labels", "token_order"))
    logits = model.teacher_forced(tokens, labels, order)
    outputs = {
        "freqs_cis": model.rope,
        "position_instruction_tokens": model.instructions(order)[0],
        "token_logits": logits,
        "loss": F.cross_entropy(logits.mT, tokens.gather(1, order))[None],
    }
    for name in fixture.outputs:
        if name.startswith("gen_") and not name.endswith(("_logits", "_sizes")):
            drawn = randar_sampler(
                model,
                labels,
                order,
                torch.zeros(tokens.shape, device=tokens.device),
                _steps(fixture, name, tokens.shape[1]),
                _guidance(fixture, name),
                Sampling(top_k=1),
            )
            outputs[name], outputs[f"{name}_logits"] = drawn.tokens, drawn.logits
            outputs[f"{name}_sizes"] = torch.tensor(drawn.sizes)
    return outputs


def _steps(fixture: Fixture, name: str, tokens: int) -> int:
    """Published `num_inference_steps`; -1 is one token a step."""
    steps = int(fixture.argument(name, "num_inference_steps"))
    return tokens if steps == -1 else steps


def _guidance(fixture: Fixture, name: str) -> tuple[float, float]:
    """Scales at the start and the end, as the meaning states them."""
    found = re.search(r"cfg_scales \(\s*([\d.]+)\s*,\s*([\d.]+)\s*\)", fixture.meaning(name))
    if found is None:
        raise ValueError(f"{fixture.path}: the meaning of {name!r} does not state cfg_scales")
    return float(found.group(1)), float(found.group(2))
