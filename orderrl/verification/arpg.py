"""Recorded ARPG transformers."""

import torch
from torch import Tensor
from torch.nn import functional as F

from orderrl.backbones.arpg import ARPG
from orderrl.backbones.published import arpg_sampler
from orderrl.backbones.sampling import Sampling
from orderrl.verification.family import family_config, load_recorded
from orderrl.verification.fixture import Fixture


def replay(fixture: Fixture) -> dict[str, Tensor]:
    """Every output of an ARPG fixture, by name."""
    model = load_recorded(ARPG(family_config(fixture)), fixture)
    tokens, labels, orders = (fixture.inputs[name] for name in ("idx", "labels", "orders"))
    null = torch.full_like(labels, model.num_classes)
    logits = model.teacher_forced(tokens, labels, orders)
    outputs = {
        "freqs_cis": model.rope,
        "logits_causal": logits,
        "loss_causal": F.cross_entropy(logits.mT, tokens.gather(1, orders))[None],
        "logits_causal_null": model.teacher_forced(tokens, null, orders),
    }
    if "logits_eval_noncausal" in fixture.outputs:
        outputs["logits_eval_noncausal"] = _without_mask(model, tokens, labels, orders)
    for letter, arguments in fixture.description.get("generation_arguments", {}).items():
        drawn = arpg_sampler(
            model,
            labels,
            fixture.inputs["gen_order"],
            torch.zeros(tokens.shape, device=tokens.device),
            iterations=arguments["num_iter"],
            guidance=arguments["guidance_scale"],
            guidance_schedule=arguments["cfg_schedule"],
            schedule=arguments["sample_schedule"],
            sampling=Sampling(top_k=1),
        )
        name = f"gen_{letter}"
        outputs |= {name: drawn.tokens, f"{name}_logits": drawn.logits, f"{name}_sizes": torch.tensor(drawn.sizes)}
    return outputs


def _without_mask(model: ARPG, tokens: Tensor, labels: Tensor, orders: Tensor) -> Tensor:
    """The teacher-forced pass of the published eval mode, in which future tokens leak; recorded as a warning."""
    x = torch.cat([model.embed_class(labels)[:, None], model.embeddings(tokens.gather(1, orders)[:, :-1])], 1)
    rope = torch.cat([model.rope[:1].expand(len(x), 1, -1, -1), model.rope[orders[:, :-1] + 1]], 1)
    nothing = model.start(labels)
    nothing = type(nothing)(nothing.keys, nothing.values, torch.zeros(len(labels), dtype=torch.int64))
    entries = model.encode(x[:, None], rope[:, None], nothing, causal=False)
    return model.logits(model.predict(orders[:, None], nothing, entries, causal=False))[:, 0]
