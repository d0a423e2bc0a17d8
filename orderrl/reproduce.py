"""A whole table: the planners of a suite, several seeds, all baselines: `python -m orderrl.reproduce suite=canvas`."""

from pathlib import Path

from omegaconf import DictConfig

from orderrl.evaluate import evaluate
from orderrl.factory import section, with_values
from orderrl.runtime.config import compose, run_application
from orderrl.runtime.distributed import launched, print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.train import train

SHARED = ("backbone", "data", "logger", "output_dir", "cache_dir", "device", "checkpoint_seconds")


@isolated_float32
def reproduce(config: DictConfig) -> Path:
    """Train what is not in the cache, evaluate everything, and return the run folder of the evaluation."""
    # all composed first: a wrong value in the last one is refused before the first one trains
    trainings = [(seed, row, training_config(config, row, seed)) for seed in config.seeds for row in config.runs]
    checkpoints: list[str] = []
    for seed, overrides, training in trainings:
        print_main(f"\n== seed {seed}: {' '.join(overrides)}")
        checkpoints.append(str(train(training)))
    print_main("\n== evaluation")
    return evaluate(with_values(config, {"eval": {"planners": checkpoints}}))


def training_config(config: DictConfig, overrides: list[str], seed: int) -> DictConfig:
    """The config of `python -m orderrl.train` for a planner: its overrides come after the labels of the suite."""
    wanted = compose("train", [*overrides, f"seed={seed}"])
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    own = {"labels.kind"} if "labels" in given else set()  # a group of labels names their kind
    labels = {key: value for key, value in section(config, "labels").items() if f"labels.{key}" not in given | own}
    shared: dict[str, object] = {key: config[key] for key in SHARED}
    return with_values(wanted, shared | ({"labels": labels} if wanted.labels else {}))


if __name__ == "__main__":
    run_application("reproduce", launched(reproduce))
