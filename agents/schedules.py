"""How many blocks a step reveals when the order does not say so itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from orderrl.backbones.mar import hidden_after

if TYPE_CHECKING:
    from tensordict import TensorDictBase

Schedule = Callable[["TensorDictBase", Tensor], Tensor]
"""(observation, ranked blocks (M, K) int64) -> place in the list of budgets (M,) int64."""

T = TypeVar("T", bound=Callable[..., Any])


def places_only(function: T) -> T:
    """Mark a scorer, schedule or policy that reads neither hidden states nor entropies: they need not be computed."""
    function.reads_content = False  # type: ignore[attr-defined]
    return function


def reads_content(function: object) -> bool:
    """Whether a scorer, schedule or policy may read hidden states or entropies; True unless it says otherwise."""
    return bool(getattr(function, "reads_content", True))


def legal_place(schedule: Schedule, observation: TensorDictBase, ranked: Tensor) -> Tensor:
    """The place in the list of budgets that a schedule chooses, lowered where fewer blocks are left: (M,) int64.

    Ranked are the first choices (M, K), K the largest budget; past the number of hidden blocks they are any.
    """
    return torch.minimum(schedule(observation, ranked), observation["budget_mask"].sum(-1) - 1)


def fixed(place: int = 0) -> Schedule:
    """Always the budget at one place of the list."""

    @places_only
    def schedule(observation: TensorDictBase, ranked: Tensor) -> Tensor:
        return torch.full_like(observation["label"], place)

    return schedule


def cosine_sizes(iterations: int, blocks: int) -> tuple[int, ...]:
    """Blocks of each of up to B iterations of MAR's cosine schedule (Li et al., 2024): few at first, then many."""
    if not 1 <= iterations <= blocks:
        raise ValueError(f"cosine:{iterations} must have between 1 and {blocks} iterations, one block each at least")
    left = blocks
    sizes = []
    for iteration in range(iterations):
        after = hidden_after(iteration, iterations, left, blocks) if iteration + 1 < iterations else 0
        sizes.append(left - after)
        left = after
    return tuple(sizes)


def growing(budgets: tuple[int, ...], sizes: tuple[int, ...]) -> Schedule:
    """Step sizes in sequence, for example (1, 2, 4, 4, 5): the step is read off the number of visible blocks.

    Args:
        sizes: blocks of each step; they must sum to B and be budgets; the last may be less than any (cut short).

    Raises:
        ValueError: if a size is no budget; at the first call, if the sizes do not sum to B.
    """
    named = (*sizes[:-1], max(sizes[-1], min(budgets))) if sizes else ()
    missing = sorted(set(named) - set(budgets))
    if missing:
        raise ValueError(f"sizes={sizes} name {missing}, which are not among budgets={budgets}")
    ends = torch.tensor(sizes).cumsum(0)
    places = torch.tensor([budgets.index(size) for size in named])

    @places_only
    def schedule(observation: TensorDictBase, ranked: Tensor) -> Tensor:
        blocks = observation["visible"].shape[-1]
        if sum(sizes) != blocks:
            raise ValueError(
                f"sizes={sizes} sum to {sum(sizes)}, the image has {blocks} blocks; give sizes that sum to it"
            )
        visible = observation["visible"].sum(-1).contiguous()
        step = torch.searchsorted(ends.to(visible.device, non_blocking=True), visible, right=True).clamp_max(
            len(sizes) - 1
        )
        return places.to(visible.device, non_blocking=True)[step]

    return schedule


def entropy_threshold(budgets: tuple[int, ...], threshold: float) -> Schedule:
    """The largest budget k whose k most certain hidden blocks have a mean first-token entropy below so many nats."""

    def schedule(observation: TensorDictBase, ranked: Tensor) -> Tensor:
        mask = observation["action_mask"]
        entropy = torch.where(mask, observation["entropy"], torch.inf).sort(-1).values
        chosen = torch.zeros_like(observation["label"])
        for place, budget in enumerate(budgets):
            fits = entropy[..., :budget].mean(-1) < threshold
            chosen = torch.where(fits, place, chosen)
        return chosen

    return schedule


def information_threshold(budgets: tuple[int, ...], threshold: float) -> Schedule:
    """The largest budget k whose first k ranked blocks have a summed first-token entropy below so many nats.

    A step reveals about equally much information everywhere, many blocks where they say little (the idea of InfoTok,
    arXiv:2512.16975). The blocks are the policy's own first choices; the smallest budget where none fits.
    """

    def schedule(observation: TensorDictBase, ranked: Tensor) -> Tensor:
        summed = observation["entropy"].gather(-1, ranked).cumsum(-1)
        places = (torch.tensor(budgets) - 1).to(ranked.device, non_blocking=True)
        return (summed[..., places] < threshold).sum(-1).sub(1).clamp_min(0)

    return schedule
