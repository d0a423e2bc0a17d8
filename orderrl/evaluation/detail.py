"""What the report's pictures show of every policy, apart from the rows of `results.json`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Curve:
    """A mean over images against the revealed fraction, with its 95 % band."""

    fraction: Sequence[float]  # F revealed fractions in [0, 1], increasing
    mean: Sequence[float]  # F values each
    low: Sequence[float]  # F values each
    high: Sequence[float]  # F values each


@dataclass(frozen=True)
class Episode:
    """One example image as one policy revealed it in T steps.

    Attributes:
        steps: T lists of blocks, those that each step revealed, in the order of the action.
        loss: T + 1 values, summed loss of the hidden blocks before each step and at the end, nats per image token.
        scores: (T, B) float32, the policy's scores of the blocks before each step (those of visible blocks mean
            nothing); None if it has no scores.
    """

    steps: Sequence[Sequence[int]]
    loss: Sequence[float]
    scores: Tensor | None = None

    @property
    def reveal_step(self) -> list[int]:
        """B values: the step that reveals each block, from 0."""
        found = {block: step for step, blocks in enumerate(self.steps) for block in blocks}
        return [found[block] for block in range(len(found))]


@dataclass(frozen=True)
class PolicyDetail:
    """What the pictures show of one policy."""

    name: str  # the policy, as in the table
    gain: Curve  # information gained, nats per image token
    # rows x columns of blocks, mean step at which a block is revealed, 0 first and 1 last
    mean_reveal_step: Sequence[Sequence[float]]
    episodes: Sequence[Episode] = field(default=())  # of the example images, in their order


@dataclass(frozen=True)
class Drawn:
    """The first images that a policy drew, the same classes and seeds for all policies."""

    name: str  # the policy, as in the table
    images: Tensor  # (n, 3, H, W) uint8


@dataclass(frozen=True)
class Examples:
    """The images of the episodes."""

    images: Tensor  # (E, 3, H, W) uint8
    labels: Sequence[int | str]  # E class labels
    rows: int  # of blocks
    columns: int  # of blocks


@dataclass(frozen=True)
class Pictures:
    """What the report shows besides the numbers.

    Attributes:
        details: one for each policy with pictures. Curves and maps are drawn of learned planners and of policies that
            reveal one block a step; the viewer has all.
        examples: the images of the episodes in the details; None shows neither viewer nor images.
        drawn: images that policies drew.
    """

    details: Sequence[PolicyDetail] = ()
    examples: Examples | None = None
    drawn: Sequence[Drawn] = ()
