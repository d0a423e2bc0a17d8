"""What a core remembers of its episodes, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orderrl.envs.observation import legal_budgets
from orderrl.runtime.integers import as_int64


class Rows(NamedTuple):
    """Some sub-environments: their numbers on the host, where decisions are made, and on the device."""

    here: Tensor  # (m,) int64
    there: Tensor
    whole: bool  # all of them


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

    @classmethod
    def new(cls, episodes: int, blocks: int) -> Books:
        """Of episodes that have not begun."""
        zero, unseen = torch.zeros(episodes, dtype=torch.int64), torch.full((episodes, blocks), -1)
        numbers = zero.clone(), zero - 1, zero.clone(), zero.clone(), zero.clone()
        return cls(*numbers, torch.zeros(episodes, blocks, dtype=torch.bool), unseen, unseen.clone())

    @property
    def hidden_count(self) -> Tensor:
        """(M,) int64: hidden blocks."""
        return (~self.visible).sum(-1)

    @property
    def finished(self) -> Tensor:
        """(M,) bool: episodes whose image is complete or whose 2 * B steps are used up."""
        return self.visible.all(-1) | (self.step_count >= 2 * self.visible.shape[1])

    def record(self, blocks: Tensor, count: Tensor) -> None:
        """The first `count` (M,) of the listed blocks (M, K) are visible from now on, since this step."""
        rows, ranks = (torch.arange(blocks.shape[1]) < count[:, None]).nonzero(as_tuple=True)
        chosen = blocks[rows, ranks]
        self.visible[rows, chosen] = True
        self.reveal_step[rows, chosen] = self.step_count[rows]
        self.reveal_rank[rows, chosen] = ranks

    def read(self, actions: Tensor, budgets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ranked blocks (M, K), how many of them count (M,), and whether the action is legal (M,) bool.

        Args:
            actions: (M,), or with several budgets (M, K + 1): a ranked list and the index of the budget.
            budgets: (n,) int64, of the environment.
        """
        episodes, num_blocks = self.visible.shape
        multi = budgets.tolist() != [1]
        expected = (episodes, int(budgets[-1]) + 1) if multi else (episodes,)
        actions = as_int64("action", actions, "return block indices, not scores")
        if tuple(actions.shape) != expected:
            raise ValueError(f"action must have shape {expected}, got {tuple(actions.shape)}")
        actions = actions.cpu()
        if not multi:
            blocks, count = actions[:, None], torch.ones_like(actions)
            legal = torch.ones_like(actions, dtype=torch.bool)
        else:
            blocks, chosen = actions[:, :-1], actions[:, -1]
            safe = chosen.clamp(0, len(budgets) - 1)
            legal = (chosen == safe) & legal_budgets(self.hidden_count, budgets).gather(1, safe[:, None])[:, 0]
            count = torch.minimum(budgets[safe], self.hidden_count)
        counted = torch.arange(blocks.shape[1]) < count[:, None]
        in_range = (blocks >= 0) & (blocks < num_blocks)
        safe_blocks = torch.where(in_range, blocks, 0)
        hidden = (~self.visible).float()
        named = torch.zeros_like(hidden).scatter_add(1, safe_blocks, (counted & in_range).float())
        legal &= (in_range | ~counted).all(-1) & (named <= hidden).all(-1)
        return safe_blocks, count, legal


class Look(NamedTuple):
    """Reusable entries of one packed forward: which rows it covered, and on the host where each block's chain is."""

    rows: Rows
    place: Tensor  # (m, B) int64
    entries: Any
