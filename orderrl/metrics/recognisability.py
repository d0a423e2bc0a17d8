"""Progressive recognisability: how early a classifier knows what the image will be."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from orderrl.data.pictures import hide_blocks
from orderrl.geometry import BlockGrid


class Recognisability(NamedTuple):
    """What the classifier says about partly revealed images.

    Attributes:
        confidence: (T, n) float32, probability of the true class.
        correct: (T, n) bool, whether the true class is the most probable one.
    """

    confidence: Tensor
    correct: Tensor


@torch.no_grad()
def progressive_recognisability(
    classifier: Callable[[Tensor], Tensor],
    geometry: BlockGrid,
    images: Tensor,
    labels: Tensor,
    visible: Tensor,
    batch_size: int = 1024,
) -> Recognisability:
    """Classify images of which only some blocks are revealed; hidden blocks are filled grey.

    Args:
        classifier: uint8 images (m, 3, height, width) -> logits (m, classes).
        geometry: the block grid.
        images: (n, 3, height, width) uint8, complete, as `TokenSet.images` gives them.
        labels: (n,) int64, the true classes.
        visible: (T, n, B) bool, the revealed blocks at T moments.
        batch_size: partly revealed images in one call of the classifier.

    Returns:
        Confidence and correctness, (T, n) each.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    moments, count = visible.shape[:2] if visible.ndim == 3 else (0, 0)
    if visible.ndim != 3 or count != len(images) or labels.shape != (count,):
        raise ValueError(
            "visible must have shape (T, n, B) with n images and labels, got "
            f"visible {tuple(visible.shape)}, images {tuple(images.shape)}, labels {tuple(labels.shape)}"
        )
    row = torch.arange(count, device=images.device).repeat(moments)  # (T * n,)
    logits = torch.cat(
        [
            classifier(hide_blocks(images[index], mask.to(images.device), geometry))
            for index, mask in zip(row.split(batch_size), visible.flatten(0, 1).split(batch_size), strict=True)
        ]
    )
    target = labels.to(logits.device)[row]
    confidence = logits.float().softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    return Recognisability(
        confidence.unflatten(0, (moments, count)), (logits.argmax(-1) == target).unflatten(0, (moments, count))
    )


def area_over_fraction(values: Tensor, fraction: Tensor) -> Tensor:
    """Area under the step curve of a value over the revealed fraction f in [0, 1].

    The value of a moment is held from its fraction until the fraction of the next moment, the last one until
    f = 1; so an image that shows four blocks at once earns nothing for them before they are there. A constant 1
    has area 1. Moments may repeat a fraction (finished images in a batch): they have no width.

    Args:
        values: (T, n) number or bool at T moments.
        fraction: (T, n) revealed fraction at these moments; starts at 0 (nothing revealed) and never falls.

    Returns:
        (n,) float64 (float32 on devices without float64).

    Raises:
        ValueError: if shapes differ, or the fractions do not start at 0, fall, or exceed 1.
    """
    if values.ndim != 2 or values.shape != fraction.shape or not len(values):
        raise ValueError(
            f"values and fraction must both have shape (T, n), got {tuple(values.shape)} and {tuple(fraction.shape)}"
        )
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    edges = torch.cat([fraction.to(dtype), torch.ones_like(fraction[:1], dtype=dtype)])  # (T + 1, n)
    widths = edges.diff(dim=0)
    if (edges[0] != 0).any() or (widths < 0).any():
        raise ValueError(
            "fraction must start at 0, never fall and stay within 1, "
            f"got first values up to {edges[0].max().item():g} and steps down to {widths.min().item():g}"
        )
    return (values.to(dtype) * widths).sum(0)
