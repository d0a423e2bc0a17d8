"""How much is computed at once: as much as memory allows, and on a CPU no more than its caches like."""

from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from orderrl.runtime.values import check_fields, positive

CPU_BYTES = 2**22  # of an activation: more make no forward faster on a CPU, and leave its caches
VALUES_AT_ONCE = 2**27  # of an intermediate on other devices: scores and logits of 64 images of RandAR-XL's shape
SHARE_OF_FREE = 0.8
WIDTHS_PER_ENTRY = 20  # activations of an entry that live at once, in widths of the model
SCORES_PER_ENTRY = 4  # attention scores of an entry that live at once, in entries seen


@dataclass(frozen=True)
class Packing:
    """What one forward may take."""

    memory_gb: float | None = None  # for activations, 10^9 bytes; None is what is free

    def __post_init__(self) -> None:
        check_fields(self, positive("memory_gb"))

    def budget(self, device: torch.device) -> float:
        """Bytes that may be taken now."""
        if self.memory_gb is not None:
            return self.memory_gb * 1e9
        return SHARE_OF_FREE * free_memory(device)

    def entries(self, keys: Tensor, seen: int) -> int:
        """How many entries one forward encodes, each of which attends to about `seen`.

        Of the prefix cache's keys (layers, M, heads, slots, head_dim) type and sizes count.
        """
        heads, width = keys.shape[2], keys.shape[2] * keys.shape[4]
        per_entry = keys.element_size() * (WIDTHS_PER_ENTRY * width + SCORES_PER_ENTRY * heads * seen)
        fitting = int(self.budget(keys.device) / per_entry)
        if keys.device.type == "cpu":
            fitting = min(fitting, CPU_BYTES // (keys.element_size() * width))
        return max(1, fitting)


def free_memory(device: torch.device) -> float:
    """Bytes free on a device, with what PyTorch holds but does not use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def values_at_once(on_cpu: int, device: torch.device) -> int:
    """How many values of an intermediate are computed at once: on a CPU few, so that they stay in its caches."""
    return on_cpu if device.type == "cpu" else VALUES_AT_ONCE


def plan(states: int, groups: int, cost: int, most: int) -> Iterator[tuple[slice, list[slice]]]:
    """Split states with equally many groups of chains into forwards of at most about `most` entries.

    Whole states are packed together; a state that is too large alone is split into groups.

    Args:
        states: M.
        groups: of a state.
        cost: entries of a group.
        most: entries of a forward; at least one group is taken.

    Yields:
        Slices of states, each with slices of groups.
    """
    at_once = max(1, most // max(cost, 1))
    if at_once < groups:
        step, parts = 1, [slice(start, min(start + at_once, groups)) for start in range(0, groups, at_once)]
    else:
        step, parts = at_once // max(groups, 1), [slice(0, groups)]
    for start in range(0, states, step):
        yield slice(start, min(start + step, states)), parts
