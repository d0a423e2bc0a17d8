"""A whole table: all planners of a grid, several seeds, all baselines: `python -m orderrl.results grid=canvas`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from orderrl.distributed import launched
from orderrl.entry import compose, run_application
from orderrl.evaluate import evaluate
from orderrl.pipeline import announce, with_values
from orderrl.train import train

SHARED = ("backbone", "data", "logger", "output_dir", "cache_dir", "device", "checkpoint_seconds")


def results(config: DictConfig) -> Path:
    """Train what is not in the cache, evaluate everything, and return the run folder of the evaluation."""
    checkpoints: list[str] = []
    for seed in config.seeds:
        for overrides in config.runs:
            announce(f"\n== seed {seed}: {' '.join(overrides)}")
            wanted = compose("train", [*overrides, f"seed={seed}"])
            own_labels = any(override.startswith("labels") for override in overrides)
            shared = SHARED if own_labels else (*SHARED, "labels")
            checkpoints.append(str(train(with_values(wanted, {key: config[key] for key in shared}))))
    announce("\n== evaluation")
    return evaluate(with_values(config, {"eval": {"planners": checkpoints}}))


if __name__ == "__main__":
    run_application("results", launched(results))
