"""What the commands share: parts of a config, and the first step of the main job, labels, found in the cache or made.

A step is described by plain values: everything that determines its result. The fingerprint of the description is its
key in the cache, so nothing is made twice and nothing stale is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch import Tensor

from orderrl.agents.bc import BCConfig
from orderrl.agents.dagger import own_contexts
from orderrl.agents.policies import PlannerPolicy
from orderrl.backbones import Backbone, Sampling, backbone_fingerprint, load_backbone
from orderrl.backbones.protocol import check_fits
from orderrl.backbones.registry import weights_fingerprint
from orderrl.backbones.sharding import fix_memory, shard_backbone
from orderrl.data import TokenSet, load_split
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.reward import RewardConfig
from orderrl.labels import (
    assemble,
    label_columns,
    label_shard,
    label_shard_together,
    make_shards,
    missing_shards,
    plan_shards,
)
from orderrl.oracle import Contexts, LabelConfig, random_contexts
from orderrl.planner import load_planner
from orderrl.runtime import distributed
from orderrl.runtime.cache import Cache, fingerprint
from orderrl.runtime.finite import require_finite_losses
from orderrl.runtime.job import Unfinished, forget
from orderrl.runtime.progress import progress
from orderrl.runtime.run import Run
from orderrl.runtime.storage import read_sealed
from orderrl.runtime.tables import open_table

CHEAPEST = RewardConfig(objective="likelihood", form="charged")  # needs no context losses
LABELS = "labels"
NO_DATA = "none"  # the data of a config that draws with a backbone and a tokeniser alone
DAGGER = ("dagger_rounds", "dagger_contexts", "dagger_steps", "dagger_own_share")  # nothing without rounds
FORMAT = 2  # of what is cached; raised when the meaning of stored files changes


def section(config: DictConfig, name: str, *without: str) -> dict[str, Any]:
    """A config group as plain values."""
    values = OmegaConf.to_container(config[name], resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key not in without}


def open_backbone(config: DictConfig) -> Backbone:
    """The frozen backbone of a config, checked against its data unless that is `NO_DATA`.

    Raises:
        ValueError: if the config names none, or it can't be loaded or doesn't fit the data.
    """
    chosen = config.backbone
    if chosen.name is None:
        raise ValueError(
            f"backbone.name is not set; train a backbone with `python -m orderrl.pretrain data={config.data.name} ...` "
            "and give backbone.name=PATH"
        )
    backbone = load_backbone(
        chosen.name,
        chosen.get("path"),
        device="cpu" if config.get("shard") else config.device,  # no device ever holds all of a backbone to be split
        dtype=chosen.get("dtype"),
        shape=chosen.get("shape"),
        memory_gb=chosen.get("memory_gb"),
        compile=chosen.get("compile"),
        pack_weights=chosen.get("pack_weights", True),
    )
    if config.data.name != NO_DATA:
        check_fits(backbone, load_split(config.data.name, "test"))
    return backbone


def sampling_of(config: DictConfig) -> Sampling:
    """How tokens are drawn, from a config that has the keys of `Sampling`."""
    return Sampling(**{field.name: config[field.name] for field in fields(Sampling)})


def require_order_robust(config: DictConfig, backbone: Backbone, what: str) -> None:
    """Refuse what needs an order to choose.

    Raises:
        ValueError: if the backbone knows raster order only; with the command that makes it order-robust.
    """
    if not backbone.order_robust:
        path = config.backbone.get("path")
        raise ValueError(
            f"{what} needs an order-robust backbone, and {config.backbone.name!r} draws in raster order only; make it "
            f"order-robust with `python -m orderrl.pretrain backbone={config.backbone.name} backbone.path={path} "
            f"data={config.data.name.partition(':')[0]}` and use the checkpoint as backbone.name"
        )


def with_values(config: DictConfig, values: dict[str, Any]) -> DictConfig:
    """A copy of a config with some values replaced; a section that is a config itself replaces the whole section."""
    changed = config.copy()
    OmegaConf.set_struct(changed, False)
    for key, value in values.items():
        if isinstance(value, DictConfig) or key not in changed:
            changed[key] = value
        else:
            OmegaConf.update(changed, key, value, merge=True)
    OmegaConf.set_struct(changed, True)
    return changed


def announce(text: str) -> None:
    """Tell the user what a step does or found; of many processes the main one does."""
    if distributed.is_main():
        print(text, flush=True)


def follow(
    rows: Iterator[dict[str, float]],
    work: Unfinished,
    run: Run | None,
    report: Callable[[Any], None],
    stops_itself: bool = False,
) -> None:
    """Run a training loop to its end and log its rows.

    Args:
        rows: of the loop, one a step; the loop uses `work`.
        work: a loop that continues has the rows of its earlier steps there, which are logged again.
        run: gets the rows.
        report: moves a progress bar; gets the last row, and as its key "new" how many steps were done.
        stops_itself: whether the loop ends well when its loss is not finite.

    Raises:
        NotFiniteError: at the first loss that is not finite.
    """
    shown = 0
    for row in rows:
        work.history.append(row)
        for earlier in work.history[shown:]:
            if run is not None:
                run.log(earlier, int(earlier["step"]))
        if not stops_itself:
            require_finite_losses(row)
        report(row | {"new": len(work.history) - shown})
        shown = len(work.history)


# ---------------------------------------------------------------------- labels


def label_description(config: DictConfig, backbone: Backbone, data: TokenSet, **changes: Any) -> dict[str, Any]:
    """What determines a set of labels."""
    labels = section(config, "labels", "batch_size", "shard_size") | changes
    return {"format": FORMAT, "backbone": backbone_fingerprint(backbone), "data": data.fingerprint, "labels": labels}


def find_or_make_labels(
    config: DictConfig, backbone: Backbone, split: str = "planner", run: Run | None = None, **changes: Any
) -> Path:
    """Folder of the labels of a config: a table in `contexts`, and its description.

    Args:
        config: with groups data and labels.
        backbone: scores the blocks.
        split: which images are labelled.
        run: logs the progress.
        changes: replaces values of the group labels.
    """
    require_order_robust(config, backbone, "label")
    data = load_split(config.data.name, split)
    description = label_description(config, backbone, data, **changes)
    settings = LabelConfig(**(section(config, "labels", "shard_size") | changes))

    def contexts() -> Contexts:
        return random_contexts(settings, len(data), backbone.geometry.num_blocks)

    return _find_or_label(config, backbone, data, settings, contexts, description, run)


def find_or_make_own_labels(config: DictConfig, backbone: Backbone, start: Path, images: Tensor, number: int) -> Path:
    """Folder of the labels of states that a planner reaches itself.

    Args:
        config: of agent=bc.
        backbone: scores the blocks.
        start: the planner's checkpoint.
        images: (n,) int64, planner images that it plays: those that its labels came from.
        number: of the round, from 1.
    """
    cloning = BCConfig(**section(config, "agent", "name"), seed=config.seed)
    count, share = cloning.dagger_contexts, cloning.dagger_own_share
    planner, _ = load_planner(start, backbone)
    data = load_split(config.data.name, "planner")
    settings = replace(LabelConfig(**section(config, "labels", "shard_size")), contexts=count)
    described = {"planner": weights_fingerprint(planner), "contexts": count, "own_share": share, "round": number}
    description = label_description(config, backbone, data) | {"own": described | {"seed": config.seed}}

    def contexts() -> Contexts:
        core = NextBlockCore(backbone, data, min(settings.batch_size, count), CoreConfig(reward=CHEAPEST))
        seed, first = config.seed * 1_000_003 + number, config.labels.contexts + (number - 1) * count
        return own_contexts(PlannerPolicy(planner), core, images, count, share, seed, first)

    # one process plays for all: another one's rounding might choose another block
    return _find_or_label(config, backbone, data, settings, lambda: distributed.on_main(contexts), description, None)


def _find_or_label(
    config: DictConfig,
    backbone: Backbone,
    data: TokenSet,
    settings: LabelConfig,
    make_contexts: Callable[[], Contexts],
    description: dict[str, Any],
    run: Run | None,
) -> Path:
    """The cached labels of a description, or those of the contexts that are made; interrupted labelling continues."""
    cache, key = Cache(config.cache_dir), fingerprint(description)
    found = distributed.on_main(lambda: cache.find(LABELS, key))
    if found is not None:
        forget(config.cache_dir, f"{LABELS}-{key}")
        announce(f"labels: {found} (cached)")
        return found
    if settings.kind != "pointwise" and not backbone.vocab_size:
        raise ValueError(
            f"labels.kind={settings.kind!r} needs token probabilities, which a backbone of continuous tokens does not "
            "have; use labels=pointwise"
        )
    announce(f"labels: none for this config yet, labelling {settings.contexts} contexts of {data.name}/{data.split}")
    contexts = make_contexts()
    shards = plan_shards(contexts, settings.batch_size, config.labels.shard_size)
    together = bool(config.get("shard", False))
    if together:
        shard_backbone(backbone, config.device)
        fix_memory(backbone)
    with Unfinished(config.cache_dir, f"{LABELS}-{key}") as work:
        missing = missing_shards(work, shards)
        if len(missing) < len(shards):
            there = settings.contexts - sum(map(len, missing))
            announce(f"labels: {there} of {settings.contexts} contexts are there from an interrupted run")
        mine = missing if together else distributed.share_of(missing)
        with progress(sum(map(len, mine)), "labelling", "contexts") as advance:

            def make(shard: range) -> dict[str, Tensor]:
                label = label_shard_together if together else label_shard
                made = label(backbone, data, settings, contexts, shard, advance)
                if run is not None:
                    run.log({"mean_gain": made["gains"].mean().item()}, shard.stop)
                return made

            make_shards(work, mine, make, together)

        def publish() -> None:
            assemble(work, shards, work.folder / "contexts")
            with cache.store(LABELS, key, description) as folder:
                (work.folder / "contexts").rename(folder / "contexts")

        distributed.on_main(publish)
    return cache.folder(LABELS, key)


def open_labels(folder: Path, backbone: Backbone) -> TensorDict:
    """Labels on disk, read as they are used.

    Raises:
        ValueError: if they were made for another backbone, or are not what this package writes.
    """
    have, want = read_sealed(folder / "key.json")["description"]["backbone"], backbone_fingerprint(backbone)
    if have != want:
        raise ValueError(
            f"{folder}: labels made for backbone {have} do not fit backbone {want}; make new ones with "
            "`python -m orderrl.label`"
        )
    return open_table(folder / "contexts", label_columns(backbone.geometry.num_blocks, backbone.hidden_size))
