"""Tokens that stay on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class MappedTokens:
    """Tokens in memory-mapped shards, indexed like a tensor along the first dimension.

    Args:
        parts: arrays (rows, N) or (rows, N, C).
        dtype: what indexing gives: int64 or float32.
        order: (n,) int64, the rows that are here, in their order; None is all of them as they are stored.
    """

    def __init__(self, parts: Sequence[np.ndarray], dtype: torch.dtype, order: Tensor | None = None) -> None:
        self.parts, self.dtype, self.order = list(parts), dtype, order
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self.shape = torch.Size((int(self._ends[-1]) if order is None else len(order), *parts[0].shape[1:]))
        self.ndim = len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def numel(self) -> int:
        """Number of token values."""
        return math.prod(self.shape)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Tensor:
        if isinstance(rows, slice):
            rows = torch.arange(*rows.indices(len(self)))
        index = torch.as_tensor(rows).cpu()
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        flat = index.reshape(-1).long()
        if flat.numel() and not -len(self) <= int(flat.min()) <= int(flat.max()) < len(self):
            raise IndexError(f"rows must lie in [0, {len(self)}), got {int(flat.min())} to {int(flat.max())}")
        flat = torch.where(flat < 0, flat + len(self), flat)
        if self.order is not None:
            flat = self.order[flat]
        found = torch.empty(len(flat), *self.shape[1:], dtype=self.dtype)
        kind = np.float32 if self.dtype.is_floating_point else np.int64
        shard = torch.searchsorted(self._ends, flat, right=True)
        for number in shard.unique().tolist():
            here = shard == number
            start = int(self._ends[number - 1]) if number else 0
            values = self.parts[number][(flat[here] - start).numpy()]
            found[here] = torch.from_numpy(values.astype(kind))
        return found.view(*index.shape, *self.shape[1:])

    def at(self, rows: Tensor) -> MappedTokens:
        """Some rows in a given order, still on disk: rows (n,) int64."""
        return MappedTokens(self.parts, self.dtype, rows if self.order is None else self.order[rows])

    def to(self, device: torch.device | str) -> Tensor:
        """All tokens, in memory, on a device."""
        return self[:].to(device)

    def cpu(self) -> Tensor:
        """All tokens, in memory."""
        return self[:]

    def numpy(self) -> np.ndarray:
        """All tokens, in memory."""
        return self[:].numpy()
