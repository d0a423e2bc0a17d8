"""What the report's pictures show of every policy, apart from the rows of `results.json`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Curve:
    """A mean over images against the revealed fraction, with its 95 % band.

    Raises:
        ValueError: if lengths differ.
    """

    fraction: Sequence[float]  # F revealed fractions in [0, 1], increasing
    mean: Sequence[float]  # F values each
    low: Sequence[float]  # F values each
    high: Sequence[float]  # F values each

    def __post_init__(self) -> None:
        for name in ("mean", "low", "high"):
            if len(getattr(self, name)) != len(self.fraction):
                raise ValueError(
                    f"{name} must have one value for each of the {len(self.fraction)} fractions, "
                    f"got {len(getattr(self, name))}"
                )


@dataclass(frozen=True)
class Episode:
    """One example image as one policy revealed it in T steps.

    Attributes:
        steps: T lists of blocks, those that each step revealed, in the order of the action.
        loss: T + 1 values, summed loss of the hidden blocks before each step and at the end, nats per image token.
        scores: (T, B) float32, the policy's scores of the blocks before each step (those of visible blocks mean
            nothing); None if it has no scores.

    Raises:
        ValueError: if the steps do not reveal every block once, or lengths do not fit.
    """

    steps: Sequence[Sequence[int]]
    loss: Sequence[float]
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        blocks = sorted(block for step in self.steps for block in step)
        if blocks != list(range(len(blocks))) or not all(map(len, self.steps)):
            raise ValueError(f"steps must reveal every block once, in steps that are not empty; got {self.steps}")
        if len(self.loss) != len(self.steps) + 1:
            raise ValueError(f"loss must have {len(self.steps) + 1} values, one more than steps, got {len(self.loss)}")
        if self.scores is not None and self.scores.shape != (len(self.steps), len(blocks)):
            raise ValueError(
                f"scores must have shape ({len(self.steps)} steps, {len(blocks)} blocks), "
                f"got {tuple(self.scores.shape)}"
            )

    @property
    def reveal_step(self) -> list[int]:
        """B values: the step that reveals each block, from 0."""
        found = {block: step for step, blocks in enumerate(self.steps) for block in blocks}
        return [found[block] for block in range(len(found))]


@dataclass(frozen=True)
class PolicyDetail:
    """What the pictures show of one policy.

    Raises:
        ValueError: if the grid is no grid or an episode has another number of blocks.
    """

    name: str  # the policy, as in the table
    gain: Curve  # information gained, nats per image token
    # rows x columns of blocks, mean step at which a block is revealed, 0 first and 1 last
    mean_reveal_step: Sequence[Sequence[float]]
    episodes: Sequence[Episode] = field(default=())  # of the example images, in their order

    def __post_init__(self) -> None:
        if len({len(row) for row in self.mean_reveal_step}) != 1:
            raise ValueError(f"mean_reveal_step of {self.name!r} must be a grid of rows of equal length")
        blocks = len(self.mean_reveal_step) * len(self.mean_reveal_step[0])
        for episode in self.episodes:
            if len(episode.reveal_step) != blocks:
                raise ValueError(
                    f"episodes of {self.name!r} must reveal {blocks} blocks, got {len(episode.reveal_step)}"
                )


@dataclass(frozen=True)
class Examples:
    """The images of the episodes.

    Raises:
        ValueError: if images have another shape or dtype, not one label each, or cannot be cut into the blocks.
    """

    images: Tensor  # (E, 3, H, W) uint8
    labels: Sequence[int | str]  # E class labels
    rows: int  # of blocks
    columns: int  # of blocks

    def __post_init__(self) -> None:
        images = self.images
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) != len(self.labels):
            raise ValueError(
                f"images must be uint8 of shape ({len(self.labels)}, 3, H, W), one for each label, "
                f"got {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
            )
        if images.shape[2] % self.rows or images.shape[3] % self.columns:
            raise ValueError(
                f"images of {images.shape[2]}x{images.shape[3]} pixels cannot be cut into {self.rows}x{self.columns} "
                "blocks"
            )
