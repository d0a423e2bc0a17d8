"""Train a backbone with the block-RAR curriculum: `python -m orderrl.pretrain backbone=digits`.

A published backbone continues from its weights: `backbone=llamagen_b backbone.path=...` becomes order-robust.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from orderrl.backbones import (
    OrderRobustTransformer,
    RasterTransformer,
    backbone_fingerprint,
    build_backbone,
    published_names,
    save_backbone,
)
from orderrl.backbones.pretraining import PretrainConfig, order_losses, pretrain
from orderrl.backbones.protocol import check_fits
from orderrl.backbones.registry import TrainableBackbone, new_backbone
from orderrl.backbones.sharding import is_sharded, whole_copy
from orderrl.data import AUGMENTATIONS, TokenSet, load_split
from orderrl.factory import section, with_values
from orderrl.runtime.cache import fingerprint
from orderrl.runtime.checkpoint import load_checkpoint
from orderrl.runtime.config import run_application
from orderrl.runtime.distributed import is_main, launched, on_main, print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.job import Job
from orderrl.runtime.run import Run
from orderrl.runtime.weights import load_weights
from orderrl.tokenize import find_or_make_tokens


@isolated_float32
def pretrain_backbone(config: DictConfig) -> Path:
    """Train the backbone of a config and return its checkpoint.

    The run folder holds `backbone.safetensors`, the last checkpoint of the random phase, and with an anneal also
    `backbone_final.safetensors`.

    Raises:
        ValueError: if a value of the config is not allowed, or the weights to start from don't fit.
    """
    if config.data.name == "folder":  # images become tokens first, with a tokeniser that is trained if need be
        tokens = on_main(lambda: find_or_make_tokens(config))
        config = with_values(config, {"data": {"name": f"tokens:{tokens}"}})
    train, held_out, test = (load_split(config.data.name, split) for split in ("backbone", "planner", "test"))
    settings = PretrainConfig(**section(config, "training"), seed=config.seed)
    torch.manual_seed(config.seed)
    backbone = backbone_to_train(config, train)
    description = {"data": config.data.name, "split": "backbone", "training": section(config, "training")}
    key = _key(config, backbone, train)
    with (
        Run("pretrain", config) as run,
        Job(config.cache_dir, f"backbone-{key}", config.checkpoint_seconds, run.folder, run) as job,
    ):
        if not config.shard:
            backbone = backbone.to(config.device)
        chosen, final = run.folder / "backbone.safetensors", run.folder / "backbone_final.safetensors"
        random_phase = job.folder / chosen.name

        def keep(averaged: TrainableBackbone) -> None:
            _save(random_phase, averaged, description)

        augment, shard_on = AUGMENTATIONS.get(config.data.name), config.device if config.shard else None
        pretrain(backbone, train, held_out, settings, augment, keep, job, shard_on)
        losses = order_losses(backbone, test)
        annealed = on_main(random_phase.exists)
        _save(final if annealed else chosen, backbone, description | {"test": losses})
        if annealed and is_main():
            load_checkpoint(random_phase, "backbone")  # refused if it is damaged
            shutil.copyfile(random_phase, chosen)
        run.write_json("results.json", {"split": "test", "images": len(test), **losses})
        for name, value in losses.items():
            unit = "nats" if backbone.vocab_size else "DiffLoss units"
            print_main(f"{name}: {value:.4f} {unit} per token on {len(test)} test images")
        print_main(f"backbone: {chosen}\nrun: {run.folder}")
    return chosen


def _key(config: DictConfig, backbone: TrainableBackbone, train: TokenSet) -> str:
    """Fingerprint of everything that determines what is trained."""
    description = {
        "start": backbone_fingerprint(backbone),
        "data": train.fingerprint,
        "training": section(config, "training"),
        "seed": config.seed,
        "shard": config.shard,
    }
    return fingerprint(description)


def _save(path: Path, backbone: TrainableBackbone, description: dict[str, Any]) -> None:
    """Write a checkpoint in the main process; all must call it."""
    whole = whole_copy(backbone) if is_sharded(backbone) else backbone
    if is_main():
        save_backbone(path, whole, description)


def backbone_to_train(config: DictConfig, data: TokenSet) -> TrainableBackbone:
    """A backbone to begin with: the shape of the config's `model`, or a published model with the weights of its path.

    A raster model gets instruction tokens, so that any order can be learnt.

    Raises:
        ValueError: if it doesn't fit the data, or its weights don't fit it.
    """
    chosen = config.backbone
    if chosen.name not in published_names():
        shape = section(config, "backbone")["model"] | {"height": data.height, "width": data.width}
        if chosen.family == "mar":
            shape |= {"vae_embed_dim": data.token_dim, "class_num": data.num_classes}
        else:
            shape |= {"vocab_size": data.vocab_size, "num_classes": data.num_classes}
        backbone = new_backbone(chosen.family, shape)
        check_fits(backbone, data)
        return backbone
    backbone = build_backbone(chosen.name, shape=section(config, "backbone")["shape"])
    check_fits(backbone, data)
    if chosen.path is not None:
        load_weights(backbone, chosen.path)
    if isinstance(backbone, RasterTransformer):
        return OrderRobustTransformer.from_raster(backbone, chosen.order_robust_block_size)
    return backbone


if __name__ == "__main__":
    run_application("pretrain", launched(pretrain_backbone))
