"""The published samplers: their schedules, and where they agree with our block sampler."""

from __future__ import annotations

import pytest
import torch

from orderrl.backbones import Sampling
from orderrl.backbones.published import (
    arpg_sampler,
    arpg_sizes,
    llamagen_sampler,
    randar_sampler,
    randar_sizes,
)
from tests.backbones.families import images, tiny


@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 576])
def test_schedules_decide_every_token_once(tokens: int) -> None:
    for steps in {1, 2, 5, 16, 88, tokens}:
        if steps > tokens:
            continue
        sizes = randar_sizes(tokens, steps)
        assert sum(sizes) == tokens and min(sizes) >= 1 and sizes[0] == 1
        for schedule in ("arccos", "cosine"):
            sizes = arpg_sizes(tokens, steps, schedule)
            assert sum(sizes) == tokens and min(sizes) >= 1 and len(sizes) == steps
    assert randar_sizes(tokens, tokens) == arpg_sizes(tokens, tokens) == [1] * tokens


def test_sampling_one_token_a_step_is_the_block_sampler() -> None:
    """RandAR and ARPG with one token a step equal `decode` on blocks of one token, guidance off."""
    for family in ("randar", "arpg"):
        backbone = tiny(family, 4, 4, 1)
        data = images(backbone, 3)
        generator = torch.Generator().manual_seed(3)
        order = torch.rand(16, generator=generator).argsort().expand(3, -1)
        uniforms = torch.rand(3, 16, generator=generator, dtype=torch.float64)
        tokens, one = torch.zeros_like(data.tokens), torch.ones_like(data.labels)
        prefix = backbone.start(data.labels)
        for step in range(16):
            block = order[:, step : step + 1]
            drawn = backbone.decode(prefix, block, uniforms[:, step, None, None], Sampling()).tokens
            tokens = tokens.scatter(1, block, drawn[:, 0])
            prefix = backbone.extend(prefix, tokens, block, one)
        if family == "randar":
            published = randar_sampler(backbone, data.labels, order, uniforms, steps=16)
        else:
            published = arpg_sampler(backbone, data.labels, order[0], uniforms, iterations=16)
        assert torch.equal(published.tokens, tokens)


def test_randar_first_query_of_a_step_is_teacher_forced() -> None:
    """The other queries of a step see queries instead of tokens, so only the first agrees."""
    backbone = tiny("randar", 4, 4, 1)
    data = images(backbone, 3)
    order = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)).argsort(1)
    drawn = randar_sampler(backbone, data.labels, order, torch.rand(3, 16, dtype=torch.float64), steps=5)
    logits = backbone.teacher_forced(drawn.tokens, data.labels, order)
    firsts = [sum(drawn.sizes[:i]) for i in range(len(drawn.sizes))]
    assert torch.allclose(drawn.logits[:, firsts], logits[:, firsts], atol=1e-4)
    others = [i for i in range(16) if i not in firsts]
    assert (drawn.logits[:, others] - logits[:, others]).abs().max() > 1e-2


def test_llamagen_cache_is_teacher_forcing() -> None:
    backbone = tiny("llamagen")
    labels = torch.tensor([0, 1, 2])
    drawn = llamagen_sampler(backbone, labels, torch.rand(3, 16, dtype=torch.float64))
    logits = backbone.teacher_forced(drawn.tokens, labels)
    assert torch.allclose(drawn.logits, logits, atol=1e-4)


@pytest.mark.parametrize("interval", [-1, 0, 5, 14])
def test_guidance_interval(interval: int) -> None:
    """Tokens 0 .. interval + 1 are guided, the rest are drawn from the conditional logits alone."""
    backbone = tiny("llamagen")
    labels = torch.tensor([0, 1, 2])
    sampling = Sampling(guidance=3.0, guidance_interval=interval)
    drawn = llamagen_sampler(backbone, labels, torch.rand(3, 16, dtype=torch.float64), sampling)
    plain = backbone.teacher_forced(drawn.tokens, labels)
    null = backbone.teacher_forced(drawn.tokens, torch.full_like(labels, backbone.num_classes))
    guided = null + 3.0 * (plain - null)
    last = 16 if interval == -1 else interval + 2
    assert torch.allclose(drawn.logits[:, :last], guided[:, :last], atol=1e-3)
    assert torch.allclose(drawn.logits[:, last:], plain[:, last:], atol=1e-4)


def test_linear_guidance_rises_with_the_share_of_visible_tokens() -> None:
    sampling = Sampling(guidance=5.0, guidance_schedule="linear")
    assert sampling.scale(torch.tensor([0, 8, 16]), 16).tolist() == [1.0, 3.0, 5.0]


def test_refusals() -> None:
    backbone = tiny("arpg", 4, 4, 1)
    labels, order, uniforms = torch.tensor([0]), torch.arange(16), torch.rand(1, 16)
    with pytest.raises(ValueError, match=r"iterations must lie in 1\.\.16"):
        arpg_sampler(backbone, labels, order, uniforms, iterations=17)
    with pytest.raises(ValueError, match="schedule='square' is unknown"):
        arpg_sizes(16, 4, "square")
    with pytest.raises(ValueError, match="guidance_schedule='cosine' is unknown"):
        arpg_sampler(backbone, labels, order, uniforms, 4, guidance_schedule="cosine")
    with pytest.raises(ValueError, match=r"steps must lie in 1\.\.16"):
        randar_sizes(16, 0)
    with pytest.raises(ValueError, match="guidance_schedule='cosine' is unknown"):
        Sampling(guidance_schedule="cosine")
    with pytest.raises(ValueError, match="guidance_interval must be at least -1"):
        Sampling(guidance_interval=-2)
