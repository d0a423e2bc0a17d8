"""A check that a backbone keeps the promises of the protocol."""

from __future__ import annotations

import torch
from torch import Tensor

from orderrl.backbones.protocol import Backbone
from orderrl.backbones.sampling import Sampling


def naive_block_losses(
    backbone: Backbone, tokens: Tensor, labels: Tensor, revealed: Tensor, blocks: Tensor
) -> Tensor:
    """Losses of blocks with everything recomputed and one chain at a time: the slow, obvious form.

    Args:
        tokens: (M, N) int64; labels: (M,) int64; revealed: (M, t) int64 visible blocks in order;
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


@torch.no_grad()
def check_backbone(backbone: Backbone, states: int = 3, seed: int = 0, tolerance: float = 1e-4) -> None:
    """Raise ValueError with the first broken promise: cache = recomputation, no leak, packed = one by one.

    Args:
        backbone: to be checked, in eval mode.
        states: random states.
        seed: of the random tokens and orders.
        tolerance: largest absolute difference, nats.
    """
    generator = torch.Generator().manual_seed(seed)
    geometry = backbone.geometry
    b, k = geometry.num_blocks, max(1, geometry.num_blocks // 3)
    tokens = torch.randint(backbone.vocab_size, (states, geometry.num_tokens), generator=generator)
    labels = torch.randint(backbone.num_classes, (states,), generator=generator)
    order = torch.rand(states, b, generator=generator).argsort(1)
    revealed, hidden = order[:, :k], order[:, k:]
    count = torch.full_like(labels, k)
    prefix = backbone.extend(backbone.start(labels), tokens, revealed, count)
    packed, _ = backbone.context_loss(prefix, tokens, hidden)

    def compare(name: str, one: Tensor, other: Tensor) -> None:
        difference = (one - other).abs().max().item() if one.numel() else 0.0
        if not difference <= tolerance:
            raise ValueError(f"backbone breaks '{name}': differs by {difference:.2e}, allowed {tolerance:.0e}")

    naive = naive_block_losses(backbone, tokens, labels, revealed, hidden)
    compare("packed chains over a cache equal recomputation one by one", packed.loss, naive)
    first, entropy = backbone.observe(prefix, hidden)
    compare("observe equals the first query of context_loss (hidden state)", first, packed.hidden)
    compare("observe equals the first query of context_loss (entropy)", entropy, packed.entropy)
    shuffled = torch.randint(backbone.vocab_size, tokens.shape, generator=generator)
    visible = torch.zeros(states, b, dtype=torch.bool).scatter(1, revealed, True)[:, geometry.token_block]
    other = torch.where(visible, tokens, shuffled)
    leak, _ = backbone.context_loss(prefix, other, hidden)
    compare("hidden tokens do not change the first query", leak.hidden, packed.hidden)
    chained = naive_block_losses(backbone, tokens, labels, order[:, : b - 1], order[:, b - 1 :])
    prefix = backbone.start(labels)
    for step in range(b - 1):
        block = order[:, step : step + 1]
        _, entries = backbone.context_loss(prefix, tokens, block)
        first_chain = entries.chain(torch.zeros_like(labels))
        prefix = backbone.extend(prefix, tokens, block, torch.ones_like(labels), first_chain)
    reused, _ = backbone.context_loss(prefix, tokens, order[:, b - 1 :])
    compare("reused chain entries equal re-encoded ones", reused.loss, chained)
    uniforms = torch.rand(states, 1, geometry.tokens_per_block, generator=generator, dtype=torch.float64)
    prefix = backbone.start(labels)
    drawn = backbone.decode(prefix, order[:, :1], uniforms, Sampling())
    if drawn.shape != uniforms.shape or drawn.min() < 0 or drawn.max() >= backbone.vocab_size:
        raise ValueError(f"backbone breaks 'decode draws tokens': shape {tuple(drawn.shape)}, want {tuple(uniforms.shape)}")
