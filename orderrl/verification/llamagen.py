"""Recorded LlamaGen class-conditional transformers."""

import torch
from torch import Tensor
from torch.nn import functional as F

from orderrl.backbones.llamagen import RasterTransformer
from orderrl.backbones.published import llamagen_sampler
from orderrl.backbones.sampling import Sampling, filter_logits
from orderrl.verification.family import family_config, load_recorded
from orderrl.verification.fixture import Fixture


def replay(fixture: Fixture) -> dict[str, Tensor]:
    """Every output of a LlamaGen fixture, by name."""
    config = family_config(fixture, one_block=True)
    model = load_recorded(RasterTransformer(config), fixture)
    inputs = fixture.inputs
    tokens, labels = inputs["idx"], inputs["labels"]
    outputs = {"freqs_cis": model.rope}
    outputs["logits_teacher"] = model.teacher_forced(tokens, labels)
    outputs["loss_teacher"] = F.cross_entropy(outputs["logits_teacher"].mT, tokens)[None]
    outputs["logits_teacher_null"] = model.teacher_forced(tokens, torch.full_like(labels, config.num_classes))
    outputs["logits_cached"] = _cached(model, tokens, labels)
    for name in fixture.outputs:
        if name.startswith("gen_") and not name.endswith("_logits"):
            sampling = Sampling(
                top_k=1,
                guidance=fixture.argument(name, "cfg_scale"),
                guidance_interval=int(fixture.argument(name, "cfg_interval", -1)),
            )
            drawn = llamagen_sampler(model, labels, torch.zeros(tokens.shape, device=tokens.device), sampling)
            outputs[name], outputs[f"{name}_logits"] = drawn.tokens, drawn.logits
    if "filter_probs" in fixture.outputs:
        temperature, top_k, top_p = (fixture.argument("filter_probs", key) for key in ("temperature", "top_k", "top_p"))
        filtered = filter_logits(inputs["filter_logits"] / temperature, int(top_k), top_p)
        outputs["filter_probs"] = filtered.softmax(-1)
    return outputs


def _cached(model: RasterTransformer, tokens: Tensor, labels: Tensor) -> Tensor:
    """Logits when the true tokens are fed one at a time through the key-value cache."""
    x = torch.cat([model.cls_embedding(labels)[:, None], model.tok_embeddings(tokens[:, :-1])], 1)
    cache = model.empty(len(tokens), x.shape[1])
    logits = []
    for i in range(x.shape[1]):
        rope = model.rope[i].expand(len(x), 1, 1, -1, -1)
        hidden, entries = model.encode(x[:, i, None, None], rope, cache)
        cache = cache.append(entries, torch.ones(len(labels), dtype=torch.int64))
        logits.append(model.logits(model.norm(hidden[:, 0, 0])))
    return torch.stack(logits, 1)
