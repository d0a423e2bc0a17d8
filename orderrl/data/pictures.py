"""Pictures of partly revealed images."""

import torch
from torch import Tensor

from orderrl.geometry import BlockGrid

HIDDEN_GREY = 128


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
    mask = visible.unflatten(-1, (geometry.rows, geometry.columns))
    mask = mask.repeat_interleave(height // geometry.rows, -2).repeat_interleave(width // geometry.columns, -1)
    return torch.where(mask.unsqueeze(-3), images, HIDDEN_GREY)
