"""Attention of chains against attention over everything that a chain sees, one chain at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from orderrl.backbones import layers
from orderrl.backbones.layers import Level, chain_attention, differentiable_chain_attention, unseen_later

STATES, HEADS, CHAINS, WIDTH = 3, 2, 6, 4


def levels(length: int, new: int) -> list[Level]:
    """A prefix of unequal lengths, pasts that two chains share each, and the chains themselves."""
    keys, values = torch.randn(2, STATES, HEADS, 1, 5, WIDTH)
    unseen = (torch.arange(5) >= torch.tensor([5, 1, 3])[:, None])[:, None, None, None]
    past = torch.randn(2, STATES, HEADS, CHAINS // 2, 3, WIDTH)
    own = torch.randn(2, STATES, HEADS, CHAINS, length, WIDTH)
    own_unseen = unseen_later(new, length, own.device)
    return [Level(keys, values, unseen), Level(past[0], past[1]), Level(own[0], own[1], own_unseen)]


def one_by_one(query: Tensor, given: list[Level]) -> Tensor:
    """Every chain alone, its keys side by side, through PyTorch's attention."""
    mixed = torch.empty_like(query)
    prefix, past, own = given
    for state in range(STATES):
        for chain in range(CHAINS):
            sides = [(prefix, 0), (past, chain // 2), (own, chain)]
            keys = torch.cat([level.keys[state, :, place] for level, place in sides], 1)
            values = torch.cat([level.values[state, :, place] for level, place in sides], 1)
            seen = torch.ones(query.shape[3], keys.shape[1], dtype=torch.bool)
            assert prefix.unseen is not None
            seen[:, :5] = ~prefix.unseen[state, 0, 0, 0]
            if own.unseen is not None:
                seen[:, 8:] = ~own.unseen
            mixed[state, :, chain] = F.scaled_dot_product_attention(query[state, :, chain], keys, values, seen)
    return mixed


@pytest.mark.parametrize(("length", "new"), [(4, 4), (4, 2), (3, 1)])
def test_shared_levels_are_one_softmax(length: int, new: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(length + new)
    query, given = torch.randn(STATES, HEADS, CHAINS, new, WIDTH), levels(length, new)
    expected = one_by_one(query, given)
    assert torch.allclose(differentiable_chain_attention(query, given), expected, atol=1e-6)
    for most in (1, 500, 10**9):  # a state at a time, or all
        monkeypatch.setattr(layers, "SCORES_AT_ONCE", most)
        assert torch.allclose(chain_attention(query, given), expected, atol=1e-6)


def test_gradients_flow_where_they_are_asked_for() -> None:
    query, given = torch.randn(STATES, HEADS, CHAINS, 4, WIDTH, requires_grad=True), levels(4, 4)
    chain_attention(query, given).square().sum().backward()
    assert query.grad is not None and query.grad.abs().sum() > 0
    with torch.no_grad():
        assert not chain_attention(query, given).requires_grad
