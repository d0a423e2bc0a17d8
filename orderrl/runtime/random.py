"""Random numbers that depend on what they are for, not on when or in which batch they are drawn.

PyTorch's generators are sequential: the i-th number of a batch depends on the batch. Here every
draw is a hash of its key, for example (seed, episode, step, token), so a sub-environment of a
batch sees exactly the numbers that it would see alone.
"""

import multiprocessing
import os
from collections.abc import Iterable
from enum import IntEnum

import torch
from torch import Tensor

_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


class Stream(IntEnum):
    """What a draw is for; the first part of every key, so that no two uses share a number."""

    IMAGE = 1
    LABEL = 2
    TOKEN = 3
    POLICY = 4
    NOISE = 5
    TARGET = 6
    STEP_COST = 7
    CLUSTER = 8


_inherited_seed: int | None = None  # of PyTorch's generator, in a process that has a copy of its parent's


def _remember_inherited_seed() -> None:
    global _inherited_seed
    _inherited_seed = torch.initial_seed()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember_inherited_seed)
if multiprocessing.parent_process() is not None:  # perhaps forked before this module was imported
    _remember_inherited_seed()


def drawn_seed() -> int:
    """A seed in [0, 2^31) for what was given none.

    It comes from PyTorch's generator, so `torch.manual_seed` determines it within a process. A forked process starts
    with a copy of its parent's generator, as all its siblings do; until it calls `torch.manual_seed` with a seed
    of its own, its seeds come from the operating system.
    """
    if torch.initial_seed() == _inherited_seed:
        return int.from_bytes(os.urandom(4)) >> 1
    return int(torch.randint(2**31, (), device="cpu"))


def drawn_uniform(
    shape: Iterable[int], generator: torch.Generator | None, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform numbers in [0, 1) from a generator of the CPU, moved to a device: they are the same on every device.

    All generators of this package are on the CPU; None is PyTorch's own.
    """
    return torch.rand(tuple(shape), generator=generator, dtype=dtype, device="cpu").to(device, non_blocking=True)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (unsigned) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al., 2014) on int64 with wrap-around."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def keyed_uniform(keys: Iterable[Tensor | int], device: torch.device | str = "cpu") -> Tensor:
    """Uniform float64 numbers in [0, 1), one for each broadcast combination of the keys: int64 tensors or ints."""
    state = torch.zeros((), dtype=torch.int64)
    for key in keys:
        key = torch.as_tensor(key, dtype=torch.int64)  # numbers stay on the CPU: they go along with a launch
        state = _mix(state + _mix((key if key.ndim == 0 else key.to(device)) + _GOLDEN) + _GOLDEN)
    return _shift_right(state.to(device), 11).double() * 2.0**-53


def keyed_index(keys: Iterable[Tensor | int], count: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform int64 indices in [0, count), one for each broadcast combination of the keys."""
    return (keyed_uniform(keys, device) * count).long().clamp_max(count - 1)


def keyed_normal(keys: Iterable[Tensor | int], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers, one for each broadcast combination of the keys; float64."""
    return torch.special.ndtri(keyed_uniform(keys, device).clamp_min(2.0**-54))


def mix_content(values: Tensor) -> Tensor:
    """A key for each row of float32 values (M, ...): int64 (M,), equal for equal rows whatever the batch."""
    bits = values.float().contiguous().view(torch.int32).flatten(1).long()
    weights = _mix(torch.arange(1, bits.shape[1] + 1, device=bits.device) * _GOLDEN) | 1
    return (bits * weights).sum(1)
