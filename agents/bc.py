"""Behaviour cloning on oracle labels: learn the value of every hidden block from stored contexts.

Targets: "utility" regresses U of every candidate (default: the label's argmax is noisy, its utilities
are less so; design, section 3, fact 5), "soft" is listwise cross-entropy to softmax(U / temperature), "label"
is cross-entropy on the argmax (the first version of the research plan). "charged" regresses minus the block's own
loss: what the likelihood objective charges for revealing it now (the greedy policy of the reward's other form).
"entropy" regresses the entropy of the block's first token, "ranks" the order of a teacher (distillation).

"pairs" is for sets. It regresses U and, for every two hidden blocks, what they tell about each other, (G[a, b] +
G[b, a]) / 2. As long as gains add up, a set A revealed in one step is worth

    U(A | S) = sum_{a in A} U(a | S) - (2 / N) sum_{pairs {a, b} in A} (G[a, b] + G[b, a]) / 2:

its blocks do not see each other, so what U counts of them within the set is not gained. That fixes the planner's pair
strength, the exchange rate between the two standard deviations: scores minus repulsion is what the next block adds to
this value (`orderrl.agents.policies.PairedPolicy`). The gains of pairs are never weighted by distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from orderrl.agents.agent import Agent
from orderrl.agents.dagger import label_sets
from orderrl.agents.play import play
from orderrl.agents.registry import make_policy, policy_source
from orderrl.agents.spec import PolicySpec
from orderrl.backbones.protocol import backbone_device
from orderrl.data import load_split
from orderrl.data.token_set import random_window
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.observation import labelled
from orderrl.envs.reward import CHEAPEST
from orderrl.factory import Setup
from orderrl.geometry import BlockGrid
from orderrl.labels import open_joined
from orderrl.oracle import WEIGHTS, distance_weights, utilities
from orderrl.planner import OrderHead, PlannerOutput, load_planner, new_planner
from orderrl.runtime import distributed
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.job import Job
from orderrl.runtime.learning_rate import one_cycle
from orderrl.runtime.optimisation import descend
from orderrl.runtime.sources import source_identity
from orderrl.runtime.values import Settings, at_least, between, member_of, one_of, positive, setting
from orderrl.runtime.weights import weights_fingerprint

if TYPE_CHECKING:
    from tensordict import TensorDict

TARGETS = ("label", "soft", "utility", "charged", "pairs", "entropy", "ranks")
REGRESSED = ("utility", "charged", "pairs", "entropy", "ranks")  # a mean over candidates, not over states
_CHUNK = 4096  # contexts whose gains are read at a time
_FORWARD = 256  # held-out contexts in a forward


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """How a planner is cloned from labels."""

    target: str = setting(
        "utility",
        "What is learnt: utility (regress U), soft (listwise), label (argmax), charged (the block's own loss), pairs "
        "(U and gains of pairs; needs planner.pairs=true), entropy (the block's own) or ranks (in a teacher's order)",
        one_of(TARGETS),
    )
    teacher: str | None = setting(
        None, "For target ranks, the policy whose orders are learnt, its name or file; null for others"
    )
    steps: int = setting(600, "Optimiser steps", at_least(1))
    passes: float | None = setting(50.0, "Passes over the labels, at most; null sets no limit", between("(0, 1000000]"))
    batch_size: int = setting(256, "Contexts per step", at_least(1))
    learning_rate: float = setting(1e-3, "Peak learning rate", positive())
    weight_decay: float = setting(0.05, "Weight decay of AdamW", at_least(0))
    temperature: float = setting(0.5, "Temperature of target soft, in standard deviations of U", positive())
    weight: str = setting(
        "uniform", "Weight of the utility: uniform, far (far structure counts) or an own one", member_of(WEIGHTS)
    )
    sigma: float = setting(1.5, "Reach of weight far, in blocks", positive())
    held_out: float = setting(0.1, "Share of images kept back for choosing the best checkpoint", between("(0, 1)"))
    evaluate_every: int = setting(50, "Steps between evaluations on the images kept back", at_least(1))
    dagger_rounds: int = setting(0, "Rounds of DAgger: label the planner's own states, train anew on all", at_least(0))
    dagger_contexts: int = setting(2000, "Own states labelled in a round", at_least(1))
    dagger_steps: int = setting(400, "Optimiser steps of a round", at_least(1))
    dagger_own_share: float = setting(1.0, "Share of own actions on the way; the others are random", between("[0, 1]"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.target == "ranks") != (self.teacher is not None):
            raise ValueError(f"target={self.target!r}, teacher={self.teacher!r}: target ranks, and no other, has one")

    def for_contexts(self, count: int) -> Config:
        """The same with no more steps than `passes` over so many contexts take."""
        if self.passes is None:
            return self
        return replace(self, steps=min(self.steps, math.ceil(self.passes * count / self.batch_size)))


def train(setup: Setup, config: Config, job: Job) -> OrderHead:
    """Clone a planner from sets of labels: of random contexts, and of those of each round of DAgger."""
    if config.dagger_rounds:
        config = replace(config, steps=config.dagger_steps)
    torch.manual_seed(setup.seed)
    planner = new_planner(setup.planner).to(backbone_device(setup.backbone))
    contexts = open_joined(setup.label_sets, setup.backbone, job)
    worth = None
    if config.teacher is not None:
        worth = -teacher_ranks(setup, config.teacher, int(contexts["image"].max()) + 1)[contexts["image"]]
    clone(planner, contexts, setup.backbone.geometry, config, setup.seed, job, worth)
    return planner


@torch.no_grad()
def teacher_ranks(setup: Setup, teacher: str, images: int) -> Tensor:
    """Place of every block (images, B) float32, from 0, in a policy's order of each of the first planner images."""
    named, data = make_policy(teacher, setup.backbone), load_split(setup.data, "planner")
    ranks = []
    for rows in torch.arange(images).split(_FORWARD):
        core = NextBlockCore(setup.backbone, data, len(rows), CoreConfig(budgets=named.budgets, reward=CHEAPEST))
        core.reset(index=rows)
        play(core, named.policy, torch.Generator().manual_seed(setup.seed))
        ranks.append(core.reveal_moment.argsort(1).argsort(1).cpu())
    return torch.cat(ranks).float()


def bc_loss(scores: Tensor, utility: Tensor, hidden: Tensor, target: str, temperature: float) -> Tensor:
    """Loss of predicted block scores (M, B), () mean over candidates, or over states for targets "label" and "soft".

    The worth of each candidate, hidden (M, B), is in standard deviations. Of target "pairs" it is the scores' part.
    """
    if target in REGRESSED:
        return F.mse_loss(scores[hidden], utility[hidden])
    log_probs = scores.masked_fill(~hidden, -1e9).log_softmax(-1)
    masked = utility.masked_fill(~hidden, -torch.inf)
    if target == "label":
        return F.nll_loss(log_probs, masked.argmax(-1))
    goal = (masked / temperature).softmax(-1)
    return -(goal * log_probs).sum(-1).mean()


def pair_loss(dependence: Tensor, gains: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error of the predicted dependence over pairs of two hidden blocks; 0 where there are none.

    Dependence and gains, in standard deviations, are (M, B, B) and symmetric, hidden (M, B) bool.
    """
    pairs = _pairs(hidden)
    return F.mse_loss(dependence[pairs], gains[pairs], reduction="sum") / pairs.sum().clamp_min(1)


def reasoning_steps_at(step: int, steps: int, final: int) -> int:
    """Curriculum of latent reasoning: R doubles from 0 (0, 1, 2, 4, ...) in equal phases of the first half."""
    stages = [0]
    while stages[-1] < final:
        stages.append(min(max(2 * stages[-1], 1), final))
    phase = int(step / max(steps / 2, 1) * len(stages))
    return stages[min(phase, len(stages) - 1)]


@torch.no_grad()
def held_out_metrics(planner: OrderHead, data: TensorDict, utility: Tensor) -> dict[str, float]:
    """How good the first-ranked block is on held-out contexts.

    Returns:
        mean U of the first-ranked block, in standard deviations ("chosen"), the mean regret to the best, and score_std,
        the mean standard deviation of a context's scores.
    """
    planner.eval()
    hidden, device = ~data["visible"], planner.position.device
    scores = torch.cat([planner(part.to(device)).scores.cpu() for part in data.split(_FORWARD)])
    spread = score_spread(scores, hidden).mean().item()
    scores = scores.masked_fill(~hidden, -torch.inf)
    chosen = utility.gather(1, scores.argmax(-1, keepdim=True))[:, 0]
    best = utility.masked_fill(~hidden, -torch.inf).amax(-1)
    return {"chosen": chosen.mean().item(), "regret": (best - chosen).mean().item(), "score_std": spread}


@isolated_float32
def clone(
    planner: OrderHead,
    labels: TensorDict,
    geometry: BlockGrid,
    config: Config,
    seed: int = 0,
    job: Job | None = None,
    worth: Tensor | None = None,
) -> None:
    """Train in place; on return the planner holds the weights that were best on held-out images.

    Best is the largest U of the first-ranked block; of target "pairs" the least loss. Labels are read batch by batch
    from where they are, memory or disk, and moved to the planner's device. Of several processes each takes its rows of
    every batch, and the gradient is that of the whole batch.

    Args:
        planner: trained in place.
        labels: contexts as `label_contexts` stores them.
        worth: (n, B), of each block in each context, for target "ranks".

    Metrics: loss, reasoning_steps; at evaluations also chosen and regret (standard deviations of U). Target "pairs"
    adds the loss's parts, loss_scores and loss_pairs, and at evaluations those on held-out images, held_out_scores and
    held_out_pairs.

    Raises:
        ValueError: if the labels come from a single image, so that none can be kept back, there are more processes
            than contexts in a batch, or the target is "pairs" and the planner has none.
    """
    # targets in standard deviations, and the images kept back
    config, job = config.for_contexts(len(labels)), job or Job()
    generator = torch.Generator().manual_seed(seed)
    if config.target == "pairs":
        planner.config.require_pairs("target='pairs'")
    utility, spread = score_targets(labels, geometry, config, worth)
    pairs = PairTargets(labels) if config.target == "pairs" else None
    if pairs is not None:
        planner.set_pair_strength(2 * pairs.spread / (geometry.num_tokens * spread))
    train, held_out = split_images(labels["image"], config.held_out, generator)
    kept_back = labelled(labels, held_out)
    # everything that a step changes
    optimizer = torch.optim.AdamW(planner.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = one_cycle(optimizer, config.steps, config.learning_rate)
    best: dict[str, Any] = {"quality": -float("inf"), "weights": _copy(planner)}
    final = planner.config.reasoning_steps
    steps = job.steps(
        config.steps, f"cloning ({config.target}, R = {final})", "steps", "loss {loss:.3f}",
        planner=planner, optimizer=optimizer, schedule=schedule, generator=generator, best=best,
    )  # fmt: skip
    for step in steps:
        # a gradient step on this process's rows of a batch
        drawn = train[torch.randint(len(train), (config.batch_size,), generator=generator)]
        rows = distributed.rows_of(drawn)
        batch = labelled(labels, rows).to(planner.position.device)
        planner.train()
        reasoning = reasoning_steps_at(step, config.steps, final)
        losses = cloning_losses(planner(batch, reasoning), utility, pairs, labels, rows, drawn, config)
        mean = descend(optimizer, torch.stack([*losses.values()]).sum(), planner, weight=1.0)
        schedule.step()
        row = {"loss": mean, "reasoning_steps": float(reasoning)}
        if pairs is not None:
            shares = distributed.gather({name: loss.item() for name, loss in losses.items()})
            row |= {f"loss_{name}": sum(share[name] for share in shares) for name in losses}
        # the best weights so far, by the images kept back
        if (step + 1) % config.evaluate_every == 0 or step + 1 == config.steps:
            row |= held_out_metrics(planner, kept_back, utility[held_out])
            quality = row["chosen"]
            if pairs is not None:
                errors = _held_out_losses(planner, utility, pairs, labels, held_out, config)
                quality, row = -sum(errors.values()), row | errors
            trained = reasoning == final or step + 1 == config.steps
            if trained and quality > best["quality"]:
                best |= {"quality": quality, "weights": _copy(planner)}
        job.log(**row)
    planner.load_state_dict(best["weights"])
    planner.eval()


def cloning_losses(
    output: PlannerOutput,
    utility: Tensor,
    pairs: PairTargets | None,
    labels: TensorDict,
    rows: Tensor,
    drawn: Tensor,
    config: Config,
) -> dict[str, Tensor]:
    """The parts of the loss, each the share that some rows have in the mean over all that were drawn."""
    device = output.scores.device
    hidden, wanted = (~labels["visible"][rows]).to(device), utility[rows].to(device)
    scores = bc_loss(output.scores, wanted, hidden, config.target, config.temperature)
    losses = {"scores": scores * _weight(labels, rows, drawn, config.target)}
    if pairs is not None:
        losses["pairs"] = pair_loss(output.dependence, pairs(rows).to(device), hidden) * pairs.weight(rows, drawn)
    return losses


@torch.no_grad()
def _held_out_losses(
    planner: OrderHead, utility: Tensor, pairs: PairTargets, labels: TensorDict, rows: Tensor, config: Config
) -> dict[str, float]:
    """The parts of the loss on contexts of images kept back, in eval mode."""
    planner.eval()
    found = [
        cloning_losses(
            planner(labelled(labels, part).to(planner.position.device)), utility, pairs, labels, part, rows, config
        )
        for part in rows.split(_FORWARD)
    ]
    return {f"held_out_{name}": sum(losses[name].item() for losses in found) for name in found[0]}


class PairTargets:
    """What every two hidden blocks tell about each other, read batch by batch from where the labels are."""

    def __init__(self, labels: TensorDict) -> None:
        self.labels = labels
        count, total, squares = 0, 0.0, 0.0
        for rows in torch.arange(len(labels)).split(_CHUNK):
            values = self._gains(rows)[_pairs(~labels["visible"][rows])].double()
            count, total, squares = count + len(values), total + values.sum().item(), squares + (values**2).sum().item()
        variance = (squares - total**2 / max(count, 1)) / max(count - 1, 1)
        self.spread = max(variance, 0.0) ** 0.5  # standard deviation over all pairs of all contexts, nats

    def _gains(self, rows: Tensor) -> Tensor:
        gains = self.labels["gains"][rows]
        return (gains + gains.mT) / 2

    def __call__(self, rows: Tensor) -> Tensor:
        """(m, B, B) of some contexts, in standard deviations."""
        return self._gains(rows) / max(self.spread, 1e-12)  # a backbone may see no difference

    def weight(self, rows: Tensor, drawn: Tensor) -> float:
        """Share of some rows in the mean over all pairs of the batch."""
        mine, whole = (int(_pairs(~self.labels["visible"][part]).sum()) for part in (rows, drawn))
        return mine / max(whole, 1)


def _pairs(hidden: Tensor) -> Tensor:
    """Pairs of two hidden blocks: (M, B) bool -> (M, B, B) bool."""
    same = torch.eye(hidden.shape[-1], dtype=torch.bool, device=hidden.device)
    return hidden[:, :, None] & hidden[:, None] & ~same


def score_targets(
    labels: TensorDict, geometry: BlockGrid, config: Config, worth: Tensor | None = None
) -> tuple[Tensor, float]:
    """(n, B) worth of every block in standard deviations over all candidates, and what these are."""
    if config.target == "charged":
        utility = -labels["loss"]
    elif config.target == "entropy":
        utility = labels["entropy"][:]
    elif worth is not None:
        utility = worth
    else:
        weights = distance_weights(geometry, config.weight, config.sigma)
        chunks = torch.arange(len(labels)).split(_CHUNK)  # gains (n, B, B) may be larger than the memory
        utility = torch.cat([utilities(labels["gains"][rows], geometry, weights) for rows in chunks])
    if config.target in ("entropy", "ranks"):  # that are not around 0
        utility = utility - utility[~labels["visible"]].mean()
    spread = utility[~labels["visible"]].std().clamp_min(1e-12)  # a backbone may see no difference
    return utility / spread, spread.item()


def split_images(image: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows (int64) to learn from and those kept back, by the image (n,) of each; classes in proportion in both."""
    images = image.unique()
    if len(images) < 2:
        raise ValueError(f"there must be at least 2 images to learn from, one is kept back; got {len(images)}")
    count = min(max(1, int(share * len(images))), len(images) - 1)
    kept_back = torch.isin(image, images[random_window(len(images), count, generator)])
    return (~kept_back).nonzero().flatten(), kept_back.nonzero().flatten()


def score_spread(scores: Tensor, hidden: Tensor) -> Tensor:
    """Standard deviation of scores (M, B) over the hidden blocks of each context, (M,)."""
    count = hidden.sum(-1, keepdim=True)
    mean = scores.masked_fill(~hidden, 0.0).sum(-1, keepdim=True) / count
    return ((scores - mean).masked_fill(~hidden, 0.0).square().sum(-1) / count[:, 0]).sqrt()


def _weight(labels: TensorDict, rows: Tensor, drawn: Tensor, target: str) -> float:
    """Share of some rows in the mean loss of the batch: in candidates where they are regressed, else in states."""
    if target in REGRESSED:
        return int((~labels["visible"][rows]).sum()) / int((~labels["visible"][drawn]).sum())
    return len(rows) / len(drawn)


def _copy(planner: OrderHead) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in planner.state_dict().items()}


def _check(setup: Setup, config: Config) -> None:
    if config.target == "pairs":
        setup.planner.require_pairs("agent.target=pairs")


def _idle(config: Config) -> list[str]:
    unused = [] if config.dagger_rounds else [item.name for item in fields(config) if item.name.startswith("dagger_")]
    return ["teacher", *unused]  # its content is described


def _describe(setup: Setup, config: Config) -> dict[str, Any]:
    """The teacher by its content, wherever its file lies, and how it acts."""
    if config.teacher is None:
        return {}
    spec = PolicySpec.parse(config.teacher)
    if spec.path is None:
        file = source_identity(policy_source(spec))
        return {"teacher": config.teacher} | ({} if file is None else {"taught": file})
    acting = str(replace(spec, kind="newest", name=""))
    return {"teacher": weights_fingerprint(load_planner(spec.path)[0])} | ({"taught": acting} if acting else {})


AGENT = Agent(
    Config,
    train,
    environment=False,
    label_sets=label_sets,
    check=_check,
    idle=_idle,
    describe=_describe,
    scores_alone=True,
)
