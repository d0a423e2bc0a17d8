"""Pictures of partly revealed images and of the order of reveal."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from orderrl.data import TokenSet
from orderrl.data.pictures import HIDDEN_GREY, hide_blocks
from orderrl.geometry import BlockGrid


def partial_images(
    data: TokenSet, geometry: BlockGrid, tokens: Tensor, visible: Tensor, device: torch.device | None = None
) -> Tensor:
    """Decode images with their hidden blocks grey.

    Args:
        data: decodes tokens to pixels.
        tokens: (..., N) int64, or (..., N, C) float32; hidden ones are not shown.
        visible: (..., B) bool.
        device: where tokens are decoded; None is where they lie.

    Returns:
        (..., 3, h, w) uint8 on the CPU.
    """
    shown = visible[..., geometry.token_block.to(visible.device)]
    shown = shown.view(shown.shape + (1,) * (tokens.ndim - shown.ndim))
    return hide_blocks(data.images(torch.where(shown, tokens, 0), device), visible.cpu(), geometry)


def order_image(geometry: BlockGrid, reveal_step: Tensor, height: int, width: int) -> Tensor:
    """Heat map of the reveal step of each block, hidden blocks grey: reveal_step (B,) -> (3, height, width) uint8."""
    from matplotlib import colormaps  # takes long to import

    steps = reveal_step.cpu().float()
    colours = torch.from_numpy(colormaps["viridis"]((steps / max(float(steps.max()), 1.0)).clamp(0, 1).numpy()))
    colours = (colours[:, :3] * 255).round().to(torch.uint8)
    colours[steps < 0] = HIDDEN_GREY
    blocks = colours.T.view(1, 3, geometry.rows, geometry.columns).float()
    return F.interpolate(blocks, size=(height, width), mode="nearest")[0].to(torch.uint8)


def frame(
    data: TokenSet, geometry: BlockGrid, tokens: Tensor, visible: Tensor, reveal_step: Tensor, side: int = 128
) -> np.ndarray:
    """Partial image beside the heat map of its order, (h, w, 3) uint8; small images are enlarged to about `side`."""
    image = partial_images(data, geometry, tokens, visible)
    scale = max(1, side // image.shape[-1])
    height, width = image.shape[-2] * scale, image.shape[-1] * scale
    large = image.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    gap = torch.full((3, height, max(4, scale // 2)), 255, dtype=torch.uint8)
    order = order_image(geometry, reveal_step, height, width)
    return torch.cat([large, gap, order], dim=-1).permute(1, 2, 0).numpy()
