"""Which parameters of a model decay, and a step of its optimiser."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from orderrl.runtime import distributed


def parameter_groups(module: nn.Module, weight_decay: float, undecayed: Sequence[Tensor] = ()) -> list[dict[str, Any]]:
    """Groups for an optimiser: matrices with weight decay; vectors, and what is named `undecayed`, without."""
    apart = {id(parameter) for parameter in undecayed}
    matrices = [p for p in module.parameters() if p.ndim > 1 and id(p) not in apart]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": [*vectors, *undecayed], "weight_decay": 0.0}]


def descend(
    optimizer: Optimizer, loss: Tensor, *modules: nn.Module, clip: float = 1.0, weight: float | None = None
) -> float:
    """A step that lowers a loss (of this process's rows); the gradient of each module is clipped by itself.

    The mean loss is returned, in which this process has the share `weight`, see `distributed.backward`.
    """
    optimizer.zero_grad()
    mean = distributed.backward(loss, [parameter for module in modules for parameter in module.parameters()], weight)
    for module in modules:
        nn.utils.clip_grad_norm_(module.parameters(), clip)
    optimizer.step()
    return mean
