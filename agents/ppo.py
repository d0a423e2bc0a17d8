"""Proximal policy optimisation of a planner, on TorchRL's collector, GAE and ClipPPOLoss.

The loop reads as its pseudo-code: collect, estimate advantages, take clipped steps. It starts from a cloned
planner; the action is a ranked list of blocks and a budget. In training the critic may see what is
hidden (key `context_loss`), because the true hidden tokens are most of the reward's variance.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.collectors import Collector
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from orderrl.agents.distribution import RankedBlocks
from orderrl.envs.torchrl import NextBlockTorchRLEnv
from orderrl.planner import OrderHead

OBSERVATION_KEYS = ("hidden", "entropy", "visible", "label", "fraction")


@dataclass(frozen=True)
class PPOConfig:
    """Hyper-parameters, named as in Schulman et al. (2017).

    Attributes:
        iterations: rounds of collecting and learning.
        num_envs: images in parallel.
        frames_per_batch: environment steps of a round, over all images.
        epochs: passes over a round.
        minibatch_size: frames of a gradient step.
        learning_rate: of the planner; falls linearly to a tenth.
        critic_learning_rate: of the critic.
        gae_lambda: of generalised advantage estimation; gamma is 1.
        clip_epsilon: of the probability ratio.
        entropy_coeff: weight of the entropy bonus; falls linearly to zero.
        max_grad_norm: gradient clipping.
        sharpness: factor from cloned scores to policy logits at the start.
        privileged_critic: let the critic see context losses of hidden blocks (training only).
        critic_warmup: rounds at the start that train the critic alone.
        seed: of episodes, actions and minibatches.
    """

    iterations: int = 30
    num_envs: int = 128
    frames_per_batch: int = 2048
    epochs: int = 4
    minibatch_size: int = 512
    learning_rate: float = 3e-4
    critic_learning_rate: float = 1e-3
    gae_lambda: float = 0.95
    clip_epsilon: float = 0.2
    entropy_coeff: float = 0.01
    max_grad_norm: float = 1.0
    sharpness: float = 3.0
    privileged_critic: bool = True
    critic_warmup: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "num_envs", "frames_per_batch", "epochs", "minibatch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.frames_per_batch % self.num_envs:
            raise ValueError(
                f"num_envs={self.num_envs} must divide frames_per_batch={self.frames_per_batch}: every image takes "
                "the same number of steps in a round"
            )
        if not self.sharpness > 0:
            raise ValueError(f"sharpness must be positive, got {self.sharpness}")


class _Actor(nn.Module):
    """The planner on separate observation tensors with any leading dimensions."""

    def __init__(self, planner: OrderHead) -> None:
        super().__init__()
        self.planner = planner

    def forward(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        observation, leading = _flatten(parts)
        scores, budget_logits, _ = self.planner(observation)
        return self.planner.block_logits(scores).unflatten(0, leading), budget_logits.unflatten(0, leading)


class _Critic(nn.Module):
    """A planner of its own weights whose value is read."""

    def __init__(self, planner: OrderHead) -> None:
        super().__init__()
        self.planner = planner

    def forward(self, *parts: Tensor) -> Tensor:
        observation, leading = _flatten(parts)
        return self.planner(observation)[2].unflatten(0, leading)


def _flatten(parts: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], torch.Size]:
    leading = parts[3].shape  # label
    keys = (*OBSERVATION_KEYS, "context_loss")
    return {key: part.flatten(0, len(leading) - 1) for key, part in zip(keys, parts, strict=False)}, leading


class PPO:
    """A planner being improved on an environment.

    Args:
        planner: the start; a copy is trained, `planner` of this object is the current one.
        env: in mode "teacher"; with `privileged` if the config's critic sees context losses.
        config: hyper-parameters.
    """

    def __init__(self, planner: OrderHead, env: NextBlockTorchRLEnv, config: PPOConfig) -> None:
        if config.privileged_critic and not env.privileged:
            raise ValueError("privileged_critic=True needs an environment made with privileged=True")
        budgets = env.core.config.budgets
        torch.manual_seed(config.seed)
        self.config, self.env = config, env
        self.planner = planner.with_budgets(len(budgets))
        with torch.no_grad():
            self.planner.sharpness.fill_(config.sharpness).log_()
        self.critic = OrderHead(replace(planner.config, privileged=config.privileged_critic, num_budgets=1))
        keys = list(OBSERVATION_KEYS)
        actor_module = TensorDictModule(_Actor(self.planner), keys, ["logits", "budget_logits"])
        parameters = {"logits": "logits", "action_mask": "action_mask"}
        if env.core.multi:
            parameters |= {"budget_logits": "budget_logits", "budget_mask": "budget_mask"}
        self.actor = ProbabilisticActor(
            actor_module,
            in_keys=parameters,
            distribution_class=RankedBlocks,
            distribution_kwargs={"budgets": tuple(budgets)},
            return_log_prob=True,
        )
        critic_keys = [*keys, "context_loss"] if config.privileged_critic else keys
        self.value = TensorDictModule(_Critic(self.critic), critic_keys, ["state_value"])
        self.advantage = GAE(gamma=1.0, lmbda=config.gae_lambda, value_network=self.value)
        self.loss = ClipPPOLoss(
            self.actor,
            self.value,
            clip_epsilon=config.clip_epsilon,
            entropy_coeff=config.entropy_coeff,
            critic_coeff=1.0,
            loss_critic_type="l2",
            normalize_advantage=True,
        )
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(self.planner.parameters()), "lr": config.learning_rate},
                {"params": list(self.critic.parameters()), "lr": config.critic_learning_rate},
            ],
            weight_decay=0.0,
        )
        self.iteration = 0

    # ------------------------------------------------------------------ training

    def train(self) -> Iterator[dict[str, float]]:
        """Rounds until `config.iterations`; yields one dict of metrics a round.

        Metrics: step, frames, reward (mean return of finished episodes, nats per token), planner_steps (mean
        per image), entropy, loss parts, value_error (share of the return's variance not explained).
        """
        config, core = self.config, self.env.core
        while self.iteration < config.iterations:
            # every round is keyed by its number, so a resumed run sees what an uninterrupted one sees
            torch.manual_seed(config.seed * 1_000_003 + self.iteration)
            core.seed(self._round_seed())
            progress = self.iteration / config.iterations
            self._anneal(progress)
            data = self._collect()
            with torch.no_grad():
                self.advantage(data)
            row = self._summary(data)
            frames = data.reshape(-1)
            warming = self.iteration < config.critic_warmup
            for _ in range(config.epochs):
                for rows in torch.randperm(len(frames)).split(config.minibatch_size):
                    row |= self._update(frames[rows], warming)
            self.iteration += 1
            yield {"step": self.iteration, "frames": self.iteration * config.frames_per_batch} | row

    def _round_seed(self) -> int:
        return (self.config.seed * 100_003 + self.iteration) * self.env.core.num_envs

    def _collect(self) -> Any:
        """One round of sampled episodes, batch (num_envs, steps)."""
        collector = Collector(
            self.env,
            self.actor,
            frames_per_batch=self.config.frames_per_batch,
            total_frames=self.config.frames_per_batch,
            exploration_type=ExplorationType.RANDOM,
        )
        with set_exploration_type(ExplorationType.RANDOM):
            data = next(iter(collector))
        collector.shutdown(close_env=False)
        data["next", "reward"] = data["next", "reward"] * self.env.core.geometry.num_tokens  # nats per image
        return data

    def _anneal(self, progress: float) -> None:
        rates = (self.config.learning_rate, self.config.critic_learning_rate)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - 0.9 * progress)
        self.loss.entropy_coeff.fill_(self.config.entropy_coeff * (1 - progress))

    def _update(self, minibatch: Any, warming: bool) -> dict[str, float]:
        parts = self.loss(minibatch)
        total = parts["loss_critic"]
        if not warming:
            total = total + parts["loss_objective"] + parts["loss_entropy"]
        self.optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.planner.parameters(), self.config.max_grad_norm)
        nn.utils.clip_grad_norm_(self.critic.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        return {
            "loss_critic": parts["loss_critic"].item(),
            "loss_objective": parts["loss_objective"].item(),
            "entropy": parts["entropy"].item(),
            "clip_fraction": parts["clip_fraction"].item(),
        }

    def _summary(self, data: Any) -> dict[str, float]:
        ended = data["next", "done"][..., 0]
        target, value = data["value_target"], data["state_value"]
        episodes = max(int(ended.sum()), 1)
        return {
            "reward": data["next", "reward"].sum().item() / episodes,
            "planner_steps": data.numel() / episodes,
            "illegal": data["next", "illegal"].float().mean().item(),
            "value_error": ((target - value).var() / target.var()).item(),
        }

    # ------------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, Any]:
        """Everything that a round changes; with it a resumed run equals an uninterrupted one."""
        return {
            "planner": copy.deepcopy(self.planner.state_dict()),
            "critic": copy.deepcopy(self.critic.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "iteration": self.iteration,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the round in which `state` was taken."""
        self.planner.load_state_dict(state["planner"])
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration = state["iteration"]
