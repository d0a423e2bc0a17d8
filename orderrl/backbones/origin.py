"""What a specialist was made for and of, as its checkpoint says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from orderrl.runtime.values import kinds, require_kind

ORIGIN = "origin"  # in a checkpoint's description
NATIVE = "native"  # the policy that is a backbone's own position head


@dataclass(frozen=True)
class Origin:
    """The order that a backbone was trained in, and the backbone that it was fine-tuned from.

    Attributes:
        order: the policy that chose the orders, by its name; a planner's file lies beside the checkpoint.
        label: what tables call the specialist.
        seed: of its training.
        start: name or path of the backbone that it was fine-tuned from, `START` if its planner reads it and it lies
            beside the checkpoint; None if it was trained from nothing.
        start_fingerprint: of that backbone.
        planner: SHA-256 of the planner's file; None if there is none.
        fitted: the blocks of an order that was fitted on gain labels; None of other orders.
        folder: of the checkpoint.
    """

    order: str
    label: str
    seed: int
    start: str | None = None
    start_fingerprint: str | None = None
    planner: str | None = None
    fitted: list[int] | None = None
    folder: Path = Path()

    def described(self) -> dict[str, Any]:
        """Plain values for a checkpoint's description."""
        return {key: value for key, value in asdict(self).items() if key != "folder"}

    @classmethod
    def of(cls, description: Mapping[str, Any], path: Path) -> Origin | None:
        """What a checkpoint says; None if it is no specialist, ValueError if it is not as this package writes it."""
        found = description.get(ORIGIN)
        if found is None:
            return None
        known = {key: kind for key, kind in kinds(cast(Any, cls)).items() if key != "folder"}
        try:
            require_kind(ORIGIN, found, dict)
            for key, kind in known.items():
                require_kind(key, found.get(key), kind)
            blocks = found.get("fitted") or []
            if sorted(blocks) != [*range(len(blocks))]:
                raise ValueError("fitted must be every block once")
        except ValueError as error:
            raise ValueError(f"{path}: does not say which orders it was made for ({error})") from error
        return cls(**{key: found.get(key) for key in known}, folder=path.parent)
