"""Pictures of partly revealed images."""

import torch
from torch import Tensor

from orderrl.geometry import BlockGrid

HIDDEN_GREY = 128
OUTLINE = (230, 120, 20)  # orange


def hide_blocks(images: Tensor, visible: Tensor, geometry: BlockGrid) -> Tensor:
    """Fill hidden blocks with grey.

    Args:
        images: (..., C, height, width) uint8 pixels; height and width are multiples of the grid of blocks.
        visible: (..., B) bool, True where a block is revealed; broadcasts against the images.

    Returns:
        (..., C, height, width) uint8, `HIDDEN_GREY` where a block is hidden.

    Raises:
        ValueError: if visible has not B entries or the blocks do not divide the pixels.
    """
    height, width = images.shape[-2:]
    if visible.shape[-1] != geometry.num_blocks:
        raise ValueError(f"visible must have B={geometry.num_blocks} entries an image, got {visible.shape[-1]}")
    if height % geometry.rows or width % geometry.columns:
        raise ValueError(
            f"images of {height}x{width} pixels cannot be cut into {geometry.rows}x{geometry.columns} blocks; "
            "height and width must be multiples of these"
        )
    return torch.where(_pixels(visible, height, width, geometry), images, HIDDEN_GREY)


def outline_blocks(images: Tensor, chosen: Tensor, geometry: BlockGrid) -> Tensor:
    """Draw the edges of chosen blocks (..., B) in images (..., 3, height, width), two pixels wide; as `hide_blocks`."""
    height, width = images.shape[-2:]
    edge = torch.ones(height // geometry.rows, width // geometry.columns, dtype=torch.bool)
    edge[2:-2, 2:-2] = False
    drawn = _pixels(chosen, height, width, geometry) & edge.repeat(geometry.rows, geometry.columns)
    return torch.where(drawn, torch.tensor(OUTLINE, dtype=torch.uint8).view(3, 1, 1), images)


def _pixels(blocks: Tensor, height: int, width: int, geometry: BlockGrid) -> Tensor:
    """What is true of blocks (..., B), of their pixels: (..., 1, height, width) bool."""
    mask = blocks.unflatten(-1, (1, geometry.rows, geometry.columns))
    return mask.repeat_interleave(height // geometry.rows, -2).repeat_interleave(width // geometry.columns, -1)
