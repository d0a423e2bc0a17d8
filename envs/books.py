"""What a core remembers of its episodes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Some sub-environments: their numbers on the host, where decisions are made, and on the device."""

    here: Tensor  # (m,) int64
    there: Tensor


@dataclass
class Books:
    """What is known of the episodes without waiting for the device, on the host; each (M,) or (M, B)."""

    seeds: Tensor
    episode: Tensor
    step_count: Tensor
    image_index: Tensor
    labels: Tensor
    visible: Tensor
    reveal_step: Tensor
    reveal_rank: Tensor

    @property
    def hidden_count(self) -> Tensor:
        """(M,) int64: hidden blocks."""
        return (~self.visible).sum(-1)

    @property
    def finished(self) -> Tensor:
        """(M,) bool: episodes whose image is complete or whose 2 * B steps are used up."""
        return self.visible.all(-1) | (self.step_count >= 2 * self.visible.shape[1])


class Look(NamedTuple):
    """Reusable entries of one packed forward: which rows it covered, and on the host where each block's chain is."""

    rows: Rows
    place: Tensor  # (m, B) int64
    entries: Any
