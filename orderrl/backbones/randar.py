"""The order-robust LlamaGen backbone: a causal transformer with position-instruction tokens (RandAR).

Notable:
- The sequence is [class, q1, x1, q2, x2, ...]: instruction token q_i says where the next token lies and
  predicts x_i (RandAR, Pang et al., 2024). Parameter names are the published ones.
- 2-D RoPE depends on the position in the image alone, so any order is the same computation.
- Hidden blocks are short chains q1, x1, ..., qn that read the prefix and themselves (`orderrl.backbones.chains`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderrl.backbones.cache import ChainEntries, PrefixCache
from orderrl.backbones.chains import ChainBackbone, Drawn, Growing, entropy
from orderrl.backbones.cpu_linear import EVERY
from orderrl.backbones.layers import Level, rotate
from orderrl.backbones.llamagen import CausalTransformer, RasterTransformer, TransformerConfig


class OrderRobustTransformer(CausalTransformer, ChainBackbone):
    """Causal transformer over [class, q1, x1, q2, x2, ...] for any token order.

    It satisfies `orderrl.backbones.Backbone`; the methods are documented there.
    """

    order_robust = True
    entries_per_token = 2  # instruction and content

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.pos_instruct_embeddings = nn.Parameter(torch.empty(1, config.dim))
        self.reset_parameters()

    @classmethod
    def from_raster(cls, raster: RasterTransformer, block_size: int) -> OrderRobustTransformer:
        """The start of order-robust fine-tuning: raster weights and new instruction tokens, on a grid of blocks."""
        model = cls(replace(raster.config, block_size=block_size))
        weights = raster.state_dict() | {"pos_instruct_embeddings": model.pos_instruct_embeddings.data}
        model.load_state_dict(weights)
        return model

    # ------------------------------------------------------------------ embeddings

    def instructions(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Instruction tokens of raster positions (...): embeddings (..., dim) and rotations."""
        rope = self.rope[positions + 1]
        shared = self.pos_instruct_embeddings.view(self.config.heads, -1).expand(*positions.shape, -1, -1)
        return rotate(shared, rope).flatten(-2), rope

    def interleave(self, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """q1, x1, q2, x2, ...: positions and tokens (..., n) -> embeddings (..., 2n, dim), rotations."""
        queries, rope = self.instructions(positions)
        contents = self.tok_embeddings(tokens)
        return (
            torch.stack([queries, contents], dim=-2).flatten(-3, -2),
            torch.stack([rope, rope], dim=-3).flatten(-4, -3),
        )

    # ------------------------------------------------------------------ training

    def teacher_forced(
        self, tokens: Tensor, labels: Tensor, token_order: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """Logits (M, N, vocab) of every token given its predecessors in an order, in which they stand.

        Args:
            tokens: (M, N) int64, raster order.
            labels: (M,) int64; num_classes is the dropped label.
            token_order: (M, N) int64, raster positions in the order of generation.
            scale: (M, N) in raster order, factors of the tokens' embeddings; None is 1. Gradients with respect to it
                say what a token's visibility is worth.
        """
        x, rope = self._sequence(tokens, labels, token_order)
        if scale is not None:  # of contents; the class and the instructions stay
            factors = torch.ones_like(x[..., 0])
            factors[:, 2::2] = scale.gather(1, token_order)
            x = x * factors[..., None]
        # the last content token predicts nothing
        return self.logits(self._forward(x[:, :-1], rope[:, :-1])[:, 1::2])

    def observe_contexts(self, tokens: Tensor, labels: Tensor, blocks: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """What `observe` gives for every block after `start` and `extend`, in one forward that has gradients.

        It keeps no cache, because a cache is written in place. What the layers below those that are trained compute
        has no gradient and costs no memory.

        Args:
            tokens: (M, N) int64, raster order.
            labels: (M,) int64.
            blocks: (M, K) int64, reveal order; entries past the count may be any blocks.
            count: (M,) int64 in [0, K], how many of the blocks are visible.

        Returns:
            Hidden states (M, B, D) and entropies (M, B) in nats of the first query of each block; those of visible
            blocks mean nothing.
        """
        x, rope = (part[:, None] for part in self._sequence(tokens, labels, self.geometry.token_order(blocks)))
        query, query_rope = self.instructions(self.block_tokens[:, 0].expand(len(tokens), -1))
        query, query_rope = query[:, :, None], query_rope[:, :, None]  # (M, B, 1, ...): a chain for each block
        visible = 1 + self.entries_per_token * self.geometry.tokens_per_block * count
        mask = (torch.arange(x.shape[2], device=x.device) < visible[:, None])[:, None, None, None]
        for number, layer in enumerate(self._blocks()):
            last = number + 1 == self.config.layers  # of which the context leaves keys and values alone
            x, key, value = layer.chain(x, rope, [], queries=None if last else EVERY)
            query, _, _ = layer.chain(query, query_rope, [Level(key, value, mask)])
        hidden = self.norm(query[:, :, 0])
        return hidden.float(), entropy(self.logits(hidden).float().log_softmax(-1))

    def _sequence(self, tokens: Tensor, labels: Tensor, token_order: Tensor) -> tuple[Tensor, Tensor]:
        """class, q1, x1, ..., qn, xn for a token order (M, n): embeddings (M, 2n + 1, dim) and rotations."""
        pairs, pair_rope = self.interleave(token_order, tokens.gather(1, token_order))
        start_rope = self.rope[:1].expand(len(tokens), -1, -1, -1)
        return torch.cat([self.cls_embedding(labels)[:, None], pairs], 1), torch.cat([start_rope, pair_rope], 1)

    # ------------------------------------------------------------------ chains over a prefix

    def start(self, labels: Tensor) -> PrefixCache:
        empty = self.empty(len(labels), 2 * self.geometry.num_tokens + 1)
        x = self.cls_embedding(labels)[:, None, None]
        rope = self.rope[:1].expand(len(labels), 1, -1, -1, -1)
        _, entries = self.encode(x, rope, empty, outputs=None)
        return empty.append(entries, torch.ones(len(labels), dtype=torch.int64))

    def _teach(
        self, prefix: PrefixCache, positions: Tensor, tokens: Tensor, past: ChainEntries | None, whole: bool
    ) -> tuple[Tensor, ChainEntries]:
        pairs, rope = self.interleave(positions, tokens)
        if not whole:  # the last content token predicts nothing
            pairs, rope = pairs[:, :, :-1], rope[:, :, :-1]
        hidden, entries = self.encode(pairs, rope, prefix, past, outputs=slice(0, None, 2))
        return self.norm(hidden), entries

    def _continue(
        self,
        prefix: PrefixCache,
        position: Tensor,
        drawn: Drawn | None,
        own: Growing | None,
        past: ChainEntries | None = None,
    ) -> Tensor:
        x, rope = self.instructions(position[..., None])
        if drawn is not None:  # the token just drawn goes in together with the next instruction
            x = torch.cat([self.tok_embeddings(drawn.token)[:, :, None], x], dim=2)
            rope = torch.cat([self.rope[drawn.position + 1][:, :, None], rope], dim=2)
        room = None if own is None else own.grown(x.shape[2])
        hidden, _ = self.encode(x, rope, prefix, past, room, outputs=slice(-1, None))
        return self.norm(hidden[:, :, 0])

    def _contents(self, prefix: PrefixCache, positions: Tensor, tokens: Tensor, skip: int) -> ChainEntries:
        pairs, rope = self.interleave(positions, tokens)
        _, entries = self.encode(pairs[:, None, skip:], rope[:, None, skip:], prefix, outputs=None)
        return entries


def cross_entropy(logits: Tensor, tokens: Tensor, token_order: Tensor) -> Tensor:
    """Teacher-forced loss per token: logits (M, N, vocab) in generation order -> (M, N) nats."""
    return F.cross_entropy(logits.float().mT, tokens.gather(1, token_order), reduction="none")
