"""Animations of orders: GIFs that loop, count the steps and outline the blocks of each."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from orderrl.data.pictures import hide_blocks, outline_blocks
from orderrl.evaluation.detail import Examples, PolicyDetail
from orderrl.geometry import BlockGrid

_SIDE = 96  # pixels of an image, at least
_COLUMNS = 6  # images at most
_GAP, _LINE = 8, 22  # pixels between images, and of a line of text
_MILLISECONDS, _LAST = 350, 2500  # a frame stays, and the last one


def save_orders(path: Path, details: Sequence[PolicyDetail], examples: Examples) -> None:
    """Write a GIF that loops: raster order (else the last policy) above, the table's first policy below.

    Policies come in the order of the table; those without episodes are left out.
    """
    shown = [detail for detail in details if detail.episodes]
    if not shown:
        return
    lower = next((detail for detail in shown if detail.name == "raster"), shown[-1])
    rows = [lower] if lower is shown[0] else [lower, shown[0]]
    scale = max(1, -(-_SIDE // examples.images.shape[-1]))
    images = F.interpolate(examples.images[:_COLUMNS].float(), scale_factor=scale, mode="nearest").to(torch.uint8)
    grid = BlockGrid(examples.rows, examples.columns, 1)
    steps = max(len(episode.steps) for detail in rows for episode in detail.episodes[:_COLUMNS])
    frames = [_frame(rows, images, grid, step) for step in range(steps + 1)]
    save_animation(path, frames)


def save_animation(path: Path, frames: Sequence[Image.Image]) -> None:
    """Write a GIF that loops, and rests on its last frame."""
    durations = [*[_MILLISECONDS] * (len(frames) - 1), _LAST]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)


def titled(picture: Image.Image, title: str) -> Image.Image:
    """A picture under a line of text."""
    canvas = Image.new("RGB", (picture.width, picture.height + _LINE), "white")
    ImageDraw.Draw(canvas).text((_GAP, 2), title, fill="black", font=ImageFont.load_default(14))
    canvas.paste(picture, (0, _LINE))
    return canvas


def _frame(rows: Sequence[PolicyDetail], images: Tensor, grid: BlockGrid, step: int) -> Image.Image:
    """All images after so many steps: a line of text and a row of images for each policy."""
    count, _, height, width = images.shape
    size = (_GAP + count * (width + _GAP), height + _GAP)
    canvas = Image.new("RGB", (size[0], len(rows) * (size[1] + _LINE)), "white")
    for number, detail in enumerate(rows):
        row = Image.new("RGB", size, "white")
        reveal_step = torch.tensor([episode.reveal_step for episode in detail.episodes[:count]])
        partial = hide_blocks(images[: len(reveal_step)], reveal_step < step, grid)
        partial = outline_blocks(partial, reveal_step == step - 1, grid)
        for column, image in enumerate(partial.permute(0, 2, 3, 1).numpy()):
            row.paste(Image.fromarray(image), (_GAP + column * (width + _GAP), 0))
        canvas.paste(titled(row, f"{detail.name}, step {step}"), (0, number * (size[1] + _LINE)))
    return canvas
