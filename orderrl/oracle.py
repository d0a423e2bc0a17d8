"""The value of a block: gains G, utilities U, and labels of random contexts.

With S the visible context, G[a, b] = l_b(S) - l_b(S + a) is what revealing block a lowers the loss of
block b by, and U(a | S) = 1/N sum_b w(b, a) G[a, b] (design, section 3; Algorithms 1 and 2 of the plan).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orderrl.backbones.protocol import Backbone, BlockLosses, backbone_device
from orderrl.backbones.sampling import Sampling
from orderrl.geometry import BlockGrid
from orderrl.partial_classifier import GROUPINGS, ClassifierConfig, PartialClassifier, cluster_orders, importance
from orderrl.runtime.devices import moved
from orderrl.runtime.isolation import isolated
from orderrl.runtime.random import Stream, keyed_uniform
from orderrl.runtime.registry import Registry
from orderrl.runtime.values import Settings, at_least, between, one_of, setting

KINDS = ("pointwise", "kl", "expected")  # of gains
CLASSIFIER = "classifier"  # the kind of labels that are no gains: what a block says about the class
WEIGHTS: Registry[Callable[[BlockGrid, float], Tensor]] = Registry(
    "weight",
    "orderrl.weights",
    {
        "uniform": lambda geometry, sigma: torch.ones_like(geometry.distances),
        "far": lambda geometry, sigma: 1 - torch.exp(-((geometry.distances / sigma) ** 2)),
    },
)
"""w(b, a): (geometry, sigma in blocks) -> (B, B) float32, growing with the distance of b from a."""
register_weight = WEIGHTS.register
LEAST_LOSS = 0.1  # nats; blocks of less loss are drawn as if they had it, so that no weight grows without bound


def distance_weights(geometry: BlockGrid, weight: str, sigma: float) -> Tensor:
    """w(b, a) of the utility for single blocks.

    Args:
        geometry: the block grid.
        weight: "uniform" (Algorithm 1: all ones), "far" (Algorithm 2: 1 - exp(-(d / sigma)^2)), or one of a user.
        sigma: in blocks; how far "near" reaches.

    Returns:
        (B, B) float32, indexed [a, b].

    Raises:
        ValueError: if weight is unknown or sigma is not positive and finite.
    """
    found, blocks = WEIGHTS.find(weight)(geometry, sigma), geometry.num_blocks
    if not isinstance(found, Tensor) or found.shape != (blocks, blocks):
        raise ValueError(f"weight {weight!r} must give a tensor of shape {(blocks, blocks)}, indexed [a, b]")
    return found


def utilities(gains: Tensor, geometry: BlockGrid, weights: Tensor | None = None) -> Tensor:
    """U of every candidate: gains (..., B, B) indexed [a, b] -> (..., B), nats per image token; None weighs all 1."""
    weighted = gains if weights is None else gains * weights.to(gains)
    return weighted.sum(-1) / geometry.num_tokens


@torch.no_grad()
def block_gains(
    backbone: Backbone,
    prefix: Any,
    tokens: Tensor,
    hidden: Tensor,
    kind: str = "pointwise",
    uniforms: Tensor | None = None,
    samples: int = 1,
    now: tuple[BlockLosses, Any] | None = None,
    targets: Targets | None = None,
) -> Tensor:
    """G[a, b] for pairs of hidden blocks of states that hide equally many.

    Args:
        tokens: (M, N) int64; read for kinds "pointwise" and "kl".
        hidden: (M, C) int64, the hidden blocks of each state.
        kind: "pointwise" (true block, true rest), "kl" (true block, the backbone's expectation over the
            rest) or "expected" (blocks drawn from the backbone, expectation over the rest: no hindsight).
        uniforms: (M, samples, B + B*B, p*p) in [0, 1); needed for "kl" and "expected".
        samples: draws that are averaged; for "kl" and "expected".
        now: what `context_loss` gave for these hidden blocks with `whole`, if it is known.
        targets: the pairs to compute; None is all.

    Returns:
        (M, B, B) float32, nats, indexed [a, b]; zero on the diagonal, for visible blocks and for pairs left out. Pairs
        that are computed are multiplied with their weight in `targets`.
    """
    total = backbone.geometry.num_blocks
    targets = targets or all_targets(hidden)
    width = targets.place.shape[2]  # targets of a candidate
    place, candidates = targets.place.flatten(1), hidden.repeat_interleave(width, 1)
    blocks = hidden.gather(1, place)  # (M, C * width)
    gains = torch.zeros(len(hidden), total**2, dtype=torch.float32, device=hidden.device)
    for draw in range(1 if kind == "pointwise" else samples):
        noise = None if uniforms is None else uniforms[:, draw]
        if kind == "expected":
            assert noise is not None
            drawn = backbone.decode(prefix, hidden, _rows(noise, hidden), Sampling()).tokens
            tokens = backbone.geometry.write(tokens, hidden, drawn)
        if kind == "expected" or now is None:
            now = backbone.context_loss(prefix, tokens, hidden, whole=True)
        losses, past = now
        if width == 0:
            break
        if kind == "pointwise":
            after, _ = backbone.context_loss(prefix, tokens, blocks, past=past)
            values = losses.loss.gather(1, place) - after.loss
        else:
            assert noise is not None
            noise = _rows(noise, total + candidates * total + blocks)
            values = backbone.expected_gain(prefix, blocks, past, noise) / samples
        gains.scatter_add_(1, candidates * total + blocks, values * targets.weight.flatten(1))
    return gains.unflatten(1, (total, total))


class Targets(NamedTuple):
    """The pairs of hidden blocks whose gain is computed."""

    place: Tensor  # (M, C, r) int64, for each candidate the places of its r targets among the C hidden blocks
    weight: Tensor  # (M, C, r) float32, 1 / probability of being chosen: weighted row sums are unbiased


def all_targets(hidden: Tensor) -> Targets:
    """Every other hidden block is a target of each candidate: hidden (M, C)."""
    states, count = hidden.shape
    place = torch.arange(count, device=hidden.device)
    others = (place[None, :-1] + (place[None, :-1] >= place[:, None])).expand(states, -1, -1)  # skips the candidate
    return Targets(others, torch.ones(others.shape, dtype=torch.float32, device=hidden.device))


def sampled_targets(geometry: BlockGrid, hidden: Tensor, losses: Tensor, fraction: float, uniforms: Tensor) -> Targets:
    """A part of the targets of each candidate, drawn so that weighted row sums of gains stay unbiased.

    Candidate a has r = max(1, round(fraction * (C - 1))) targets, drawn by systematic sampling with probability
    proportional to sqrt(l_b + 0.1 nats) / max(d(a, b), 1)^2, at most 1: near blocks and blocks of high loss have the
    large gains. The weights are those of Horvitz and Thompson (1952).

    Args:
        hidden: (M, C) int64, the hidden blocks of each state.
        losses: (M, C) float32, their losses, nats.
        fraction: in (0, 1].
        uniforms: (M, C) in [0, 1), one for each candidate.
    """
    count = hidden.shape[1]
    wanted = max(1, round(fraction * (count - 1)))
    if wanted >= count - 1:
        return all_targets(hidden)
    distance = geometry.distances.to(hidden.device)[hidden[:, :, None], hidden[:, None]]  # (M, C, C)
    size = (losses.clamp_min(0) + LEAST_LOSS).sqrt()[:, None] / distance.clamp_min(1) ** 2
    size = size.masked_fill(torch.eye(count, dtype=torch.bool, device=hidden.device), 0.0).double()
    chance = _inclusion(size, wanted)
    # a point falls into every interval of length 1: exactly `wanted` of the C - 1 intervals are hit
    end = chance.cumsum(-1)
    end[..., -1] = wanted
    start = torch.cat([torch.zeros_like(end[..., :1]), end[..., :-1]], -1)
    point = uniforms.double()[..., None]
    hit = (end - point).ceil() > (start - point).ceil()
    place = hit.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :wanted]
    return Targets(place, chance.gather(-1, place).reciprocal().float())


def _inclusion(size: Tensor, wanted: int) -> Tensor:
    """Probabilities proportional to size (..., C), at most 1, that sum to `wanted`."""
    certain = torch.zeros_like(size, dtype=torch.bool)
    chance = size
    for _ in range(wanted + 1):  # every round makes at least one more certain, or is the last
        rest = wanted - certain.sum(-1, keepdim=True)
        scaled = size * rest / size.masked_fill(certain, 0.0).sum(-1, keepdim=True)
        chance = torch.where(certain, 1.0, scaled)
        certain = certain | (scaled >= 1)
    return chance.clamp_max(1.0)


def _rows(uniforms: Tensor, index: Tensor) -> Tensor:
    """uniforms (M, R, p*p), index (M, C) -> (M, C, p*p)."""
    return uniforms.gather(1, index[..., None].expand(-1, -1, uniforms.shape[-1]))


def gain_uniforms(geometry: BlockGrid, keys: tuple[Tensor | int, ...], samples: int, device: torch.device) -> Tensor:
    """Random numbers for `block_gains`, (M, samples, B + B*B, p*p) float64, that do not depend on the batch.

    The keys say what the M states are, each (M,) int64 or an int.
    """
    rows = geometry.num_blocks * (geometry.num_blocks + 1)
    shaped = [torch.as_tensor(key, device=device).view(-1, 1, 1, 1) for key in keys]
    draw = torch.arange(samples, device=device).view(1, -1, 1, 1)
    row = torch.arange(rows, device=device).view(1, 1, -1, 1)
    token = torch.arange(geometry.tokens_per_block, device=device)
    return keyed_uniform([Stream.LABEL, *shaped, draw, row, token], device)


def target_uniforms(keys: tuple[Tensor | int, ...], hidden: Tensor) -> Tensor:
    """Random numbers for `sampled_targets`, (M, C) float64; keys as in `gain_uniforms`, hidden (M, C)."""
    shaped = [torch.as_tensor(key, device=hidden.device).view(-1, 1) for key in keys]
    return keyed_uniform([Stream.TARGET, *shaped, hidden], hidden.device)


@dataclass(frozen=True)
class LabelConfig(Settings):
    """Which contexts are labelled and how."""

    contexts: int = setting(800, "Random contexts of planner images to label", at_least(1))
    kind: str = setting(
        "pointwise",
        "Kind of gains: pointwise (true block, true rest), kl (true block, expectation over the rest under the "
        "backbone) or expected (block and rest drawn from the backbone: no hindsight); or classifier (how well a block "
        "tells the class, no gain)",
        one_of((*KINDS, CLASSIFIER)),
    )
    samples: int = setting(1, "Draws per context, for kinds kl, expected and classifier", at_least(1))
    seed: int = setting(0, "Seed of the contexts and draws", at_least(0))
    batch_size: int = setting(64, "Contexts per call; fewer if memory is short", at_least(1))
    target_fraction: float = setting(
        1.0, "Share of the other hidden blocks whose gains are computed for each candidate; 1 is all", between("(0, 1]")
    )
    clusters: int = setting(
        4, "For kind classifier, disjoint clusters of blocks that are shown to it alone", at_least(1)
    )
    grouping: str = setting(
        "random",
        "For kind classifier, how clusters are formed: random (partitions, averaged over samples), tiles, cumulative "
        "(first parts of random orders) or, with agent=ste, ranks of the scores",
        one_of(GROUPINGS),
    )
    classifier: ClassifierConfig = setting(ClassifierConfig(), "For kind classifier, its shape and training")
    visible_states: bool = False  # store the hidden states of visible blocks too, for planners that read them


@dataclass(frozen=True)
class LabelSetConfig(LabelConfig):
    """The config group `labels`: which contexts are labelled and how they are kept."""

    shard_size: int = setting(
        256, "Contexts per file while labelling; what an interruption loses at most, in each process", at_least(1)
    )


def clustered_importance(
    classifier: PartialClassifier,
    geometry: BlockGrid,
    config: LabelConfig,
    tokens: Tensor,
    labels: Tensor,
    keys: tuple[Tensor, ...],
    scores: Tensor | None = None,
) -> Tensor:
    """Importance of every block in images as the settings of labels have it, (M, B); keys as for `cluster_orders`."""
    orders = cluster_orders(config.grouping, geometry, config.clusters, config.samples, keys, scores)
    cumulative = config.grouping == "cumulative"
    return importance(classifier, geometry, tokens, labels, orders, config.clusters, cumulative)


class Contexts(NamedTuple):
    """Contexts to label, all int64."""

    number: Tensor  # (n,), what random draws are keyed by; a part of the contexts keeps its numbers
    image: Tensor  # (n,), index of the image
    order: Tensor  # (n, B), reveal order
    length: Tensor  # (n,), how many blocks of the order are visible

    def select(self, rows: Tensor) -> Contexts:
        """Some of the contexts: rows (k,) int64 or (n,) bool."""
        return Contexts(*(part[rows] for part in self))


@isolated
def random_contexts(config: LabelConfig, images: int, num_blocks: int) -> Contexts:
    """Random prefixes, sorted by length.

    The number of visible blocks is uniform on 0 .. B - 2 (with one hidden block there is no choice).
    """
    generator = torch.Generator().manual_seed(config.seed)
    image = torch.arange(config.contexts) % images
    order = torch.rand(config.contexts, num_blocks, generator=generator, dtype=torch.float32).argsort(1)
    length = torch.randint(max(num_blocks - 1, 1), (config.contexts,), generator=generator)
    by_length = length.argsort(stable=True)
    return Contexts(torch.arange(config.contexts), image[by_length], order[by_length], length[by_length])


@isolated
@torch.no_grad()
def label_contexts(
    backbone: Backbone,
    tokens: Tensor,
    labels: Tensor,
    config: LabelConfig,
    contexts: Contexts,
    classifier: PartialClassifier | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Label contexts in batches of equal length.

    Args:
        tokens: (n, N) int64, images.
        labels: (n,) int64, their classes.
        contexts: all or some of what `random_contexts` gives; rows come back sorted by length, else in their order.
        classifier: of kind "classifier", whose gains are diagonal: their row sums, the utilities, are the importance.

    Yields:
        Dicts of tensors with m rows: image (m,), order (m, B), length (m,), label (m,), observation parts
        hidden (m, B, D), zero where visible unless the config wants those states too, entropy (m, B), visible (m, B);
        loss (m, B) and gains (m, B, B) in nats.
    """
    _, image, order, length = contexts
    device = backbone_device(backbone)
    geometry = backbone.geometry
    starts = torch.arange(len(image))
    for value in length.unique(sorted=True).tolist():
        # backbones that keep entries know how many states fit into memory
        fitting = getattr(backbone, "states_at_once", lambda chains: config.batch_size)(geometry.num_blocks - value)
        for rows in starts[length == value].split(min(config.batch_size, fitting)):
            context = order[rows].to(device)
            x, y = (moved(part[image[rows]], device) for part in (tokens, labels))
            prefix = backbone.start(y)
            if value:
                count = torch.full((len(rows),), value)
                prefix = backbone.extend(prefix, x, context[:, :value], count)
            hidden_blocks = context[:, value:].sort(1).values
            now, entries = backbone.context_loss(prefix, x, hidden_blocks, whole=True)
            key = (config.seed, contexts.number[rows])
            uniforms, targets = None, None
            if config.kind in ("kl", "expected"):
                uniforms = gain_uniforms(geometry, key, config.samples, device)
            if config.target_fraction < 1:
                chosen = target_uniforms(key, hidden_blocks)
                targets = sampled_targets(geometry, hidden_blocks, now.loss, config.target_fraction, chosen)
            known = (now, entries)
            if config.kind == CLASSIFIER:
                assert classifier is not None
                worth = clustered_importance(classifier, geometry, config, x, y, (image[rows],))
                worth = torch.zeros_like(worth).scatter(1, hidden_blocks, worth.gather(1, hidden_blocks))
                gains = torch.diag_embed(worth * geometry.num_tokens)
            else:
                gains = block_gains(
                    backbone, prefix, x, hidden_blocks, config.kind, uniforms, config.samples, known, targets
                )
            m, total = len(rows), geometry.num_blocks
            spread = hidden_blocks[..., None].expand(-1, -1, backbone.hidden_size)
            states = now.hidden.new_zeros(m, total, backbone.hidden_size).scatter(1, spread, now.hidden)
            if config.visible_states:
                states = backbone.observe(prefix, torch.arange(total, device=device).expand(m, -1))[0]
            yield {
                "image": image[rows],
                "order": order[rows],
                "length": length[rows],
                "label": labels[image[rows]],
                "hidden": states.cpu(),
                "entropy": now.entropy.new_zeros(m, total).scatter(1, hidden_blocks, now.entropy).cpu(),
                "visible": torch.ones(m, total, dtype=torch.bool).scatter(1, hidden_blocks.cpu(), False),
                "loss": now.loss.new_zeros(m, total).scatter(1, hidden_blocks, now.loss).cpu(),
                "gains": gains.cpu(),
            }
