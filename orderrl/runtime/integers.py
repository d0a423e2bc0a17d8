"""Whole numbers that a caller gives: actions, seeds, labels, indices. Nothing is rounded or cut to one in silence."""

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGEST_SEED = 2**62  # sums of seeds and places stay within int64


def as_int64(name: str, values: Any, hint: str = "") -> Tensor:
    """Integers of any width, in a tensor, an array or nested lists, as an int64 tensor on the device they lie on.

    As in Gymnasium's `Discrete`, floats are refused even where they are whole; truth values are no numbers.

    Args:
        hint: what to give instead, for the message.

    Raises:
        ValueError: if they are anything else; it names the argument and what was given.
    """
    try:
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be int64, got {values!r}") from None
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        given = f"{tensor.dtype}: {tensor.tolist()!s:.80}"
        raise ValueError(f"{name} must be int64, got {given}" + (f"; {hint}" if hint else ""))
    return tensor.to(torch.int64)


def as_choices(name: str, values: Any, count: int, limit: int, of: str) -> Tensor:
    """What a caller chose for each of the episodes that begin, (count,) int64: one integer for all, or one for each.

    ValueError if they are no integers, not as many, or not from 0 to limit - 1.
    """
    chosen = as_int64(name, values)
    if chosen.shape not in [(), (count,)]:
        raise ValueError(f"{name} must be one int64 or {count}, one for each episode that begins, got {values!r}")
    if bool(((chosen < 0) | (chosen >= limit)).any()):
        raise ValueError(f"{name}={chosen.tolist()} lies outside the {limit} {of}; use 0 to {limit - 1}")
    return chosen.expand(count)


def as_rows(values: Any, count: int) -> Tensor:
    """Sub-environments by their numbers, (m,) int64: distinct ones of `count`, else ValueError."""
    rows = as_int64("rows", values)
    if rows.ndim != 1 or len(rows.unique()) < len(rows) or bool(((rows < 0) | (rows >= count)).any()):
        raise ValueError(f"rows must be distinct numbers (m,) from 0 to {count - 1}, got {rows.tolist()!s:.80}")
    return rows


def as_seed(value: Any) -> int:
    """A seed as a Python integer; ValueError if it is no whole number or out of range."""
    with suppress(ValueError):
        seed = as_int64("seed", value)
        if seed.ndim == 0 and 0 <= int(seed) <= LARGEST_SEED:
            return int(seed)
    raise ValueError(f"seed must be a whole number from 0 to {LARGEST_SEED}, got {value!r}")
