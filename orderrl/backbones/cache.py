"""Key-value caches: the prefix of a state and the entries of its chains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChainEntries:
    """Keys and values of C chains of T entries per state.

    Attributes:
        keys, values: (layers, M, heads, C, T, head_dim).
    """

    keys: Tensor
    values: Tensor

    def chain(self, index: Tensor) -> ChainEntries:
        """Entries of one chain per state: index (M,) int64 -> C = 1."""
        return self.chains(index[:, None])

    def chains(self, index: Tensor) -> ChainEntries:
        """Entries of some chains per state: index (M, K) int64 -> C = K."""
        shape = list(self.keys.shape)
        shape[3] = index.shape[1]
        expanded = index[None, :, None, :, None, None].expand(shape)
        return ChainEntries(self.keys.gather(3, expanded), self.values.gather(3, expanded))

    def select(self, rows: Tensor) -> ChainEntries:
        """A copy of the entries of some states: rows (K,) int64."""
        return ChainEntries(self.keys[:, rows], self.values[:, rows])

    def then(self, later: ChainEntries) -> ChainEntries:
        """Append entries to every chain."""
        return ChainEntries(torch.cat([self.keys, later.keys], 4), torch.cat([self.values, later.values], 4))

    def spread(self, rows: Tensor, states: int, onto: ChainEntries | None = None) -> ChainEntries:
        """Place these entries at some rows among `states` states, over `onto` or over zeros."""
        if onto is None:
            shape = list(self.keys.shape)
            shape[1] = states
            onto = ChainEntries(self.keys.new_zeros(shape), self.values.new_zeros(shape))
        onto.keys[:, rows], onto.values[:, rows] = self.keys, self.values
        return onto


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of what M states have revealed so far; grows only at its end.

    Attributes:
        keys, values: (layers, M, heads, slots + 1, head_dim); the last slot takes writes of padding.
        length: (M,) int64, entries in use; entries behind it are undefined.
    """

    keys: Tensor
    values: Tensor
    length: Tensor

    @property
    def slots(self) -> int:
        """Entries that fit."""
        return self.keys.shape[3] - 1

    def view(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values (layers, M, heads, L, head_dim) and mask (M, L) up to the longest state."""
        longest = int(self.length.max()) if len(self.length) else 0
        mask = torch.arange(longest, device=self.length.device) < self.length[:, None]
        return self.keys[:, :, :, :longest], self.values[:, :, :, :longest], mask

    def append(self, entries: ChainEntries, count: Tensor) -> PrefixCache:
        """Append the first `count` (M,) entries of the single chain of each state.

        Writes in place and returns the cache with its new lengths.
        """
        new = entries.keys.shape[4]
        step = torch.arange(new, device=self.length.device)
        slot = torch.where(step < count[:, None], self.length[:, None] + step, self.slots)  # (M, T)
        index = slot[None, :, None, :, None].expand(entries.keys[:, :, :, 0].shape)
        self.keys.scatter_(3, index, entries.keys[:, :, :, 0])
        self.values.scatter_(3, index, entries.values[:, :, :, 0])
        return PrefixCache(self.keys, self.values, self.length + count)

    def select(self, rows: Tensor) -> PrefixCache:
        """A copy of some states: rows is a (K,) int64 index or an (M,) bool mask."""
        return PrefixCache(self.keys[:, rows], self.values[:, rows], self.length[rows])

    def put(self, rows: Tensor, other: PrefixCache) -> PrefixCache:
        """Overwrite some states in place: the inverse of `select`."""
        self.keys[:, rows] = other.keys
        self.values[:, rows] = other.values
        length = self.length.clone()
        length[rows] = other.length
        return PrefixCache(self.keys, self.values, length)
