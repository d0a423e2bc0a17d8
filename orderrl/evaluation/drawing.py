"""Images drawn by the backbone in the order that a policy chooses."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from orderrl.agents.play import play
from orderrl.agents.policies import Policy, ReferencePolicy
from orderrl.agents.schedules import reads_content
from orderrl.backbones import ARPG, Backbone, OrderRobustTransformer, RasterTransformer, Sampling
from orderrl.backbones.mar_backbone import MaskedTransformer
from orderrl.backbones.protocol import backbone_device
from orderrl.backbones.published import PublishedSamples, arpg_sampler, llamagen_sampler, randar_sampler
from orderrl.data import TokenSet
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.replay import replay
from orderrl.envs.reward import RewardConfig
from orderrl.runtime.isolation import isolated
from orderrl.runtime.progress import Advance, unseen
from orderrl.runtime.random import Stream, keyed_normal, keyed_uniform


@dataclass(frozen=True)
class Generated:
    """Generated images."""

    tokens: Tensor  # (n, N) int64
    labels: Tensor  # (n,) int64, the classes conditioned on
    # (n, B) int64, the step that revealed each block; (n, N), of each token, from a published sampler
    reveal_step: Tensor
    seconds: float  # wall time, policy included


@isolated
@torch.no_grad()
def generate_images(
    backbone: Backbone,
    data: TokenSet,
    policy: Policy | ReferencePolicy,
    budgets: tuple[int, ...],
    labels: Tensor,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    batch_size: int = 250,
    advance: Advance = unseen,
    candidates: int = 1,
) -> Generated:
    """Generate one image for each label.

    Args:
        data: names the shape of the images; none of them is read.
        labels: (n,) int64 classes.
        sampling: how tokens are drawn.
        seed: image i is drawn with seed + i, whatever the batch.
        advance: called with the number of images that were done.
        candidates: images drawn for one, with seeds and sampled orders of their own; the one is kept that has the
            shortest code (`drawn_code_lengths`).
    """
    if candidates > 1:
        start = time.perf_counter()
        how = (backbone, data, policy, budgets, labels, sampling)
        sets = [generate_images(*how, seed + number * len(labels), batch_size) for number in range(candidates)]
        best = torch.stack([drawn_code_lengths(backbone, data, made, batch_size) for made in sets]).argmin(0)
        rows = torch.arange(len(labels))
        tokens, reveal_step = (
            torch.stack([getattr(made, name) for made in sets])[best, rows] for name in ("tokens", "reveal_step")
        )
        advance(len(labels))
        return Generated(tokens, sets[0].labels, reveal_step, time.perf_counter() - start)
    config = CoreConfig("generate", budgets, sampling=sampling, strict=True, hindsight=False)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []  # and not the cores: their caches are large
    for rows in torch.arange(len(labels)).split(batch_size):
        core = NextBlockCore(backbone, data, len(rows), config, seed + int(rows[0]), observe=reads_content(policy))
        core.reset(labels=labels[rows])
        play(core, policy, generator)
        parts.append((core.tokens.cpu(), core.labels.cpu(), core.reveal_step.cpu()))
        advance(len(rows))
    tokens, drawn_labels, reveal_step = (torch.cat(part) for part in zip(*parts, strict=True))
    return Generated(tokens, drawn_labels, reveal_step, time.perf_counter() - start)


@torch.no_grad()
def drawn_code_lengths(backbone: Backbone, data: TokenSet, made: Generated, batch_size: int = 250) -> Tensor:
    """What the backbone itself charges drawn images in the order of their drawing, (n,) nats (DiffLoss units)."""
    config, lengths = CoreConfig("generate", reward=RewardConfig(objective="likelihood")), []
    blocks = torch.arange(backbone.geometry.num_blocks)
    for rows in torch.arange(len(made.tokens)).split(batch_size):
        images = data.holding(made.tokens[rows], made.labels[rows])
        core = NextBlockCore(backbone, data, len(rows), config, observe=False)
        tokens, labels, step = (part.to(core.device) for part in (images.tokens, images.labels, made.reveal_step[rows]))
        losses, _ = backbone.context_loss(backbone.start(labels), tokens, blocks.to(labels).expand(len(rows), -1))
        total = replay(core, images, step, torch.zeros_like(step))
        lengths.append((losses.loss.sum(-1) - total * backbone.geometry.num_tokens).cpu())
    return torch.cat(lengths)


@isolated
@torch.no_grad()
def generate_published(
    backbone: Backbone,
    labels: Tensor,
    steps: int | None = None,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    batch_size: int = 250,
    advance: Advance = unseen,
) -> Generated:
    """Generate one image for each label with the sampler that the model was published with, in random token order.

    Args:
        backbone: LlamaGen (raster order), RandAR, ARPG or MAR.
        steps: of RandAR's schedule, iterations of ARPG or MAR; None draws one token a step, MAR in up to 64 iterations.
        labels, sampling, seed, batch_size, advance: as in `generate_images`; ARPG's images share the order of the seed.

    Raises:
        ValueError: if the backbone has no published sampler, or it cannot do what `sampling` asks for.
    """
    device, total = backbone_device(backbone), backbone.geometry.num_tokens
    start = time.perf_counter()
    parts: list[tuple[Tensor, Tensor]] = []
    for rows in torch.arange(len(labels)).split(batch_size):
        seeds, places = (rows + seed).to(device)[:, None], torch.arange(total, device=device)
        order = keyed_uniform((Stream.POLICY, seeds, places), device).argsort(1)
        uniforms = keyed_uniform((Stream.TOKEN, seeds, places), device)
        wanted = labels[rows].to(device)
        if isinstance(backbone, MaskedTransformer):
            parts.append(_published_masked(backbone, wanted, order, seeds, steps or min(64, total), sampling))
        else:
            shared = keyed_uniform((Stream.POLICY, seed, places), device).argsort(0)
            drawn, order = _published_causal(backbone, wanted, order, shared, uniforms, steps or total, sampling)
            step = torch.arange(len(drawn.sizes)).repeat_interleave(torch.tensor(drawn.sizes)).to(device)
            parts.append((drawn.tokens, torch.zeros_like(order).scatter(1, order, step.expand_as(order))))
        advance(len(rows))
    tokens, reveal_step = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Generated(tokens, labels, reveal_step, time.perf_counter() - start)


def _published_causal(
    backbone: Backbone, labels: Tensor, order: Tensor, shared: Tensor, uniforms: Tensor, steps: int, sampling: Sampling
) -> tuple[PublishedSamples, Tensor]:
    """Samples of a causal model and their token order (M, N)."""
    linear = sampling.guidance_schedule == "linear"
    if isinstance(backbone, RasterTransformer):
        raster = torch.arange(order.shape[1]).to(order)
        return llamagen_sampler(backbone, labels, uniforms, sampling), raster.expand_as(order)
    if isinstance(backbone, OrderRobustTransformer):
        guidance = (1.0 if linear else sampling.guidance, sampling.guidance)
        return randar_sampler(backbone, labels, order, uniforms, steps, guidance, sampling), order
    if isinstance(backbone, ARPG):
        drawn = arpg_sampler(
            backbone, labels, shared, uniforms, steps, sampling.guidance, sampling.guidance_schedule, sampling=sampling
        )
        return drawn, shared.expand_as(order)
    raise ValueError(f"a backbone of type {type(backbone).__name__} has no published sampler; choose another policy")


def _published_masked(
    backbone: MaskedTransformer, labels: Tensor, order: Tensor, seeds: Tensor, steps: int, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Tokens of a masked model and the iteration that drew each of them (M, N)."""
    channels = torch.arange(backbone.token_dim, device=labels.device)

    def noise(iteration: int, images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        step = torch.arange(backbone.diffloss.num_sampling_steps + 1, device=labels.device)[:, None, None]
        key = (Stream.NOISE, seeds[images], positions[:, None], step, channels)
        drawn = keyed_normal(key, labels.device).float()  # (1 + S, n, C)
        return drawn[0], drawn[1:]

    iterations = backbone.sampling_iterations(
        labels, order, noise, steps, sampling.guidance, sampling.guidance_schedule, sampling.temperature
    )
    reveal_step = torch.zeros_like(order)
    tokens = torch.zeros(())
    for number, done in enumerate(iterations):
        reveal_step[done.images, done.positions] = number
        tokens = done.tokens
    return tokens, reveal_step


@isolated
def balanced_labels(count: int, classes: int | Tensor) -> Tensor:
    """Classes in turn, (count,) int64; classes are (c,) int64 labels, or how many there are."""
    labels = torch.arange(classes) if isinstance(classes, int) else classes
    return labels[torch.arange(count) % len(labels)]
