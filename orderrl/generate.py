"""Draw images and show the order: `python -m orderrl.generate policy=multiscale@4 label=3 n=16`.

A published model needs no data set here: `backbone=randar_xl backbone.path=... tokenizer=vq16 tokenizer.path=...`.
"""

from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from orderrl.agents.registry import make_policy
from orderrl.backbones.protocol import backbone_device
from orderrl.evaluation.drawing import balanced_labels, generate_images, generate_published
from orderrl.evaluation.policies import fitted_order, found_policy
from orderrl.factory import NO_DATA, backbone_and_data, sampling_of, setup_of
from orderrl.geometry import BlockGrid
from orderrl.metrics.images import save_images
from orderrl.report.drawn import save_pictures
from orderrl.runtime.config import run_application
from orderrl.runtime.distributed import print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.progress import progress
from orderrl.runtime.run import Run

PUBLISHED = "published"  # the policy that is the model's own sampler


@isolated_float32
def generate(config: DictConfig) -> Path:
    """Generate images and return the run folder: `images.png`, `order.gif`, `order.png` and maybe `samples/`."""
    # compose and build
    if config.n < 1:
        raise ValueError(f"n must be at least 1 image, got {config.n}")
    config, backbone, data = backbone_and_data(config)
    if config.label is not None and not 0 <= config.label < backbone.num_classes:
        raise ValueError(f"label={config.label} is no class; use 0 to {backbone.num_classes - 1} or null")
    setup, sampling, geometry = setup_of(config, backbone), sampling_of(config), backbone.geometry
    device = backbone_device(backbone)
    spec = found_policy(config.policy, setup)
    labels = balanced_labels(config.n, data.classes)
    if config.label is not None:
        labels = torch.full_like(labels, config.label)
    if str(spec) == PUBLISHED:
        geometry = BlockGrid(geometry.height, geometry.width, 1)  # its pictures show single tokens
        draw = partial(generate_published, backbone, labels, config.steps, sampling, config.seed)
    else:
        fitted = None if setup.data == NO_DATA else partial(fitted_order, setup)
        named = make_policy(spec, backbone, fitted, tuple(config.budgets))
        how = (backbone, data, named.policy, named.budgets, labels, sampling, config.seed)
        draw = partial(generate_images, *how, candidates=spec.candidates)
    # draw, and show what was drawn
    with Run("generate", config) as run:
        with progress(config.n, f"generating ({spec})", "images") as advance:
            made = draw(advance=advance)
        pictures = save_pictures(run.folder, data, geometry, made, device)
        if config.keep_samples:
            by_class = made.labels.argsort(stable=True)
            save_images(data.images(made.tokens[by_class], device), run.folder / "samples", made.labels[by_class])
        steps = (made.reveal_step.amax(1) + 1).float().mean().item()
        run.log({"images": float(config.n), "seconds": made.seconds, "planner_steps": steps}, 0)
        print_main(f"{config.n} images in {made.seconds:.1f} s, {steps:.1f} planner steps each")
        print_main(f"pictures: {', '.join(map(str, pictures))}")
    return run.folder


if __name__ == "__main__":
    run_application("generate", generate)
