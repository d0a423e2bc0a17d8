"""Proximal policy optimisation of a planner, on TorchRL's collector, GAE and ClipPPOLoss.

The loop reads as its pseudo-code: collect, estimate advantages, take clipped steps. It starts from a cloned
planner; the action is a ranked list of blocks and a budget. In training the critic may see what is
hidden (key `context_loss`), because the true hidden tokens are most of the reward's variance.

Of several processes each plays its share of the environments, with the seeds that they have in one process, and takes
its share of every minibatch; gradients are averaged. Advantages are normalised, and actions drawn, in every process on
its own.
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
from torchrl.envs.utils import ExplorationType
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from orderrl import distributed
from orderrl.agents.distribution import RankedBlocks
from orderrl.envs.torchrl import NextBlockTorchRLEnv
from orderrl.planner import OrderHead
from orderrl.resuming import Unfinished

_PROCESS_SEEDS = 1_000_000_007  # between the random numbers of processes
OBSERVATION_KEYS = ("hidden", "entropy", "visible", "label", "fraction")


@dataclass(frozen=True)
class PPOConfig:
    """Hyper-parameters, named as in Schulman et al. (2017).

    Attributes:
        iterations: rounds of collecting and learning.
        num_envs: episodes in parallel.
        group_size: episodes in parallel that play the same image; with 2 or more, the mean advantage of the others at
            the same step is taken from each (leave-one-out baseline: what the image itself is worth cancels).
        frames_per_batch: environment steps of a round, over all images.
        epochs: passes over a round.
        minibatch_size: frames of a gradient step.
        learning_rate: of the planner; falls linearly to a tenth.
        critic_learning_rate: of the critic.
        gae_lambda: of generalised advantage estimation; gamma is 1.
        clip_epsilon: of the probability ratio.
        entropy_coeff: weight of the entropy bonus; falls linearly to zero.
        max_grad_norm: gradient clipping.
        sharpness: factor from cloned scores to policy logits at the start; None keeps the start's own.
        spacing: at the start, what a block listed in a step takes from the logit of a block in the same place,
            falling with distance as exp(-d^2 / 2); learnt from there on, for every pair of blocks; None keeps the
            start's own.
        privileged_critic: let the critic see context losses of hidden blocks (training only).
        critic_warmup: rounds at the start that train the critic alone.
        seed: of episodes, actions and minibatches.
    """

    iterations: int = 12
    num_envs: int = 128
    group_size: int = 1
    frames_per_batch: int = 2048
    epochs: int = 3
    minibatch_size: int = 256
    learning_rate: float = 6e-4
    critic_learning_rate: float = 1e-3
    gae_lambda: float = 0.9
    clip_epsilon: float = 0.2
    entropy_coeff: float = 0.0
    max_grad_norm: float = 1.0
    sharpness: float | None = 5.0
    spacing: float | None = 4.0
    privileged_critic: bool = True
    critic_warmup: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "num_envs", "group_size", "frames_per_batch", "epochs", "minibatch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.frames_per_batch % self.num_envs:
            raise ValueError(
                f"num_envs={self.num_envs} must divide frames_per_batch={self.frames_per_batch}: every image takes "
                "the same number of steps in a round"
            )
        if self.num_envs % self.group_size:
            raise ValueError(f"group_size={self.group_size} must divide num_envs={self.num_envs}")
        for name in ("learning_rate", "critic_learning_rate", "clip_epsilon", "max_grad_norm", "sharpness"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("entropy_coeff", "spacing", "critic_warmup"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"gae_lambda must lie in [0, 1], got {self.gae_lambda}")


class _Actor(nn.Module):
    """The planner on separate observation tensors with any leading dimensions."""

    def __init__(self, planner: OrderHead) -> None:
        super().__init__()
        self.planner = planner

    def forward(self, *parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        observation, leading = _flatten(parts)
        scores, budget_logits, _ = self.planner(observation)
        return (
            self.planner.block_logits(scores).unflatten(0, leading),
            budget_logits.unflatten(0, leading),
            self.planner.repulsion.expand(*leading, -1, -1),
        )


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


def leave_one_out_mean(values: Tensor, done: Tensor, group_size: int) -> Tensor:
    """Mean over the other episodes of a group at the same step of the same episode; 0 where no other got that far.

    Sub-environments of a group play the same images in the same sequence, each at its own pace.

    Args:
        values: (M, T).
        done: (M, T) bool, whether an episode ends with that step.
        group_size: G; sub-environments g G .. g G + G - 1 are a group.

    Returns:
        (M, T); it does not depend on the row's own values in that episode.
    """
    count, length = values.shape
    time = torch.arange(length, device=values.device).expand_as(done)
    episode = done.cumsum(1) - done.long()
    begins = torch.cat([torch.ones_like(done[:, :1]), done[:, :-1]], 1)
    step = time - torch.where(begins, time, 0).cummax(1).values
    group = torch.arange(count, device=values.device)[:, None] // group_size
    place = ((group * length + episode) * length + step).flatten()
    size = count // group_size * length**2
    total = values.new_zeros(size).index_add(0, place, values.flatten())[place].view_as(values)
    number = values.new_zeros(size).index_add(0, place, torch.ones_like(values).flatten())[place].view_as(values)
    return (total - values) / (number - 1).clamp_min(1)


class PPO:
    """A planner being improved on an environment.

    Args:
        planner: the start; a copy is trained, `planner` of this object is the current one.
        env: in mode "teacher"; with `privileged` if the config's critic sees context losses. Of several processes each
            has its share of `config.num_envs`.
        config: hyper-parameters, of all processes together.

    Raises:
        ValueError: if the environment is not the one that the config describes, or the config can't be shared out.
    """

    def __init__(self, planner: OrderHead, env: NextBlockTorchRLEnv, config: PPOConfig) -> None:
        if config.privileged_critic and not env.privileged:
            raise ValueError("privileged_critic=True needs an environment made with privileged=True")
        self._check_shares(config)
        if env.core.num_envs * distributed.size() != config.num_envs:
            raise ValueError(f"num_envs={config.num_envs} needs as many environments, this one has {env.core.num_envs}")
        budgets = env.core.config.budgets
        torch.manual_seed(config.seed)
        self.config, self.env = config, env
        # in eval mode: with dropout the ratio of new to old probabilities would not start at 1
        self.planner = planner.with_budgets(len(budgets)).to(env.core.device).eval()
        with torch.no_grad():
            if config.sharpness is not None:
                self.planner.sharpness.fill_(config.sharpness).log_()
            if config.spacing is not None:
                self.planner.repulsion.copy_(config.spacing * torch.exp(-(env.core.geometry.distances**2) / 2))
        critic_config = replace(planner.config, privileged=config.privileged_critic, num_budgets=1, reasoning_steps=0)
        self.critic = OrderHead(critic_config).to(env.core.device).eval()
        keys = list(OBSERVATION_KEYS)
        actor_module = TensorDictModule(_Actor(self.planner), keys, ["logits", "budget_logits", "repulsion"])
        parameters = {"logits": "logits", "action_mask": "action_mask"}
        if env.core.multi:
            parameters |= {key: key for key in ("budget_logits", "budget_mask", "repulsion")}
        self.actor = ProbabilisticActor(
            actor_module,
            in_keys=parameters,
            distribution_class=RankedBlocks,
            distribution_kwargs={"budgets": tuple(budgets)},
            return_log_prob=True,
        )
        critic_keys = [*keys, "context_loss"] if config.privileged_critic else keys
        self.value = TensorDictModule(_Critic(self.critic), critic_keys, ["state_value"])
        self.advantage = GAE(gamma=1.0, lmbda=config.gae_lambda, value_network=self.value, deactivate_vmap=True)
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

    @staticmethod
    def _check_shares(config: PPOConfig) -> None:
        processes = distributed.size()
        for name, unit in (("num_envs", config.group_size), ("frames_per_batch", 1), ("minibatch_size", 1)):
            if getattr(config, name) % (processes * unit):
                raise ValueError(
                    f"{name}={getattr(config, name)} must be a multiple of {processes * unit}: {processes} processes"
                    + (f" with groups of {unit}" if unit > 1 else "")
                )

    # ------------------------------------------------------------------ training

    def train(self, work: Unfinished | None = None) -> Iterator[dict[str, float]]:
        """Rounds until `config.iterations`; yields one dict of metrics a round.

        Args:
            work: keeps the state between rounds, so that an interrupted training continues.

        Metrics: step, frames, return (of each image's first episode, nats per image), planner_steps (of the same),
        illegal (share of void steps), value_error (share of the value target's variance not explained), entropy,
        clip_fraction and the parts of the loss.
        """
        config, core = self.config, self.env.core
        minibatch = config.minibatch_size // distributed.size()
        rounds = range(self.iteration, config.iterations) if work is None else work.steps(config.iterations, ppo=self)
        for number in rounds:
            # every round is keyed by its number, so a resumed run sees what an uninterrupted one sees
            torch.manual_seed(config.seed * 1_000_003 + number + _PROCESS_SEEDS * distributed.rank())
            core.seed(self._round_seeds())
            progress = number / config.iterations
            self._anneal(progress)
            data = self._collect()
            self._estimate(data)
            row = self._summary(data)
            frames = data.reshape(-1)
            warming = number < config.critic_warmup
            for _ in range(config.epochs):
                for rows in torch.randperm(len(frames)).split(minibatch):
                    row |= self._update(frames[rows], warming)
            self.iteration += 1
            counts = {"step": self.iteration, "frames": self.iteration * config.frames_per_batch}
            yield counts | distributed.mean_of(row)

    def _round_seeds(self) -> Tensor:
        """Seeds of this process's environments in a round; a seed draws the images, so those of a group share it."""
        count = self.env.core.num_envs
        members = torch.arange(count * distributed.rank(), count * (distributed.rank() + 1))
        members = members // self.config.group_size * self.config.group_size
        return (self.config.seed * 100_003 + self.iteration) * self.config.num_envs + members

    @torch.no_grad()
    def _estimate(self, data: Any) -> None:
        """Write advantages and value targets."""
        self.advantage(data)
        if self.config.group_size > 1:
            others = leave_one_out_mean(data["advantage"][..., 0], data["next", "done"][..., 0], self.config.group_size)
            data["advantage"] -= others[..., None]

    def _collect(self) -> Any:
        """One round of sampled episodes, batch (environments of this process, steps)."""
        frames = self.config.frames_per_batch // distributed.size()
        collector = Collector(
            self.env,
            self.actor,
            frames_per_batch=frames,
            total_frames=frames,
            exploration_type=ExplorationType.RANDOM,
            auto_register_policy_transforms=False,
        )
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
        distributed.backward(total, (*self.planner.parameters(), *self.critic.parameters()))
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
        """Metrics of a round; return and steps are those of each image's first episode, if it ended."""
        ended = data["next", "done"][..., 0]  # (num_envs, steps)
        first = (ended.cumsum(1) - ended.long()) == 0
        complete = ended.any(1)
        target, value = data["value_target"], data["state_value"]
        returns = (data["next", "reward"][..., 0] * first).sum(1)[complete]
        return {
            "return": returns.mean().item(),
            "planner_steps": first.sum(1)[complete].float().mean().item(),
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
