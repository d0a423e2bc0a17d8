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
from orderrl.backbones.layers import Level, rotate, unseen_later
from orderrl.backbones.llamagen import RELATIVE, CausalTransformer, RasterTransformer, TransformerConfig
from orderrl.backbones.protocol import answers_alike


@answers_alike
class OrderRobustTransformer(CausalTransformer, ChainBackbone):
    """Causal transformer over [class, q1, x1, q2, x2, ...] for any token order.

    It satisfies `orderrl.backbones.Backbone`; the methods are documented there.
    """

    order_robust = True
    entries_per_token = 2  # instruction and content

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.pos_instruct_embeddings = nn.Parameter(torch.empty(1, config.dim))
        if self.relative:
            self.offset_embeddings = nn.Embedding((2 * config.height - 1) * (2 * config.width - 1), config.dim)
        if config.position_head:
            self.position_head = nn.Linear(config.dim, self.geometry.num_blocks)
        self.reset_parameters()

    @classmethod
    def from_raster(cls, raster: RasterTransformer, block_size: int) -> OrderRobustTransformer:
        """The start of order-robust fine-tuning: raster weights and new instruction tokens, on a grid of blocks."""
        model = cls(replace(raster.config, block_size=block_size))
        weights = raster.state_dict() | {"pos_instruct_embeddings": model.pos_instruct_embeddings.data}
        model.load_state_dict(weights)
        return model

    # ------------------------------------------------------------------ embeddings

    @property
    def relative(self) -> bool:
        """Whether instruction tokens say how far the next token lies from the last one."""
        return self.config.next_position == RELATIVE

    def instructions(self, positions: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Instruction tokens of raster positions (...): embeddings (..., dim) and rotations.

        They say where the next token lies, or of a relative model, how far from the token `before` (...), in whose
        place they stand: one row of a table for every offset (OAR, arXiv:2504.17069). The first token, before which
        stands -1, has its absolute position.
        """
        rope = self.rope[positions + 1]
        shared = self.pos_instruct_embeddings.view(self.config.heads, -1).expand(*positions.shape, -1, -1)
        absolute = rotate(shared, rope).flatten(-2)
        if not self.relative:
            return absolute, rope
        assert before is not None
        height, width = self.config.height, self.config.width
        down = positions // width - before // width + height - 1
        right = positions % width - before % width + width - 1
        begun = before >= 0
        offset = torch.where(begun, down * (2 * width - 1) + right, 0)
        found = torch.where(begun[..., None], self.offset_embeddings(offset), absolute)
        return found, torch.where(begun[..., None, None], self.rope[before + 1], rope)

    def interleave(self, positions: Tensor, tokens: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q1, x1, q2, x2, ...: positions and tokens (..., n) -> embeddings (..., 2n, dim), rotations.

        A relative model needs the position (...) `before` the first, or -1.
        """
        earlier = None
        if self.relative:
            assert before is not None
            earlier = torch.cat([before[..., None], positions[..., :-1]], -1)
        queries, query_rope = self.instructions(positions, earlier)
        rope = self.rope[positions + 1] if self.relative else query_rope
        contents = self.tok_embeddings(tokens)
        return (
            torch.stack([queries, contents], dim=-2).flatten(-3, -2),
            torch.stack([query_rope, rope], dim=-3).flatten(-4, -3),
        )

    def _ends(self, blocks: Tensor, count: Tensor) -> Tensor:
        """Position (M,) of the last token of the first `count` (M,) of the blocks (M, K); -1 where there is none."""
        ends = torch.cat([blocks.new_full((len(blocks), 1), -1), self.block_tokens[blocks][:, :, -1]], 1)
        return ends.gather(1, count[:, None])[:, 0]

    def _before(self, prefix: PrefixCache, chains: int, past: ChainEntries | None = None) -> Tensor | None:
        """Position (M, C) of the token before each chain, of a relative model."""
        if not self.relative:
            return None
        if past is not None:
            assert past.last is not None
            return past.last.repeat_interleave(chains // past.last.shape[1], 1)
        assert prefix.last is not None
        return prefix.last[:, None].expand(-1, chains)

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
        return self.logits(self._teacher_forced(tokens, labels, token_order, scale)[:, 1::2])

    def _teacher_forced(
        self, tokens: Tensor, labels: Tensor, token_order: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """Hidden states (M, 2N, dim) of class, q1, x1, ..., qN: the last content token predicts nothing."""
        x, rope = self._sequence(tokens, labels, token_order)
        if scale is not None:  # of contents; the class and the instructions stay
            factors = torch.ones_like(x[..., 0])
            factors[:, 2::2] = scale.gather(1, token_order)
            x = x * factors[..., None]
        return self._forward(x[:, :-1], rope[:, :-1])

    def sampler_forced(
        self, tokens: Tensor, labels: Tensor, token_order: Tensor, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sampler's own sequence: what `teacher_forced` gives where blocks of a step do not see each other.

        Every block is a chain behind the sequence of all blocks, of which it sees those of the steps before.

        Args:
            tokens, labels, token_order: as in `teacher_forced`.
            seen: (M, B) int64, for each block in the order, how many blocks are visible when it is drawn; None is one
                block a step, which is cheaper.

        Returns:
            Logits (M, N, vocab) of every token, and the hidden states (M, B, dim) before every block from which a
            position head says which one comes next: of the class token and of the last token of each block but the
            last.
        """
        block = self.entries_per_token * self.geometry.tokens_per_block
        if seen is None:
            hidden = self._teacher_forced(tokens, labels, token_order)
            return self.logits(hidden[:, 1::2]), hidden[:, ::block]
        blocks, device = self.geometry.num_blocks, tokens.device
        x, rope = (part[:, :-block] for part in self._sequence(tokens, labels, token_order))  # nobody sees the last one
        past = x.shape[1]
        # every block once more behind what it sees, without its last content token
        positions = token_order.unflatten(1, (blocks, -1))  # (M, B, p*p)
        values = tokens.gather(1, token_order).view_as(positions)
        ends = torch.cat([torch.full_like(token_order[:, :1], -1), positions[:, :, -1]], 1)  # of the first k blocks
        own, own_rope = self.interleave(positions, values, ends.gather(1, seen))
        chains, chain_rope = own[:, :, :-1], own_rope[:, :, :-1]
        # a chain sees the blocks of the steps before it, and itself
        x, rope = x[:, None], rope[:, None]
        later = torch.arange(past, device=device) >= 1 + block * seen[..., None]  # (M, B, past)
        causal, own_causal = (unseen_later(length, length, device) for length in (past, block - 1))
        for number, layer in enumerate(self._blocks()):
            last = number + 1 == self.config.layers  # of which only what is returned is needed
            places, queries = (slice(0, None, block), slice(0, None, 2)) if last else (EVERY, EVERY)
            x, key, value = layer.chain(x, rope, [], queries=places, unseen=causal)
            levels = [Level(key, value, later[:, None, :, None])]
            chains, _, _ = layer.chain(chains, chain_rope, levels, queries=queries, unseen=own_causal)
        return self.logits(self.norm(chains).flatten(1, 2)), self.norm(x[:, 0])

    def next_block(self, prefix: PrefixCache, tokens: Tensor, labels: Tensor, last: Tensor) -> Tensor:
        """What the position head says comes next: scores (M, B), of visible blocks too.

        The cache keeps no hidden states, so the last entry is encoded once more in its own place.

        Args:
            tokens: (M, N) int64, raster order.
            labels: (M,) int64.
            last: (M,) int64, the block that was revealed last; -1 where nothing is visible.
        """
        position = self.block_tokens[last, -1]
        token = self.tok_embeddings(tokens.gather(1, position[:, None])[:, 0])
        begun = last >= 0
        x = torch.where(begun[:, None], token, self.cls_embedding(labels))[:, None, None]
        rope = self.rope[torch.where(begun, position + 1, 0)][:, None, None]
        hidden, _ = self.encode(x, rope, PrefixCache(prefix.keys, prefix.values, prefix.length - 1))
        return self.position_head(self.norm(hidden[:, 0, 0])).float()

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
        first = self.block_tokens[:, 0].expand(len(tokens), -1)
        query, query_rope = self.instructions(first, self._ends(blocks, count)[:, None].expand_as(first))
        query, query_rope = query[:, :, None], query_rope[:, :, None]  # (M, B, 1, ...): a chain for each block
        visible = 1 + self.entries_per_token * self.geometry.tokens_per_block * count
        hidden_part = (torch.arange(x.shape[2], device=x.device) >= visible[:, None])[:, None, None, None]
        unseen = unseen_later(x.shape[2], x.shape[2], x.device)
        for number, layer in enumerate(self._blocks()):
            last = number + 1 == self.config.layers  # of which the context leaves keys and values alone
            x, key, value = layer.chain(x, rope, [], queries=None if last else EVERY, unseen=unseen)
            query, _, _ = layer.chain(query, query_rope, [Level(key, value, hidden_part)])
        hidden = self.norm(query[:, :, 0])
        return hidden.float(), entropy(self.logits(hidden).float().log_softmax(-1))

    def _sequence(self, tokens: Tensor, labels: Tensor, token_order: Tensor) -> tuple[Tensor, Tensor]:
        """class, q1, x1, ..., qn, xn for a token order (M, n): embeddings (M, 2n + 1, dim) and rotations."""
        none = torch.full_like(labels, -1)
        pairs, pair_rope = self.interleave(token_order, tokens.gather(1, token_order), none)
        start_rope = self.rope[:1].expand(len(tokens), -1, -1, -1)
        return torch.cat([self.cls_embedding(labels)[:, None], pairs], 1), torch.cat([start_rope, pair_rope], 1)

    # ------------------------------------------------------------------ chains over a prefix

    def start(self, labels: Tensor) -> PrefixCache:
        empty = self.empty(len(labels), 2 * self.geometry.num_tokens + 1)
        x = self.cls_embedding(labels)[:, None, None]
        rope = self.rope[:1].expand(len(labels), 1, -1, -1, -1)
        _, entries = self.encode(x, rope, empty, outputs=None)
        started = empty.append(entries, torch.ones(len(labels), dtype=torch.int64))
        return replace(started, last=torch.full_like(labels, -1)) if self.relative else started

    def _teach(
        self, prefix: PrefixCache, positions: Tensor, tokens: Tensor, past: ChainEntries | None, whole: bool
    ) -> tuple[Tensor, ChainEntries]:
        pairs, rope = self.interleave(positions, tokens, self._before(prefix, positions.shape[1], past))
        if not whole:  # the last content token predicts nothing
            pairs, rope = pairs[:, :, :-1], rope[:, :, :-1]
        hidden, entries = self.encode(pairs, rope, prefix, past, outputs=slice(0, None, 2))
        return self.norm(hidden), replace(entries, last=positions[..., -1]) if self.relative else entries

    def _continue(
        self,
        prefix: PrefixCache,
        position: Tensor,
        drawn: Drawn | None,
        own: Growing | None,
        past: ChainEntries | None = None,
    ) -> Tensor:
        before = self._before(prefix, position.shape[1], past) if drawn is None else drawn.position
        x, rope = self.instructions(position[..., None], None if before is None else before[..., None])
        if drawn is not None:  # the token just drawn goes in together with the next instruction
            x = torch.cat([self.tok_embeddings(drawn.token)[:, :, None], x], dim=2)
            rope = torch.cat([self.rope[drawn.position + 1][:, :, None], rope], dim=2)
        room = None if own is None else own.grown(x.shape[2])
        hidden, _ = self.encode(x, rope, prefix, past, room, outputs=slice(-1, None))
        return self.norm(hidden[:, :, 0])

    def _contents(self, prefix: PrefixCache, positions: Tensor, tokens: Tensor, skip: int) -> ChainEntries:
        pairs, rope = self.interleave(positions, tokens, prefix.last)
        _, entries = self.encode(pairs[:, None, skip:], rope[:, None, skip:], prefix, outputs=None)
        return entries


def cross_entropy(logits: Tensor, tokens: Tensor, token_order: Tensor) -> Tensor:
    """Teacher-forced loss per token: logits (M, N, vocab) in generation order -> (M, N) nats."""
    return F.cross_entropy(logits.float().mT, tokens.gather(1, token_order), reduction="none")
