"""A whole table: the planners and specialists of a suite, several seeds, all baselines.

`python -m orderrl.reproduce suite=canvas`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from orderrl.agents.registry import policy_source
from orderrl.agents.spec import PolicySpec
from orderrl.evaluate import evaluate
from orderrl.factory import section, with_values
from orderrl.pretrain import backbone_recipe, trained
from orderrl.runtime.cache import Cache
from orderrl.runtime.config import compose, quoted, run_application
from orderrl.runtime.distributed import launched, print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.train import train
from orderrl.training import BODY

TRAINED = "trained:"  # a teacher that the suite trains itself, by its name
SHARED = ("backbone", "data", "logger", "output_dir", "cache_dir", "device", "checkpoint_seconds")
_OF_SPECIALISTS = tuple(key for key in SHARED if key != "backbone")


@isolated_float32
def reproduce(config: DictConfig) -> Path:
    """Train what is not in the cache, evaluate everything, and return the run folder of the evaluation."""
    # all composed first: a wrong value in the last one is refused before the first one trains
    trainings = [(seed, row, training_config(config, row, seed)) for seed in config.seeds for row in config.runs]
    for seed in config.seeds:
        list(specialist_configs(config, seed, ["planner.safetensors"] * len(config.runs)))
    named: dict[str, str] = {}
    # planners, then the backbones that learn their orders
    planners: dict[int, list[str]] = {seed: [] for seed in config.seeds}
    for seed, overrides, training in trainings:
        print_main(f"\n== seed {seed}: {' '.join(overrides)}")
        planners[seed].append(str(train(taught(training, named))))
        named[str(training.name)] = planners[seed][-1]  # of this seed, if the next rows ask for it
    specialists = [
        str(specialist(wanted)) for seed in config.seeds for wanted in specialist_configs(config, seed, planners[seed])
    ]
    # a planner whose agent tuned a body of its own is evaluated with that one
    print_main("\n== evaluation")
    made = [Path(path) for seed in config.seeds for path in planners[seed]]
    bodies = {path: path.with_name(BODY) for path in made if path.with_name(BODY).exists()}
    found: dict[str, Any] = {
        "planners": [str(path) for path in made if path not in bodies],
        "specialists": [*specialists, *(str(body) for body in bodies.values())],
    }
    return evaluate(with_values(config, {"eval": found}))


def taught(training: DictConfig, named: Mapping[str, str]) -> DictConfig:
    """A training whose teacher, if it is trained:NAME, is the planner of this name that was trained before it."""
    teacher = training.agent.get("teacher") or ""
    if not teacher.startswith(TRAINED):
        return training
    name = teacher.removeprefix(TRAINED)
    if name not in named:
        raise ValueError(f"agent.teacher={teacher}: no run before it has name={name}; there are {', '.join(named)}")
    return with_values(training, {"agent": {"teacher": named[name]}})


def training_config(config: DictConfig, overrides: list[str], seed: int) -> DictConfig:
    """The config of `python -m orderrl.train` for a planner: its overrides come after the labels of the suite."""
    wanted = compose("train", [*overrides, f"seed={seed}"])
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    own = {"labels.kind"} if "labels" in given else set()  # a group of labels names their kind
    labels = {key: value for key, value in section(config, "labels").items() if f"labels.{key}" not in given | own}
    shared: dict[str, object] = {key: config[key] for key in SHARED}
    return with_values(wanted, shared | ({"labels": labels} if wanted.labels else {}))


def specialist_configs(config: DictConfig, seed: int, planners: list[str]) -> Iterator[DictConfig]:
    """The configs of `python -m orderrl.pretrain` for the specialists of a seed, in the order of the suite.

    One that names no backbone is fine-tuned from the suite's own; ValueError if one names a planner that no run trains.
    """
    for overrides in config.specialists:
        try:
            filled = [override.format(*(quoted(path)[1:-1] for path in planners)) for override in overrides]
        except (IndexError, KeyError, ValueError):
            raise ValueError(f"specialists: {list(overrides)} name a run that the suite lacks") from None
        named = any(override.startswith("backbone=") for override in filled)
        own = [] if named else [f"backbone={config.backbone.name}", f"training.start={config.backbone.name}"]
        wanted = compose("pretrain", [*own, *filled, f"seed={seed}"])
        yield with_values(wanted, {key: config[key] for key in _OF_SPECIALISTS})


def specialist(config: DictConfig) -> Path:
    """The cached backbone of a config, or the one that is trained now."""
    print_main(f"\n== seed {config.seed}: specialist of {config.training.order}")
    recipe = backbone_recipe(config, config.data.name)
    spec = PolicySpec.parse(config.training.order)
    name = str(replace(spec, name=Path(spec.name).name))
    return recipe.find_or_train(Cache(config.cache_dir), partial(trained, config, recipe), name, policy_source(spec))


if __name__ == "__main__":
    run_application("reproduce", launched(reproduce))
