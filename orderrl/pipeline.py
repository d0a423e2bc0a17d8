"""The steps of the main job, each found in the cache or made: labels, a cloned planner, a planner improved by PPO.

A step is described by plain values: everything that determines its result. The fingerprint of the description is its
key in the cache, so nothing is made twice and nothing stale is taken.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch import Tensor

from orderrl import distributed
from orderrl.agents.bc import BCConfig, clone
from orderrl.agents.imitation import ImitationConfig, imitate
from orderrl.agents.ppo import PPO, PPOConfig
from orderrl.agents.search import SearchConfig, search_schedule
from orderrl.backbones import Backbone, Sampling, backbone_fingerprint, load_backbone
from orderrl.backbones.protocol import backbone_device, check_fits
from orderrl.backbones.registry import weights_fingerprint
from orderrl.backbones.sharding import fix_memory, shard_backbone
from orderrl.data import TokenSet, load_split
from orderrl.entry import compose
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.reward import RewardConfig
from orderrl.envs.torchrl import NextBlockTorchRLEnv
from orderrl.labelling import assemble, label_shard, label_shard_together, make_shards, plan_shards
from orderrl.oracle import LabelConfig, random_contexts
from orderrl.planner import OrderHead, PlannerConfig, load_planner, save_planner
from orderrl.resuming import Unfinished, forget
from orderrl.runs import Cache, Run, fingerprint, progress

CHEAPEST = RewardConfig(objective="likelihood", form="charged")  # needs no context losses
LABELS, PLANNERS = "labels", "planners"
FORMAT = 1  # of what is cached; raised when the meaning of stored files changes


def section(config: DictConfig, name: str, *without: str) -> dict[str, Any]:
    """A config group as plain values."""
    values = OmegaConf.to_container(config[name], resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key not in without}


def open_backbone(config: DictConfig) -> Backbone:
    """The frozen backbone of a config, checked against its data.

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
    )
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


def follow(rows: Iterator[dict[str, float]], work: Unfinished, run: Run | None, report: Callable[[Any], None]) -> None:
    """Run a training loop to its end and log its rows.

    Args:
        rows: of the loop, one a step; the loop uses `work`.
        work: a loop that continues has the rows of its earlier steps there, which are logged again.
        run: gets the rows.
        report: moves a progress bar; gets the last row, and as its key "new" how many steps were done.
    """
    shown = 0
    for row in rows:
        work.history.append(row)
        for earlier in work.history[shown:]:
            if run is not None:
                run.log(earlier, int(earlier["step"]))
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
    """Folder of the labels of a config: a memory-mapped TensorDict and its description.

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
    cache, key = Cache(config.cache_dir), fingerprint(description)
    found = distributed.on_main(lambda: cache.find(LABELS, key))
    if found is not None:
        forget(config.cache_dir, f"{LABELS}-{key}")
        announce(f"labels: {found} (cached)")
        return found
    settings = LabelConfig(**(section(config, "labels", "shard_size") | changes))
    if settings.kind != "pointwise" and not backbone.vocab_size:
        raise ValueError(
            f"labels.kind={settings.kind!r} needs token probabilities, which a backbone of continuous tokens does not "
            "have; use labels=pointwise"
        )
    announce(f"labels: none for this config yet, labelling {settings.contexts} contexts of {data.name}/{split}")
    contexts = random_contexts(settings, len(data), backbone.geometry.num_blocks)
    shards = plan_shards(contexts, settings.batch_size, config.labels.shard_size)
    together = bool(config.get("shard", False))
    if together:
        shard_backbone(backbone, config.device)
        fix_memory(backbone)
    with Unfinished(config.cache_dir, f"{LABELS}-{key}") as work:
        with progress(None, "labelling", "contexts") as advance:

            def make(shard: range) -> dict[str, Tensor]:
                label = label_shard_together if together else label_shard
                made = label(backbone, data, settings, contexts, shard, advance)
                if run is not None:
                    run.log({"mean_gain": made["gains"].mean().item()}, shard.stop)
                return made

            make_shards(work, shards, make, together)

        def publish() -> None:
            assemble(work, shards, work.folder / "contexts")
            with cache.store(LABELS, key, description) as folder:
                (work.folder / "contexts").rename(folder / "contexts")

        distributed.on_main(publish)
    return cache.folder(LABELS, key)


def open_labels(folder: Path, backbone: Backbone) -> TensorDict:
    """Memory-mapped labels.

    Raises:
        ValueError: if they were made for another backbone.
    """
    described = json.loads((folder / "key.json").read_text(encoding="utf-8"))["description"]
    have, want = described["backbone"], backbone_fingerprint(backbone)
    if have != want:
        raise ValueError(
            f"{folder}: labels made for backbone {have} do not fit backbone {want}; make new ones with "
            "`python -m orderrl.label`"
        )
    return TensorDict.load_memmap(str(folder / "contexts"))


# ---------------------------------------------------------------------- planners


def find_or_train_clone(config: DictConfig, backbone: Backbone, run: Run | None = None, reuse: bool = True) -> Path:
    """Checkpoint of the planner that `agent=bc` trains."""
    require_order_robust(config, backbone, "agent=bc")
    settings = BCConfig(**section(config, "agent", "name"), seed=config.seed)
    shape = PlannerConfig.for_backbone(backbone, **section(config, "planner"))
    labels = find_or_make_labels(config, backbone)
    description = {
        "format": FORMAT,
        "agent": section(config, "agent"),
        "planner": section(config, "planner"),
        "labels": labels.name,
        "seed": config.seed,
        "backbone": backbone_fingerprint(backbone),
        "data": config.data.name,
        "budgets": [1],
        "objective": "context",
    }

    def train(work: Unfinished) -> OrderHead:
        torch.manual_seed(config.seed)
        planner = OrderHead(shape)
        contexts = open_labels(labels, backbone)
        with progress(settings.steps, f"cloning ({settings.target}, R = {shape.reasoning_steps})", "steps") as advance:
            rows = clone(planner, contexts, backbone.geometry, settings, work)
            follow(rows, work, run, lambda row: advance(row["new"], f"loss {row['loss']:.3f}"))
        return planner

    return _find_or_train(config, description, train, reuse)


def find_or_train_schedule(config: DictConfig, backbone: Backbone, run: Run | None = None, reuse: bool = True) -> Path:
    """Checkpoint of the planner that `agent=schedule` trains: it imitates the best fixed schedule found."""
    search = SearchConfig(**section(config.agent, "search"), seed=config.seed)
    settings = ImitationConfig(**section(config.agent, "imitation"), seed=config.seed)
    environment = core_config(config)
    if environment.reward.objective != "likelihood":
        raise ValueError(
            f"agent=schedule searches for objective='likelihood', got env.objective={environment.reward.objective!r}; "
            "use env=likelihood"
        )
    shape = PlannerConfig.for_backbone(backbone, **section(config, "planner"), num_budgets=len(environment.budgets))
    description = {
        "format": FORMAT,
        "agent": section(config, "agent"),
        "planner": section(config, "planner"),
        "env": section(config, "env"),
        "seed": config.seed,
        "backbone": backbone_fingerprint(backbone),
        "data": config.data.name,
        "budgets": list(environment.budgets),
        "objective": environment.reward.objective,
    }

    def train(work: Unfinished) -> OrderHead:
        data = load_split(config.data.name, "planner")
        with progress(search.played, f"searching a schedule on {data.name}/{data.split}", "orders") as advance:
            cost = environment.reward.step_cost
            policy = search_schedule(backbone, data, environment.budgets, cost, search, advance, work)
        torch.manual_seed(config.seed)
        planner = OrderHead(shape).to(backbone_device(backbone))
        core = NextBlockCore(backbone, data, settings.num_envs, replace(environment, reward=CHEAPEST))
        with progress(settings.steps, f"imitating the schedule (R = {shape.reasoning_steps})", "steps") as advance:
            rows = imitate(planner, core, policy, settings, work)
            follow(rows, work, run, lambda row: advance(row["new"], f"agreement {row['agreement']:.2f}"))
        return planner

    # short, and nothing in it can be shared out: the main process does it on its own
    return distributed.on_main(lambda: _find_or_train(config, description, train, reuse))


def find_or_train_ppo(config: DictConfig, backbone: Backbone, run: Run | None = None, reuse: bool = True) -> Path:
    """Checkpoint of the planner that `agent=ppo` trains; continues an interrupted run of the same config."""
    require_order_robust(config, backbone, "agent=ppo")
    settings = PPOConfig(**section(config, "agent", "name", "start", "start_target"), seed=config.seed)
    start = Path(config.agent.start) if config.agent.start else _clone_to_start_from(config, backbone)
    planner, _ = load_planner(start, backbone)
    description = {
        "format": FORMAT,
        "agent": section(config, "agent", "start", "start_target"),
        "planner": section(config, "planner"),
        "start": weights_fingerprint(planner),
        "env": section(config, "env"),
        "seed": config.seed,
        "backbone": backbone_fingerprint(backbone),
        "data": config.data.name,
        "budgets": list(config.env.budgets),
        "objective": config.env.objective,
    }

    def train(work: Unfinished) -> OrderHead:
        data = load_split(config.data.name, "planner")
        core = NextBlockCore(backbone, data, settings.num_envs // distributed.size(), core_config(config))
        env = NextBlockTorchRLEnv(core=core, privileged=settings.privileged_critic)
        ppo = PPO(planner, env, settings)
        with progress(settings.iterations, f"ppo ({config.env.objective})", "rounds") as advance:

            def report(row: dict[str, float]) -> None:
                advance(row["new"], f"return {row['return']:.2f} nats, {row['planner_steps']:.1f} steps")

            follow(ppo.train(work), work, run, report)
        return ppo.planner

    return _find_or_train(config, description, train, reuse)


def core_config(config: DictConfig) -> CoreConfig:
    """The environment of a config group env."""
    values = section(config, "env")
    budgets = tuple(values.pop("budgets"))
    return CoreConfig(budgets=budgets, reward=RewardConfig(**values))


def _clone_to_start_from(config: DictConfig, backbone: Backbone) -> Path:
    """The planner that `start_target` names, of the same backbone, data, labels, planner and seed."""
    if config.agent.start_target == "schedule":
        searching = compose("train", ["agent=schedule"])
        shared = ("backbone", "data", "env", "planner", "seed", "cache_dir", "device", "checkpoint_seconds")
        announce("ppo: starting from the fixed schedule of this config")
        return find_or_train_schedule(with_values(searching, {key: config[key] for key in shared}), backbone)
    cloning = compose("train", ["agent=bc", f"agent.target={config.agent.start_target}"])
    shared = ("backbone", "data", "labels", "planner", "seed", "cache_dir", "device", "checkpoint_seconds")
    announce(f"ppo: starting from the clone of this config with target {cloning.agent.target}")
    return find_or_train_clone(with_values(cloning, {key: config[key] for key in shared}), backbone)


def _find_or_train(
    config: DictConfig, description: dict[str, Any], train: Callable[[Unfinished], OrderHead], reuse: bool
) -> Path:
    """The cached planner of a description, or what `train` makes; an interrupted training continues."""
    cache, key = Cache(config.cache_dir), fingerprint(description)
    found = distributed.on_main(lambda: cache.find(PLANNERS, key))
    path = cache.folder(PLANNERS, key) / "planner.safetensors"
    if found is not None and reuse:
        forget(config.cache_dir, f"{PLANNERS}-{key}")
        announce(f"planner: {path} (cached; reuse=false trains again)")
        return path

    def publish() -> None:
        if found is not None:  # trained again on purpose; the old one goes only now that there is a new one
            shutil.rmtree(found)
        with cache.store(PLANNERS, key, description) as folder:
            save_planner(folder / "planner.safetensors", planner, description)

    with Unfinished(config.cache_dir, f"{PLANNERS}-{key}", config.checkpoint_seconds) as work:
        planner = train(work)
        distributed.on_main(publish)
    announce(f"planner: {path}")
    return path


def newest_planner(config: DictConfig, backbone: Backbone, agent: str) -> Path | None:
    """The newest cached planner of an agent for this backbone and data."""
    want = {"format": FORMAT, "backbone": backbone_fingerprint(backbone), "data": config.data.name}

    def fits(description: dict[str, Any]) -> bool:
        return description["agent"]["name"] == agent and want.items() <= description.items()

    found = Cache(config.cache_dir).newest(PLANNERS, fits)
    return None if found is None else found / "planner.safetensors"
