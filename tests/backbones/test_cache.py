"""Caches: append, select and put against plain lists."""

import torch

from orderrl.backbones import OrderRobustTransformer
from orderrl.backbones.cache import ChainEntries, PrefixCache
from tests.helpers import tiny_images


def entries(states: int, chains: int, length: int) -> ChainEntries:
    return ChainEntries(torch.randn(2, states, 3, chains, length, 4), torch.randn(2, states, 3, chains, length, 4))


def empty(states: int, slots: int) -> PrefixCache:
    zeros = torch.zeros(2, states, 3, slots + 1, 4)
    return PrefixCache(zeros, zeros.clone(), torch.zeros(states, dtype=torch.int64))


def test_append_equals_concatenation_of_what_counts() -> None:
    cache = empty(3, 6)
    wanted: list[list[torch.Tensor]] = [[], [], []]
    for count in ([2, 0, 1], [3, 2, 3], [0, 3, 1]):
        new = entries(3, 1, 3)
        cache = cache.append(new, torch.tensor(count))
        for row, n in enumerate(count):
            wanted[row].append(new.keys[:, row, :, 0, :n])
    keys, values, mask = cache.view()
    assert keys.shape[3] == values.shape[3] == 5
    assert mask.sum(1).tolist() == [5, 5, 5] and cache.slots == 6
    for row in range(3):
        assert torch.equal(keys[:, row], torch.cat(wanted[row], 2))


def test_append_fills_the_last_slot() -> None:
    new = entries(2, 1, 3)
    cache = empty(2, 3).append(new, torch.tensor([3, 1]))
    assert torch.equal(cache.view()[0][:, 0], new.keys[:, 0, :, 0])
    assert cache.view()[2].tolist() == [[True] * 3, [True, False, False]]


def test_select_copies_and_put_writes_back() -> None:
    cache = empty(4, 3).append(entries(4, 1, 2), torch.tensor([1, 2, 2, 0]))
    rows = torch.tensor([3, 1])
    part = cache.select(rows)
    before = cache.keys.clone()
    part = part.append(entries(2, 1, 1), torch.tensor([1, 1]))
    assert torch.equal(cache.keys, before) and cache.length.tolist() == [1, 2, 2, 0]
    whole = cache.put(rows, part)
    assert whole.length.tolist() == [1, 3, 2, 1]
    assert torch.equal(whole.keys[:, rows], part.keys)
    assert torch.equal(whole.keys[:, [0, 2]], before[:, [0, 2]])


def test_chains_and_spread_are_gathers() -> None:
    packed = entries(3, 4, 2)
    index = torch.tensor([[0, 3], [2, 2], [1, 0]])
    chosen = packed.chains(index)
    for row in range(3):
        assert torch.equal(chosen.values[:, row], packed.values[:, row][:, :, index[row]])
    one = packed.chain(torch.tensor([3, 0, 1]))
    assert torch.equal(one.keys[:, 0, :, 0], packed.keys[:, 0, :, 3])
    rows = torch.tensor([4, 0, 2])
    spread = packed.spread(rows, 5)
    assert torch.equal(spread.keys[:, rows], packed.keys) and (spread.keys[:, [1, 3]] == 0).all()
    later = entries(1, 4, 2)
    assert torch.equal(later.spread(torch.tensor([2]), 5, spread).keys[:, 2], later.keys[:, 0])
    assert torch.equal(spread.keys[:, 0], packed.keys[:, 1])


def test_an_extended_copy_leaves_the_original_usable(backbone: OrderRobustTransformer) -> None:
    data, block = tiny_images(backbone, 2), torch.zeros(2, 1, dtype=torch.int64)
    prefix = backbone.start(data.labels)
    rest = torch.arange(1, 9).expand(2, -1)
    before = backbone.context_loss(prefix, data.tokens, rest)[0].loss
    backbone.extend(prefix.select(torch.arange(2)), data.tokens, block, torch.ones(2, dtype=torch.int64))
    assert torch.equal(backbone.context_loss(prefix, data.tokens, rest)[0].loss, before)
