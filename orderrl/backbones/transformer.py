"""The order-robust LlamaGen backbone: a causal transformer with position-instruction tokens.

Notable:
- The sequence is [class, q1, x1, q2, x2, ...]: instruction token q_i says where the next token lies and
  predicts x_i (RandAR, Pang et al., 2024). Parameter names are the published ones.
- 2-D RoPE depends on the position in the image alone, so any order is the same computation.
- Entries at the end of a sequence are encoded as *chains*: each hidden block is a short causal chain
  q1, x1, ..., qn that reads the prefix and itself. Context losses, one-block look-ahead, appending and
  parallel decoding are the same forward over different chains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderrl.backbones.cache import ChainEntries, PrefixCache
from orderrl.backbones.layers import TransformerBlock, chain_attention, rope_table, rotate
from orderrl.backbones.protocol import BlockLosses
from orderrl.backbones.sampling import Sampling, sample_tokens
from orderrl.geometry import BlockGrid


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of an `OrderRobustTransformer`.

    Attributes:
        height, width: token grid.
        block_size: tokens along a side of a block.
        vocab_size: token values.
        num_classes: class labels; one more row is the dropped label.
        dim, layers, heads: width, depth and attention heads.
        multiple_of: the feed-forward width is rounded up to a multiple of this.
        dropout: dropout rate in training.
    """

    height: int
    width: int
    block_size: int
    vocab_size: int
    num_classes: int
    dim: int = 128
    layers: int = 4
    heads: int = 4
    multiple_of: int = 32
    dropout: float = 0.0

    def __post_init__(self) -> None:
        BlockGrid(self.height, self.width, self.block_size)
        for name in ("vocab_size", "num_classes", "dim", "layers", "heads", "multiple_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} must divide dim={self.dim}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    def to_dict(self) -> dict[str, int | float]:
        """Plain values, as stored in checkpoints."""
        return asdict(self)


class ClassEmbedding(nn.Module):
    """Label table; the last row is the dropped label used for classifier-free guidance."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class OrderRobustTransformer(nn.Module):
    """Causal transformer over [class, q1, x1, q2, x2, ...] for any token order.

    It satisfies `orderrl.backbones.Backbone`; the methods are documented there.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.geometry = BlockGrid(config.height, config.width, config.block_size)
        self.vocab_size, self.num_classes, self.hidden_size = config.vocab_size, config.num_classes, config.dim
        self.cls_embedding = ClassEmbedding(config.num_classes, config.dim)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.pos_instruct_embeddings = nn.Parameter(torch.empty(1, config.dim))
        self.layers = nn.ModuleList(
            TransformerBlock(config.dim, config.heads, config.multiple_of, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        rope = rope_table(config.height, config.width, config.dim // config.heads)
        self.register_buffer("rope", rope, persistent=False)
        self.register_buffer("block_tokens", self.geometry.block_tokens, persistent=False)
        self.rope: Tensor
        self.block_tokens: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal(0, 0.02) for every matrix, as in LlamaGen, and a zero output matrix."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.output.weight)

    def _blocks(self) -> Iterator[TransformerBlock]:
        return (cast(TransformerBlock, layer) for layer in self.layers)

    # ------------------------------------------------------------------ embeddings

    def _instructions(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Instruction tokens of raster positions (...): embeddings (..., dim) and rotations."""
        rope = self.rope[positions + 1]
        shared = self.pos_instruct_embeddings.view(self.config.heads, -1).expand(*positions.shape, -1, -1)
        return rotate(shared, rope).flatten(-2), rope

    def _interleave(self, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """q1, x1, q2, x2, ...: positions and tokens (..., n) -> embeddings (..., 2n, dim), rotations."""
        queries, rope = self._instructions(positions)
        contents = self.tok_embeddings(tokens)
        return (
            torch.stack([queries, contents], dim=-2).flatten(-3, -2),
            torch.stack([rope, rope], dim=-3).flatten(-4, -3),
        )

    # ------------------------------------------------------------------ training

    def teacher_forced(self, tokens: Tensor, labels: Tensor, token_order: Tensor) -> Tensor:
        """Logits of every token given its predecessors in an order.

        Args:
            tokens: (M, N) int64, raster order.
            labels: (M,) int64; num_classes is the dropped label.
            token_order: (M, N) int64, raster positions in the order of generation.

        Returns:
            (M, N, vocab) logits, in the order of generation.
        """
        ordered = tokens.gather(1, token_order)
        pairs, pair_rope = self._interleave(token_order, ordered)  # (M, 2N, dim)
        start = self.cls_embedding(labels)[:, None]
        x = torch.cat([start, pairs[:, :-1]], dim=1)  # the last content token predicts nothing
        start_rope = self.rope[:1].expand(len(tokens), -1, -1, -1)
        rope = torch.cat([start_rope, pair_rope[:, :-1]], dim=1)
        for layer in self._blocks():
            x = layer(x, rope)
        return self.output(self.norm(x[:, 1::2]))

    # ------------------------------------------------------------------ chains over a prefix

    def _encode(
        self, x: Tensor, rope: Tensor, prefix: PrefixCache, past: ChainEntries | None = None
    ) -> tuple[Tensor, ChainEntries]:
        """Encode chains: x (M, C, T, dim) -> hidden states (M, C, T, dim) before the final norm, new entries."""
        prefix_keys, prefix_values, prefix_mask = prefix.view()
        keys, values = [], []
        for number, layer in enumerate(self._blocks()):
            query, key, value = (
                part.permute(0, 3, 1, 2, 4) for part in layer.attention.project(layer.attention_norm(x), rope)
            )  # (M, heads, C, T, head_dim)
            keys.append(key)
            values.append(value)
            if past is not None:
                key = torch.cat([past.keys[number], key], dim=3)
                value = torch.cat([past.values[number], value], dim=3)
            mixed = chain_attention(query, key, value, prefix_keys[number], prefix_values[number], prefix_mask)
            x = x + layer.attention.wo(mixed.permute(0, 2, 3, 1, 4).flatten(-2))
            x = x + layer.feed_forward(layer.ffn_norm(x))
        return x, ChainEntries(torch.stack(keys), torch.stack(values))

    def start(self, labels: Tensor) -> PrefixCache:
        c = self.config
        shape = (c.layers, len(labels), c.heads, 2 * self.geometry.num_tokens + 2, c.dim // c.heads)
        keys = self.tok_embeddings.weight.new_zeros(shape)
        empty = PrefixCache(keys, torch.zeros_like(keys), torch.zeros_like(labels))
        x = self.cls_embedding(labels)[:, None, None]
        rope = self.rope[:1].expand(len(labels), 1, -1, -1, -1)
        _, entries = self._encode(x, rope, empty)
        return empty.append(entries, torch.ones_like(labels))

    def context_loss(
        self,
        prefix: PrefixCache,
        tokens: Tensor,
        blocks: Tensor,
        past: ChainEntries | None = None,
        whole: bool = False,
    ) -> tuple[BlockLosses, ChainEntries]:
        positions = self.block_tokens[blocks]  # (M, C, p*p)
        targets = tokens[:, None].expand(-1, blocks.shape[1], -1).gather(2, positions)
        pairs, rope = self._interleave(positions, targets)
        if not whole:  # the last content token predicts nothing
            pairs, rope = pairs[:, :, :-1], rope[:, :, :-1]
        hidden, entries = self._encode(pairs, rope, prefix, past)
        queries = self.norm(hidden[:, :, ::2])  # (M, C, p*p, dim)
        log_probs = self.output(queries).float().log_softmax(-1)
        loss = -log_probs.gather(-1, targets[..., None]).sum((-2, -1))
        return BlockLosses(loss, queries[:, :, 0], _entropy(log_probs[:, :, 0])), entries

    def expected_gain(self, prefix: PrefixCache, blocks: Tensor, past: ChainEntries, uniforms: Tensor) -> Tensor:
        instructions, rope = self._instructions(self.block_tokens[blocks])  # (M, C, p*p, ...)
        pasts: list[ChainEntries | None] = [past, None]
        gain = instructions.new_zeros(blocks.shape)
        drawn = None
        for i in range(instructions.shape[2]):
            x, x_rope = instructions[:, :, i : i + 1], rope[:, :, i : i + 1]
            if drawn is not None:
                x = torch.cat([self.tok_embeddings(drawn)[:, :, None], x], dim=2)
                x_rope = rope[:, :, i - 1 : i + 1]
            log_probs = []
            for side, earlier in enumerate(pasts):
                hidden, entries = self._encode(x, x_rope, prefix, earlier)
                pasts[side] = entries if earlier is None else earlier.then(entries)
                log_probs.append(self.output(self.norm(hidden[:, :, -1])).float().log_softmax(-1))
            informed, uninformed = log_probs
            gain += (informed.exp() * (informed - uninformed)).sum(-1)
            drawn = sample_tokens(informed, uniforms[:, :, i], Sampling())
        return gain

    def observe(self, prefix: PrefixCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        queries, rope = self._instructions(self.block_tokens[blocks][:, :, :1])
        hidden, _ = self._encode(queries, rope, prefix)
        first = self.norm(hidden[:, :, 0])
        return first, _entropy(self.output(first).float().log_softmax(-1))

    def extend(
        self,
        prefix: PrefixCache,
        tokens: Tensor,
        blocks: Tensor,
        count: Tensor,
        first: ChainEntries | None = None,
    ) -> PrefixCache:
        positions = self.block_tokens[blocks].flatten(1)  # (M, K*p*p)
        pairs, rope = self._interleave(positions, tokens.gather(1, positions))
        entries_each = 2 * self.geometry.tokens_per_block
        if first is not None:  # the first block's entries are known up to its last content token
            done = first.keys.shape[4]
            prefix = prefix.append(first, done * (count > 0))
            pairs, rope = pairs[:, done:], rope[:, done:]
            remaining = (entries_each * count - done).clamp_min(0)
        else:
            remaining = entries_each * count
        _, entries = self._encode(pairs[:, None], rope[:, None], prefix)
        return prefix.append(entries, remaining)

    def decode(
        self,
        prefix: PrefixCache,
        blocks: Tensor,
        uniforms: Tensor,
        sampling: Sampling,
        unconditional: PrefixCache | None = None,
    ) -> Tensor:
        positions = self.block_tokens[blocks]  # (M, K, p*p)
        instructions, rope = self._instructions(positions)
        prefixes = [prefix] if unconditional is None else [prefix, unconditional]
        pasts: list[ChainEntries | None] = [None for _ in prefixes]
        drawn: list[Tensor] = []
        for i in range(positions.shape[-1]):
            x, x_rope = instructions[:, :, i : i + 1], rope[:, :, i : i + 1]
            if drawn:  # the token just drawn goes in together with the next instruction
                x = torch.cat([self.tok_embeddings(drawn[-1])[:, :, None], x], dim=2)
                x_rope = rope[:, :, i - 1 : i + 1]
            logits = []
            for side, cache in enumerate(prefixes):
                past = pasts[side]
                hidden, entries = self._encode(x, x_rope, cache, past)
                pasts[side] = entries if past is None else past.then(entries)
                logits.append(self.output(self.norm(hidden[:, :, -1])).float())
            drawn.append(sample_tokens(logits[0], uniforms[:, :, i], sampling, *logits[1:]))
        return torch.stack(drawn, dim=-1)


def _entropy(log_probs: Tensor) -> Tensor:
    """Entropy over the last dimension, nats."""
    return -(log_probs.exp() * log_probs).sum(-1)


def cross_entropy(logits: Tensor, tokens: Tensor, token_order: Tensor) -> Tensor:
    """Teacher-forced loss per token: logits (M, N, vocab) in generation order -> (M, N) nats."""
    return F.cross_entropy(logits.float().mT, tokens.gather(1, token_order), reduction="none")
