"""Train a backbone with the block-RAR curriculum: `python -m orderrl.pretrain backbone=digits`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from orderrl.backbones import OrderRobustTransformer, TransformerConfig, save_backbone
from orderrl.backbones.training import PretrainConfig, order_losses, pretrain
from orderrl.data import augment_digits, load_split
from orderrl.entry import run_application
from orderrl.pipeline import announce, section
from orderrl.runs import Run, progress

AUGMENTATIONS = {"digits": augment_digits}


def pretrain_backbone(config: DictConfig) -> Path:
    """Train the backbone of a config and return its checkpoint.

    The run folder holds `backbone.safetensors`, the last checkpoint of the random phase, and with an anneal also
    `backbone_final.safetensors`.
    """
    train, held_out, test = (load_split(config.data.name, split) for split in ("backbone", "planner", "test"))
    settings = PretrainConfig(**section_of_training(config), seed=config.seed)
    torch.manual_seed(config.seed)
    shape = section(config, "backbone")["model"]
    shape |= {"vocab_size": train.vocab_size, "num_classes": train.num_classes}
    backbone = OrderRobustTransformer(TransformerConfig(train.height, train.width, **shape)).to(config.device)
    with Run("pretrain", config) as run:
        chosen, final = run.folder / "backbone.safetensors", run.folder / "backbone_final.safetensors"
        description = {"data": config.data.name, "split": "backbone", "training": section_of_training(config)}

        def keep(averaged: OrderRobustTransformer) -> None:
            save_backbone(chosen, averaged, description)

        with progress(settings.steps, f"pretraining ({settings.order} order)", "steps") as advance:
            augment = AUGMENTATIONS.get(config.data.name)
            for row in pretrain(backbone, train, held_out, settings, augment, keep):
                advance(note=f"loss {row['loss']:.3f}")
                run.log(row, int(row["step"]))
        losses = order_losses(backbone, test)
        save_backbone(final if chosen.exists() else chosen, backbone, description | {"test": losses})
        run.write_json("results.json", {"split": "test", "images": len(test), **losses})
        for name, value in losses.items():
            announce(f"{name}: {value:.4f} nats per token on {len(test)} test images")
        announce(f"backbone: {chosen}\nrun: {run.folder}")
    return chosen


def section_of_training(config: DictConfig) -> dict[str, Any]:
    """The values of `backbone.training`."""
    return dict(section(config, "backbone")["training"])


if __name__ == "__main__":
    run_application("pretrain", pretrain_backbone)
