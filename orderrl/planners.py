"""The steps of the main job that train planners, each found in the cache or made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tensordict import TensorDict

from orderrl.agents.bc import TARGETS, BCConfig, clone
from orderrl.agents.fitted_q import FittedQConfig, best_schedules, fit_budgets, record_order, require_choice
from orderrl.agents.grpo import GRPO, GRPOConfig
from orderrl.agents.imitation import ImitationConfig, imitate
from orderrl.agents.joint import OH_KEYS
from orderrl.agents.orders import ORDERS
from orderrl.agents.policies import AmongBudgets, Policy, ReferencePolicy
from orderrl.agents.policy_gradient import PolicyGradient, PolicyGradientConfig
from orderrl.agents.ppo import PPO, PPOConfig
from orderrl.agents.registry import differing_settings, make_policy, policy_source
from orderrl.agents.search import FixedSchedule, SearchConfig, search_schedule
from orderrl.agents.spec import NEWEST, PolicySpec
from orderrl.backbones import Backbone, backbone_fingerprint
from orderrl.backbones.protocol import backbone_device
from orderrl.backbones.registry import weights_fingerprint
from orderrl.data import TokenSet, load_split
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.reward import RewardConfig
from orderrl.envs.torchrl import NextBlockTorchRLEnv
from orderrl.labels import join, label_columns
from orderrl.pipeline import (
    CHEAPEST,
    DAGGER,
    FORMAT,
    LABELS,
    NO_DATA,
    announce,
    find_or_make_labels,
    find_or_make_own_labels,
    follow,
    open_labels,
    require_order_robust,
    section,
    with_values,
)
from orderrl.planner import OrderHead, PlannerConfig, load_planner, save_planner
from orderrl.runtime import distributed
from orderrl.runtime.cache import Cache, fingerprint
from orderrl.runtime.config import compose
from orderrl.runtime.job import Unfinished, forget
from orderrl.runtime.jsonfile import read_json
from orderrl.runtime.progress import progress
from orderrl.runtime.run import Run
from orderrl.runtime.storage import checksum
from orderrl.runtime.tables import open_table

PLANNERS = "planners"


def find_or_train_clone(config: DictConfig, backbone: Backbone, run: Run | None = None, reuse: bool = True) -> Path:
    """Checkpoint of the planner that `agent=bc` trains.

    Each round of DAgger labels states that the last planner reaches and trains another one on all labels; labels and
    planners of earlier rounds are found again. All play images that the first labels came from, so every round keeps
    back the same ones, with the states that were reached on them.
    """
    require_order_robust(config, backbone, "agent=bc")
    settings = BCConfig(**section(config, "agent", "name"), seed=config.seed)
    if settings.target == "pairs":  # asked before labels are made, which takes long
        PlannerConfig.for_backbone(backbone, **section(config, "planner")).require_pairs("agent.target=pairs")
    labels = [find_or_make_labels(config, backbone)]
    images = open_labels(labels[0], backbone)["image"].unique()
    for number in range(settings.dagger_rounds):
        before = with_values(config, {"agent": with_values(config.agent, {"dagger_rounds": number}), "name": None})
        planner = _find_or_clone(before, backbone, labels, None, True)
        announce(f"dagger: round {number + 1} of {settings.dagger_rounds}")
        labels.append(find_or_make_own_labels(config, backbone, planner, images, number + 1))
    return _find_or_clone(config, backbone, labels, run, reuse)


def _find_or_clone(config: DictConfig, backbone: Backbone, labels: list[Path], run: Run | None, reuse: bool) -> Path:
    """Checkpoint of the planner cloned from some sets of labels: random contexts, and those of each round of DAgger."""
    settings = BCConfig(**section(config, "agent", "name"), seed=config.seed)
    shape = PlannerConfig.for_backbone(backbone, **section(config, "planner"))
    rounds = settings.dagger_rounds
    description = {
        "format": FORMAT,
        "agent": section(config, "agent", *([] if rounds else DAGGER)),
        "planner": section(config, "planner"),
        "labels": labels[0].name,
        "seed": config.seed,
        "backbone": backbone_fingerprint(backbone),
        "data": config.data.name,
        "images": planner_images(config),
        "budgets": [1],
        "objective": "context",
    }
    if rounds:
        description["own_labels"] = [found.name for found in labels[1:]]
        settings = replace(settings, steps=settings.dagger_steps)

    def train(work: Unfinished) -> OrderHead:
        torch.manual_seed(config.seed)
        planner = OrderHead(shape)
        contexts = _joined(labels, backbone, work)
        steps = settings.for_contexts(len(contexts)).steps
        with progress(steps, f"cloning ({settings.target}, R = {shape.reasoning_steps})", "steps") as advance:
            rows = clone(planner, contexts, backbone.geometry, settings, work)
            follow(rows, work, run, lambda row: advance(row["new"], f"loss {row['loss']:.3f}"))
        return planner

    return find_or_train_planner(config, description, train, reuse, run)


def _joined(labels: list[Path], backbone: Backbone, work: Unfinished) -> TensorDict:
    """Sets of labels as one; several are copied to the job's folder, which goes when the job is done."""
    opened = [open_labels(found, backbone) for found in labels]
    if len(labels) == 1:
        return opened[0]
    folder = work.folder / "contexts"
    distributed.on_main(lambda: join([found / "contexts" for found in labels], folder))
    return open_table(folder, label_columns(backbone.geometry.num_blocks, backbone.hidden_size))


def find_or_train_schedule(config: DictConfig, backbone: Backbone, run: Run | None = None, reuse: bool = True) -> Path:
    """Checkpoint of the planner that `agent=schedule` trains: it imitates the best fixed schedule found."""
    require_order_robust(config, backbone, "agent=schedule")
    _require_code_length(config, "agent=schedule searches")
    search, environment = (
        SearchConfig(**section(config.agent, "search"), seed=config.seed),
        core_config(config, backbone),
    )

    def searched(data: TokenSet, work: Unfinished) -> Policy:
        return _searched(search, environment, backbone, data, work).policy(backbone.geometry, environment.budgets)

    described = {"env": section(config, "env") | {"step_cost": environment.reward.typical_step_cost}}
    return _find_or_imitate(config, backbone, searched, described, run, reuse)


def _searched(
    search: SearchConfig, environment: CoreConfig, backbone: Backbone, data: TokenSet, work: Unfinished
) -> FixedSchedule:
    """The best fixed schedule for an environment; it needs one step cost: of a range the geometric mean."""
    cost = environment.reward.typical_step_cost
    with progress(search.played, f"searching a schedule on {data.name}/{data.split}", "orders") as advance:
        return search_schedule(backbone, data, environment.budgets, cost, search, advance, work)


def _require_code_length(config: DictConfig, what: str) -> None:
    """Raise ValueError, saying what does so, if the environment pays for anything but code length and steps."""
    for key, wanted in (("objective", "likelihood"), ("weight", "uniform")):
        if config.env[key] != wanted:
            raise ValueError(
                f"{what} for {key}={wanted!r}, got env.{key}={config.env[key]!r}; use env=likelihood env.weight=uniform"
            )


def find_or_train_fitted_q(config: DictConfig, backbone: Backbone, run: Run | None = None, reuse: bool = True) -> Path:
    """Checkpoint of the planner that `agent=fitted_q` trains: adaptive budgets along a fixed order.

    Raises:
        ValueError: if the order is unknown, or the environment pays for context or offers a single budget.
    """
    require_order_robust(config, backbone, "agent=fitted_q")
    _require_code_length(config, "agent=fitted_q learns budgets")
    settings = FittedQConfig(**section(config, "agent", "name", "order", "search"), seed=config.seed)
    search = SearchConfig(**section(config.agent, "search"), seed=config.seed)
    environment, name = core_config(config, backbone), config.agent.order
    if name != "schedule" and name not in ORDERS:
        raise ValueError(f"agent.order={name!r} is unknown; choose schedule or one of {', '.join(ORDERS)}")
    require_choice(environment.budgets, backbone.geometry.num_blocks)
    described = section(config, "agent", *([] if name == "schedule" else ["search"]))
    description = _describe(config, backbone) | {"agent": described}
    costs = environment.reward.step_cost_range
    told = section(config, "planner") | {"num_budgets": len(environment.budgets), "step_cost_range": costs}
    shape = PlannerConfig.for_backbone(backbone, **told)

    def train(work: Unfinished) -> OrderHead:
        data = load_split(config.data.name, "planner")
        if name in ORDERS:
            order = ORDERS[name](backbone.geometry)
        else:
            order = _searched(search, environment, backbone, data, work).order
        images = min(settings.images, len(data))
        with progress(images, f"playing {name} order on {data.name}/{data.split}", "images") as advance:
            played = record_order(backbone, data, order, images, shape.content, advance, work=work)
        for steps, (nats, sizes) in best_schedules(played["cost"], environment.budgets).items():
            written = "+".join(map(str, sizes))
            announce(f"best fixed schedule in {name} order, {steps} steps: {written}, {nats:.2f} nats (planner images)")
        torch.manual_seed(config.seed)
        planner = OrderHead(shape).to(backbone_device(backbone)).eval()
        with progress(settings.steps, f"fitting budgets (R = {shape.reasoning_steps})", "steps") as advance:
            rows = fit_budgets(
                planner, played, order, environment.budgets, environment.reward.step_cost, settings, work
            )
            follow(rows, work, run, lambda row: advance(row["new"], f"cost {row['cost']:.1f} nats"))
        return planner

    # as with imitation, the main process does it on its own
    return distributed.on_main(lambda: find_or_train_planner(config, description, train, reuse, run))


def find_or_train_imitation(config: DictConfig, backbone: Backbone, run: Run | None = None, reuse: bool = True) -> Path:
    """Checkpoint of the planner that `agent=imitation` trains: it imitates a policy of `orderrl.agents.registry`.

    Raises:
        ValueError: if the policy looks behind the observation, must be told what a step costs, or chooses budgets that
            the environment does not have.
    """
    require_order_robust(config, backbone, "agent=imitation")
    spec = PolicySpec.parse(config.agent.policy)
    named = make_policy(spec, backbone)
    if isinstance(named.policy, ReferencePolicy):
        raise ValueError(f"agent.policy={named.name!r} looks behind the observation; imitate another policy")
    if named.step_cost_range is not None:
        raise ValueError(f"agent.policy='{spec}' must be told what a step costs; imitate it at one cost: PATH@cost0.5")
    policy = AmongBudgets(named.policy, named.budgets, core_config(config, backbone).budgets)
    # What is in a planner's file or a user's module counts, not its name.
    file = policy_source(spec)
    imitated = {} if file is None else {"imitated": checksum(file)}
    return _find_or_imitate(config, backbone, lambda data, work: policy, imitated, run, reuse)


def _find_or_imitate(
    config: DictConfig,
    backbone: Backbone,
    policy: Callable[[TokenSet, Unfinished], Policy],
    described: dict[str, Any],
    run: Run | None,
    reuse: bool,
) -> Path:
    """Checkpoint of a planner that imitates the policy which `policy` makes for planner images.

    `described` is what the description says differently or besides.
    """
    settings = ImitationConfig(**section(config.agent, "imitation"), seed=config.seed)
    environment = core_config(config, backbone)
    shape = PlannerConfig.for_backbone(backbone, **section(config, "planner"), num_budgets=len(environment.budgets))
    description = _describe(config, backbone) | described

    def train(work: Unfinished) -> OrderHead:
        data = load_split(config.data.name, "planner")
        shown = policy(data, work)
        torch.manual_seed(config.seed)
        planner = OrderHead(shape).to(backbone_device(backbone))
        core = NextBlockCore(backbone, data, settings.num_envs, replace(environment, reward=CHEAPEST))
        with progress(settings.steps, f"imitating (R = {shape.reasoning_steps})", "steps") as advance:
            rows = imitate(planner, core, shown, settings, work)
            follow(rows, work, run, lambda row: advance(row["new"], f"agreement {row['agreement']:.2f}"))
        return planner

    # short, and nothing in it can be shared out: the main process does it on its own
    return distributed.on_main(lambda: find_or_train_planner(config, description, train, reuse, run))


def _describe(config: DictConfig, backbone: Backbone) -> dict[str, Any]:
    """What determines a planner that learns in the environment of a config."""
    return {
        "format": FORMAT,
        "agent": section(config, "agent"),
        "planner": section(config, "planner"),
        "env": section(config, "env"),
        "seed": config.seed,
        "backbone": backbone_fingerprint(backbone),
        "data": config.data.name,
        "images": planner_images(config),
        "budgets": list(config.env.budgets),
        "objective": config.env.objective,
    }


def planner_images(config: DictConfig) -> str:
    """Fingerprint of the images that planners learn from; a token set may change under its name."""
    return load_split(config.data.name, "planner").fingerprint


def find_or_train_ppo(config: DictConfig, backbone: Backbone, run: Run | None = None, reuse: bool = True) -> Path:
    """Checkpoint of the planner that `agent=ppo` trains; continues an interrupted run of the same config."""
    require_order_robust(config, backbone, "agent=ppo")
    settings = PPOConfig(**section(config, "agent", "name", "start", "start_target"), seed=config.seed)

    def make(planner: OrderHead, core: NextBlockCore) -> PPO:
        return PPO(planner, NextBlockTorchRLEnv(core=core, privileged=settings.privileged_critic), settings)

    return _find_or_improve(config, backbone, settings, make, run, reuse)


def find_or_train_grpo(config: DictConfig, backbone: Backbone, run: Run | None = None, reuse: bool = True) -> Path:
    """Checkpoint of the planner that `agent=grpo` trains; continues an interrupted run of the same config."""
    require_order_robust(config, backbone, "agent=grpo")
    settings = GRPOConfig(**section(config, "agent", "name", "start", "start_target"), seed=config.seed)

    def make(planner: OrderHead, core: NextBlockCore) -> GRPO:
        return GRPO(planner, NextBlockTorchRLEnv(core=core), settings)

    return _find_or_improve(config, backbone, settings, make, run, reuse)


def _find_or_improve(
    config: DictConfig,
    backbone: Backbone,
    settings: PolicyGradientConfig,
    make: Callable[[OrderHead, NextBlockCore], PolicyGradient],
    run: Run | None,
    reuse: bool,
) -> Path:
    """Checkpoint of a planner that starts from another and is improved on the environment of a config."""
    # refused before labels and a start are made, which takes long
    environment = core_config(config, backbone)
    if isinstance(settings, PPOConfig):
        settings.require_whole_episodes(backbone.geometry.num_blocks, environment.budgets)
    start = planner_to_start_from(config, backbone)
    planner, _ = load_planner(start, backbone)
    description = _describe(config, backbone) | {
        "agent": section(config, "agent", "start", "start_target"),
        "start": weights_fingerprint(planner),
    }

    def train(work: Unfinished) -> OrderHead:
        data = load_split(config.data.name, "planner")
        core = NextBlockCore(backbone, data, settings.num_envs // distributed.size(), environment)
        agent = make(planner, core)
        with progress(settings.iterations, f"{config.agent.name} ({config.env.objective})", "rounds") as advance:

            def report(row: dict[str, float]) -> None:
                advance(row["new"], f"return {row['return']:.2f} nats, {row['planner_steps']:.1f} steps")

            follow(agent.train(work), work, run, report)
        return agent.planner

    return find_or_train_planner(config, description, train, reuse, run)


def core_config(config: DictConfig, backbone: Backbone) -> CoreConfig:
    """The environment of a config group env.

    Raises:
        ValueError: if a value is not allowed, or a budget exceeds the blocks of the backbone's images.
    """
    values = section(config, "env")
    budgets = tuple(values.pop("budgets"))
    environment = CoreConfig(budgets=budgets, reward=RewardConfig(**values))
    environment.require_blocks(backbone.geometry.num_blocks)
    return environment


def planner_to_start_from(config: DictConfig, backbone: Backbone) -> Path:
    """The planner that `agent.start`, `start_target` or L_OH names; what it is and where it came from is printed.

    A file; "newest", the newest cached clone of this backbone and data, whatever its settings; or, with null, the
    planner of the same backbone, data, labels, planner and seed, which is trained if it is not in the cache.

    Raises:
        ValueError: if there is no clone in the cache to be the newest one.
    """
    agent = config.agent
    if agent.start is not None and agent.start != NEWEST:
        announce(f"{agent.name}: starts from {agent.start}")
        return Path(agent.start)
    if agent.start == NEWEST:
        newest = newest_planner(config, backbone, "bc")
        if newest is None:
            raise ValueError(
                f"agent.start=newest: no clone for backbone {config.backbone.name!r} and this data in "
                f"{config.cache_dir}; train one with `python -m orderrl.train agent=bc`"
            )
        announce(f"{agent.name}: starts from the newest clone, {newest}")
        return newest
    started, what = _config_of_start(config)
    newest = newest_planner(config, backbone, started.agent.name)
    if newest is not None and (different := _differences(newest, started, backbone)):
        taken = f"agent.start={'newest' if started.agent.name == 'bc' else newest} takes it"
        announce(f"{agent.name}: passes over the newest in the cache, {newest} ({different}); {taken}")
    cached = set((Path(config.cache_dir) / PLANNERS).glob("*"))
    find_or_train = {
        "bc": find_or_train_clone,
        "schedule": find_or_train_schedule,
        "imitation": find_or_train_imitation,
    }
    path = find_or_train[started.agent.name](started, backbone)
    announce(f"{agent.name}: starts from {what}, {'cached' if path.parent in cached else 'trained now'}: {path}")
    return path


def _config_of_start(config: DictConfig) -> tuple[DictConfig, str]:
    """The config that trains the planner to start from, and what that is in words."""
    agent = config.agent
    target = agent.get("start_target")
    cloned = target is None or target in TARGETS
    name = "bc" if cloned else "schedule" if target == "schedule" else "imitation"
    started = compose("train", [f"agent={name}"])
    shared = ("backbone", "data", "planner", "seed", "cache_dir", "device", "checkpoint_seconds")
    started = with_values(started, {key: config[key] for key in (*shared, "labels" if cloned else "env")})
    # values are set and not composed: a policy's name may hold what an override may not
    if cloned:
        started.agent.update({key: agent[key] for key in OH_KEYS} if target is None else {"target": target})
        return started, f"the clone of this config with target {started.agent.target}"
    if name == "imitation":
        started.agent.policy = target
    return started, "the fixed schedule of this config" if name == "schedule" else f"an imitation of {target}"


def _differences(newest: Path, wanted: DictConfig, backbone: Backbone) -> str:
    """In which settings a cached planner is not the one that a config would train, "" if in none."""
    try:
        _, there = load_planner(newest)
    except (ValueError, OSError):  # it is not taken, and whoever takes it is told
        return ""
    agent = section(wanted, "agent", *([] if wanted.agent.get("dagger_rounds") else DAGGER))
    here: dict[str, Any] = {"agent": agent, "planner": section(wanted, "planner"), "seed": wanted.seed, "name": None}
    if wanted.agent.name == "bc":
        here["labels"] = section(wanted, "labels", "batch_size", "shard_size")
        there = there | {"labels": _label_settings(wanted, there["labels"])}
    else:
        environment = section(wanted, "env")
        if wanted.agent.name == "schedule":
            environment["step_cost"] = core_config(wanted, backbone).reward.typical_step_cost
        here["env"] = environment
    there = {key: there.get(key) for key in here}
    keys = differing_settings(there, here)
    told = [f"{key}={_value(there, key)} there, {_value(here, key)} here" for key in keys[:5]]
    return "; ".join([*told, *([f"and {len(keys) - 5} more"] if len(keys) > 5 else [])])


def _label_settings(config: DictConfig, key: str) -> Any:
    """The settings of cached labels; their key where they are gone."""
    try:
        return read_json(Cache(config.cache_dir).folder(LABELS, key) / "key.json")["description"]["labels"]
    except (OSError, ValueError, KeyError):
        return key


def _value(settings: Any, key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return "null" if settings is None else settings


def find_or_train_planner(
    config: DictConfig,
    description: dict[str, Any],
    train: Callable[[Unfinished], OrderHead],
    reuse: bool,
    run: Run | None = None,
    save: Callable[[Path, OrderHead], None] | None = None,
) -> Path:
    """The cached planner of a description, or what `train` makes; an interrupted training continues.

    Args:
        config: of the command.
        description: everything that determines the planner.
        train: makes it; logs to `run` itself.
        reuse: False trains again what is in the cache.
        run: gets the rows of a training that was interrupted after its result was stored.
        save: writes what was trained to a folder, as `planner.safetensors` and whatever belongs to it; None writes the
            planner with the description.
    """
    if config.name is not None:
        description |= {"name": config.name}
    cache, key = Cache(config.cache_dir), fingerprint(description)
    found = distributed.on_main(lambda: cache.find(PLANNERS, key))
    path = cache.folder(PLANNERS, key) / "planner.safetensors"
    if found is not None and reuse:
        for row in forget(config.cache_dir, f"{PLANNERS}-{key}"):
            if run is not None:
                run.log(row, int(row["step"]))
        announce(f"planner: {path} (cached; reuse=false trains again)")
        return path

    def publish() -> None:
        work.keep_history()
        with cache.store(PLANNERS, key, description, replace=not reuse) as folder:
            if save is None:
                save_planner(folder / "planner.safetensors", planner, description)
            else:
                save(folder, planner)

    with Unfinished(config.cache_dir, f"{PLANNERS}-{key}", config.checkpoint_seconds) as work:
        planner = train(work)
        distributed.on_main(publish)
    announce(f"planner: {path}")
    return path


def newest_planner(config: DictConfig, backbone: Backbone, agent: str) -> Path | None:
    """The newest cached planner of an agent for this backbone and, if the config has data, these planner images."""
    want = {"format": FORMAT, "backbone": backbone_fingerprint(backbone)}
    if config.data.name != NO_DATA:
        want["images"] = planner_images(config)

    def fits(description: dict[str, Any]) -> bool:
        return description["agent"]["name"] == agent and want.items() <= description.items()

    found = Cache(config.cache_dir).newest(PLANNERS, fits)
    return None if found is None else found / "planner.safetensors"
