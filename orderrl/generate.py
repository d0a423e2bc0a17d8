"""Draw images and show the order: `python -m orderrl.generate policy=multiscale@4 label=3 n=16`.

A published model needs no data set here: `backbone=randar_xl backbone.path=... tokenizer=vq16 tokenizer.path=...`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from PIL import Image
from torchvision.utils import make_grid

from orderrl.agents.registry import make_policy
from orderrl.backbones import Backbone
from orderrl.backbones.protocol import backbone_device
from orderrl.data import TokenSet, load_split
from orderrl.data.token_files import decode_in_parts
from orderrl.envs.render import order_image, partial_images
from orderrl.evaluate import fitted_order, policy_of
from orderrl.evaluation.drawing import Generated, balanced_labels, generate_images, generate_published
from orderrl.factory import NO_DATA, open_backbone, sampling_of, with_values
from orderrl.geometry import BlockGrid
from orderrl.metrics.images import save_images
from orderrl.runtime.config import run_application
from orderrl.runtime.distributed import print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.progress import progress
from orderrl.runtime.run import Run
from orderrl.tokenizers import KLTokenizer, VQTokenizer, load_tokenizer

SMALLEST_SIDE = 64  # of an image in the pictures, pixels
PUBLISHED = "published"  # the policy that is the model's own sampler


@isolated_float32
def generate(config: DictConfig) -> Path:
    """Generate images and return the run folder: `images.png`, `order.gif`, `order.png` and maybe `samples/`.

    Raises:
        ValueError: if the policy is unknown or a value is not allowed.
    """
    if config.n < 1:
        raise ValueError(f"n must be at least 1 image, got {config.n}")
    config, backbone, data = _opened(config)
    if config.label is not None and not 0 <= config.label < backbone.num_classes:
        raise ValueError(f"label={config.label} is no class; use 0 to {backbone.num_classes - 1} or null")
    spec = policy_of(config, backbone)
    labels = balanced_labels(config.n, data.classes)
    if config.label is not None:
        labels = torch.full_like(labels, config.label)
    sampling = sampling_of(config)
    geometry, device = backbone.geometry, backbone_device(backbone)
    if str(spec) == PUBLISHED:
        geometry = BlockGrid(geometry.height, geometry.width, 1)  # its pictures show single tokens
        draw = partial(generate_published, backbone, labels, config.steps, sampling, config.seed)
    else:
        fitted = None if config.data.name == NO_DATA else lambda: fitted_order(config, backbone)
        named = make_policy(spec, backbone, fitted, tuple(config.budgets))
        draw = partial(generate_images, backbone, data, named.policy, named.budgets, labels, sampling, config.seed)
    with Run("generate", config) as run:
        with progress(config.n, f"generating ({spec})", "images") as advance:
            made = draw(advance=advance)
        columns = max(1, round(config.n**0.5))
        grids = []
        for step in range(-1, int(made.reveal_step.max()) + 1):
            visible = made.reveal_step <= step
            images = _enlarge(partial_images(data, geometry, made.tokens, visible, device))
            shown = make_grid(images, nrow=columns, padding=2, pad_value=255)
            grids.append(Image.fromarray(shown.permute(1, 2, 0).numpy()))
        grids[-1].save(run.folder / "images.png")
        grids[0].save(run.folder / "order.gif", save_all=True, append_images=grids[1:] + [grids[-1]] * 4, duration=250)
        if config.keep_samples:
            by_class = made.labels.argsort(stable=True)
            save_images(data.images(made.tokens[by_class], device), run.folder / "samples", made.labels[by_class])
        _order_grid(made, images.shape[-2], images.shape[-1], columns, geometry).save(run.folder / "order.png")
        steps = (made.reveal_step.amax(1) + 1).float().mean().item()
        run.log({"images": float(config.n), "seconds": made.seconds, "planner_steps": steps}, 0)
        print_main(
            f"{config.n} images in {made.seconds:.1f} s, {steps:.1f} planner steps each\n"
            f"pictures: {run.folder / 'images.png'}, {run.folder / 'order.gif'}, {run.folder / 'order.png'}"
        )
    return run.folder


def _opened(config: DictConfig) -> tuple[DictConfig, Backbone, TokenSet]:
    """The backbone and the data of a config, and the config; with a tokeniser it has no data.

    Raises:
        ValueError: if they can't be opened or do not fit.
    """
    chosen = config.tokenizer
    if chosen.name == "none":
        return config, open_backbone(config), load_split(config.data.name, "test")
    if config.data.name.startswith("tokens:"):
        raise ValueError(
            f"tokenizer={chosen.name} draws without a data set, and {config.data.name} has a tokeniser of its own; "
            "leave out one of them"
        )
    config = with_values(config, {"data": {"name": NO_DATA}})
    backbone = open_backbone(config)
    return config, backbone, _set_without_images(backbone, load_tokenizer(chosen.name, chosen.path))


def _set_without_images(backbone: Backbone, tokenizer: VQTokenizer | KLTokenizer) -> TokenSet:
    """What stands for a data set where images are drawn and none are read.

    Raises:
        ValueError: if the tokeniser does not decode what the backbone draws.
    """
    geometry, channels = backbone.geometry, getattr(backbone, "token_dim", 0)
    drawn = backbone.vocab_size or None, channels or tokenizer.token_dim
    decoded = tokenizer.vocab_size, tokenizer.token_dim
    if drawn != decoded:
        raise ValueError(
            f"tokenizer={tokenizer.name} (vocab_size, token_dim) = {decoded} does not fit the backbone's "
            f"{backbone.vocab_size, channels}; choose the tokeniser that the backbone was trained with"
        )
    empty = torch.zeros(0, geometry.num_tokens, dtype=torch.int64)
    return TokenSet(
        NO_DATA,
        "test",
        torch.zeros(0, geometry.num_tokens, channels) if channels else empty,
        torch.zeros(0, dtype=torch.int64),
        geometry.height,
        geometry.width,
        backbone.vocab_size,
        backbone.num_classes,
        channels,
        lambda tokens: decode_in_parts(tokenizer.to(tokens.device), tokens, (geometry.height, geometry.width)),
    )


def _enlarge(images: torch.Tensor) -> torch.Tensor:
    factor = max(1, SMALLEST_SIDE // images.shape[-1])
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def _order_grid(made: Generated, height: int, width: int, columns: int, geometry: BlockGrid) -> Image.Image:
    """Heat maps of the order of every image."""
    maps = [order_image(geometry, steps, height, width) for steps in made.reveal_step]
    return Image.fromarray(
        make_grid(torch.stack(maps), nrow=columns, padding=2, pad_value=255).permute(1, 2, 0).numpy()
    )


if __name__ == "__main__":
    run_application("generate", generate)
