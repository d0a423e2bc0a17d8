"""A check that a backbone keeps the promises of the protocol."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from orderrl.backbones.protocol import Backbone, BlockLosses, backbone_device
from orderrl.backbones.sampling import Sampling
from orderrl.runtime.isolation import isolated_float32

ALTERNATIVES = 16  # tokens tried against the one that greedy decoding chose


def naive_block_losses(backbone: Backbone, tokens: Tensor, labels: Tensor, revealed: Tensor, blocks: Tensor) -> Tensor:
    """Losses of blocks with everything recomputed and one chain at a time: the slow, obvious form.

    Args:
        tokens: (M, N) int64.
        labels: (M,) int64.
        revealed: (M, t) int64, visible blocks in order.
        blocks: (M, C) int64.

    Returns:
        (M, C) float32, nats.
    """
    columns = []
    for column in range(blocks.shape[1]):
        prefix = backbone.start(labels)
        for step in range(revealed.shape[1]):
            one = torch.ones_like(labels)
            prefix = backbone.extend(prefix, tokens, revealed[:, step : step + 1], one)
        losses, _ = backbone.context_loss(prefix, tokens, blocks[:, column : column + 1])
        columns.append(losses.loss[:, 0])
    return torch.stack(columns, 1)


@dataclass(frozen=True)
class _Sample:
    """Random states of a backbone: `revealed` (M, t) and `hidden` (M, B - t) are the two parts of a block order."""

    backbone: Backbone
    tokens: Tensor
    labels: Tensor
    revealed: Tensor
    hidden: Tensor
    generator: torch.Generator
    tolerance: float

    def compare(self, promise: str, one: Tensor, other: Tensor) -> None:
        difference = (one - other).abs().max().item() if one.numel() else 0.0
        if not difference <= self.tolerance:
            raise ValueError(f"backbone breaks '{promise}': differs by {difference:.2e}, allowed {self.tolerance:.0e}")

    def prefix(self) -> Any:
        """A new cache of the states, all blocks appended at once (`extend` may change a cache in place)."""
        count = torch.full_like(self.labels, self.revealed.shape[1])
        return self.backbone.extend(self.backbone.start(self.labels), self.tokens, self.revealed, count)

    @cached_property
    def packed(self) -> BlockLosses:
        return self.backbone.context_loss(self.prefix(), self.tokens, self.hidden)[0]

    def naive(self, blocks: Tensor, extra: Tensor | None = None) -> Tensor:
        revealed = self.revealed if extra is None else torch.cat([self.revealed, extra], 1)
        return naive_block_losses(self.backbone, self.tokens, self.labels, revealed, blocks)


def random_tokens(backbone: Backbone, states: int, generator: torch.Generator) -> Tensor:
    """Tokens (M, N) int64; continuous ones (M, N, C) float32."""
    if backbone.vocab_size:
        return torch.randint(backbone.vocab_size, (states, backbone.geometry.num_tokens), generator=generator)
    channels = getattr(backbone, "token_dim")  # noqa: B009 - only backbones of continuous tokens have it
    return torch.randn(states, backbone.geometry.num_tokens, channels, generator=generator)


def _draw_sample(backbone: Backbone, states: int, seed: int, tolerance: float) -> _Sample:
    generator, device = torch.Generator().manual_seed(seed), backbone_device(backbone)
    b = backbone.geometry.num_blocks
    visible = max(1, b // 3) if b > 1 else 0
    tokens = random_tokens(backbone, states, generator)
    labels = torch.randint(backbone.num_classes, (states,), generator=generator)
    order = torch.rand(states, b, generator=generator).argsort(1).to(device)
    parts = order[:, :visible], order[:, visible:]
    return _Sample(backbone, tokens.to(device), labels.to(device), *parts, generator, tolerance)


def _check_packing(sample: _Sample) -> None:
    naive = sample.naive(sample.hidden)
    sample.compare("packed chains over a cache equal recomputation one by one", sample.packed.loss, naive)


def _check_observation(sample: _Sample) -> None:
    first, entropy = sample.backbone.observe(sample.prefix(), sample.hidden)
    sample.compare("observe equals the first query of context_loss (hidden state)", first, sample.packed.hidden)
    sample.compare("observe equals the first query of context_loss (entropy)", entropy, sample.packed.entropy)


def _check_leak(sample: _Sample) -> None:
    backbone, geometry = sample.backbone, sample.backbone.geometry
    shuffled = random_tokens(backbone, len(sample.tokens), sample.generator).to(sample.tokens)
    visible = torch.zeros(len(sample.tokens), geometry.num_blocks, dtype=torch.bool, device=sample.tokens.device)
    visible = visible.scatter(1, sample.revealed, True)[:, geometry.token_block.to(visible.device)]
    other = torch.where(visible.view(visible.shape + (1,) * (shuffled.ndim - 2)), sample.tokens, shuffled)
    leak, _ = backbone.context_loss(sample.prefix(), other, sample.hidden)
    sample.compare("hidden tokens do not change the first query (hidden state)", leak.hidden, sample.packed.hidden)
    sample.compare("hidden tokens do not change the first query (entropy)", leak.entropy, sample.packed.entropy)


def _check_reuse(sample: _Sample) -> None:
    backbone, last = sample.backbone, sample.hidden[:, -1:]
    prefix = sample.prefix()
    for step in range(sample.hidden.shape[1] - 1):
        block = sample.hidden[:, step : step + 1]
        _, entries = backbone.context_loss(prefix, sample.tokens, block)
        first = entries.chain(torch.zeros_like(sample.labels))
        prefix = backbone.extend(prefix, sample.tokens, block, torch.ones_like(sample.labels), first)
    reused, _ = backbone.context_loss(prefix, sample.tokens, last)
    sample.compare("reused chain entries equal re-encoded ones", reused.loss, sample.naive(last, sample.hidden[:, :-1]))


def _check_past(sample: _Sample) -> None:
    if sample.hidden.shape[1] < 3:
        return
    prefix, pasts = sample.prefix(), sample.hidden[:, :2]
    _, past = sample.backbone.context_loss(prefix, sample.tokens, pasts, whole=True)
    targets = sample.hidden[:, [1, 2, 0, 2]]  # two chains behind each past
    after, _ = sample.backbone.context_loss(prefix, sample.tokens, targets, past=past)
    naive = [sample.naive(targets[:, 2 * p : 2 * p + 2], pasts[:, p : p + 1]) for p in range(2)]
    sample.compare("a block given as past equals the same block revealed", after.loss, torch.cat(naive, 1))


def _check_select(sample: _Sample) -> None:
    backbone, rows = sample.backbone, torch.arange(1, device=sample.labels.device)
    count = torch.ones_like(sample.labels) * sample.revealed.shape[1]
    count[0] = 0  # one state stays behind and is written over by its complete copy
    prefix = backbone.extend(backbone.start(sample.labels), sample.tokens, sample.revealed, count)
    prefix = prefix.put(rows, sample.prefix().select(rows))
    losses, _ = backbone.context_loss(prefix, sample.tokens, sample.hidden)
    sample.compare("states of different lengths, put and selected, equal uniform ones", losses.loss, sample.packed.loss)


def _check_decode(sample: _Sample) -> None:
    """Tokens that greedy decoding chose have the lowest loss, so that no token's loss can have read that token."""
    backbone, geometry = sample.backbone, sample.backbone.geometry
    prefix, block = sample.prefix(), sample.hidden[:, :1]
    shape = (len(block), 1, geometry.tokens_per_block)
    uniforms = torch.rand(shape, generator=sample.generator, dtype=torch.float64).to(block.device)
    if not backbone.vocab_size:
        drawn = backbone.decode(prefix, block, uniforms, Sampling()).tokens
        if drawn.shape[:-1] != uniforms.shape or not bool(drawn.isfinite().all()):
            raise ValueError(f"backbone breaks 'decode draws tokens': shape {tuple(drawn.shape)}, or not finite")
        again = backbone.decode(prefix, block, uniforms, Sampling()).tokens
        sample.compare("equal numbers draw equal tokens", drawn, again)
        return
    drawn = backbone.decode(prefix, block, uniforms, Sampling(top_k=1)).tokens
    if drawn.shape != uniforms.shape or drawn.min() < 0 or drawn.max() >= backbone.vocab_size:
        raise ValueError(
            f"backbone breaks 'decode draws tokens': shape {tuple(drawn.shape)} in [{int(drawn.min())}, "
            f"{int(drawn.max())}], want {shape} in [0, {backbone.vocab_size - 1}]"
        )
    positions = geometry.block_tokens.to(block.device)[block[:, 0]]
    greedy = sample.tokens.scatter(1, positions, drawn[:, 0])
    best = backbone.context_loss(prefix, greedy, block)[0].loss
    for value in torch.randperm(backbone.vocab_size, generator=sample.generator)[:ALTERNATIVES].tolist():
        other = greedy.scatter(1, positions[:, -1:], value)
        loss = backbone.context_loss(prefix, other, block)[0].loss
        sample.compare("greedy decoding finds the token of least loss", torch.minimum(loss, best), best)


@isolated_float32
@torch.no_grad()
def check_backbone(backbone: Backbone, states: int = 3, seed: int = 0, tolerance: float = 1e-4) -> None:
    """Check that caches equal recomputation, packed chains single ones, and that no hidden token leaks.

    Args:
        backbone: to be checked, in eval mode, on any device.
        states: random states.
        seed: of the random tokens and orders.
        tolerance: largest absolute difference, nats.

    Raises:
        ValueError: with the first broken promise.
    """
    sample = _draw_sample(backbone, states, seed, tolerance)
    same = (_check_packing, _check_observation, _check_leak, _check_reuse, _check_past, _check_select)
    for check in (*same, _check_decode):
        check(sample)
