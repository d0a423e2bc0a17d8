"""The one recipe of all agents: a planner is found in the cache, or trained by a job that survives interruptions.

A planner is described by plain values: everything that determines it. The fingerprint of the description is its key in
the cache, so nothing is trained twice and nothing that is out of date is taken. What an agent learns from (labels, a
planner to start from) is found or made first.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from orderrl.agents import bc, imitation
from orderrl.agents.agent import AGENTS, Agent, Trained, find_agent
from orderrl.agents.orders import ORDERS
from orderrl.agents.spec import NEWEST
from orderrl.backbones import backbone_fingerprint, save_backbone
from orderrl.backbones.origin import ORIGIN, Origin
from orderrl.envs.reward import OBJECTIVES
from orderrl.factory import FORMAT, NO_DATA, Setup
from orderrl.labels import LABELS, label_settings
from orderrl.oracle import WEIGHTS
from orderrl.planner import load_planner, require_described, save_planner
from orderrl.runtime import distributed
from orderrl.runtime.cache import Cache, fingerprint
from orderrl.runtime.distributed import print_main
from orderrl.runtime.hub import hub_file
from orderrl.runtime.job import Job, finish
from orderrl.runtime.jsonfile import read_json
from orderrl.runtime.run import Run
from orderrl.runtime.storage import checksum, write_json
from orderrl.runtime.values import differing, flat
from orderrl.runtime.weights import HUB, weights_fingerprint

PLANNERS = "planners"  # in the cache
BODY = "backbone.safetensors"  # that an agent tuned together with its planner
KEPT = ("planner.safetensors", BODY, "results.json")  # of a planner; the last two not of all
_SHOWN = 5  # settings in a message


def find_or_train(setup: Setup, name: str, config: Any, run: Run | None = None, reuse: bool = True) -> Path:
    """Checkpoint of the planner that an agent trains; an interrupted training continues.

    Args:
        setup: what it is trained with.
        name: of the agent.
        config: the agent's settings.
        run: gets the rows of metrics.
        reuse: False trains again what is in the cache.

    Returns:
        `planner.safetensors` in the cache; beside it are the other files of `KEPT`, if the agent makes them.

    Raises:
        ValueError: if the agent cannot learn from this setup.
    """
    agent = find_agent(name)
    setup.require_order_robust(f"agent={name}")
    if agent.environment:
        setup.environment.require_blocks(setup.backbone.geometry.num_blocks)
    if not agent.scores_alone and (setup.planner.network == "orderhead" or setup.planner.visible_states):
        raise ValueError(
            f"agent={name} needs a planner with heads for budgets and value that is content with hidden blocks, got "
            f"planner.network={setup.planner.network}, planner.visible_states={setup.planner.visible_states}; use "
            "planner=latent, or agent=bc or ste"
        )
    agent.check(setup, config)
    recipe = partial(_find_or_train, setup, name, agent, config, run, reuse)
    return distributed.on_main(recipe) if agent.alone else recipe()


def _find_or_train(setup: Setup, name: str, agent: Agent, config: Any, run: Run | None, reuse: bool) -> Path:
    # what it learns from
    description = describe(setup, name, agent, config)
    if agent.start:
        path = planner_to_start_from(setup, name, config)
        start, started = load_planner(path, setup.backbone)
        setup = replace(setup, start=start)
        description["start"] = weights_fingerprint(start)
        if not agent.environment:
            require_described(path, start, started)
            description["budgets"] = started["budgets"]
    if agent.label_sets is not None:
        sets = setup.label_sets or agent.label_sets(setup, config, lambda part, own: find_or_train(part, name, own))
        setup = replace(setup, label_sets=sets)
        description["labels"] = sets[0].name
        if len(sets) > 1:
            description["own_labels"] = [found.name for found in sets[1:]]

    # what is in the cache
    cache, key = Cache(setup.cache_dir), fingerprint(description)
    found = distributed.on_main(lambda: cache.find(PLANNERS, key))
    path = cache.folder(PLANNERS, key) / KEPT[0]
    if found is not None and reuse:
        finish(setup.cache_dir, f"{PLANNERS}-{key}", run)
        print_main(f"planner: {path} (cached; reuse=false trains again)")
        return path

    # what is trained
    def store() -> None:
        with cache.store(PLANNERS, key, description, replace=not reuse) as folder:
            save_trained(folder, setup, trained, description)

    with Job(setup.cache_dir, f"{PLANNERS}-{key}", setup.checkpoint_seconds, run=run) as job:
        made = agent.train(setup, config, job)
        trained = made if isinstance(made, Trained) else Trained(made)
        job.publish(store)
    print_main(f"planner: {path}")
    return path


def describe(setup: Setup, name: str, agent: Agent, config: Any) -> dict[str, Any]:
    """What determines a planner, apart from the labels and the planner that its agent learns from."""
    idle = [*agent.idle(config), *(("start", "start_target") if agent.start else ())]
    settings = {key: value for key, value in asdict(config).items() if key not in idle}
    description: dict[str, Any] = {
        "format": FORMAT,
        "agent": {"name": name} | settings,
        "planner": setup.planner_settings,
        "seed": setup.seed,
        "backbone": backbone_fingerprint(setup.backbone),
        "data": setup.data,
        "budgets": [1],
        "objective": "context",
    }
    if agent.environment:
        environment = setup.environment_settings
        description |= {"env": environment, "budgets": environment["budgets"], "objective": environment["objective"]}
    if agent.environment or not agent.start:  # else the labels say it
        description["images"] = setup.images
    if setup.name is not None:
        description["name"] = setup.name
    reward = setup.environment.reward
    own = {
        "agent": AGENTS.version(name),
        "objective": OBJECTIVES.version(reward.objective) if agent.environment else None,
        "weight": WEIGHTS.version(getattr(config, "weight", reward.weight)),
        "order": ORDERS.version(getattr(config, "order", "raster")),
    }
    if any(own.values()):  # of users: their code determines it too
        description["own"] = {kind: version for kind, version in own.items() if version}
    return description | agent.describe(setup, config)


def save_trained(folder: Path, setup: Setup, trained: Trained, description: Mapping[str, Any]) -> None:
    """Write what an agent made to a folder."""
    planner, backbone, outcome = (folder / name for name in KEPT)
    fits = setup.backbone if trained.backbone is None else trained.backbone
    save_planner(planner, trained.planner, {**description, "backbone": backbone_fingerprint(fits)})
    if trained.backbone is not None:
        # a specialist: it draws in the order of the planner beside it
        origin = Origin(
            order=planner.name,
            label=setup.name or description["agent"]["name"],
            seed=setup.seed,
            planner=checksum(planner),
        )
        made = {"tuned_from": description["backbone"], "agent": description["agent"], "data": setup.data}
        made[ORIGIN] = origin.described()
        save_backbone(backbone, trained.backbone, made)
    if trained.outcome is not None:
        write_json(outcome, trained.outcome)


# ---------------------------------------------------------------------- the planner that an agent starts from


def planner_to_start_from(setup: Setup, name: str, config: Any) -> Path:
    """The planner that the settings `start` and `start_target` name; what it is and where it came from is printed.

    A file or one of the Hub; "newest", the newest cached clone of this backbone and data, whatever its settings; or,
    with None, the planner of the same backbone, data, labels, planner and seed, which is trained if it is not in the
    cache. ValueError if there is no clone in the cache to be the newest one.
    """
    # a planner that is there
    if config.start is not None and config.start != NEWEST:
        print_main(f"{name}: starts from {config.start}")
        return hub_file(config.start, "planner") if config.start.startswith(HUB) else Path(config.start)
    if config.start == NEWEST:
        newest = newest_planner(setup, "bc")
        if newest is None:
            raise ValueError(
                f"agent.start=newest: no clone for backbone {setup.backbone_name!r} and this data in "
                f"{setup.cache_dir}; train one with `python -m orderrl.train agent=bc`"
            )
        print_main(f"{name}: starts from the newest clone, {newest}")
        return newest
    # the one that fits these settings, and why a newer one is not it
    setup = replace(setup, name=None)
    started, wanted, what = _start_of(config)
    newest = newest_planner(setup, started)
    if newest is not None and (different := _differences(newest, setup, started, wanted)):
        taken = f"agent.start={NEWEST if started == 'bc' else newest} takes it"
        print_main(f"{name}: passes over the newest in the cache, {newest} ({different}); {taken}")
    cached = set((setup.cache_dir / PLANNERS).glob("*"))
    path = find_or_train(setup, started, wanted)
    print_main(f"{name}: starts from {what}, {'cached' if path.parent in cached else 'trained now'}: {path}")
    return path


def _start_of(config: Any) -> tuple[str, Any, str]:
    """The agent and the settings that train the planner to start from, and what that is in words."""
    target = getattr(config, "start_target", None)
    if target is None:
        clone = config.cloning
        return "bc", clone, f"the clone of this config with target {clone.target}"
    if target in bc.TARGETS:
        return "bc", bc.Config(target=target), f"the clone of this config with target {target}"
    if target == "schedule":
        return target, find_agent(target).config(), "the fixed schedule of this config"
    return "imitation", imitation.Config(policy=target), f"an imitation of {target}"


def _differences(newest: Path, setup: Setup, name: str, config: Any) -> str:
    """In which settings a cached planner is not the one that an agent would train, "" if in none."""
    try:
        _, there = load_planner(newest)
    except (ValueError, OSError):  # whoever takes it refuses it
        return ""
    agent = find_agent(name)
    wanted = describe(setup, name, agent, config)
    here = {key: wanted.get(key) for key in ("agent", "planner", "seed", "name", "env")}
    if agent.label_sets is not None:
        here["labels"] = label_settings(setup.labels)
        there = there | {"labels": _label_settings(setup, there["labels"])}
    there, here = flat({key: there.get(key) for key in here}), flat(here)
    keys = differing(there, here)
    shown = [f"{key}={_shown(there.get(key))} there, {_shown(here.get(key))} here" for key in keys[:_SHOWN]]
    return "; ".join([*shown, *([f"and {len(keys) - _SHOWN} more"] if len(keys) > _SHOWN else [])])


def _label_settings(setup: Setup, key: str) -> Any:
    """The settings of cached labels; their key where they are gone."""
    try:
        return read_json(Cache(setup.cache_dir).folder(LABELS, key) / "key.json")["description"]["labels"]
    except (OSError, ValueError, KeyError):
        return key


def _shown(value: Any) -> Any:
    return "null" if value is None else value


def newest_planner(setup: Setup, agent: str) -> Path | None:
    """The newest cached planner of an agent for this backbone and, if the setup has data, these planner images."""
    want = {"format": FORMAT, "backbone": backbone_fingerprint(setup.backbone)}
    if setup.data != NO_DATA:
        want["images"] = setup.images

    def fits(description: dict[str, Any]) -> bool:
        return description["agent"]["name"] == agent and want.items() <= description.items()

    found = Cache(setup.cache_dir).newest(PLANNERS, fits)
    return None if found is None else found / KEPT[0]
