"""Online imitation: a planner learns another policy's actions, blocks and budgets, in the states of both.

It is a start for PPO and GRPO. The agent imitates a policy of `orderrl.agents.registry`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orderrl.agents.agent import Agent
from orderrl.agents.bc import score_spread
from orderrl.agents.distribution import planner_actions
from orderrl.agents.play import act, play, scripted
from orderrl.agents.policies import Policy, ReferencePolicy, among_budgets
from orderrl.agents.registry import make_policy, policy_source
from orderrl.agents.spec import PolicySpec
from orderrl.backbones.protocol import backbone_device
from orderrl.data import load_split
from orderrl.envs.core import NextBlockCore
from orderrl.envs.reward import CHEAPEST
from orderrl.factory import Setup
from orderrl.planner import OrderHead
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.job import Job
from orderrl.runtime.learning_rate import one_cycle
from orderrl.runtime.optimisation import descend
from orderrl.runtime.random import drawn_uniform
from orderrl.runtime.storage import checksum
from orderrl.runtime.values import Settings, at_least, between, positive, setting


@dataclass(frozen=True, kw_only=True)
class ImitationConfig(Settings):
    """How a planner learns a policy's actions."""

    steps: int = setting(300, "Optimiser steps, each on the current states of all images", at_least(1))
    num_envs: int = setting(64, "Images in parallel", at_least(1))
    learning_rate: float = setting(2e-3, "Peak learning rate", positive())
    weight_decay: float = setting(0.01, "Weight decay of AdamW", at_least(0))
    own_share: float = setting(
        0.2, "Share of actions that the planner samples itself, so that it learns to come back", between("[0, 1)")
    )
    entropy_coeff: float = setting(
        0.02,
        "Weight of the entropy bonus, which keeps PPO exploring; more favours large budgets, whose lists have more "
        "entropy",
        at_least(0),
    )


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """What a planner imitates, and how."""

    policy: str = setting(
        "raster", "What is imitated, a name as in eval.policies; its budgets must be among the environment's"
    )
    imitation: ImitationConfig = setting(ImitationConfig(), "How the planner learns it")


def train(setup: Setup, config: Config, job: Job) -> OrderHead:
    """Imitate the policy that the config names."""
    return imitated(setup, policy_to_imitate(setup, config), config.imitation, job)


def policy_to_imitate(setup: Setup, config: Config) -> Policy | ReferencePolicy:
    """The policy of a config, with the environment's budgets.

    ValueError if it looks behind the observation, needs a step cost, or chooses budgets that the environment lacks.
    """
    spec = PolicySpec.parse(config.policy)
    named = make_policy(spec, setup.backbone)
    if isinstance(named.policy, ReferencePolicy):
        raise ValueError(f"agent.policy={named.name!r} looks behind the observation; imitate another policy")
    if named.step_cost_range is not None:
        raise ValueError(
            f"agent.policy='{spec}' was trained on a range of step costs; imitate it at one of them: PATH@cost0.5"
        )
    return among_budgets(named.policy, named.budgets, setup.environment.budgets)


def imitated(setup: Setup, policy: Policy | ReferencePolicy, config: ImitationConfig, job: Job) -> OrderHead:
    """A new planner that imitates a policy on planner images, in an environment that needs no context losses."""
    torch.manual_seed(setup.seed)
    shape = replace(setup.planner, num_budgets=len(setup.environment.budgets))
    planner = OrderHead(shape).to(backbone_device(setup.backbone))
    environment = replace(setup.environment, reward=CHEAPEST)
    core = NextBlockCore(setup.backbone, load_split(setup.data, "planner"), config.num_envs, environment)
    imitate(planner, core, policy, config, setup.seed, job)
    return planner


@isolated_float32
def imitate(
    planner: OrderHead,
    core: NextBlockCore,
    policy: Policy | ReferencePolicy,
    config: ImitationConfig,
    seed: int = 0,
    job: Job | None = None,
) -> None:
    """Train in place, in eval mode: minus log-probability of the policy's action, minus the entropy bonus.

    Args:
        planner: with as many budgets as the core.
        core: in mode "teacher"; its context losses are not read.
        policy: gives the action to learn in every state.
        seed: of episodes and actions.

    Metrics: loss, entropy, score_std (standard deviation of the scores of a state's hidden blocks), agreement (share of
    states in which the most likely first block and budget are the policy's).

    Raises:
        ValueError: if the planner has another number of budgets than the core.
    """
    budgets, job = core.config.budgets, job or Job()
    planner.config.require_budgets(budgets)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    planner.eval()
    optimizer = torch.optim.AdamW(planner.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    rate = one_cycle(optimizer, config.steps, config.learning_rate)
    core.seed(seed * core.num_envs)
    core.reset()
    chosen: list[Tensor] = []  # all actions: played again, they give the episodes' caches to the last bit
    played = 0
    steps = job.steps(
        config.steps, f"imitating (R = {planner.config.reasoning_steps})", "steps", "agreement {agreement:.2f}",
        planner=planner, optimizer=optimizer, rate=rate, generator=generator, played=chosen,
    )  # fmt: skip
    for _ in steps:
        # the last step's actions, or all that an interrupted run chose
        play(core, scripted(chosen[played:]), steps=len(chosen) - played, restart=True)
        played = len(chosen)
        # a gradient step on the current states; where all episodes begin anew at once there is nothing to learn
        observation = core.observation()
        shown = act(policy, core, generator).to(core.device)
        playing = ~core.visible.all(-1)
        if not playing.any():
            chosen.append(shown.cpu())
            rate.step()
            continue
        output = planner(observation)
        distribution = planner_actions(output, observation, budgets)
        entropy = distribution.entropy()[playing].mean()
        loss = -distribution.log_prob(shown)[playing].mean() - config.entropy_coeff * entropy
        mean = descend(optimizer, loss, planner)
        rate.step()
        same = (distribution.mode == shown).view(len(shown), -1)[playing]
        # the planner's own actions in some states, the policy's in the others
        own = drawn_uniform((len(shown),), None, core.device) < config.own_share
        actions = torch.where(own.view(-1, *[1] * (shown.ndim - 1)), distribution.sample(), shown)
        chosen.append(actions.cpu())
        agreement = (same[:, 0] & same[:, -1]).float().mean().item()
        spread = score_spread(output.scores, observation["action_mask"])[playing].mean()
        job.log(loss=mean, entropy=entropy.item(), agreement=agreement, score_std=spread.item())


def _describe(setup: Setup, config: Config) -> dict[str, Any]:
    """What is in a planner's file or a user's module counts, not its name."""
    file = policy_source(PolicySpec.parse(config.policy))
    return {} if file is None else {"imitated": checksum(file)}


# short, and nothing in it can be shared out
AGENT = Agent(Config, train, check=policy_to_imitate, describe=_describe, alone=True)
