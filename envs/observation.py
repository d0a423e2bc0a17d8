"""What a policy sees of a state: the one place where observations are put together. No hidden token enters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tensordict import TensorDict, TensorDictBase

SEEN = ("hidden", "entropy", "visible", "label", "fraction")
"""Keys of every observation, without masks."""
MASKS = ("action_mask", "budget_mask")


def observed(
    hidden: Tensor,
    entropy: Tensor,
    visible: Tensor,
    label: Tensor,
    budget_mask: Tensor | None = None,
    step_cost: Tensor | None = None,
) -> TensorDict:
    """The observation of M states.

    Args:
        hidden: (M, B, D) float32, the backbone's hidden state at the first query of each hidden block, 0 where visible.
        entropy: (M, B) float32 nats, of that query's prediction, 0 where visible.
        visible: (M, B) bool.
        label: (M,) int64.
        budget_mask: (M, n) bool, legal budgets; None if there is one budget.
        step_cost: (M,) float32, nats per image; None if every episode has the same.

    Returns:
        Batch (M,): these, fraction (M, 1) float32, action_mask (M, B) bool, and step_cost as (M, 1).
    """
    from tensordict import TensorDict  # takes long to import

    fraction = visible.float().mean(-1, keepdim=True)
    parts = dict(zip((*SEEN, "action_mask"), (hidden, entropy, visible, label, fraction, ~visible), strict=True))
    if budget_mask is not None:
        parts["budget_mask"] = budget_mask
    if step_cost is not None:
        parts["step_cost"] = step_cost[:, None]
    return TensorDict(parts, batch_size=[len(visible)])


def labelled(states: TensorDictBase, rows: Tensor | None = None, budgets: tuple[int, ...] = (1,)) -> TensorDict:
    """The observation of labelled states, which labels store, so no forward is needed.

    Args:
        states: batch (m,), which may lie on disk.
        rows: (k,) int64, of which states; None is all.
        budgets: of the environment.
    """
    stored = (states[key] if rows is None else states[key][rows] for key in ("hidden", "entropy", "visible", "label"))
    hidden, entropy, visible, label = stored
    mask = None if budgets == (1,) else legal_budgets((~visible).sum(-1), torch.tensor(budgets))
    return observed(hidden, entropy, visible, label, budget_mask=mask)


def legal_budgets(hidden_count: Tensor, budgets: Tensor) -> Tensor:
    """(M, n) bool: a budget is legal up to the hidden blocks (M,) int64; the smallest always is."""
    mask = budgets <= hidden_count[:, None]
    mask[:, 0] = True
    return mask
