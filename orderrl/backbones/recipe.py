"""Backbones that are made: what is trained on what, and the files that a training leaves."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orderrl.backbones.llamagen import RasterTransformer
from orderrl.backbones.pretraining import PretrainConfig, order_losses, pretrain
from orderrl.backbones.protocol import check_fits
from orderrl.backbones.randar import OrderRobustTransformer
from orderrl.backbones.registry import (
    TrainableBackbone,
    backbone_fingerprint,
    build_backbone,
    new_backbone,
    published_names,
    save_backbone,
)
from orderrl.backbones.sharding import is_sharded, whole_copy
from orderrl.data import AUGMENTATIONS, TokenSet, load_split
from orderrl.runtime.cache import fingerprint
from orderrl.runtime.checkpoint import load_checkpoint
from orderrl.runtime.distributed import is_main, on_main, print_main
from orderrl.runtime.job import Job
from orderrl.runtime.run import Run
from orderrl.runtime.weights import load_weights


@dataclass(frozen=True, kw_only=True)
class BackboneRecipe:
    """Everything that determines a backbone that is trained."""

    backbone: Mapping[str, Any]  # the config group `backbone` as plain values, of `pretrain`
    training: Mapping[str, Any]  # the config group `training` as plain values
    data: str  # name of the data set
    seed: int  # of initialisation, batches, orders and augmentation
    device: str  # where it is trained
    shard: bool  # split the weights over all processes

    def train(self, cache_dir: str, checkpoint_seconds: float, new_run: Callable[[], Run]) -> Path:
        """Train on the backbone split and measure on the test split.

        The run's folder gets `results.json` and `backbone.safetensors`, the last checkpoint of the random phase, and
        with an anneal also `backbone_final.safetensors`.

        Args:
            cache_dir: where the state of an unfinished training is kept.
            new_run: begins the run of the command.

        Returns:
            The checkpoint.

        Raises:
            ValueError: if a value is not allowed, or the weights to start from do not fit.
        """
        # build
        train, held_out, test = (load_split(self.data, split) for split in ("backbone", "planner", "test"))
        config = PretrainConfig(**self.training, seed=self.seed)
        torch.manual_seed(self.seed)
        backbone = backbone_to_train(self.backbone, train)
        description = {"data": self.data, "split": "backbone", "training": dict(self.training)}
        key = f"backbone-{self._key(backbone, train)}"
        # train
        with new_run() as run, Job(cache_dir, key, checkpoint_seconds, run.folder, run) as job:
            chosen, final = run.folder / "backbone.safetensors", run.folder / "backbone_final.safetensors"
            if not self.shard:
                backbone = backbone.to(self.device)
            random_phase = job.folder / chosen.name

            def keep(averaged: TrainableBackbone) -> None:
                _save(random_phase, averaged, description)

            shard_on = self.device if self.shard else None
            pretrain(backbone, train, held_out, config, AUGMENTATIONS.get(self.data), keep, job, shard_on)
            # measure and keep
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
        return chosen

    def _key(self, backbone: TrainableBackbone, train: TokenSet) -> str:
        """Fingerprint of everything that determines what is trained."""
        description = {
            "start": backbone_fingerprint(backbone),
            "data": train.fingerprint,
            "training": dict(self.training),
            "seed": self.seed,
            "shard": self.shard,
        }
        return fingerprint(description)


def _save(path: Path, backbone: TrainableBackbone, description: dict[str, Any]) -> None:
    """Write a checkpoint in the main process; all must call it."""
    whole = whole_copy(backbone) if is_sharded(backbone) else backbone
    if is_main():
        save_backbone(path, whole, description)


def backbone_to_train(chosen: Mapping[str, Any], data: TokenSet) -> TrainableBackbone:
    """A backbone to begin with: the shape of `model`, or a published model with the weights of its path.

    A raster model gets instruction tokens, so that any order can be learnt.

    Args:
        chosen: the config group `backbone` as plain values.
        data: which it must fit.

    Raises:
        ValueError: if it does not fit the data, or its weights do not fit it.
    """
    if chosen["name"] not in published_names():
        shape = {**chosen["model"], "height": data.height, "width": data.width}
        if chosen["family"] == "mar":
            shape |= {"vae_embed_dim": data.token_dim, "class_num": data.num_classes}
        else:
            shape |= {"vocab_size": data.vocab_size, "num_classes": data.num_classes}
        backbone = new_backbone(chosen["family"], shape)
        check_fits(backbone, data)
        return backbone
    backbone = build_backbone(chosen["name"], shape=chosen["shape"])
    check_fits(backbone, data)
    if chosen["path"] is not None:
        load_weights(backbone, chosen["path"])
    if isinstance(backbone, RasterTransformer):
        return OrderRobustTransformer.from_raster(backbone, chosen["order_robust_block_size"])
    return backbone
