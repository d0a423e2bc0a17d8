"""Key-value caches: the prefix of a state and the entries of its chains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from orderrl.backbones.layers import Level


@dataclass(frozen=True)
class ChainEntries:
    """Keys and values of C chains of T entries per state."""

    keys: tuple[Tensor, ...]  # one tensor a layer, (M, heads, C, T, head_dim)
    values: tuple[Tensor, ...]  # one tensor a layer, (M, heads, C, T, head_dim)
    last: Tensor | None = None  # (M, C) int64, raster position of each chain's last token, for models that ask for it

    @classmethod
    def of(cls, parts: Tensor) -> ChainEntries:
        """Views of keys of all layers, then values: (2 * layers, M, heads, C, T, head_dim)."""
        layers = parts.unbind()
        return cls(layers[: len(layers) // 2], layers[len(layers) // 2 :])

    @property
    def length(self) -> int:
        """T, entries of a chain."""
        return self.keys[0].shape[3] if self.keys else 0

    @property
    def count(self) -> int:
        """C, chains of a state."""
        return self.keys[0].shape[2] if self.keys else 0

    @property
    def states(self) -> int:
        """M."""
        return self.keys[0].shape[0] if self.keys else 0

    def map(self, change: Callable[[Tensor], Tensor], last: Tensor | None = None) -> ChainEntries:
        """The same change of every tensor of keys and values."""
        return ChainEntries(tuple(map(change, self.keys)), tuple(map(change, self.values)), last)

    def chain(self, index: Tensor) -> ChainEntries:
        """Entries of one chain per state: index (M,) int64 -> C = 1. What they end with is not kept."""
        rows = torch.arange(len(index), device=index.device)
        return self.map(lambda part: part[rows, :, index].unsqueeze(2))

    def select(self, rows: Tensor | slice) -> ChainEntries:
        """The entries of some states: rows (K,) int64, a copy, or a slice, a view."""
        return self.map(lambda part: part[rows], None if self.last is None else self.last[rows])

    def narrow(self, chains: slice) -> ChainEntries:
        """A view of consecutive chains of every state."""
        return self.map(lambda part: part[:, :, chains], None if self.last is None else self.last[:, chains])

    def until(self, length: int) -> ChainEntries:
        """A view of the first entries of every chain."""
        return self.map(lambda part: part[..., :length, :])

    def spread(self, rows: Tensor, states: int, onto: ChainEntries | None = None) -> ChainEntries:
        """Place these entries at some rows among `states` states, over `onto` or over zeros."""
        if onto is None:
            onto = self.map(lambda part: part.new_zeros(states, *part.shape[1:]))
        for target, source in zip(onto.keys + onto.values, self.keys + self.values, strict=True):
            target[rows] = source
        return onto

    @staticmethod
    def cat(parts: Sequence[ChainEntries], dim: int) -> ChainEntries:
        """Join along states (dim 0) or chains (dim 2)."""
        if len(parts) == 1:
            return parts[0]
        keys = zip(*(part.keys for part in parts), strict=True)
        values = zip(*(part.values for part in parts), strict=True)
        ends = [part.last for part in parts if part.last is not None]
        last = torch.cat(ends, min(dim, 1)) if ends else None
        return ChainEntries(tuple(torch.cat(k, dim) for k in keys), tuple(torch.cat(v, dim) for v in values), last)


@dataclass(frozen=True)
class ChainParts:
    """Entries of chains as the forwards left them, for a few chains to be picked from; joining all would copy them."""

    parts: Sequence[Sequence[ChainEntries]]  # for consecutive states, the entries of consecutive chains

    def whole(self) -> ChainEntries:
        """All chains of all states."""
        return ChainEntries.cat([ChainEntries.cat(row, 2) for row in self.parts], 0)

    def chain(self, index: Tensor) -> ChainEntries:
        """Entries of one chain per state: index (M,) int64 -> C = 1."""
        picked = []
        for row in self.parts:
            here, index = index[: row[0].states], index[row[0].states :]
            picked.append(ChainEntries.cat(row, 2).chain(here))
        return ChainEntries.cat(picked, 0)


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of what M states have revealed so far; grows only at its end.

    Rows and counts may lie on the CPU or on the device; those on the device are waited for.
    """

    keys: Tensor  # (layers, M, heads, slots + 1, head_dim); the last slot takes writes of padding
    values: Tensor
    length: Tensor  # (M,) int64 on the CPU, so that nobody waits for it: entries in use; those behind it are undefined
    # (M, L) bool, which of the first L entries are undefined, L the largest length; None is made of the lengths
    unseen: Tensor | None = None
    # (M,) int64 on the device, raster position of the last token, -1 before the first; for models that ask for it
    last: Tensor | None = None

    @property
    def slots(self) -> int:
        """Entries that fit."""
        return self.keys.shape[3] - 1

    @cached_property
    def levels(self) -> list[Level]:
        """What every chain of a state sees, layer by layer, up to the longest state: views of the entries.

        Kept, because chains that grow token by token ask every time.
        """
        shortest, longest = (int(end) for end in self.length.aminmax()) if len(self.length) else (0, 0)
        unseen = self.unseen
        if unseen is None and shortest < longest:
            unseen = (torch.arange(longest) >= self.length[:, None]).to(self.keys.device, non_blocking=True)
        if unseen is not None:  # broadcast to (M, heads, C, T, L)
            unseen = unseen[:, None, None, None]
        return [
            Level(keys[:, :, None, :longest], values[:, :, None, :longest], unseen)
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def append(self, entries: ChainEntries, count: Tensor) -> PrefixCache:
        """Append the first `count` (M,) entries of the single chain of each state.

        Writes in place and returns the cache with its new lengths.
        """
        count = count.cpu()
        both = (self.keys, entries.keys), (self.values, entries.values)
        ends = torch.stack([self.length, count]).unique(dim=1)
        if ends.shape[1] == 1:  # all states at the same place
            start, new = ends[:, 0].tolist()
            for held, parts in both:
                _write(held[:, :, :, start : start + new], [part[:, :, 0, :new] for part in parts])
        else:
            step = torch.arange(entries.length)
            slot = torch.where(step < count[:, None], self.length[:, None] + step, self.slots)  # (M, T)
            slot = slot.to(self.keys.device, non_blocking=True)
            rows = torch.arange(len(slot), device=slot.device)[:, None]
            for held, parts in both:
                for layer, part in zip(held, parts, strict=True):
                    layer[rows, :, slot] = part[:, :, 0].transpose(1, 2)
        return replace(self, length=self.length + count, unseen=None)

    @staticmethod
    def cat(parts: Sequence[PrefixCache]) -> PrefixCache:
        """The states of several caches one behind the other, to be read: without places for more entries."""
        if len(parts) == 1:
            return parts[0]
        length = torch.cat([part.length for part in parts])
        used = slice(int(length.max()) if len(length) else 0)
        keys, values = (
            torch.cat([getattr(part, name)[:, :, :, used] for part in parts], 1) for name in ("keys", "values")
        )
        ends = [part.last for part in parts if part.last is not None]
        return PrefixCache(keys, values, length, last=torch.cat(ends) if ends else None)

    def select(self, rows: Tensor | slice) -> PrefixCache:
        """Some states: rows is a (K,) int64 index or an (M,) bool mask, for a copy, or a slice, for a view."""
        here, there = self._places(rows)
        last = None if self.last is None else self.last[there]
        return PrefixCache(self.keys[:, there], self.values[:, there], self.length[here], last=last)

    def put(self, rows: Tensor, other: PrefixCache) -> PrefixCache:
        """Overwrite some states in place: the inverse of `select`."""
        here, there = self._places(rows)
        self.keys[:, there] = other.keys
        self.values[:, there] = other.values
        length = self.length.clone()
        length[here] = other.length
        if self.last is not None and other.last is not None:
            self.last[there] = other.last
        return PrefixCache(self.keys, self.values, length, last=self.last)

    def _places(self, rows: Any) -> tuple[Any, Any]:
        """Rows as they index what lies on the CPU and what lies on the device."""
        if isinstance(rows, slice):
            return rows, rows
        return rows.cpu(), rows.to(self.keys.device, non_blocking=True)


def _write(held: Tensor, parts: Sequence[Tensor]) -> None:
    """Write one tensor a layer into a view of all layers; off the CPU, where that is a launch for each, by a copy."""
    learning = torch.is_grad_enabled() and any(part.requires_grad for part in (held, *parts))
    if held.device.type == "cpu" and not learning:
        torch.stack(tuple(parts), out=held)
    else:
        held.copy_(torch.stack(tuple(parts)))
