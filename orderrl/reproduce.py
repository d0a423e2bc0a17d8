"""A whole table: the planners of a suite, several seeds, all baselines: `python -m orderrl.reproduce suite=canvas`."""

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from orderrl.evaluate import evaluate
from orderrl.factory import section, with_values
from orderrl.runtime.config import compose, run_application
from orderrl.runtime.distributed import launched, print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.train import train

TRAINED = "trained:"  # a teacher that the suite trains itself, by its name
SHARED = ("backbone", "data", "logger", "output_dir", "cache_dir", "device", "checkpoint_seconds")


@isolated_float32
def reproduce(config: DictConfig) -> Path:
    """Train what is not in the cache, evaluate everything, and return the run folder of the evaluation."""
    # all composed first: a wrong value in the last one is refused before the first one trains
    trainings = [(seed, row, training_config(config, row, seed)) for seed in config.seeds for row in config.runs]
    checkpoints: list[str] = []
    named: dict[str, str] = {}
    for seed, overrides, training in trainings:
        print_main(f"\n== seed {seed}: {' '.join(overrides)}")
        checkpoints.append(str(train(taught(training, named))))
        named[str(training.name)] = checkpoints[-1]  # of this seed, if the next rows ask for it
    print_main("\n== evaluation")
    return evaluate(with_values(config, {"eval": {"planners": checkpoints}}))


def taught(training: DictConfig, named: Mapping[str, str]) -> DictConfig:
    """A training whose teacher, if it is trained:NAME, is the planner of this name that was trained before it.

    Raises:
        ValueError: if there is none.
    """
    teacher = training.agent.get("teacher") or ""
    if not teacher.startswith(TRAINED):
        return training
    name = teacher.removeprefix(TRAINED)
    if name not in named:
        raise ValueError(f"agent.teacher={teacher}: no run before it has name={name}; there are {', '.join(named)}")
    return with_values(training, {"agent": {"teacher": named[name]}})


def training_config(config: DictConfig, overrides: list[str], seed: int) -> DictConfig:
    """The config of `python -m orderrl.train` for a planner: its overrides come after the labels of the suite."""
    labels = section(config, "labels")
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    kind = [] if given & {"labels", "labels.kind"} else [f"labels={labels['kind']}"]
    wanted = compose("train", [*kind, *overrides, f"seed={seed}"])
    shared = {key: value for key, value in labels.items() if key != "kind" and f"labels.{key}" not in given}
    return with_values(wanted, {"labels": shared} | {key: config[key] for key in SHARED})


if __name__ == "__main__":
    run_application("reproduce", launched(reproduce))
