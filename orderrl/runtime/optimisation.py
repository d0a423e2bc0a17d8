"""Which parameters of a model decay."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def parameter_groups(module: nn.Module, weight_decay: float, undecayed: Sequence[Tensor] = ()) -> list[dict[str, Any]]:
    """Groups for an optimiser: matrices with weight decay; vectors, and what is named `undecayed`, without."""
    apart = {id(parameter) for parameter in undecayed}
    matrices = [p for p in module.parameters() if p.ndim > 1 and id(p) not in apart]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": [*vectors, *undecayed], "weight_decay": 0.0}]
