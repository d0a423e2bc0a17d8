"""Record episodes of a policy for offline reinforcement learning: `python -m orderrl.rollouts policy=raster n=256`."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig

from orderrl.agents.policies import among_budgets
from orderrl.agents.registry import make_policy
from orderrl.data import load_split
from orderrl.evaluation.policies import fitted_order, found_policy
from orderrl.evaluation.transitions import record_dataset, require_minari, write_minari
from orderrl.factory import open_backbone, setup_of
from orderrl.runtime.config import run_application
from orderrl.runtime.distributed import print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.run import Run


@isolated_float32
def rollouts(config: DictConfig) -> Path:
    """Record the episodes of a config and return the folder of the transitions; ValueError if the output exists."""
    # compose and build
    if config.minari is not None:
        require_minari(config.minari)
    backbone = open_backbone(config)
    setup = setup_of(config, backbone)
    setup.require_order_robust("rollouts")
    asked = None if config.env.budgets is None else tuple(config.env.budgets)
    named = make_policy(found_policy(config.policy, setup), backbone, partial(fitted_order, setup), asked or (1,))
    environment = replace(setup.environment, budgets=asked or named.budgets)
    environment.require_blocks(backbone.geometry.num_blocks)
    policy = among_budgets(named.policy, named.budgets, environment.budgets)
    costs, trained = environment.reward.step_cost_range, named.step_cost_range
    if costs and trained and not trained[0] <= costs[0] < costs[1] <= trained[1]:
        raise ValueError(f"env.step_cost={costs} reaches beyond the range that the planner was trained on, {trained}")
    data = load_split(config.data.name, config.split)
    # play and record
    with Run("rollouts", config) as run:
        folder = run.folder / "transitions" if config.output is None else Path(config.output).expanduser()
        made = record_dataset(backbone, data, policy, environment, config.n, folder, config.batch_size, config.seed)
        returns = torch.zeros(config.n).index_add_(0, made["episode"], made["next", "reward"][:, 0])
        run.log({"episodes": float(config.n), "transitions": float(len(made)), "return": returns.mean().item()}, 0)
        print_main(f"{config.n} episodes of {named.name}, {len(made)} transitions, mean return {returns.mean():.4f}")
        print_main(f"transitions: {folder}")
        if config.minari is not None:
            known = {"backbone": config.backbone.name, "data": config.data.name, "split": config.split}
            arguments = known | {"budgets": list(environment.budgets)} | asdict(environment.reward)
            write_minari(config.minari, made, backbone, environment.budgets, arguments, named.name, config.seed, costs)
            print_main(f"Minari data set: {config.minari}")
    return folder


if __name__ == "__main__":
    run_application("rollouts", rollouts)
