"""Train a planner: `python -m orderrl.train agent=bc`, then `agent=ppo`, `grpo` or `joint`; `agent=fitted_q` alone."""

from __future__ import annotations

import shutil
from pathlib import Path

from omegaconf import DictConfig

from orderrl.agents.registry import check_planner_name
from orderrl.joint_tuning import find_or_train_joint
from orderrl.pipeline import announce, open_backbone
from orderrl.planners import (
    find_or_train_clone,
    find_or_train_fitted_q,
    find_or_train_grpo,
    find_or_train_imitation,
    find_or_train_ppo,
    find_or_train_schedule,
)
from orderrl.runtime.config import run_application
from orderrl.runtime.distributed import launched, on_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.run import Run

AGENTS = {
    "bc": find_or_train_clone,
    "ppo": find_or_train_ppo,
    "grpo": find_or_train_grpo,
    "fitted_q": find_or_train_fitted_q,
    "schedule": find_or_train_schedule,
    "imitation": find_or_train_imitation,
    "joint": find_or_train_joint,
}
KEPT = ("planner.safetensors", "backbone.safetensors", "results.json")  # the last two of joint tuning alone


@isolated_float32
def train(config: DictConfig) -> Path:
    """Train the planner of a config and return its checkpoint.

    What the agent needs and does not find in the cache (labels, a cloned planner) is made first.

    Raises:
        ValueError: if the agent is unknown or a value of the config is not allowed.
    """
    if config.agent.name not in AGENTS:
        raise ValueError(f"agent.name={config.agent.name!r} is unknown; choose one of {', '.join(AGENTS)}")
    check_planner_name(config.name)
    backbone = open_backbone(config)
    with Run("train", config) as run:
        path = AGENTS[config.agent.name](config, backbone, run, config.reuse)
        on_main(lambda: [shutil.copyfile(found, run.folder / found.name) for found in _results(path.parent)])
        announce(f"run: {run.folder}")
    return run.folder / path.name


def _results(folder: Path) -> list[Path]:
    return [folder / name for name in KEPT if (folder / name).exists()]


if __name__ == "__main__":
    run_application("train", launched(train))
