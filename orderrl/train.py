"""Train a planner: `python -m orderrl.train agent=bc`, then `python -m orderrl.train agent=ppo`."""

from __future__ import annotations

import shutil
from pathlib import Path

from omegaconf import DictConfig

from orderrl.distributed import launched, on_main
from orderrl.entry import run_application
from orderrl.pipeline import announce, find_or_train_clone, find_or_train_ppo, find_or_train_schedule, open_backbone
from orderrl.runs import Run

AGENTS = {"bc": find_or_train_clone, "ppo": find_or_train_ppo, "schedule": find_or_train_schedule}


def train(config: DictConfig) -> Path:
    """Train the planner of a config and return its checkpoint.

    What the agent needs and does not find in the cache (labels, a cloned planner) is made first.

    Raises:
        ValueError: if the agent is unknown or a value of the config is not allowed.
    """
    if config.agent.name not in AGENTS:
        raise ValueError(f"agent.name={config.agent.name!r} is unknown; choose one of {', '.join(AGENTS)}")
    backbone = open_backbone(config)
    with Run("train", config) as run:
        path = AGENTS[config.agent.name](config, backbone, run, config.reuse)
        kept = run.folder / "planner.safetensors"
        on_main(lambda: shutil.copyfile(path, kept))
        announce(f"run: {run.folder}")
    return kept


if __name__ == "__main__":
    run_application("train", launched(train))
