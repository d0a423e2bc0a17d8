"""Transformer parts of the LlamaGen family: RMSNorm, SwiGLU, 2-D RoPE, attention over a shared prefix.

What is special here is `chain_attention`: many short causal chains read one prefix cache, so the
context loss of every hidden block costs one forward over the chains and never touches the prefix.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


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
    return torch.cat([torch.zeros(1, half, 2), table])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate adjacent channel pairs: x (..., heads, head_dim), rope (..., head_dim / 2, 2), broadcast over heads."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    turned = pairs * torch.view_as_complex(rope.float()).unsqueeze(-2)
    return torch.view_as_real(turned).flatten(-2).type_as(x)


def chain_attention(
    query: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_mask: Tensor,
    causal: bool = True,
) -> Tensor:
    """Attention of many chains over one shared prefix, as a single softmax.

    Args:
        query: (M, heads, C, T, head_dim), T queries of C chains of M states.
        own_key, own_value: (M, heads, C, S, head_dim), the chain's own entries, aligned at their ends with the queries.
        prefix_key, prefix_value: (M, heads, L, head_dim), shared by the chains of a state.
        prefix_mask: (M, L) bool, True where the prefix entry exists.
        causal: query i sees own entries up to and including S - T + i; off, all of them.

    Returns:
        (M, heads, C, T, head_dim). Every query sees the valid prefix.
    """
    chains, new = query.shape[2:4]
    total = own_key.shape[3]
    query = query * query.shape[-1] ** -0.5
    to_prefix = query.flatten(2, 3) @ prefix_key.mT  # (M, heads, C*T, L)
    to_prefix = to_prefix.masked_fill_(~prefix_mask[:, None, None], -torch.inf)
    to_own = query @ own_key.mT  # (M, heads, C, T, P + T)
    if causal:
        future = torch.ones(new, total, dtype=torch.bool, device=query.device).triu(total - new + 1)
        to_own = to_own.masked_fill_(future, -torch.inf)
    weights = torch.cat([to_prefix, to_own.flatten(2, 3)], dim=-1).softmax(-1)
    from_prefix, from_own = weights.split([prefix_key.shape[2], total], dim=-1)
    return (from_prefix @ prefix_value).unflatten(2, (chains, new)) + from_own.unflatten(2, (chains, new)) @ own_value


class Attention(nn.Module):
    """Multi-head self-attention with a fused projection (query, key, value in that order)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., dim) -> rotated query, rotated key, value, each (..., heads, head_dim)."""
        mixed = self.wqkv(x).unflatten(-1, (3 * self.heads, -1))
        query_key, value = mixed.split([2 * self.heads, self.heads], dim=-2)
        query, key = rotate(query_key, rope).chunk(2, dim=-2)
        return query, key, value

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Plain causal self-attention over a whole sequence, (M, S, dim)."""
        query, key, value = (part.transpose(1, 2) for part in self.project(x, rope))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.wo(rearrange(mixed, "m h s d -> m s (h d)"))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), its width two thirds of 4 * dim, rounded up."""

    def __init__(self, dim: int, multiple_of: int) -> None:
        super().__init__()
        width = int(2 * 4 * dim / 3)
        width = -(-width // multiple_of) * multiple_of
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w3 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


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
