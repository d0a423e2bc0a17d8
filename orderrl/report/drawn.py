"""Pictures of generated images: what was drawn, and in which order."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from orderrl.data import TokenSet
from orderrl.data.pictures import outline_blocks
from orderrl.envs.render import order_image, partial_images
from orderrl.evaluation.drawing import Generated
from orderrl.geometry import BlockGrid
from orderrl.report.animation import save_animation, titled

SMALLEST_SIDE = 64  # of an image in the pictures, pixels


def save_pictures(
    folder: Path, data: TokenSet, geometry: BlockGrid, made: Generated, device: torch.device | None = None
) -> list[Path]:
    """Write `images.png`, `order.gif` (the images step by step) and `order.png` (heat maps), and return their paths.

    Tokens are decoded on the device; None is where they lie.
    """
    columns = max(1, round(len(made.tokens) ** 0.5))
    # the images at every step
    frames = []
    for step in range(int(made.reveal_step.max()) + 2):
        images = partial_images(data, geometry, made.tokens, made.reveal_step < step, device)
        factor = max(1, SMALLEST_SIDE // images.shape[-1])
        images = images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        outlined = outline_blocks(images, (made.reveal_step == step - 1).cpu(), geometry)
        frames.append(titled(_sheet(outlined, columns), f"step {step}"))
    # their order, in colours
    height, width = images.shape[-2:]
    maps = torch.stack([order_image(geometry, steps, height, width) for steps in made.reveal_step])
    paths = [folder / name for name in ("images.png", "order.gif", "order.png")]
    _sheet(images, columns).save(paths[0])
    save_animation(paths[1], frames)
    _sheet(maps, columns).save(paths[2])
    return paths


def _sheet(images: Tensor, columns: int) -> Image.Image:
    """Pictures (n, 3, H, W) uint8 side by side."""
    from torchvision.utils import make_grid  # takes long to import

    return Image.fromarray(make_grid(images, nrow=columns, padding=2, pad_value=255).permute(1, 2, 0).numpy())
