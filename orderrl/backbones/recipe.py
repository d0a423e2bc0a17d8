"""Backbones that are made: what is trained on what, and the files that a training leaves."""

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from orderrl.backbones.fsdp import is_split, whole_copy
from orderrl.backbones.llamagen import ABSOLUTE, RasterTransformer
from orderrl.backbones.origin import NATIVE, ORIGIN, Origin
from orderrl.backbones.pretraining import RANDOM, OrderSource, PretrainConfig, order_losses, pretrain
from orderrl.backbones.protocol import Backbone, check_fits
from orderrl.backbones.randar import OrderRobustTransformer
from orderrl.backbones.registry import (
    BACKBONES,
    TrainableBackbone,
    backbone_fingerprint,
    build_backbone,
    load_backbone,
    new_backbone,
    published_names,
    save_backbone,
)
from orderrl.data import TokenSet, load_split
from orderrl.runtime.cache import Cache, fingerprint
from orderrl.runtime.checkpoint import load_checkpoint
from orderrl.runtime.distributed import is_main, on_main, print_main
from orderrl.runtime.hub import PLANNER, START
from orderrl.runtime.job import Job
from orderrl.runtime.run import Run
from orderrl.runtime.sources import source_identity
from orderrl.runtime.weights import load_weights

_MAY_CHANGE = ("dropout", "position_head", "next_position")  # of a model that is trained further
MakeOrders = Callable[[Backbone, TokenSet, PretrainConfig], OrderSource]
"""(what planners read, images of the backbone split, settings) -> the orders of a policy."""
BACKBONES_FOLDER = "backbones"  # in the cache
_CHECKPOINT, _FINAL, _RESULTS = "backbone.safetensors", "backbone_final.safetensors", "results.json"


@dataclass(frozen=True, kw_only=True)
class BackboneRecipe:
    """Everything that determines a backbone that is trained."""

    backbone: Mapping[str, Any]  # the config group `backbone` as plain values, of `pretrain`
    training: Mapping[str, Any]  # the config group `training` as plain values
    data: str  # name of the data set
    seed: int  # of initialisation, batches, orders and augmentation
    device: str  # where it is trained
    fsdp: bool = False  # split the weights over all processes
    orders: MakeOrders | None = None  # where the orders of a policy come from

    @cached_property
    def config(self) -> PretrainConfig:
        """The settings of the training."""
        return PretrainConfig(**self.training, seed=self.seed)

    def train(self, cache_dir: str, checkpoint_seconds: float, new_run: Callable[[], Run]) -> Path:
        """Train on the backbone split and measure on the test split.

        The run's folder gets `results.json` and `backbone.safetensors`, the last checkpoint of the random phase, and
        with an anneal also `backbone_final.safetensors`; of a planner's specialist also the planner, and
        the backbone that it reads if that was a file.

        Args:
            cache_dir: where the state of an unfinished training is kept.
            new_run: begins the run of the command.

        Returns:
            The checkpoint.

        Raises:
            ValueError: if a value is not allowed, or the weights to start from do not fit.
        """
        # build
        config = self.config
        train, held_out, test = (load_split(self.data, split) for split in ("backbone", "planner", "test"))
        torch.manual_seed(self.seed)
        start = None if config.start is None else load_backbone(config.start, device=self.device)
        if start is None:
            backbone = backbone_to_train(self.backbone, train)
        else:
            backbone = fine_tuned(start, self.backbone, train)
        orders = self._orders(start, backbone, train)
        description: dict[str, Any] = {"data": self.data, "split": "backbone", "training": dict(self.training)}
        if config.order != RANDOM or start is not None:
            description[ORIGIN] = self._origin(start, orders).described()
        # train
        key = f"backbone-{self._key(backbone, train)}"
        with new_run() as run, Job(cache_dir, key, checkpoint_seconds, run.folder, run) as job:
            chosen, final = run.folder / _CHECKPOINT, run.folder / _FINAL
            if not self.fsdp:
                backbone = backbone.to(self.device)
            random_phase = job.folder / chosen.name

            def keep(averaged: TrainableBackbone) -> None:
                _save(random_phase, averaged, description)

            def measured() -> dict[str, float]:
                own = None if orders is None or orders.hindsight else orders.of(test, backbone)
                return order_losses(backbone, test, own=own)

            before = job.piece("before", measured) if start is not None else None
            split_on = self.device if self.fsdp else None
            pretrain(backbone, train, held_out, config, keep, job, split_on, orders)
            # measure and keep
            losses = measured()
            annealed = on_main(random_phase.exists)
            if orders is not None and not self._has_head:
                description[ORIGIN] |= on_main(lambda: self._keep(orders, start, run.folder))
            _save(final if annealed else chosen, backbone, description | {"test": losses})
            if annealed and is_main():
                load_checkpoint(random_phase, "backbone")  # refused if it is damaged
                shutil.copyfile(random_phase, chosen)
            results = {"split": "test", "images": len(test), **losses}
            run.write_json(_RESULTS, results if before is None else results | {"before": before})
        for name, value in losses.items():
            unit = "nats" if backbone.vocab_size else "DiffLoss units"
            was = "" if before is None else f" (before: {before[name]:.4f})"
            print_main(f"{name}: {value:.4f}{was} {unit} per token on {len(test)} test images")
        return chosen

    def find_or_train(self, cache: Cache, train: Callable[[], Path], order: str, source: Path | None = None) -> Path:
        """The cached backbone of this recipe, or the one that `train` makes, which is kept with what lies beside it.

        Args:
            order: name of the policy, without the folder of a planner's file.
            source: the file that the policy is made of; None if there is none.
        """
        description = {
            "start": None if self.config.start is None else backbone_fingerprint(load_backbone(self.config.start)),
            "backbone": dict(self.backbone),
            "data": load_split(self.data, "backbone").fingerprint,
            "training": dict(self.training) | {"start": None, "order": None},
            "order": source_identity(source or self.config.order.partition("@")[0]),
            "name": order,
            "seed": self.seed,
        }
        key = fingerprint(description)
        if cache.find(BACKBONES_FOLDER, key) is None:
            made = train()
            with cache.store(BACKBONES_FOLDER, key, description) as folder:
                beside = (made.with_name(name) for name in (PLANNER, START))
                for path in (made, *filter(Path.is_file, beside), made.with_name(_RESULTS)):
                    shutil.copyfile(path, folder / path.name)
        return cache.folder(BACKBONES_FOLDER, key) / _CHECKPOINT

    def _orders(self, start: Backbone | None, backbone: TrainableBackbone, train: TokenSet) -> OrderSource | None:
        """Where the orders of a policy come from; None trains random or plain raster orders."""
        if self.config.policy is None or self.orders is None:
            return None
        return self.orders(start or copy.deepcopy(backbone).eval().requires_grad_(False), train, self.config)

    def _keep(self, orders: OrderSource, start: Backbone | None, folder: Path) -> dict[str, Any]:
        """Copy what the orders need to the folder of a specialist; what its `Origin` says of it."""
        kept = orders.keep(folder)
        if "planner" in kept and isinstance(start, TrainableBackbone) and _is_file(self.config.start):
            save_backbone(folder / START, start, {"data": start.trained_on})
            kept["start"] = START
        return kept

    @property
    def _has_head(self) -> bool:
        """Whether the backbone learns to say which block comes next; its own order is then what it says."""
        return bool(self.backbone.get("model", {}).get("position_head", False))

    def _origin(self, start: Backbone | None, orders: OrderSource | None) -> Origin:
        """What a specialist is made of and for."""
        config, said = self.config, []
        if start is None:
            said.append("from nothing")
        if config.rounds != 1:
            said.append(f"{config.rounds} rounds")
        if config.random_share:
            said.append(f"{config.random_share:.0%} random")
        if config.locality:
            said.append(f"locality {config.locality:g}")
        if self.backbone.get("model", {}).get("next_position", ABSOLUTE) != ABSOLUTE:
            said.append("relative")
        if self._has_head:
            said.append("position head")
        name = config.order if orders is None else orders.label
        begun = config.start
        if begun is not None and _is_file(begun):  # found again from any folder
            begun = str(Path(begun).resolve())
        return Origin(
            order=NATIVE if self._has_head else config.order,
            label=f"{name} ({', '.join(said)})" if said else name,
            seed=self.seed,
            start=begun,
            start_fingerprint=None if start is None else backbone_fingerprint(start),
        )

    def _key(self, backbone: TrainableBackbone, train: TokenSet) -> str:
        """Fingerprint of everything that determines what is trained."""
        description = {
            "start": backbone_fingerprint(backbone),
            "data": train.fingerprint,
            "training": dict(self.training),
            "seed": self.seed,
            "shard": self.fsdp,
        }
        return fingerprint(description)


def _is_file(start: str | None) -> bool:
    """Whether a backbone to start from is named by its file."""
    return start is not None and start not in BACKBONES and Path(start).is_file()


def _save(path: Path, backbone: TrainableBackbone, description: dict[str, Any]) -> None:
    """Write a checkpoint in the main process; all must call it."""
    whole = whole_copy(backbone) if is_split(backbone) else backbone
    if is_main():
        save_backbone(path, whole, description)


def fine_tuned(start: Backbone, chosen: Mapping[str, Any], data: TokenSet) -> TrainableBackbone:
    """A copy of a backbone to be trained further, with the dropout and the position head that `model` asks for.

    Args:
        start: frozen.
        chosen: the config group `backbone` as plain values.
        data: which it must fit.

    Raises:
        ValueError: if it is none of this package's families, does not fit the data, or has another shape.
    """
    check_fits(start, data)
    if not isinstance(start, TrainableBackbone):
        raise ValueError(f"training.start: a backbone of type {type(start).__name__} is none that pretrain trains")
    if chosen.get("path") is not None:
        raise ValueError(f"backbone.path={chosen['path']!r} and training.start both name weights to start from")
    shape, wanted = start.config.to_dict(), chosen.get("model", {})
    for key, value in wanted.items():
        if key not in _MAY_CHANGE and shape[key] != value:
            raise ValueError(
                f"backbone.model.{key}={value} is not the {shape[key]} of training.start; give that, or the backbone "
                "preset of the start"
            )
    changed = {key: wanted[key] for key in _MAY_CHANGE if key in wanted}
    copied: TrainableBackbone = type(start)(replace(start.config, **changed))  # type: ignore[arg-type]
    missing, unexpected = copied.load_state_dict(start.state_dict(), strict=False)
    unknown = [key for key in (*missing, *unexpected) if not key.startswith(("position_head.", "offset_embeddings."))]
    assert not unknown, unknown
    return copied


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
