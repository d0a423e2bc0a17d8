"""Transformer parts of the LlamaGen family: RMSNorm, SwiGLU, 2-D RoPE, attention over a shared prefix.

What is special here is `chain_attention`: many short causal chains read one prefix cache, so the
context loss of every hidden block costs one forward over the chains and never touches the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from orderrl.backbones.cpu_linear import EVERY, Linear
from orderrl.backbones.memory import values_at_once

FEW_QUERIES = 8  # of a group of chains: one token of a block, or of a few blocks at once
SCORES_AT_ONCE = 2**20  # on a CPU: a few megabytes, so that they stay in its cache between the passes over them


def rope_table(height: int, width: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """2-D rotary table of LlamaGen (Sun et al., 2024).

    The first half of the rotation pairs turns with the row, the second with the column. Row 0 of
    the table belongs to the class token and is all zero (not the identity), as published.

    Returns:
        (1 + H*W, head_dim / 2, 2) float32: cosine and sine for the class token, then raster order.

    Raises:
        ValueError: if head_dim is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim must be a multiple of 4 for 2-D rotary embeddings, got {head_dim}")
    half = head_dim // 2
    frequencies = base ** (-torch.arange(0, half, 2).float() / half)  # (half / 2,)
    rows = torch.arange(height).float()[:, None] * frequencies
    columns = torch.arange(width).float()[:, None] * frequencies
    angles = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1).flatten(
        0, 1
    )  # (H*W, half)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([table.new_zeros(1, half, 2), table])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate adjacent channel pairs: x (..., heads, head_dim), rope (..., head_dim / 2, 2), broadcast over heads."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = pairs * torch.view_as_complex(rope.float()).unsqueeze(-2)
    return torch.view_as_real(turned).flatten(-2).type_as(x)


class Level(NamedTuple):
    """Keys and values that groups of chains share: a state's prefix, a block before the chain, the chain itself."""

    keys: Tensor  # (M, heads, G, L, head_dim); each of the G is read by C / G consecutive chains
    values: Tensor
    # bool, True where a query may not look, broadcast to (M, heads, C, T, L); None is nowhere
    unseen: Tensor | None = None

    def states(self, rows: slice) -> Level:
        """A view of some states; a mask that all states share stays whole."""
        unseen = self.unseen if self.unseen is None or self.unseen.ndim < self.keys.ndim else self.unseen[rows]
        return Level(self.keys[rows], self.values[rows], unseen)


def unseen_later(length: int, total: int, device: torch.device) -> Tensor | None:
    """(length, total) bool: what the last `length` of `total` entries do not see, those behind them; None if nothing.

    This is the mask of a chain's own level.
    """
    if length == 1:
        return None
    return torch.ones(length, total, dtype=torch.bool, device=device).triu(total - length + 1)


def chain_attention(query: Tensor, levels: Sequence[Level]) -> Tensor:
    """Attention of many chains over what they share and what is their own, as a single softmax; nothing is copied.

    T queries of C chains of M states (M, heads, C, T, head_dim), contiguous, look at the levels; each sees at least one
    key. The result has their shape.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and query.requires_grad):
        return differentiable_chain_attention(query, levels)
    mixed = torch.empty_like(query)
    if not mixed.numel():
        return mixed
    seen = sum(level.keys.shape[3] for level in levels)
    at_once = max(1, values_at_once(SCORES_AT_ONCE, query.device) // max(query[0, ..., 0].numel() * seen, 1))
    for start in range(0, len(query), at_once):
        states = slice(start, start + at_once)
        _attend(query[states], [level.states(states) for level in levels], mixed[states])
    return mixed


def _attend(query: Tensor, levels: Sequence[Level], mixed: Tensor) -> None:
    """`chain_attention` of a few states, without gradients, with all scores in one buffer; writes to `mixed`."""
    states, heads, chains, length, width = query.shape
    ends, on_cpu = list(accumulate(level.keys.shape[3] for level in levels)), query.device.type == "cpu"
    scores = query.new_empty(states * heads, chains * length, ends[-1])
    scaled = query * width**-0.5 if on_cpu else query
    for (keys, _, unseen), end in zip(levels, ends, strict=True):
        groups, seen = keys.shape[2:4]
        place = scores.view(states * heads * groups, -1, ends[-1])[..., end - seen : end]
        asked, held = scaled.view(len(place), -1, width), keys.reshape(len(place), seen, width)
        if on_cpu:  # one batched call and a copy: written in place, every product would be a call of its own
            place.copy_(_scores(asked, held))
        else:
            torch.baddbmm(place, asked, held.mT, beta=0, alpha=width**-0.5, out=place)
        if unseen is not None:
            scores.view(states, heads, chains, length, -1)[..., end - seen : end].masked_fill_(unseen, -torch.inf)
    torch.softmax(scores, dim=-1, out=scores)
    for number, ((_, values, _), end) in enumerate(zip(levels, ends, strict=True)):
        groups, seen = values.shape[2:4]
        weights = scores.view(states * heads * groups, -1, ends[-1])[..., end - seen : end]
        weights = weights.contiguous() if on_cpu and groups == chains else weights
        total = mixed.view(len(weights), -1, width)
        torch.baddbmm(total, weights, values.reshape(len(weights), seen, width), beta=int(number > 0), out=total)


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """query (n, T, width), keys (n, L, width) -> (n, T, L)."""
    if query.shape[1] <= FEW_QUERIES:  # few queries: memory is read faster with the keys on the left
        return torch.bmm(keys, query.mT).mT
    return torch.bmm(query, keys.mT)


def differentiable_chain_attention(query: Tensor, levels: Sequence[Level]) -> Tensor:
    """`chain_attention` from operations that have gradients, and that a compiler can fuse."""
    query = query * query.shape[-1] ** -0.5
    leading = query.shape[:-1]
    scores = []
    for keys, _, unseen in levels:
        part = (_grouped(query, keys.shape[2]) @ keys.mT).view(*leading, keys.shape[3])
        scores.append(part if unseen is None else part.masked_fill(unseen, -torch.inf))
    weights = torch.cat(scores, dim=-1).softmax(-1)
    parts = weights.split([part.shape[-1] for part in scores], dim=-1)
    mixed = [
        (_grouped(part, values.shape[2]) @ values).view(query.shape)
        for part, (_, values, _) in zip(parts, levels, strict=True)
    ]
    return torch.stack(mixed).sum(0)


def _grouped(chains: Tensor, groups: int) -> Tensor:
    """(M, heads, C, T, ...) -> (M, heads, groups, C / groups * T, ...)."""
    return chains.unflatten(2, (groups, -1)).flatten(3, 4)


class Attention(nn.Module):
    """Multi-head self-attention with a fused projection (query, key, value in that order)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv = Linear(dim, 3 * dim, bias=False)
        self.wo = Linear(dim, dim, bias=False)

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., dim) -> rotated query, rotated key, value, each (..., heads, head_dim)."""
        mixed = self.wqkv(x).unflatten(-1, (3 * self.heads, -1))
        query_key, value = mixed.split([2 * self.heads, self.heads], dim=-2)
        query, key = rotate(query_key, rope).chunk(2, dim=-2)
        return query, key, value

    def project_chains(self, x: Tensor, rope: Tensor, queries: slice | None) -> tuple[Tensor | None, Tensor, Tensor]:
        """(M, C, T, dim) -> contiguous query of the places `queries` (None: no query), key and value of all places.

        Each is (M, heads, C, T, head_dim).
        """
        if queries == EVERY:
            mixed = self.wqkv(x).unflatten(-1, (3 * self.heads, -1))
            query_key, value = mixed.split([2 * self.heads, self.heads], dim=-2)
            (query, key), (value,) = by_heads(rotate(query_key, rope), self.heads), by_heads(value, self.heads)
            return query, key, value
        dim = x.shape[-1]
        key, value = self.wqkv(x, slice(dim, None)).unflatten(-1, (2 * self.heads, -1)).chunk(2, dim=-2)
        (key,), (value,) = by_heads(rotate(key, rope), self.heads), by_heads(value, self.heads)
        if queries is None:
            return None, key, value
        asked = self.wqkv(x[:, :, queries], slice(dim)).unflatten(-1, (self.heads, -1))
        (query,) = by_heads(rotate(asked, rope[:, :, queries]), self.heads)
        return query, key, value

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Causal self-attention over a whole sequence, (M, S, dim)."""
        query, key, value = (part.transpose(1, 2) for part in self.project(x, rope))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.wo(rearrange(mixed, "m h s d -> m s (h d)"))


def by_heads(x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(M, C, T, n * heads, head_dim) -> n tensors (M, heads, C, T, head_dim), each of them contiguous."""
    return x.unflatten(3, (-1, heads)).permute(3, 0, 4, 1, 2, 5).contiguous().unbind()


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), its width two thirds of 4 * dim, rounded up."""

    def __init__(self, dim: int, multiple_of: int) -> None:
        super().__init__()
        width = int(2 * 4 * dim / 3)
        width = -(-width // multiple_of) * multiple_of
        self.w1 = Linear(dim, width, bias=False)
        self.w3 = Linear(dim, width, bias=False)
        self.w2 = Linear(width, dim, bias=False)

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        gate = self.w1(x)
        if torch.is_grad_enabled():
            return self.w2(F.silu(gate) * self.w3(x), onto=onto)
        return self.w2(F.silu(gate, inplace=True).mul_(self.w3(x)), onto=onto)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward with residual connections."""

    def __init__(self, dim: int, heads: int, multiple_of: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.attention = Attention(dim, heads)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-5)
        self.feed_forward = FeedForward(dim, multiple_of)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Teacher-forced pass over whole sequences, (M, S, dim)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rope))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))

    def chain(
        self,
        x: Tensor,
        rope: Tensor,
        levels: Sequence[Level],
        own: tuple[Tensor, Tensor] | None = None,
        queries: slice | None = EVERY,
        unseen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pass over new entries of chains that see what the levels hold, their own past and each other causally.

        Args:
            x: (M, C, T, dim), the new entries; off the CPU it may be overwritten where there are no gradients.
            rope: (M, C, T, head_dim / 2, 2), or broadcast.
            levels: what groups of chains share.
            own: keys and values (M, heads, C, S, head_dim) of which the last T places take the new entries and those
                before hold the chains' earlier ones; None if there are none.
            queries: the places whose output is needed; the others only leave keys and values behind. None is no place.
            unseen: what each new entry does not see of its chain, (T, S) as `unseen_later` gives it.

        Returns:
            (M, C, queries, dim), and the new entries' keys and values (M, heads, C, T, head_dim).
        """
        query, key, value = self.attention.project_chains(self.attention_norm(x), rope, queries)
        new_key, new_value, length = key, value, x.shape[2]
        if own is not None:
            own[0][..., -length:, :], own[1][..., -length:, :] = key, value
            key, value = own
        if query is None:
            return x[:, :, :0], new_key, new_value
        assert queries is not None
        unseen = None if unseen is None else unseen[queries]
        mixed = chain_attention(query, [*levels, Level(key, value, unseen)])
        x, mixed = x[:, :, queries], mixed.permute(0, 2, 3, 1, 4).flatten(-2)
        if self.training and self.dropout.p:
            x = x + self.dropout(self.attention.wo(mixed))
            return x + self.dropout(self.feed_forward(self.ffn_norm(x))), new_key, new_value
        x = self.attention.wo(mixed, onto=x)
        return self.feed_forward(self.ffn_norm(x), onto=x), new_key, new_value
