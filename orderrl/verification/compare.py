"""Replay a fixture on our implementation and compare every recorded output."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from orderrl.verification import arpg, kl, llamagen, mar, randar, vq
from orderrl.verification.fixture import Fixture

Replay = Callable[[Fixture], dict[str, Tensor]]


@dataclass(frozen=True)
class Comparison:
    """One recorded output against ours."""

    name: str  # of the output
    shape: tuple[int, ...]  # as recorded
    difference: float | None  # largest absolute difference; None without a counterpart or if the shapes differ
    tolerance: float  # what is allowed; where it varies within the output, the one at the largest excess
    agrees: bool  # whether every element lies within its tolerance
    remark: str = ""  # why there is no difference, else empty


# The published model class, and a source file where one name means several models.
_FAMILIES: tuple[tuple[str, str, Replay], ...] = (
    ("RandARTransformer", "", randar.replay),
    ("Transformer", "arpg", arpg.replay),
    ("Transformer", "", llamagen.replay),
    ("MAR", "", mar.replay),
    ("VQModel", "", vq.replay),
    ("AutoencoderKL", "", kl.replay),
)


def replay_of(fixture: Fixture) -> Replay:
    """The function that replays fixtures of this model; ValueError if it is none of ours."""
    name = fixture.constructor.partition("(")[0]
    for constructor, file, replay in _FAMILIES:
        if constructor == name and any(file in path.rpartition("/")[2] for path in fixture.files):
            return replay
    known = ", ".join(dict.fromkeys(constructor for constructor, _, _ in _FAMILIES))
    raise ValueError(f"{fixture.path}: no model of ours replays {fixture.constructor!r}; known are {known}")


def compare(fixture: Fixture) -> list[Comparison]:
    """Every recorded output of a fixture, in its order; ValueError if the weights don't fit."""
    replay = replay_of(fixture)
    with torch.no_grad():
        ours = {name: value.cpu() for name, value in replay(fixture).items()}
    special = mar.tolerances(fixture) if replay is mar.replay else {}
    return [
        _compare(name, recorded, ours.get(name), special.get(name, fixture.tolerance(name)))
        for name, recorded in fixture.outputs.items()
    ]


def _compare(name: str, recorded: Tensor, ours: Tensor | None, allowed: float | Tensor) -> Comparison:
    shape = tuple(recorded.shape)
    limit = torch.as_tensor(allowed, dtype=torch.float64)
    if ours is None:
        return Comparison(name, shape, None, limit.min().item(), False, "no counterpart")
    if ours.shape != recorded.shape:
        return Comparison(name, shape, None, limit.min().item(), False, f"shape {tuple(ours.shape)}")
    distance = (ours.double() - recorded.double()).abs()
    if not distance.numel():
        return Comparison(name, shape, 0.0, limit.min().item(), True)
    worst = (distance - limit).argmax()
    agrees = bool((distance <= limit).all())  # a NaN is not
    at_worst = limit.expand_as(distance).flatten()[worst].item()
    return Comparison(name, shape, distance.max().item(), at_worst, agrees)
