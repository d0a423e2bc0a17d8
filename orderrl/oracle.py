"""The value of a block: gains G, utilities U, and labels of random contexts.

With S the visible context, G[a, b] = l_b(S) - l_b(S + a) is what revealing block a lowers the loss of
block b by, and U(a | S) = 1/N sum_b w(b, a) G[a, b] (design, section 3; Algorithms 1 and 2 of the plan).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orderrl.backbones.protocol import Backbone, backbone_device
from orderrl.backbones.sampling import Sampling
from orderrl.geometry import BlockGrid
from orderrl.random import Stream, keyed_uniform

KINDS = ("pointwise", "kl", "expected")
WEIGHTS = ("uniform", "far")


def distance_weights(geometry: BlockGrid, weight: str, sigma: float) -> Tensor:
    """w(b, a) of the utility for single blocks.

    Args:
        geometry: the block grid.
        weight: "uniform" (Algorithm 1: all ones) or "far" (Algorithm 2: 1 - exp(-(d / sigma)^2)).
        sigma: in blocks; how far "near" reaches.

    Returns:
        (B, B) float32, indexed [a, b].

    Raises:
        ValueError: if weight is unknown or sigma is not positive.
    """
    if weight not in WEIGHTS:
        raise ValueError(f"weight={weight!r} is unknown; choose one of {', '.join(WEIGHTS)}")
    if not sigma > 0:
        raise ValueError(f"sigma must be positive (in blocks), got {sigma}")
    if weight == "uniform":
        return torch.ones(geometry.num_blocks, geometry.num_blocks)
    return 1 - torch.exp(-((geometry.distances / sigma) ** 2))


def utilities(gains: Tensor, geometry: BlockGrid, weights: Tensor) -> Tensor:
    """U of every candidate: gains (..., B, B) indexed [a, b] -> (..., B), nats per image token."""
    return (gains * weights.to(gains)).sum(-1) / geometry.num_tokens


def _pairs(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """All ordered pairs of different chains out of `count`: candidate and target indices."""
    candidate, target = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    different = candidate != target
    return candidate[different].to(device), target[different].to(device)


def _chunks(rows: int, entries_per_row: int, max_entries: int) -> list[Tensor]:
    """Split rows so that one forward encodes at most about `max_entries` entries."""
    return list(torch.arange(rows).split(max(1, max_entries // max(entries_per_row, 1))))


@torch.no_grad()
def block_gains(
    backbone: Backbone,
    prefix: Any,
    tokens: Tensor,
    hidden: Tensor,
    kind: str = "pointwise",
    uniforms: Tensor | None = None,
    samples: int = 1,
    max_entries: int = 4096,
) -> Tensor:
    """G[a, b] for every pair of hidden blocks of states that hide equally many.

    Args:
        backbone: scores the blocks.
        prefix: cache of M states.
        tokens: (M, N) int64; read for kinds "pointwise" and "kl".
        hidden: (M, C) int64, the hidden blocks of each state.
        kind: "pointwise" (true block, true rest), "kl" (true block, the backbone's expectation over the
            rest) or "expected" (blocks drawn from the backbone, expectation over the rest: no hindsight).
        uniforms: (M, samples, B + B*B, p*p) in [0, 1); needed for "kl" and "expected".
        samples: draws that are averaged; for "kl" and "expected".
        max_entries: upper bound of entries encoded in one forward; the result does not depend on it.

    Returns:
        (M, B, B) float32, nats, indexed [a, b]; zero on the diagonal and for visible blocks.

    Raises:
        ValueError: if the kind is unknown or its random numbers are missing.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if kind != "pointwise" and uniforms is None:
        raise ValueError(f"uniforms must be given for kind={kind!r}")
    geometry = backbone.geometry
    states, count = hidden.shape
    gains = torch.zeros(states, geometry.num_blocks**2, device=hidden.device)
    entries_per_row = 2 * geometry.tokens_per_block * max(count * (count - 1), 1)
    draws = 1 if kind == "pointwise" else samples
    for rows in _chunks(states, entries_per_row, max_entries):
        rows = rows.to(hidden.device)
        part = prefix if len(rows) == states else prefix.select(rows)
        for draw in range(draws):
            noise = None if uniforms is None else uniforms[rows, draw]
            values = _pair_gains(backbone, part, tokens[rows], hidden[rows], kind, noise)
            candidate, target = _pairs(count, hidden.device)
            flat = hidden[rows][:, candidate] * geometry.num_blocks + hidden[rows][:, target]
            gains[rows] = gains[rows].scatter_add(1, flat, values / draws)
    return gains.unflatten(1, (geometry.num_blocks, geometry.num_blocks))


def _pair_gains(
    backbone: Backbone, prefix: Any, tokens: Tensor, hidden: Tensor, kind: str, uniforms: Tensor | None
) -> Tensor:
    """Gains of all ordered pairs of different hidden blocks, (M, C * (C - 1))."""
    blocks_total = backbone.geometry.num_blocks
    candidate, target = _pairs(hidden.shape[1], hidden.device)
    if kind == "expected":
        assert uniforms is not None
        noise = _rows(uniforms, hidden)
        drawn = backbone.decode(prefix, hidden, noise, Sampling())
        tokens = backbone.geometry.write(tokens, hidden, drawn)
    now, entries = backbone.context_loss(prefix, tokens, hidden, whole=True)
    past = entries.chains(candidate.expand(len(hidden), -1))
    targets = hidden[:, target]
    if kind == "pointwise":
        after, _ = backbone.context_loss(prefix, tokens, targets, past=past)
        return now.loss[:, target] - after.loss
    assert uniforms is not None
    noise = _rows(uniforms, blocks_total + hidden[:, candidate] * blocks_total + targets)
    return backbone.expected_gain(prefix, targets, past, noise)


def _rows(uniforms: Tensor, index: Tensor) -> Tensor:
    """uniforms (M, R, p*p), index (M, C) -> (M, C, p*p)."""
    return uniforms.gather(1, index[..., None].expand(-1, -1, uniforms.shape[-1]))


def gain_uniforms(geometry: BlockGrid, keys: tuple[Tensor | int, ...], samples: int, device: torch.device) -> Tensor:
    """Random numbers for `block_gains`, keyed so that they do not depend on the batch.

    Args:
        geometry: the block grid.
        keys: what the M states are, each (M,) int64 or an int.
        samples: draws.
        device: where the result lies.

    Returns:
        (M, samples, B + B*B, p*p) float64.
    """
    rows = geometry.num_blocks * (geometry.num_blocks + 1)
    shaped = [torch.as_tensor(key, device=device).view(-1, 1, 1, 1) for key in keys]
    draw = torch.arange(samples, device=device).view(1, -1, 1, 1)
    row = torch.arange(rows, device=device).view(1, 1, -1, 1)
    token = torch.arange(geometry.tokens_per_block, device=device)
    return keyed_uniform([Stream.LABEL, *shaped, draw, row, token], device)


@dataclass(frozen=True)
class LabelConfig:
    """Which contexts are labelled and how.

    Attributes:
        contexts: number of random contexts; images take turns.
        kind: see `block_gains`.
        samples: draws per context for kinds "kl" and "expected".
        seed: of the contexts and draws.
        batch_size: contexts per call.
    """

    contexts: int = 4000
    kind: str = "pointwise"
    samples: int = 1
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is unknown; choose one of {', '.join(KINDS)}")
        for name in ("contexts", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Contexts(NamedTuple):
    """Contexts to label, all int64.

    Attributes:
        number: (n,), what random draws are keyed by; a part of the contexts keeps its numbers.
        image: (n,), index of the image.
        order: (n, B), reveal order.
        length: (n,), how many blocks of the order are visible.
    """

    number: Tensor
    image: Tensor
    order: Tensor
    length: Tensor

    def select(self, rows: Tensor) -> Contexts:
        """Some of the contexts: rows (k,) int64 or (n,) bool."""
        return Contexts(*(part[rows] for part in self))


def random_contexts(config: LabelConfig, images: int, num_blocks: int) -> Contexts:
    """Random prefixes, sorted by length.

    The number of visible blocks is uniform on 0 .. B - 2 (with one hidden block there is no choice).
    """
    generator = torch.Generator().manual_seed(config.seed)
    image = torch.arange(config.contexts) % images
    order = torch.rand(config.contexts, num_blocks, generator=generator).argsort(1)
    length = torch.randint(max(num_blocks - 1, 1), (config.contexts,), generator=generator)
    by_length = length.argsort(stable=True)
    return Contexts(torch.arange(config.contexts), image[by_length], order[by_length], length[by_length])


@torch.no_grad()
def label_contexts(
    backbone: Backbone, tokens: Tensor, labels: Tensor, config: LabelConfig, contexts: Contexts
) -> Iterator[dict[str, Tensor]]:
    """Label contexts in batches of equal length.

    Args:
        backbone: scores the blocks.
        tokens: (n, N) int64, images.
        labels: (n,) int64, their classes.
        config: kind and batch size.
        contexts: all or some of what `random_contexts` gives; rows come back sorted by length, else in their order.

    Yields:
        Dicts of tensors with m rows: image (m,), order (m, B), length (m,), label (m,), observation parts
        hidden (m, B, D), entropy (m, B), visible (m, B); loss (m, B) and gains (m, B, B) in nats.
    """
    _, image, order, length = contexts
    device = backbone_device(backbone)
    geometry = backbone.geometry
    starts = torch.arange(len(image))
    for value in length.unique(sorted=True).tolist():
        for rows in starts[length == value].split(config.batch_size):
            context = order[rows].to(device)
            x, y = tokens[image[rows]].to(device), labels[image[rows]].to(device)
            prefix = backbone.start(y)
            if value:
                count = torch.full_like(y, value)
                prefix = backbone.extend(prefix, x, context[:, :value], count)
            hidden_blocks = context[:, value:].sort(1).values
            now, _ = backbone.context_loss(prefix, x, hidden_blocks)
            uniforms = None
            if config.kind != "pointwise":
                uniforms = gain_uniforms(geometry, (config.seed, contexts.number[rows]), config.samples, device)
            gains = block_gains(backbone, prefix, x, hidden_blocks, config.kind, uniforms, config.samples)
            m, total = len(rows), geometry.num_blocks
            spread = hidden_blocks[..., None].expand(-1, -1, backbone.hidden_size)
            yield {
                "image": image[rows],
                "order": order[rows],
                "length": length[rows],
                "label": labels[image[rows]],
                "hidden": now.hidden.new_zeros(m, total, backbone.hidden_size).scatter(1, spread, now.hidden).cpu(),
                "entropy": now.entropy.new_zeros(m, total).scatter(1, hidden_blocks, now.entropy).cpu(),
                "visible": torch.ones(m, total, dtype=torch.bool).scatter(1, hidden_blocks.cpu(), False),
                "loss": now.loss.new_zeros(m, total).scatter(1, hidden_blocks, now.loss).cpu(),
                "gains": gains.cpu(),
            }
