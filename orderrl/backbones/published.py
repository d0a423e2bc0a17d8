"""The samplers of the published models, step by step as they were published.

They differ from our block sampler (`Backbone.decode`) in what the tokens of one step see of each other, so both are
kept and both are named: RandAR's queries of one step see each other causally, ARPG's tokens of one iteration see each
other in both directions, LlamaGen draws one token at a time (`RasterTransformer.decode_steps`).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from orderrl.backbones.arpg import ARPG
from orderrl.backbones.cache import ChainEntries, PrefixCache
from orderrl.backbones.llamagen import RasterTransformer
from orderrl.backbones.randar import OrderRobustTransformer
from orderrl.backbones.sampling import SCHEDULES, Sampling, sample_tokens

ARPG_SCHEDULES = ("arccos", "cosine")


class PublishedSamples(NamedTuple):
    """What a published sampler drew."""

    tokens: Tensor  # (M, N) int64, raster order
    logits: Tensor  # (M, N, vocab), guided logits in the order of generation
    sizes: list[int]  # tokens drawn at each step


def llamagen_sampler(
    model: RasterTransformer, labels: Tensor, uniforms: Tensor, sampling: Sampling = Sampling()
) -> PublishedSamples:
    """LlamaGen's sampler: raster order, one token a step, guidance in an interval.

    Args:
        labels: (M,) int64.
        uniforms: (M, N) in [0, 1), in raster order.
        sampling: temperature, top-k, top-p, guidance and its interval.
    """
    steps = list(model.decode_steps(labels, uniforms, sampling, sampling.guidance != 1))
    tokens, logits = (torch.stack(part, 1) for part in zip(*steps, strict=True))
    return PublishedSamples(tokens, logits, [1] * len(steps))


# ---------------------------------------------------------------------- RandAR


def randar_sizes(tokens: int, steps: int) -> list[int]:
    """Tokens of each step: the first draws one, then floor((1 - cos(pi/2 (s+1)/S)) N + 1) are decided after step s+1.

    Args:
        tokens: N.
        steps: S, the published `num_inference_steps`; S = N draws one token a step.

    Raises:
        ValueError: if steps is not in 1..N.
    """
    if not 1 <= steps <= tokens:
        raise ValueError(f"steps must lie in 1..{tokens}, the tokens of the image, got {steps}")
    sizes, decided, step = [1], 1, 1
    while decided < tokens:
        target = min(tokens, math.floor((1 - math.cos(math.pi / 2 * (step + 1) / steps)) * tokens + 1))
        size = min(max(1, target - decided), tokens - decided)
        sizes.append(size)
        decided += size
        step += 1
    return sizes


@torch.no_grad()
def randar_sampler(
    model: OrderRobustTransformer,
    labels: Tensor,
    token_order: Tensor,
    uniforms: Tensor,
    steps: int,
    guidance: tuple[float, float] = (1.0, 1.0),
    sampling: Sampling = Sampling(),
) -> PublishedSamples:
    """RandAR's parallel decoding (Pang et al., 2024): the queries of a step see each other causally.

    After a step only its first query keeps its cache entry; the others are encoded again between their tokens, in one
    forward with the queries of the next step.

    Args:
        labels: (M,) int64.
        token_order: (M, N) int64, raster positions in the order of generation.
        uniforms: (M, N) in [0, 1), in the order of generation.
        steps: published `num_inference_steps`.
        guidance: scale at the start and at the end; it rises with the share of tokens decided before the step. No
            guidance if the end is not above 1.
        sampling: temperature, top-k and top-p; its guidance is not read.

    Raises:
        ValueError: if steps is not in 1..N.
    """
    if model.relative:
        raise ValueError("RandAR's sampler says where the next token lies, not how far it is; use absolute positions")
    total = model.geometry.num_tokens
    sizes = randar_sizes(total, steps)
    guided = guidance[1] > 1
    sides = [labels, torch.full_like(labels, model.num_classes)] if guided else [labels]
    cache = model.start(torch.cat(sides))
    order = token_order.repeat(len(sides), 1)
    done = torch.zeros_like(labels[:0])
    drawn: list[Tensor] = []
    logits_seen: list[Tensor] = []
    decided = 0
    pending = 0  # tokens of the last step, whose contents are not in the cache yet
    for size in sizes:
        queries, query_rope = model.instructions(order[:, decided : decided + size])
        if pending:
            place = slice(decided - pending, decided)
            pairs, rope = model.interleave(order[:, place], done.repeat(len(sides), 1))
            queries = torch.cat([pairs[:, 1:], queries], dim=1)  # without the first query, which the cache keeps
            query_rope = torch.cat([rope[:, 1:], query_rope], dim=1)
        hidden, entries = model.encode(queries[:, None], query_rope[:, None], cache)
        known = max(2 * pending - 1, 0) + 1
        cache = cache.append(entries, torch.full((len(order),), known))
        parts = model.logits(model.norm(hidden[:, 0, -size:])).float().chunk(len(sides))
        scale = guidance[0] + (guidance[1] - guidance[0]) * decided / total
        logits = parts[1] + scale * (parts[0] - parts[1]) if guided else parts[0]
        done = sample_tokens(logits, uniforms[:, decided : decided + size], sampling)
        drawn.append(done)
        logits_seen.append(logits)
        decided, pending = decided + size, size
    tokens = torch.cat(drawn, 1)
    return PublishedSamples(torch.zeros_like(tokens).scatter(1, token_order, tokens), torch.cat(logits_seen, 1), sizes)


# ---------------------------------------------------------------------- ARPG


def arpg_sizes(tokens: int, iterations: int, schedule: str = "arccos") -> list[int]:
    """Tokens of each iteration.

    Args:
        tokens: N.
        iterations: published `num_iter`.
        schedule: "arccos" or "cosine": the share that is still masked after an iteration.

    Raises:
        ValueError: if the schedule is unknown or iterations is not in 1..N.
    """
    if schedule not in ARPG_SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; choose one of {', '.join(ARPG_SCHEDULES)}")
    if not 1 <= iterations <= tokens:
        raise ValueError(f"iterations must lie in 1..{tokens}, the tokens of the image, got {iterations}")
    sizes, remaining = [], tokens
    for step in range(iterations):
        progress = (step + 1) / iterations
        share = math.acos(progress) / (math.pi / 2) if schedule == "arccos" else math.cos(math.pi / 2 * progress)
        masked = max(1, min(math.floor(tokens * share), remaining - 1))
        if step == iterations - 1:
            masked = 0
        sizes.append(remaining - masked)
        remaining = masked
    return sizes


@torch.no_grad()
def arpg_sampler(
    model: ARPG,
    labels: Tensor,
    token_order: Tensor,
    uniforms: Tensor,
    iterations: int,
    guidance: float = 1.0,
    guidance_schedule: str = "linear",
    schedule: str = "arccos",
    sampling: Sampling = Sampling(),
) -> PublishedSamples:
    """ARPG's sampler (Li et al., 2025): the tokens of an iteration see each other in both directions.

    Args:
        labels: (M,) int64.
        token_order: (N,) int64, raster positions in the order of generation, shared by all images.
        uniforms: (M, N) in [0, 1), in the order of generation.
        iterations: published `num_iter`.
        guidance: scale; the dropped class always runs beside.
        guidance_schedule: "linear" (rises with the share of tokens decided, this iteration's included) or "constant".
        schedule: "arccos" or "cosine", see `arpg_sizes`.
        sampling: temperature, top-k and top-p; its guidance is not read.

    Raises:
        ValueError: if a schedule is unknown or iterations is not in 1..N.
    """
    if guidance_schedule not in SCHEDULES:
        raise ValueError(f"guidance_schedule={guidance_schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    total = model.geometry.num_tokens
    sizes = arpg_sizes(total, iterations, schedule)
    both = torch.cat([labels, torch.full_like(labels, model.num_classes)])
    cache: PrefixCache | None = None
    order = token_order.expand(len(both), -1)
    drawn: list[Tensor] = []
    logits_seen: list[Tensor] = []
    decided = 0
    for size in sizes:
        if cache is None:
            cache = model.start(both)
        else:
            fed = order[:, None, decided - drawn[-1].shape[1] : decided]
            contents = model.embeddings(drawn[-1].repeat(2, 1))[:, None]
            entries = model.encode(contents, model.rope[fed + 1], cache, causal=False)
            cache = cache.append(entries, torch.full((len(both),), fed.shape[2]))
        hidden = model.predict(order[:, None, decided : decided + size], cache, ChainEntries((), ()), causal=False)
        conditional, unconditional = model.logits(hidden[:, 0]).float().chunk(2)
        decided += size
        scale = 1 + (guidance - 1) * decided / total if guidance_schedule == "linear" else guidance
        logits = unconditional + scale * (conditional - unconditional)
        drawn.append(sample_tokens(logits, uniforms[:, decided - size : decided], sampling))
        logits_seen.append(logits)
    tokens = torch.cat(drawn, 1)
    raster = torch.zeros_like(tokens).scatter(1, token_order.expand(len(tokens), -1), tokens)
    return PublishedSamples(raster, torch.cat(logits_seen, 1), sizes)
