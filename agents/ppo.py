"""Proximal policy optimisation of a planner, on TorchRL's collector, GAE and ClipPPOLoss.

In training the critic may see what is hidden (key `context_loss`), because the true hidden tokens are most of the
reward's variance. The loop is `orderrl.agents.policy_gradient`'s. Of several processes each normalises advantages on
its own.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs.utils import ExplorationType
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from orderrl.agents.agent import Agent
from orderrl.agents.policy_gradient import Asked, PolicyGradient, PolicyGradientConfig, played_core
from orderrl.envs.torchrl import NextBlockTorchRLEnv
from orderrl.factory import Setup
from orderrl.planner import OrderHead
from orderrl.runtime import distributed
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.job import Job
from orderrl.runtime.values import at_least, between, positive, redefault, setting


@dataclass(frozen=True, kw_only=True)
class Config(PolicyGradientConfig):
    """How a planner is improved, named as in Schulman et al. (2017).

    With `group_size` 2 or more, the mean advantage of the others at the same step is taken from each (leave-one-out
    baseline: what the image itself is worth cancels). gamma is 1. `minibatch_size` counts frames.
    """

    group_size: int = setting(8, "Episodes that play the same image; 2 or more centre advantages by image", at_least(1))
    frames_per_batch: int = setting(2048, "Environment steps of a round, over all images", at_least(1))
    minibatch_size: int = setting(256, "Frames of a gradient step", at_least(1))
    critic_learning_rate: float = setting(3e-3, "Learning rate of the critic; falls linearly to a tenth", positive())
    gae_lambda: float = setting(0.95, "Lambda of generalised advantage estimation", between("[0, 1]"))
    sharpness: float | None = redefault(PolicyGradientConfig, "sharpness", 20.0)
    privileged_critic: bool = setting(True, "Whether the critic sees context losses of hidden blocks (training only)")
    critic_warmup: int = setting(0, "First rounds, which train the critic alone", at_least(0))
    spacing: float | None = redefault(PolicyGradientConfig, "spacing", 16.0)

    _shared_out: ClassVar = ("frames_per_batch", "minibatch_size")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames_per_batch % self.num_envs:
            raise ValueError(
                f"num_envs={self.num_envs} must divide frames_per_batch={self.frames_per_batch}: every image takes "
                "the same number of steps in a round"
            )

    def require_whole_episodes(self, blocks: int, budgets: tuple[int, ...]) -> None:
        """Raise ValueError if a round ends before an episode of the smallest budget does.

        What comes after a round's end is played in no round, so nothing would be learnt about late steps.
        """
        steps, longest = self.frames_per_batch // self.num_envs, -(-blocks // budgets[0])
        if steps < longest:
            raise ValueError(
                f"frames_per_batch={self.frames_per_batch} over num_envs={self.num_envs} are {steps} steps of each "
                f"image a round, but an episode takes up to {longest}; use frames_per_batch={longest * self.num_envs} "
                "or fewer num_envs"
            )


def train(setup: Setup, config: Config, job: Job) -> OrderHead:
    """Improve the planner that the setup starts from, in its environment."""
    assert setup.start is not None
    env = NextBlockTorchRLEnv(core=played_core(setup, config), privileged=config.privileged_critic)
    return PPO(setup.start, env, config, setup.seed).train(job, f"ppo ({setup.environment.reward.objective})")


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


class PPO(PolicyGradient):
    """A planner being improved on an environment, with a critic.

    The environment has `privileged` if the config's critic sees context losses.

    Metrics of a round, besides those of `PolicyGradient.train`: value_error (share of the value target's variance not
    explained), loss_critic, loss_objective.
    """

    config: Config

    @isolated_float32
    def __init__(self, planner: OrderHead, env: NextBlockTorchRLEnv, config: Config, seed: int = 0) -> None:
        if config.privileged_critic and not env.privileged:
            raise ValueError("privileged_critic=True needs an environment made with privileged=True")
        super().__init__(planner, env, config, seed)
        critic_config = replace(
            self.planner.config, privileged=config.privileged_critic, num_budgets=1, reasoning_steps=0, pairs=False
        )
        self.critic = OrderHead(critic_config).to(env.core.device).eval()
        keys = (*self.keys, "context_loss") if config.privileged_critic else self.keys
        self.value = TensorDictModule(Asked(self.critic, keys, ("value",)), list(keys), ["state_value"])
        self.advantage = GAE(gamma=1.0, lmbda=config.gae_lambda, value_network=self.value, deactivate_vmap=True)
        loss = ClipPPOLoss(
            self.actor,
            self.value,
            clip_epsilon=config.clip_epsilon,
            entropy_coeff=config.entropy_coeff,
            critic_coeff=1.0,
            loss_critic_type="l2",
            normalize_advantage=True,
        )
        self._set_up(loss, planner=config.learning_rate, critic=config.critic_learning_rate)

    def _collect(self) -> TensorDictBase:
        """The same number of frames of every environment; an episode that the round's end cuts has no return."""
        frames = self.config.frames_per_batch // distributed.size()
        collector = Collector(
            self.env,
            self.actor,
            frames_per_batch=frames,
            total_frames=frames,
            exploration_type=ExplorationType.RANDOM,
            auto_register_policy_transforms=False,
        )
        data = next(iter(collector)).to(self.env.core.device)  # the collector's own notes lie on the CPU
        collector.shutdown(close_env=False)
        data["next", "reward"] = data["next", "reward"] * self.env.core.geometry.num_tokens  # nats per image
        return data

    @torch.no_grad()
    def _estimate(self, data: TensorDictBase) -> None:
        """Write advantages and value targets."""
        self.advantage(data)
        if self.config.group_size > 1:
            others = leave_one_out_mean(data["advantage"][..., 0], data["next", "done"][..., 0], self.config.group_size)
            data["advantage"] -= others[..., None]

    def _loss(self, minibatch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        parts = self.loss(minibatch)
        total = parts["loss_critic"]
        if self.iteration >= self.config.critic_warmup:
            total = total + parts["loss_objective"] + parts["loss_entropy"]
        return total, {key: parts[key] for key in ("loss_critic", "loss_objective", "entropy", "clip_fraction")}

    def _summary(self, data: TensorDictBase) -> dict[str, float]:
        target, value = data["value_target"], data["state_value"]
        return super()._summary(data) | {"value_error": ((target - value).var() / target.var()).item()}


def _check(setup: Setup, config: Config) -> None:
    config.require_whole_episodes(setup.backbone.geometry.num_blocks, setup.environment.budgets)


AGENT = Agent(Config, train, start=True, check=_check)
