"""Train a planner: `python -m orderrl.train agent=bc`, then `agent=ppo`, `grpo` or `joint`; `agent=fitted_q` alone."""

import shutil
from pathlib import Path

from omegaconf import DictConfig

from orderrl.agents.agent import find_agent
from orderrl.agents.registry import check_planner_name
from orderrl.factory import open_backbone, section, setup_of, typed
from orderrl.runtime.config import run_application
from orderrl.runtime.distributed import launched, on_main, print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.run import Run
from orderrl.training import KEPT, find_or_train


@isolated_float32
def train(config: DictConfig) -> Path:
    """Train the planner of a config and return its checkpoint.

    What the agent needs and does not find in the cache (labels, a cloned planner) is made first.
    """
    agent = find_agent(config.agent.name)
    check_planner_name(config.name)
    settings = typed(agent.config, section(config, "agent", "name"))
    if config.labels and not agent.reads_labels:
        raise ValueError(f"labels: agent={config.agent.name} learns from no labels; leave labels=... out")
    setup = setup_of(config, open_backbone(config))
    with Run("train", config) as run:
        path = find_or_train(setup, config.agent.name, settings, run, config.reuse)
        kept = [path.parent / name for name in KEPT if (path.parent / name).exists()]
        on_main(lambda: [shutil.copyfile(found, run.folder / found.name) for found in kept])
        print_main(f"run: {run.folder}")
    return run.folder / path.name


if __name__ == "__main__":
    run_application("train", launched(train))
