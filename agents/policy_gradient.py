"""What agents share that improve a planner on an environment with a clipped policy gradient.

The loop reads as its pseudo-code: collect, estimate advantages, take clipped steps. It starts from a cloned planner;
the action is a ranked list of blocks and a budget. How a round is collected, what an advantage is and what else the
loss has is the agent's own (`orderrl.agents.ppo`, `orderrl.agents.grpo`).

Of several processes each plays its share of the environments, with the seeds that they have in one process, and takes
its share of every minibatch; gradients are averaged. Actions are drawn in every process on its own.
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import ClipPPOLoss

from orderrl.agents.bc import score_spread
from orderrl.agents.distribution import RankedBlocks
from orderrl.data import load_split
from orderrl.envs.core import NextBlockCore
from orderrl.envs.observation import SEEN
from orderrl.envs.torchrl import NextBlockTorchRLEnv
from orderrl.factory import Setup
from orderrl.planner import OrderHead
from orderrl.runtime import distributed
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.job import Job
from orderrl.runtime.optimisation import descend
from orderrl.runtime.values import Settings, at_least, positive, setting

_PROCESS_SEEDS = 1_000_000_007  # between the random numbers of processes


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(Settings):
    """Settings that every agent has, named as in Schulman et al. (2017); each agent's `Config` adds its own.

    The repulsion that `spacing` begins with falls with distance as exp(-d^2 / 2); it is learnt from there on, for every
    pair of blocks. A `pair_strength` of None is 1, or what cloning target "pairs" made of it.
    """

    start: str | None = setting(
        None,
        "Planner checkpoint to start from, or newest (the newest clone in the cache); null finds or trains the planner "
        "that start_target names",
    )
    start_target: str = setting(
        "utility",
        "Target of the clone to start from, schedule (agent=schedule), or the name of a policy (agent=imitation)",
    )
    iterations: int = setting(12, "Rounds of collecting and learning", at_least(1))
    num_envs: int = setting(128, "Episodes in parallel", at_least(1))
    group_size: int = setting(8, "Episodes in parallel that play the same image", at_least(1))
    epochs: int = setting(3, "Passes over a round", at_least(1))
    minibatch_size: int = setting(256, "Samples of a gradient step", at_least(1))
    learning_rate: float = setting(6e-4, "Learning rate of the planner; falls linearly to a tenth", positive())
    clip_epsilon: float = setting(0.2, "Clipping of the probability ratio", positive())
    entropy_coeff: float = setting(0.0, "Weight of the entropy bonus; falls linearly to zero", at_least(0))
    max_grad_norm: float = setting(1.0, "Largest norm of the gradient, which is clipped there", positive())
    sharpness: float | None = setting(
        5.0, "Factor from cloned scores to policy logits at the start; null keeps the start's own", positive()
    )
    spacing: float | None = setting(
        4.0, "How much blocks of one step keep apart at the start (logits); null keeps the start's own", at_least(0)
    )
    pair_strength: float | None = setting(
        None,
        "Weight of the planner's own dependence (planner.pairs) at the start; null keeps the start's own",
        at_least(0),
    )

    _shared_out: ClassVar[tuple[str, ...]] = ("minibatch_size",)  # besides num_envs: multiples of the processes

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_envs % self.group_size:
            raise ValueError(f"group_size={self.group_size} must divide num_envs={self.num_envs}")


def played_core(setup: Setup, config: PolicyGradientConfig) -> NextBlockCore:
    """This process's share of the environments: planner images, in the setup's environment."""
    count = config.num_envs // distributed.size()
    return NextBlockCore(setup.backbone, load_split(setup.data, "planner"), count, setup.environment)


class Asked(nn.Module):
    """Some outputs of a planner on separate observation tensors, which `keys` name, with any leading dimensions."""

    def __init__(self, planner: OrderHead, keys: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.planner, self.keys, self.outputs = planner, keys, outputs

    def forward(self, *parts: Tensor) -> tuple[Tensor, ...]:
        observation = dict(zip(self.keys, parts, strict=True))
        leading = observation["label"].shape
        output = self.planner({key: part.flatten(0, len(leading) - 1) for key, part in observation.items()})
        return tuple(getattr(output, name).unflatten(0, leading) for name in self.outputs)


class PolicyGradient(ABC):
    """A planner being improved on an environment, round by round.

    Agents give `_collect`, `_estimate` and `_loss`, and call `_set_up` when they have built what they train.

    Args:
        planner: the start; a copy is trained, `planner` of this object is the current one.
        env: in mode "teacher". Of several processes each has its share of `config.num_envs`.
        config: hyper-parameters, of all processes together.
        seed: of episodes, actions and minibatches.

    Attributes:
        actor: TorchRL's policy made of it.
        loss: TorchRL's clipped loss.
        iteration: rounds done.
        frames: environment steps that they played, in all processes.

    Raises:
        ValueError: if the environment is not the one that the config describes, or the config cannot be shared out.
    """

    config: PolicyGradientConfig
    loss: ClipPPOLoss

    @isolated_float32
    def __init__(
        self, planner: OrderHead, env: NextBlockTorchRLEnv, config: PolicyGradientConfig, seed: int = 0
    ) -> None:
        self._check_shares(config)
        if env.core.num_envs * distributed.size() != config.num_envs:
            raise ValueError(f"num_envs={config.num_envs} needs as many environments, this one has {env.core.num_envs}")
        budgets, reward = env.core.config.budgets, env.core.config.reward
        torch.manual_seed(seed)
        self.config, self.env, self.seed = config, env, seed
        self.keys = SEEN if reward.step_cost_range is None else (*SEEN, "step_cost")
        if planner.config.step_cost_range and reward.step_cost_range is None:  # a start for many costs goes on at one
            planner = planner.at_step_cost(reward.typical_step_cost)
        # in eval mode: with dropout the ratio of new to old probabilities would not start at 1
        self.planner = planner.with_budgets(len(budgets), reward.step_cost_range).to(env.core.device).eval()
        if config.pair_strength is not None:
            self.planner.set_pair_strength(config.pair_strength)
        with torch.no_grad():
            if config.sharpness is not None:
                self.planner.sharpness.fill_(config.sharpness).log_()
            if config.spacing is not None:
                self.planner.repulsion.copy_(config.spacing * torch.exp(-(env.core.geometry.distances**2) / 2))
        self.actor = self._actor_of(self.planner)
        self.iteration, self.frames = 0, 0

    def _actor_of(self, planner: OrderHead) -> ProbabilisticActor:
        """TorchRL's policy of a planner."""
        outputs = ("logits", "budget_logits", "repulsion")
        module = TensorDictModule(Asked(planner, self.keys, outputs), list(self.keys), list(outputs))
        parameters = {"logits": "logits", "action_mask": "action_mask"}
        if self.env.core.multi:
            parameters |= {key: key for key in ("budget_logits", "budget_mask", "repulsion")}
        return ProbabilisticActor(
            module,
            in_keys=parameters,
            distribution_class=RankedBlocks,
            distribution_kwargs={"budgets": tuple(self.env.core.config.budgets)},
            return_log_prob=True,
        )

    def _set_up(self, loss: ClipPPOLoss, **rates: float) -> None:
        """Take the loss, and optimise the modules of this object that are named, at their learning rates."""
        self.loss, self._rates = loss, rates
        self._trained: dict[str, nn.Module] = {name: getattr(self, name) for name in rates}
        groups = [{"params": list(self._trained[name].parameters()), "lr": rate} for name, rate in rates.items()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    @staticmethod
    def _check_shares(config: PolicyGradientConfig) -> None:
        processes = distributed.size()
        for name, unit in (("num_envs", config.group_size), *((name, 1) for name in config._shared_out)):
            if getattr(config, name) % (processes * unit):
                raise ValueError(
                    f"{name}={getattr(config, name)} must be a multiple of {processes * unit}: {processes} processes"
                    + (f" with groups of {unit}" if unit > 1 else "")
                )

    # ------------------------------------------------------------------ training

    @isolated_float32
    def train(self, job: Job | None = None, description: str = "") -> OrderHead:
        """Rounds until `config.iterations`; returns the planner.

        Args:
            job: keeps the state between rounds, so that an interrupted training continues, and logs.

        Metrics: frames, return (of each image's first episode, nats per image), planner_steps (of the same), illegal
        (share of void steps), score_std (standard deviation of the scores of a state's hidden blocks), entropy,
        clip_fraction, the parts of the loss, and what the agent adds.
        """
        config, core, job = self.config, self.env.core, job or Job()
        minibatch = config.minibatch_size // distributed.size()
        note = "return {return:.2f} nats, {planner_steps:.1f} steps"
        for number in job.steps(config.iterations, description, "rounds", note, agent=self):
            # every round is keyed by its number, so a resumed run sees what an uninterrupted one sees
            torch.manual_seed(self.seed * 1_000_003 + number + _PROCESS_SEEDS * distributed.rank())
            core.seed(self._round_seeds())
            self._anneal(number / config.iterations)
            # collect
            data = self._collect()
            self._estimate(data)
            row = self._summary(data)
            self.frames += sum(distributed.gather(self._count(data)))
            # learn
            samples = self._samples(data)
            for _ in range(config.epochs):
                # indices are moved once, not once for every key of every minibatch
                for rows in torch.randperm(len(samples)).to(core.device).split(minibatch):
                    row |= self._update(samples[rows])
            self.iteration += 1
            self.planner.require_finite_outputs(f"round {self.iteration}: the planner")
            job.log(frames=self.frames, **distributed.mean_of(row))
        return self.planner

    def _round_seeds(self) -> Tensor:
        """Seeds of this process's environments in a round; a seed draws the images, so those of a group share it."""
        config, count = self.config, self.env.core.num_envs
        members = torch.arange(count * distributed.rank(), count * (distributed.rank() + 1))
        members = members // config.group_size * config.group_size
        return (self.seed * 100_003 + self.iteration) * config.num_envs + members

    @abstractmethod
    def _collect(self) -> TensorDictBase:
        """A round of sampled episodes, batch (episodes side by side, steps); rewards are nats per image."""

    @abstractmethod
    def _estimate(self, data: TensorDictBase) -> None:
        """Write advantages."""

    @abstractmethod
    def _loss(self, minibatch: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """What a gradient step lowers, and its parts for the log."""

    def _samples(self, data: TensorDictBase) -> TensorDictBase:
        """What minibatches are drawn from: frames."""
        return data.reshape(-1)

    def _count(self, data: TensorDictBase) -> int:
        """Environment steps in a round of this process."""
        return data.numel()

    def _anneal(self, progress: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates.values(), strict=True):
            group["lr"] = rate * (1 - 0.9 * progress)
        self.loss.entropy_coeff.fill_(self.config.entropy_coeff * (1 - progress))

    def _update(self, minibatch: TensorDictBase) -> dict[str, float]:
        total, parts = self._loss(minibatch)
        descend(self.optimizer, total, *self._trained.values(), clip=self.config.max_grad_norm)
        return {name: part.item() for name, part in parts.items()}

    def _summary(self, data: TensorDictBase) -> dict[str, float]:
        """Metrics of a round; return and steps are those of each image's first episode, if it ended."""
        ended = data["next", "done"][..., 0]  # (num_envs, steps)
        hidden = data["action_mask"].flatten(0, 1)
        playing = hidden.any(-1)
        spread = score_spread(data["logits"].flatten(0, 1)[playing], hidden[playing])
        first = (ended.cumsum(1) - ended.long()) == 0
        complete = ended.any(1)
        returns = (data["next", "reward"][..., 0] * first).sum(1)[complete]
        return {
            "return": returns.mean().item(),
            "planner_steps": first.sum(1)[complete].float().mean().item(),
            "illegal": data["next", "illegal"].float().mean().item(),
            "score_std": (spread.mean() / self.planner.sharpness.exp()).item(),
        }

    # ------------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, Any]:
        """Everything that a round changes; with it a resumed run equals an uninterrupted one."""
        parts = {name: copy.deepcopy(module.state_dict()) for name, module in self._trained.items()}
        optimizer = copy.deepcopy(self.optimizer.state_dict())
        return parts | {"optimizer": optimizer, "iteration": self.iteration, "frames": self.frames}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the round in which `state` was taken."""
        for name, module in self._trained.items():
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.frames = state["iteration"], state["frames"]
