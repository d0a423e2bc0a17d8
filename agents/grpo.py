"""Group-relative policy optimisation of a planner (GRPO; Shao et al., 2024), on TorchRL's ClipPPOLoss without a critic.

The episodes of a group reveal the same image, so their mean return is what the image itself is worth, and the rest is
what the planner did: the mean takes the place of a critic. Rounds hold whole episodes only; a sub-environment whose
episode has ended waits until all have. The loop is `orderrl.agents.policy_gradient`'s.

TorchRL's own `GRPOLoss` reads language models (token log-probabilities under a masking strategy); what remains of it
here, the clipped ratio, is `ClipPPOLoss`.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDictBase, pad
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import ClipPPOLoss

from orderrl.agents.agent import Agent
from orderrl.agents.policy_gradient import PolicyGradient, PolicyGradientConfig, played_core
from orderrl.envs.torchrl import NextBlockTorchRLEnv
from orderrl.factory import Setup
from orderrl.planner import OrderHead
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.job import Job
from orderrl.runtime.values import at_least, setting

_LEAST_STD = 1e-3  # nats; far below what orders differ by, far above how losses are rounded


@dataclass(frozen=True, kw_only=True)
class Config(PolicyGradientConfig):
    """How a planner is improved, named as in Shao et al. (2024).

    `minibatch_size` counts episodes; the loss is the mean over their steps (token-level, as in DAPO), and not over
    episodes of the mean over their steps, which would favour long bad episodes (Liu et al., 2025). Dr. GRPO (Liu et
    al., 2025) leaves out `normalize_by_std`, because it weighs images whose orders hardly differ as much as the others.
    With `reward_to_go` the advantage of a step is what was paid from it on, minus the mean of what the others of the
    group that got as far were paid from the same step on; off, that of every step is its episode's.
    """

    group_size: int = setting(8, "Episodes that play the same image and are compared", at_least(2))
    episodes: int = setting(256, "Whole episodes of a round, over all images; a multiple of num_envs", at_least(1))
    minibatch_size: int = setting(32, "Episodes of a gradient step", at_least(1))
    kl_coeff: float = setting(0.0, "Weight of the Kullback-Leibler penalty to the policy of the start", at_least(0))
    normalize_by_std: bool = setting(
        True, "Whether advantages are divided by the standard deviation inside the group; Dr. GRPO does not"
    )
    reward_to_go: bool = setting(
        False, "Whether what is paid from a step on is compared with the group at the same step, not whole returns"
    )

    _shared_out: ClassVar = ("episodes", "minibatch_size")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.episodes % self.num_envs:
            raise ValueError(
                f"num_envs={self.num_envs} must divide episodes={self.episodes}: every sub-environment plays the same "
                "number of them in a round"
            )


def train(setup: Setup, config: Config, job: Job) -> OrderHead:
    """Improve the planner that the setup starts from, in its environment."""
    assert setup.start is not None
    env = NextBlockTorchRLEnv(core=played_core(setup, config))
    return GRPO(setup.start, env, config, setup.seed).train(job, f"grpo ({setup.environment.reward.objective})")


def group_advantages(
    reward: Tensor, played: Tensor, group_size: int, normalize_by_std: bool = True, reward_to_go: bool = False
) -> Tensor:
    """Advantages relative to the episodes of the same group (Shao et al., 2024, section 4.1), options as in `Config`.

    Args:
        reward: (E, T), of whole episodes.
        played: (E, T) bool, the steps of each; they come first.
        group_size: G; episodes g G .. g G + G - 1 are a group.

    Returns:
        (E, T), zero where nothing was played. In a group the mean is zero: over its episodes, or with reward_to_go over
        those at the same step. What they are divided by has 0.001 nats added.
    """
    worth = torch.where(played, reward, 0.0).flip(1).cumsum(1).flip(1)
    compared = played
    if not reward_to_go:
        worth, compared = worth[:, :1].expand_as(reward), torch.ones_like(played)
    worth, counted = worth.unflatten(0, (-1, group_size)), compared.unflatten(0, (-1, group_size))  # (E / G, G, T)
    number = counted.sum(1, keepdim=True)
    mean = torch.where(counted, worth, 0.0).sum(1, keepdim=True) / number.clamp_min(1)
    advantage = torch.where(counted, worth - mean, 0.0)
    if normalize_by_std:
        variance = advantage.square().sum(1, keepdim=True) / (number - 1).clamp_min(1)
        advantage = advantage / (variance.sqrt() + _LEAST_STD)
    return torch.where(played, advantage.flatten(0, 1), 0.0)


class GRPO(PolicyGradient):
    """A planner being improved on an environment, without a critic.

    Of the environment the rewards alone are read, so form "charged" does.

    Metrics of a round, besides those of `PolicyGradient.train`: group_std (mean standard deviation of returns inside
    a group, nats per image: without any there is nothing to learn from), loss_objective, and with kl_coeff kl (to the
    start, nats per step).
    """

    config: Config

    @isolated_float32
    def __init__(self, planner: OrderHead, env: NextBlockTorchRLEnv, config: Config, seed: int = 0) -> None:
        super().__init__(planner, env, config, seed)
        self.start = self._actor_of(copy.deepcopy(self.planner).requires_grad_(False)) if config.kl_coeff else None
        loss = ClipPPOLoss(self.actor, clip_epsilon=config.clip_epsilon, entropy_coeff=config.entropy_coeff)
        self._set_up(loss, planner=config.learning_rate)

    @torch.no_grad()
    def _collect(self) -> TensorDictBase:
        """Whole episodes, batch (episodes, steps of the longest); the key `played` says which steps are of each."""
        with set_exploration_type(ExplorationType.RANDOM):
            parts = [self._play() for _ in range(self.config.episodes // self.config.num_envs)]
        longest = max(part.shape[1] for part in parts)
        return torch.cat([pad(part, [0, 0, 0, longest - part.shape[1]]) for part in parts])

    def _play(self) -> TensorDictBase:
        """One episode of every sub-environment."""
        limit = 2 * self.env.core.geometry.num_blocks  # the core ends every episode there
        data = self.env.rollout(limit, self.actor, break_when_any_done=False, break_when_all_done=True)
        done = data["next", "done"][..., 0]
        data["played"] = (done.cumsum(1) - done.long()) == 0  # a rollout repeats the last step of those that wait
        data["next", "reward"] = data["next", "reward"] * self.env.core.geometry.num_tokens  # nats per image
        seen = (
            "action",
            "action_log_prob",
            "logits",
            "played",
            *(("next", key) for key in ("reward", "done", "illegal")),
        )
        return data.select(*self.actor.in_keys, *seen)  # next states are of no use, and pairs of blocks are large

    @torch.no_grad()
    def _estimate(self, data: TensorDictBase) -> None:
        """Write advantages, and what the start's policy gives the actions."""
        config = self.config
        advantage = group_advantages(
            data["next", "reward"][..., 0],
            data["played"],
            config.group_size,
            config.normalize_by_std,
            config.reward_to_go,
        )
        data["advantage"] = advantage[..., None]
        if self.start is not None:
            data["start_log_prob"] = self.start.get_dist(data).log_prob(data["action"])

    def _samples(self, data: TensorDictBase) -> TensorDictBase:
        """Minibatches are drawn from episodes, so that all processes have the same number of them."""
        return data

    def _count(self, data: TensorDictBase) -> int:
        return int(data["played"].sum())

    def _loss(self, minibatch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        # the device is asked once which steps were played, not once for every key
        steps = minibatch.reshape(-1)[minibatch["played"].flatten().nonzero().flatten()]
        parts = self.loss(steps)
        total = parts["loss_objective"] + parts["loss_entropy"]
        shown = {key: parts[key] for key in ("loss_objective", "entropy", "clip_fraction")}
        if self.start is not None:
            shown["kl"] = self._kl(steps)
            total = total + self.config.kl_coeff * shown["kl"]
        return total, shown

    def _kl(self, steps: TensorDictBase) -> Tensor:
        """Estimate of KL(planner || start) that is never negative (Shao et al., 2024, equation 4)."""
        log_ratio = steps["start_log_prob"] - self.actor.get_dist(steps).log_prob(steps["action"])
        return (log_ratio.exp() - log_ratio - 1).mean()

    def _summary(self, data: TensorDictBase) -> dict[str, float]:
        played = data["played"]
        returns = torch.where(played, data["next", "reward"][..., 0], 0.0).sum(1)
        return super()._summary(data) | {
            "illegal": data["next", "illegal"][played].float().mean().item(),
            "group_std": returns.unflatten(0, (-1, self.config.group_size)).std(1).mean().item(),
        }


AGENT = Agent(Config, train, start=True)
