"""The fixed order fitted on planner labels: the best that positions alone can do, frozen into one order."""

import numpy as np
import torch
from torch import Tensor


def fit_order(visible: Tensor, utility: Tensor) -> Tensor:
    """Greedy order under a linear model of U on the visible mask.

    For every block, U is regressed (ridge, penalty 1) on which blocks are visible, over all contexts that hide it; the
    order then takes the block with the highest prediction, marks it visible and repeats.

    Args:
        visible: (n, B) bool, contexts.
        utility: (n, B) float32, U of every hidden block.

    Returns:
        (B,) int64 permutation.

    Raises:
        ValueError: if some block is hidden in no context.
    """
    from sklearn.linear_model import Ridge  # takes long to import

    blocks = visible.shape[1]
    never = [b for b in range(blocks) if not bool((~visible[:, b]).any())]
    if never:
        raise ValueError(f"visible must hide every block in some context; blocks {never} are never hidden")
    models = [
        Ridge(alpha=1.0).fit(visible[~visible[:, b]].numpy(), utility[~visible[:, b], b].numpy()) for b in range(blocks)
    ]
    shown = np.zeros((1, blocks))
    order: list[int] = []
    for _ in range(blocks):
        predicted = np.array([float(model.predict(shown)[0]) for model in models])
        predicted[order] = -np.inf
        order.append(int(predicted.argmax()))
        shown[0, order[-1]] = 1
    return torch.tensor(order)
