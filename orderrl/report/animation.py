"""An animation of orders: the same held-out images, revealed by two policies side by side."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from orderrl.data.pictures import HIDDEN_GREY
from orderrl.evaluation.detail import Episode, Examples, PolicyDetail

_SIDE = 96  # pixels of an image, at least
_COLUMNS = 6  # images at most
_GAP, _LINE = 8, 22  # pixels between images, and of a line of text
_FRESH = (230, 120, 20)  # outline of the blocks of a step
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
    steps = max(len(episode.steps) for detail in rows for episode in detail.episodes[:_COLUMNS])
    frames = [_frame(rows, images, examples, step) for step in range(steps + 1)]
    durations = [*[_MILLISECONDS] * steps, _LAST]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)


def _frame(rows: Sequence[PolicyDetail], images: Tensor, examples: Examples, step: int) -> Image.Image:
    """All images after so many steps: a line of text and a row of images for each policy."""
    count, _, height, width = images.shape
    canvas = Image.new("RGB", (_GAP + count * (width + _GAP), len(rows) * (height + _LINE + _GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for number, detail in enumerate(rows):
        top = number * (height + _LINE + _GAP) + _LINE
        draw.text((_GAP, top - _LINE + 2), f"{detail.name}, step {step}", fill="black", font=font)
        for column, (image, episode) in enumerate(zip(images, detail.episodes, strict=False)):
            left = _GAP + column * (width + _GAP)
            canvas.paste(_partial(image, episode, examples, step), (left, top))
            for box in _fresh(episode, examples, step, (height, width)):
                draw.rectangle([(left + box[0], top + box[1]), (left + box[2], top + box[3])], outline=_FRESH, width=2)
    return canvas


def _partial(image: Tensor, episode: Episode, examples: Examples, step: int) -> Image.Image:
    """An image with the blocks grey that are hidden after so many steps."""
    hidden = torch.tensor(episode.reveal_step).view(1, 1, examples.rows, examples.columns) >= step
    grey = F.interpolate(hidden.float(), size=image.shape[1:], mode="nearest")[0].bool()
    return Image.fromarray(torch.where(grey, HIDDEN_GREY, image).permute(1, 2, 0).numpy())


def _fresh(episode: Episode, examples: Examples, step: int, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Corners (left, top, right, bottom) of the blocks that the last of so many steps revealed."""
    if not 0 < step <= len(episode.steps):
        return []
    high, wide = size[0] // examples.rows, size[1] // examples.columns
    places = [divmod(block, examples.columns) for block in episode.steps[step - 1]]
    return [(x * wide, y * high, (x + 1) * wide - 1, (y + 1) * high - 1) for y, x in places]
