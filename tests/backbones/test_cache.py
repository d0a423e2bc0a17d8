"""Caches: append, select and put against plain lists."""

import torch

from orderrl.backbones import OrderRobustTransformer
from orderrl.backbones.cache import ChainEntries, PrefixCache
from tests.helpers import tiny_images


def entries(states: int, chains: int, length: int) -> ChainEntries:
    parts = [torch.randn(states, 3, chains, length, 4) for _ in range(4)]
    return ChainEntries(tuple(parts[:2]), tuple(parts[2:]))


def keys_of(packed: ChainEntries) -> torch.Tensor:
    """(layers, M, heads, C, T, head_dim)."""
    return torch.stack(packed.keys)


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
            wanted[row].append(keys_of(new)[:, row, :, 0, :n])
    levels = cache.levels
    keys = torch.stack([level.keys[:, :, 0] for level in levels])
    assert keys.shape[3] == levels[0].values.shape[3] == 5
    assert levels[0].unseen is None and cache.slots == 6  # all are equally long
    for row in range(3):
        assert torch.equal(keys[:, row], torch.cat(wanted[row], 2))


def test_entries_with_gradients_are_appended_too() -> None:
    new = entries(2, 1, 3)
    new.keys[-1].requires_grad_()  # of the layers that are trained
    cache = empty(2, 3).append(new, torch.tensor([3, 3]))
    assert torch.equal(cache.keys[0, :, :, :3], new.keys[0][:, :, 0]) and cache.keys.requires_grad


def test_append_fills_the_last_slot() -> None:
    new = entries(2, 1, 3)
    cache = empty(2, 3).append(new, torch.tensor([3, 1]))
    level = cache.levels[1]
    assert torch.equal(level.keys[0, :, 0], new.keys[1][0, :, 0])
    assert level.unseen is not None and level.unseen[:, 0, 0, 0].tolist() == [[False] * 3, [False, True, True]]


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


def test_a_slice_of_states_is_a_view() -> None:
    cache = empty(4, 3).append(entries(4, 1, 2), torch.tensor([1, 2, 2, 0]))
    part = cache.select(slice(1, 3))
    assert part.keys.data_ptr() == cache.keys[:, 1].data_ptr() and part.length.tolist() == [2, 2]


def test_chain_spread_and_cat_are_gathers() -> None:
    packed = entries(3, 4, 2)
    index = [3, 0, 1]
    one = packed.chain(torch.tensor(index))
    for row in range(3):
        assert torch.equal(keys_of(one)[:, row, :, 0], keys_of(packed)[:, row, :, index[row]])
    rows = torch.tensor([4, 0, 2])
    spread = packed.spread(rows, 5)
    assert torch.equal(keys_of(spread)[:, rows], keys_of(packed)) and (keys_of(spread)[:, [1, 3]] == 0).all()
    later = entries(1, 4, 2)
    assert torch.equal(keys_of(later.spread(torch.tensor([2]), 5, spread))[:, 2], keys_of(later)[:, 0])
    assert torch.equal(spread.keys[1][0], packed.keys[1][1])
    for dim, parts in ((0, [packed.select(slice(0, 1)), packed.select(torch.tensor([1, 2]))]),
                       (2, [packed.narrow(slice(0, 3)), packed.narrow(slice(3, 4))])):  # fmt: skip
        assert torch.equal(keys_of(ChainEntries.cat(parts, dim)), keys_of(packed))
    assert torch.equal(keys_of(packed.until(1)), keys_of(packed)[..., :1, :])


def test_an_extended_copy_leaves_the_original_usable(backbone: OrderRobustTransformer) -> None:
    data, block = tiny_images(backbone, 2), torch.zeros(2, 1, dtype=torch.int64)
    prefix = backbone.start(data.labels)
    rest = torch.arange(1, 9).expand(2, -1)
    before = backbone.context_loss(prefix, data.tokens, rest)[0].loss
    backbone.extend(prefix.select(torch.arange(2)), data.tokens, block, torch.ones(2, dtype=torch.int64))
    assert torch.equal(backbone.context_loss(prefix, data.tokens, rest)[0].loss, before)
