"""Online imitation: a planner learns another policy's actions, blocks and budget, in the states of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orderrl.agents.distribution import planner_actions
from orderrl.agents.play import play, scripted
from orderrl.agents.policies import Policy
from orderrl.envs.core import NextBlockCore
from orderrl.planner import OrderHead
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.job import Part, Unfinished, steps_of
from orderrl.runtime.values import at_least, between, check_fields, positive


@dataclass(frozen=True)
class ImitationConfig:
    """How a planner learns a policy's actions.

    Attributes:
        steps: optimiser steps, each on the current states of all images.
        num_envs: images in parallel.
        learning_rate: peak of the cosine schedule.
        weight_decay: of AdamW.
        own_share: share of actions that the planner samples itself, so that it learns to come back.
        entropy_coeff: weight of the entropy bonus; keeps the planner exploring when PPO takes over.
        seed: of episodes and actions.
    """

    steps: int = 300
    num_envs: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    own_share: float = 0.2
    entropy_coeff: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            at_least(1, "steps", "num_envs"),
            positive("learning_rate"),
            at_least(0, "weight_decay", "entropy_coeff", "seed"),
            between("[0, 1)", "own_share"),
        )


@isolated_float32
def imitate(
    planner: OrderHead,
    core: NextBlockCore,
    policy: Policy,
    config: ImitationConfig,
    work: Unfinished | None = None,
) -> Iterator[dict[str, float]]:
    """Train in place, in eval mode: minus log-probability of the policy's action, minus the entropy bonus.

    Args:
        planner: with as many budgets as the core.
        core: in mode "teacher"; its context losses are not read.
        policy: gives the action to learn in every state.
        config: hyper-parameters.
        work: keeps the training's state, so that an interrupted one continues.

    Yields:
        One dict of metrics a step: step, loss, entropy, agreement (share of states in which the most likely first
        block and budget are the policy's).

    Raises:
        ValueError: if the planner has another number of budgets than the core.
    """
    budgets = core.config.budgets
    planner.config.require_budgets(budgets)
    torch.manual_seed(config.seed)
    generator = torch.Generator(core.device).manual_seed(config.seed)
    planner.eval()
    optimizer = torch.optim.AdamW(planner.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps, pct_start=0.11)
    core.seed(config.seed * core.num_envs)
    core.reset()
    played: list[Tensor] = []  # all actions: replayed, they give the episodes' caches to the last bit
    moves = 0
    parts: dict[str, Part] = {
        "planner": planner, "optimizer": optimizer, "rate": rate, "generator": generator, "played": played,
    }  # fmt: skip
    for step in steps_of(work, config.steps, **parts):
        play(core, scripted(played[moves:]), steps=len(played) - moves, restart=True)  # an interrupted run's
        moves = len(played)
        observation = core.observation()
        shown = policy(observation, generator)
        distribution = planner_actions(planner(observation), observation, budgets)
        playing = ~core.visible.all(-1)
        entropy = distribution.entropy()[playing].mean()
        loss = -distribution.log_prob(shown)[playing].mean() - config.entropy_coeff * entropy
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(planner.parameters(), 1.0)
        optimizer.step()
        rate.step()
        same = (distribution.mode == shown).view(len(shown), -1)[playing]
        own = torch.rand(len(shown), device=core.device) < config.own_share
        actions = torch.where(own.view(-1, *[1] * (shown.ndim - 1)), distribution.sample(), shown)
        core.step(actions, restart=core.finished)
        played.append(actions.cpu())
        moves += 1
        agreement = (same[:, 0] & same[:, -1]).float().mean().item()
        yield {"step": step + 1, "loss": loss.item(), "entropy": entropy.item(), "agreement": agreement}
