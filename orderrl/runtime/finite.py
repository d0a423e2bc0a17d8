"""What is not finite is never kept: weights, losses and labels are refused where the first such value shows."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

DIVERGED = "the training diverged: lower its learning rate; nothing was stored, and the next run starts anew"
OVERFLOW = "the weights are of a diverged training, or overflow in this dtype: use others, or dtype=float32"
_LOSSES = ("loss", "held_out", "entropy", "kl", "cost", "return")  # metrics that are finite while a training is sound


class NotFiniteError(ValueError):
    """NaN or an infinity where it makes everything that follows worthless. What has it is not worth continuing."""


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor of floating-point numbers that are not all finite: its name, and how many are not."""
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        wide = tensor if tensor.element_size() > 1 else tensor.float()  # 8-bit floats know no comparisons
        finite = wide.isfinite()
        if not bool(finite.all()):
            return f"{name} ({int((~finite).sum())} of {tensor.numel()} values)"
    return None


def require_finite(where: object, tensors: Mapping[str, Tensor], advice: str) -> None:
    """Refuse tensors that are not finite (`NotFiniteError`), by what holds them and name, with the likely cause."""
    found = first_not_finite(tensors)
    if found is not None:
        raise NotFiniteError(f"{where}: not finite: {found}; {advice}")


def require_finite_losses(row: Mapping[str, float]) -> None:
    """Refuse a row of metrics in which a loss is not finite (`NotFiniteError`), by its step, name and value."""
    for key, value in row.items():
        if key.startswith(_LOSSES) and not math.isfinite(value):
            raise NotFiniteError(f"step {int(row['step'])}: {key} is {value}; {DIVERGED}")


def leaves(value: Any, kind: Any, name: str = "") -> dict[str, Any]:
    """All values of a type in nested mappings and sequences, by their dotted place."""
    if isinstance(value, kind):
        return {name: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    found: dict[str, Any] = {}
    for key, item in items:
        found |= leaves(item, kind, f"{name}.{key}" if name else str(key))
    return found
