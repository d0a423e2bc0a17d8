"""ARPG (Li et al., 2025): a two-pass decoder in which queries never enter the cache.

Notable:
- The first pass (self decoder) runs over [class, x1, x2, ...] in any order and gives *one* pair of keys and values,
  shared by all layers of the second pass. The second pass (cross decoder) turns a mask token at a target position
  into a prediction; queries see keys only, never each other.
- So a hidden block costs its queries and, inside the block, its earlier tokens; with blocks of one token the prefix is
  only read. Parameter names are the published ones.
- Context losses and the block sampler use the causal form with a mask across blocks. The published sampler, whose
  tokens of one iteration see each other in both directions, is `orderrl.backbones.published.sample_arpg`.
"""

from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from orderrl.backbones.cache import ChainEntries, PrefixCache
from orderrl.backbones.chains import ChainBackbone, Drawn, Growing
from orderrl.backbones.cpu_linear import Linear
from orderrl.backbones.layers import FeedForward, Level, by_heads, chain_attention, rotate, unseen_later
from orderrl.backbones.llamagen import FamilyModule, TransformerConfig
from orderrl.backbones.protocol import answers_alike


class _SelfAttention(nn.Module):
    """Projections of a layer of the first pass."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_q = Linear(dim, dim, bias=False)
        self.to_k = Linear(dim, dim, bias=False)
        self.to_v = Linear(dim, dim, bias=False)
        self.proj = Linear(dim, dim, bias=False)


class _CrossAttention(nn.Module):
    """Projections of a layer of the second pass; keys and values are shared."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_q = Linear(dim, dim, bias=False)
        self.proj = Linear(dim, dim, bias=False)


class _Layer(nn.Module):
    """Pre-norm attention and feed-forward with residual connections."""

    def __init__(self, attention: nn.Module, config: TransformerConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.attn = attention
        self.ffn_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.ffn = FeedForward(config.dim, config.multiple_of)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Residual connections after attention: x and mixed (..., dim)."""
        x = x + cast(nn.Linear, self.attn.proj)(mixed)
        return x + self.ffn(self.ffn_norm(x))


class _Decoder(nn.Module):
    """Both passes and the shared keys and values between them."""

    def __init__(self, config: TransformerConfig) -> None:
        config.require_plain("arpg")
        super().__init__()
        half = config.layers // 2
        self.self_dec = nn.ModuleList(_Layer(_SelfAttention(config.dim), config) for _ in range(half))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.to_k = Linear(config.dim, config.dim, bias=False)
        self.to_v = Linear(config.dim, config.dim, bias=False)
        self.cross_dec = nn.ModuleList(_Layer(_CrossAttention(config.dim), config) for _ in range(half))


@answers_alike
class ARPG(FamilyModule, ChainBackbone):
    """Two-pass decoder for any token order.

    It satisfies `orderrl.backbones.Backbone`; the methods are documented there. A cache entry of a token holds the keys
    and values of every layer of the first pass and, behind them, the shared pair. ValueError if the number of layers is
    odd: both passes have half of them.
    """

    OUTPUT = "head"
    order_robust = True
    entries_per_token = 1

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        if config.layers % 2:
            raise ValueError(f"layers={config.layers} must be even: half of them belong to each pass")
        # rows: tokens, mask, classes, dropped class, one that nothing uses
        self.embeddings = nn.Embedding(config.vocab_size + config.num_classes + 3, config.dim)
        self.layers = _Decoder(config)
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.head = Linear(config.dim, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    # ------------------------------------------------------------------ embeddings and heads

    def embed_class(self, labels: Tensor) -> Tensor:
        """(...) int64, num_classes is the dropped label -> (..., dim)."""
        return self.embeddings(self.vocab_size + 1 + labels)

    def _mask_queries(self, shape: torch.Size) -> Tensor:
        return self.embeddings.weight[self.vocab_size].expand(*shape, -1)

    def _heads(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """(M, C, T, dim) -> (M, heads, C, T, head_dim), rotated if positions are given."""
        split = x.unflatten(-1, (self.config.heads, -1))
        return by_heads(split if rope is None else rotate(split, rope), self.config.heads)[0]

    # ------------------------------------------------------------------ both passes

    def encode(
        self,
        x: Tensor,
        rope: Tensor,
        prefix: PrefixCache,
        past: ChainEntries | None = None,
        own: ChainEntries | None = None,
        causal: bool = True,
    ) -> ChainEntries:
        """First pass over chains of contents.

        Args:
            x: (M, C, T, dim) embeddings.
            rope: (M, C, T, head_dim / 2, 2) rotations.
            past: entries that come before the chains; each of its P chains is seen by C / P consecutive ones.
            own: room for the chains' entries, earlier ones first; the last T places are filled.
            causal: contents of a chain see their predecessors; off, they see each other.

        Returns:
            Entries of half the layers and, last, the pair that the second pass reads.
        """
        shared, keys, values = prefix.levels, [], []
        unseen = unseen_later(x.shape[2], x.shape[2] if own is None else own.length, x.device) if causal else None
        for number, layer in enumerate(cast(list[_Layer], self.layers.self_dec)):
            attention = cast(_SelfAttention, layer.attn)
            normed = layer.attn_norm(x)
            query, key = self._heads(attention.to_q(normed), rope), self._heads(attention.to_k(normed), rope)
            value = self._heads(attention.to_v(normed))
            keys.append(key)
            values.append(value)
            levels = [shared[number], *_given(past, number)]
            if own is not None:
                key, value = _grown(own, number, key, value)
            mixed = chain_attention(query, [*levels, Level(key, value, unseen)])
            x = layer.finish(x, mixed.permute(0, 2, 3, 1, 4).flatten(-2))
        normed = self.layers.norm(x)
        keys.append(self._heads(self.layers.to_k(normed), rope))
        values.append(self._heads(self.layers.to_v(normed)))
        if own is not None:
            _grown(own, -1, keys[-1], values[-1])
        return ChainEntries(tuple(keys), tuple(values))

    def predict(
        self,
        positions: Tensor,
        prefix: PrefixCache,
        own: ChainEntries,
        past: ChainEntries | None = None,
        causal: bool = True,
    ) -> Tensor:
        """Second pass: hidden states that predict raster positions (M, C, T), (M, C, T, dim) after the final norm.

        Args:
            positions: (M, C, T) int64.
            own: entries of the chains; query i sees all but the last T - 1 - i of them. They may be empty.
            past: entries that come before the chains, shared as in `encode`.
            causal: off, every query sees all of `own`.
        """
        levels, length = [prefix.levels[-1], *_given(past, -1)], positions.shape[2]
        if own.length:
            unseen = unseen_later(length, own.length, positions.device) if causal else None
            levels.append(Level(own.keys[-1], own.values[-1], unseen))
        rope = self.rope[positions + 1]
        x = self._mask_queries(positions.shape)
        for layer in cast(list[_Layer], self.layers.cross_dec):
            query = self._heads(cast(_CrossAttention, layer.attn).to_q(layer.attn_norm(x)), rope)
            mixed = chain_attention(query, levels)
            x = layer.finish(x, mixed.permute(0, 2, 3, 1, 4).flatten(-2))
        return self.norm(x)

    # ------------------------------------------------------------------ training

    def teacher_forced(self, tokens: Tensor, labels: Tensor, token_order: Tensor) -> Tensor:
        """Logits of every token given its predecessors in an order; as of `OrderRobustTransformer`."""
        contents = self.embeddings(tokens.gather(1, token_order)[:, :-1])
        x = self.dropout(torch.cat([self.embed_class(labels)[:, None], contents], dim=1))  # (M, N, dim)
        target_rope = self.rope[token_order + 1]
        rope = torch.cat([self.rope[:1].expand(len(x), 1, -1, -1), target_rope[:, :-1]], dim=1)
        for layer in cast(list[_Layer], self.layers.self_dec):
            attention = cast(_SelfAttention, layer.attn)
            normed = layer.attn_norm(x)
            mixed = self._causal(
                self._rotated(attention.to_q(normed), rope),
                self._rotated(attention.to_k(normed), rope),
                attention.to_v(normed).unflatten(-1, (self.config.heads, -1)),
            )
            x = layer.finish(x, mixed)
        normed = self.layers.norm(x)
        key = self._rotated(self.layers.to_k(normed), rope)
        value = self.layers.to_v(normed).unflatten(-1, (self.config.heads, -1))
        query = self._mask_queries(token_order.shape)
        for layer in cast(list[_Layer], self.layers.cross_dec):
            projected = cast(_CrossAttention, layer.attn).to_q(layer.attn_norm(query))
            query = layer.finish(query, self._causal(self._rotated(projected, target_rope), key, value))
        return self.logits(self.norm(query))

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        """(M, S, dim) -> (M, S, heads, head_dim)."""
        return rotate(x.unflatten(-1, (self.config.heads, -1)), rope)

    @staticmethod
    def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention over (M, S, heads, head_dim) -> (M, S, dim)."""
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        return rearrange(F.scaled_dot_product_attention(query, key, value, is_causal=True), "m h s d -> m s (h d)")

    # ------------------------------------------------------------------ chains over a prefix

    def start(self, labels: Tensor) -> PrefixCache:
        c = self.config
        shape = (c.layers // 2 + 1, len(labels), c.heads, self.geometry.num_tokens + 2, c.dim // c.heads)
        keys = self.head.weight.new_zeros(shape)
        empty = PrefixCache(keys, torch.zeros_like(keys), torch.zeros(len(labels), dtype=torch.int64))
        x = self.embed_class(labels)[:, None, None]
        rope = self.rope[:1].expand(len(labels), 1, -1, -1, -1)
        return empty.append(self.encode(x, rope, empty), torch.ones(len(labels), dtype=torch.int64))

    def _teach(
        self, prefix: PrefixCache, positions: Tensor, tokens: Tensor, past: ChainEntries | None, whole: bool
    ) -> tuple[Tensor, ChainEntries]:
        known = positions.shape[2] - (0 if whole else 1)  # the last token predicts nothing
        entries = self._embed_and_encode(prefix, positions[:, :, :known], tokens[:, :, :known], past)
        own = entries.until(positions.shape[2] - 1)
        return self.predict(positions, prefix, own, past), entries

    def _embed_and_encode(
        self,
        prefix: PrefixCache,
        positions: Tensor,
        tokens: Tensor,
        past: ChainEntries | None = None,
        own: ChainEntries | None = None,
    ) -> ChainEntries:
        return self.encode(self.embeddings(tokens), self.rope[positions + 1], prefix, past, own)

    def _continue(
        self,
        prefix: PrefixCache,
        position: Tensor,
        drawn: Drawn | None,
        own: Growing | None,
        past: ChainEntries | None = None,
    ) -> Tensor:
        entries = ChainEntries((), ())
        if drawn is not None:
            assert own is not None
            entries = own.grown(1)
            self._embed_and_encode(prefix, drawn.position[..., None], drawn.token[..., None], past, entries)
        return self.predict(position[..., None], prefix, entries, past)[:, :, 0]

    def _contents(self, prefix: PrefixCache, positions: Tensor, tokens: Tensor, skip: int) -> ChainEntries:
        return self._embed_and_encode(prefix, positions[:, None, skip:], tokens[:, None, skip:])


def _given(past: ChainEntries | None, layer: int) -> list[Level]:
    """The level of what comes before the chains, if anything does."""
    return [] if past is None else [Level(past.keys[layer], past.values[layer])]


def _grown(own: ChainEntries, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Fill the last places of the chains' entries; all of them."""
    own.keys[layer][..., -key.shape[3] :, :], own.values[layer][..., -key.shape[3] :, :] = key, value
    return own.keys[layer], own.values[layer]
