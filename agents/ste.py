"""The research notes' training of an OrderHead: a binary split of the tokens with a straight-through gradient.

Notable:
- The k best-scored blocks are the context, the others are generated given them, raster order inside both. The loss
  of the second group reaches the scores where the mask m (1 is hidden) multiplies: the embedding of a visible token is
  scaled by 1 - m, the loss of a hidden one is weighted by m.
- m = hard - stop(soft) + soft, soft = sigmoid((theta - s~) / tau), with s~ the scores in standard deviations of their
  image and theta the k-th highest, held fixed. Forward it is the hard split, backward the sigmoid.
- s~ knows neither the scale nor the mean of the scores, so nothing in this loss holds their spread: alone it may
  explode, and held too tightly it collapses. `score_std` is watched; both give a warning and do not end the training.
- The oracle term, oracle_coeff * MSE(sigmoid(s), importance), has the classifier's importance (labels=classifier). Its
  other form, reinforce_coeff, is a policy gradient: splits are drawn from the scores, and rewarded if the classifier
  recognises the image from the visible group.
- The head never reads a hidden token but where `curriculum_steps` routes true tokens to it, in training alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderrl.agents.agent import Agent, Trained
from orderrl.agents.bc import score_spread, split_images
from orderrl.agents.body import (
    BODIES,
    TunableBackbone,
    merge_adapters,
    optimiser_of,
    require_tunable,
    trained_part,
    tunable_copy,
)
from orderrl.backbones import OrderRobustTransformer
from orderrl.backbones.diffloss import TRAINING_STEPS
from orderrl.backbones.mar_backbone import TRAINING_DRAWS, MaskedTransformer
from orderrl.backbones.pretraining import draw_batch
from orderrl.backbones.protocol import backbone_device
from orderrl.backbones.randar import cross_entropy
from orderrl.data import TokenSet, load_split
from orderrl.factory import Setup
from orderrl.geometry import BlockGrid
from orderrl.labels import find_classifier, label_settings
from orderrl.oracle import CLASSIFIER, clustered_importance
from orderrl.partial_classifier import PartialClassifier, require_clusters
from orderrl.planner import TokenOrderHead, new_planner
from orderrl.runtime.distributed import print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.job import Job
from orderrl.runtime.values import Settings, at_least, between, one_of, positive, setting

Importance = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]
"""(tokens, labels, scores (M, B), generator) -> (M, B) in [0, 1], what the oracle term has the head regress."""

Reward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(tokens, labels, blocks (R, M, k) that are visible) -> (R, M), what the policy gradient raises."""


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """How an OrderHead is trained through a binary split of the tokens."""

    steps: int = setting(600, "Optimiser steps", at_least(1))
    batch_size: int = setting(64, "Images per step", at_least(1))
    visible_share: float = setting(0.25, "Share of the blocks that is the context", between("(0, 1)"))
    tau: float = setting(1.0, "Temperature of the soft mask at the start, standard deviations of scores", positive())
    final_tau: float = setting(0.1, "Temperature of the soft mask from the end of its anneal on", positive())
    anneal_steps: int | None = setting(None, "Steps over which the temperature falls; null is all", at_least(1))
    aligned: bool = setting(
        False, "Score states of which everything is hidden; false scores states with random visible blocks"
    )
    curriculum_steps: int = setting(
        0, "Steps over which the probability falls from 1 to 0 that the head reads true tokens instead", at_least(0)
    )
    gen_coeff: float = setting(1.0, "Weight of the generation loss through the split; 0 leaves it out", at_least(0))
    oracle_coeff: float = setting(
        0.0, "Weight of the mean squared error to the classifier's importance (labels=classifier)", at_least(0)
    )
    reinforce_coeff: float = setting(
        0.0,
        "Weight of the policy gradient whose reward is 1 where the classifier recognises the class from visible blocks "
        "that are drawn from the scores (labels=classifier)",
        at_least(0),
    )
    splits: int = setting(4, "Splits that the policy gradient draws of every image", at_least(2))
    l2_coeff: float = setting(0.0, "Weight of the mean square of the scores", at_least(0))
    spread_coeff: float = setting(0.0, "Weight of exp(-score_std), which keeps scores apart", at_least(0))
    entropy_coeff: float = setting(0.0, "Weight of the entropy of the scores' softmax, which is raised", at_least(0))
    learning_rate: float = setting(5e-4, "Peak learning rate of the head, before its scale", positive())
    head_scale: float = setting(1.0, "Factor of the head's learning rate", positive())
    head_clip: float | None = setting(1.0, "Norm to which the head's gradient is clipped; null clips none", positive())
    weight_decay: float = setting(0.05, "Weight decay of AdamW", at_least(0))
    body: str = setting(
        "frozen", "What is trained of a copy of the backbone: frozen (nothing), top, lora or all", one_of(BODIES)
    )
    layers: int = setting(1, "Top transformer layers that are trained, for body=top", at_least(1))
    rank: int = setting(4, "Rank of the adapters, for body=lora", at_least(1))
    body_learning_rate: float = setting(1e-4, "Peak learning rate of the body", positive())
    label_dropout: float = setting(0.1, "Share of labels that are dropped, for guidance", between("[0, 1]"))
    augmentation: float = setting(1.0, "Strength of the data set's augmentation; 0 is none", at_least(0))
    held_out: float = setting(
        0.1, "Share of the planner images that are watched and never learnt from", between("(0, 1)")
    )
    evaluate_every: int = setting(50, "Steps between evaluations on the images kept back", at_least(1))
    collapse: float = setting(0.5, "A warning is given where score_std falls below", at_least(0))
    explosion: float = setting(8.0, "A warning is given where score_std rises above", positive())

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gen_coeff and not self.judged:
            raise ValueError(
                "gen_coeff=0, oracle_coeff=0 and reinforce_coeff=0 leave nothing to learn; set one of them"
            )
        if not self.gen_coeff and self.body != "frozen":
            raise ValueError(f"body={self.body!r} learns from the generation loss; set gen_coeff, or use body=frozen")

    @property
    def judged(self) -> bool:
        """Whether a term asks the classifier."""
        return self.oracle_coeff > 0 or self.reinforce_coeff > 0

    def tau_at(self, step: int) -> float:
        """Temperature at a step: a line from `tau` to `final_tau`."""
        done = min(step / (self.anneal_steps or self.steps), 1.0)
        return self.tau + (self.final_tau - self.tau) * done

    def routed_at(self, step: int) -> float:
        """Probability at a step that the head reads true tokens."""
        return max(1 - step / self.curriculum_steps, 0.0) if self.curriculum_steps else 0.0


def train(setup: Setup, config: Config, job: Job) -> Trained:
    """Train a head, and with it what the config says of a copy of the backbone."""
    assert isinstance(setup.backbone, TunableBackbone)
    backbone = tunable_copy(setup.backbone)
    torch.manual_seed(setup.seed)
    head = new_planner(setup.planner).to(backbone_device(backbone))
    assert isinstance(head, TokenOrderHead)
    body = trained_part(backbone, config.body, config.layers, config.rank)
    classifier = find_classifier(setup, setup.labels) if config.judged else None
    importance = classifier_importance(setup, classifier) if classifier is not None and config.oracle_coeff else None
    reward = recognition(setup, classifier) if classifier is not None and config.reinforce_coeff else None
    images = load_split(setup.data, "planner")
    training = SplitTraining(head, backbone, body, images, config, importance, reward, setup.seed)
    training.train(job)
    merge_adapters(backbone)
    return Trained(head, None if config.body == "frozen" else backbone, training.outcome)


def classifier_importance(setup: Setup, classifier: PartialClassifier) -> Importance:
    """The importance that the labels' settings ask for, by the frozen classifier."""

    def found(tokens: Tensor, labels: Tensor, scores: Tensor, generator: torch.Generator) -> Tensor:
        keys = (torch.randint(2**53, (len(labels),), generator=generator),)
        return clustered_importance(classifier, setup.backbone.geometry, setup.labels, tokens, labels, keys, scores)

    return found


def recognition(setup: Setup, classifier: PartialClassifier) -> Reward:
    """1 where the frozen classifier recognises the image from the true tokens of the visible blocks, else 0."""
    places = setup.backbone.geometry.block_tokens

    @torch.no_grad()
    def reward(tokens: Tensor, labels: Tensor, blocks: Tensor) -> Tensor:
        kept = places.to(blocks.device)[blocks].flatten(2).transpose(0, 1)  # (M, R, k p p)
        return (labels == classifier(tokens, kept).argmax(-1).T).float()

    return reward


# ---------------------------------------------------------------------- the estimator


def standardised(scores: Tensor) -> Tensor:
    """Scores (M, B) with mean 0 and standard deviation 1 in every image."""
    spread = scores.std(-1, correction=0, keepdim=True).clamp_min(1e-6)
    return (scores - scores.mean(-1, keepdim=True)) / spread


def split_mask(scores: Tensor, visible: int, tau: float) -> Tensor:
    """Which blocks are hidden, (M, B) float32: exactly 0 for the `visible` best-scored ones and 1 for the others.

    Its gradient is that of sigmoid((theta - s~) / tau), theta the score of the last visible block.
    """
    z = standardised(scores)
    best = z.topk(visible, dim=-1)
    soft = ((best.values[:, -1:].detach() - z) / tau).sigmoid()
    hard = torch.ones_like(z).scatter(1, best.indices, 0.0)
    return hard + (soft - soft.detach())


def block_order(mask: Tensor) -> Tensor:
    """The visible blocks of a mask (M, B) in raster order, then the hidden ones: (M, B) int64."""
    return (mask.detach() > 0.5).to(torch.uint8).argsort(dim=1, stable=True)


def generation_loss(
    backbone: TunableBackbone, tokens: Tensor, labels: Tensor, mask: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean loss of a hidden token given the visible group and, of a causal backbone, the hidden ones before it.

    Args:
        tokens: (M, N) int64 or (M, N, C).
        mask: (M, B) of `split_mask`, equally many visible in every image.
        generator: on the CPU, of a masked model's times and noises.

    Returns:
        Scalar, nats or DiffLoss units per token.
    """
    geometry = backbone.geometry
    order = geometry.token_order(block_order(mask))  # (M, N)
    weight = mask[:, geometry.token_block.to(mask.device)]  # (M, N), of tokens
    visible = int((mask[0].detach() < 0.5).sum()) * geometry.tokens_per_block
    hidden = order[:, visible:]
    shown = weight.detach() < 0.5
    scale = torch.where(shown, 1 - weight, 1.0)
    if isinstance(backbone, MaskedTransformer):
        index = hidden[..., None].expand(-1, -1, backbone.hidden_size)
        z = backbone.conditions(tokens, shown, labels, scale).gather(1, index)
        targets = tokens.gather(1, hidden[..., None].expand(-1, -1, tokens.shape[-1]))
        t = torch.randint(TRAINING_STEPS, (*hidden.shape, TRAINING_DRAWS), generator=generator).to(tokens.device)
        noise = torch.randn(*t.shape, tokens.shape[-1], generator=generator, dtype=torch.float32).to(tokens)
        losses = backbone.token_losses(z[:, :, None], targets[:, :, None], t, noise).mean(-1)
    else:
        losses = cross_entropy(backbone.teacher_forced(tokens, labels, order, scale), tokens, order)[:, visible:]
    return (losses * weight.gather(1, hidden)).mean()


# ---------------------------------------------------------------------- the policy gradient


def list_log_probs(scores: Tensor, ranked: Tensor) -> Tensor:
    """Plackett-Luce log-probability of the first k blocks of each list, (..., B) for k = 1 .. B.

    Args:
        scores: (M, B).
        ranked: (..., M, B) int64, all blocks in the order in which they were drawn.
    """
    chosen = scores.expand(ranked.shape).gather(-1, ranked)
    return (chosen - chosen.flip(-1).logcumsumexp(-1).flip(-1)).cumsum(-1)


def policy_gradient(
    scores: Tensor, visible: int, splits: int, reward: Callable[[Tensor], Tensor], generator: torch.Generator
) -> Tensor:
    """REINFORCE on visible groups drawn from the scores by Gumbel top-k; its gradient raises the reward.

    The advantage of a split is its reward in standard deviations from the mean over the splits of its image.

    Args:
        scores: (M, B).
        visible: blocks of a group.
        splits: R, drawn of each image.
        reward: of blocks (R, M, visible), (R, M).
        generator: on the CPU.

    Returns:
        Scalar.
    """
    noise = -torch.empty(splits, *scores.shape).exponential_(generator=generator).log().to(scores)
    ranked = (scores.detach() + noise).argsort(-1, descending=True)
    rewards = reward(ranked[..., :visible])
    advantage = (rewards - rewards.mean(0)) / rewards.std(0, correction=0).clamp_min(1e-6)
    return -(advantage * list_log_probs(scores, ranked)[..., visible - 1]).mean()


# ---------------------------------------------------------------------- what the head reads


def token_vectors(backbone: TunableBackbone, tokens: Tensor) -> Tensor:
    """True tokens as the head reads them, (M, B, C): continuous ones or their embeddings, the mean over a block."""
    values = tokens if isinstance(backbone, MaskedTransformer) else backbone.tok_embeddings(tokens)
    return values[:, backbone.geometry.block_tokens.to(tokens.device)].mean(2)


@torch.no_grad()
def states_of(backbone: TunableBackbone, tokens: Tensor, labels: Tensor, order: Tensor, length: Tensor) -> Tensor:
    """Hidden states (M, B, D) of all blocks where of each order (M, B) the first `length` (M,) blocks are visible."""
    geometry = backbone.geometry
    if isinstance(backbone, OrderRobustTransformer):
        return backbone.observe_contexts(tokens, labels, order[:, : int(length.max())], length)[0]
    first = torch.arange(geometry.num_blocks, device=tokens.device) < length[:, None]
    visible = torch.zeros_like(first).scatter(1, order, first)[:, geometry.token_block.to(tokens.device)]
    z = backbone.conditions(tokens, visible, labels)
    return z[:, geometry.block_tokens.to(tokens.device)].mean(2)


def random_contexts(
    geometry: BlockGrid, count: int, aligned: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random orders (count, B) and how many of their blocks are visible, (count,); none if aligned."""
    order = torch.rand(count, geometry.num_blocks, generator=generator).argsort(1)
    length = torch.randint(geometry.num_blocks, (count,), generator=generator)
    return order, torch.zeros_like(length) if aligned else length


class SplitTraining:
    """Trains a head, and a part of a backbone, through binary splits.

    Args:
        head: trained in place.
        backbone: of which `body` is trained in place.
        images: the planner split; a share of it is kept back and watched.
        importance: of the oracle term; None if there is none.
        reward: of the policy gradient; None if there is none.
        seed: of batches, contexts and noises.

    Attributes:
        outcome: what was watched at the start and at the end, and the warnings that were given.
    """

    @isolated_float32
    def __init__(
        self,
        head: TokenOrderHead,
        backbone: TunableBackbone,
        body: nn.ModuleList,
        images: TokenSet,
        config: Config,
        importance: Importance | None = None,
        reward: Reward | None = None,
        seed: int = 0,
    ) -> None:
        self.head, self.backbone, self.body, self.config = head, backbone, body, config
        self.importance, self.reward = importance, reward
        self.generator = torch.Generator().manual_seed(seed)
        rows = split_images(torch.arange(len(images)), config.held_out, self.generator)
        self.images, self.watched = map(images.at, rows)
        blocks = backbone.geometry.num_blocks
        self.visible = min(max(round(config.visible_share * blocks), 1), blocks - 1)
        self.outcome: dict[str, Any] = {}

    @isolated_float32
    def train(self, job: Job | None = None) -> None:
        """Train in place.

        Metrics: loss, loss_gen (nats or DiffLoss units per token), loss_oracle, loss_reinforce; at evaluations what
        `watch` gives.
        """
        c, job = self.config, job or Job()
        rates = c.learning_rate * c.head_scale, c.body_learning_rate
        optimizer, schedule = optimiser_of(self.head, self.body, c.weight_decay, rates, c.steps)
        start = self.watch()
        job.log(**start)
        warned: list[str] = []
        steps = job.steps(
            c.steps, f"training through binary splits (body {c.body})", "steps", "loss {loss:.3f}", head=self.head,
            body=self.body, optimizer=optimizer, schedule=schedule, generator=self.generator, warned=warned,
        )  # fmt: skip
        for step in steps:
            row = self._step(optimizer, step)
            schedule.step()
            if (step + 1) % c.evaluate_every == 0 or step + 1 == c.steps:
                row |= self.watch()
                self._warn(row["score_std"], step + 1, warned)
            job.log(**row)
        self.head.eval()
        self.backbone.eval()
        self.outcome = {"start": start, "end": self.watch(), "warnings": list(warned)}

    def _step(self, optimizer: torch.optim.Optimizer, step: int) -> dict[str, float]:
        c, generator = self.config, self.generator
        # images, and the contexts in which their blocks are scored
        null = self.backbone.num_classes
        _, tokens, labels, given = draw_batch(
            self.images, c.batch_size, c.label_dropout, null, generator, c.augmentation
        )
        order, length = random_contexts(self.backbone.geometry, c.batch_size, c.aligned, generator)
        routed = torch.rand(c.batch_size, generator=generator) < c.routed_at(step)
        device = backbone_device(self.backbone)
        tokens, labels, given, order, length, routed = (
            part.to(device) for part in (tokens, labels, given, order, length, routed)
        )
        # the scores, and what each term says of them
        self.backbone.eval()
        states = states_of(self.backbone, tokens, given, order, length)
        true = token_vectors(self.backbone, tokens).detach() if c.curriculum_steps else None
        self.head.train()
        scores = self.head.score(states, true, routed if true is not None else None)
        self.backbone.train(c.body != "frozen")
        terms = {}
        if c.gen_coeff:
            mask = split_mask(scores, self.visible, c.tau_at(step))
            terms["gen"] = generation_loss(self.backbone, tokens, given, mask, generator)
        if self.importance is not None:
            target = self.importance(tokens, labels, scores.detach(), generator)
            terms["oracle"] = F.mse_loss(scores.sigmoid(), target)
        if self.reward is not None:
            rewarded = partial(self.reward, tokens, labels)
            terms["reinforce"] = policy_gradient(scores, self.visible, c.splits, rewarded, generator)
        # a step; the head's gradient is clipped by itself
        loss = self._held(scores) + sum(getattr(c, f"{name}_coeff") * term for name, term in terms.items())
        optimizer.zero_grad()
        loss.backward()
        if c.head_clip is not None:
            nn.utils.clip_grad_norm_(self.head.parameters(), c.head_clip)
        if len(self.body):
            nn.utils.clip_grad_norm_(self.body.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss.item()} | {f"loss_{name}": term.item() for name, term in terms.items()}

    def _held(self, scores: Tensor) -> Tensor:
        """What holds the scores in place, whatever they are for."""
        c = self.config
        held = c.l2_coeff * scores.square().mean()
        if c.spread_coeff:
            held = held + c.spread_coeff * (-scores.std(-1, correction=0)).exp().mean()
        if c.entropy_coeff:
            log_probs = scores.log_softmax(-1)
            held = held + c.entropy_coeff * (log_probs.exp() * log_probs).sum(-1).mean()
        return held

    @torch.no_grad()
    def watch(self) -> dict[str, float]:
        """What shows a collapse or an explosion, on the images kept back, of which nothing is visible.

        Returns:
            score_std, the mean standard deviation of an image's scores, free of any normalisation; loss_split, the
            generation loss of the head's split, and loss_random_split, that of random ones at the same noises.
        """
        self.head.eval()
        self.backbone.eval()
        device, generator = backbone_device(self.backbone), torch.Generator().manual_seed(0)
        images, geometry = self.watched.first(256), self.backbone.geometry
        tokens, labels = images.tokens[:].to(device), images.labels[:].to(device)
        order, length = (part.to(device) for part in random_contexts(geometry, len(labels), True, generator))
        scores = self.head.score(states_of(self.backbone, tokens, labels, order, length))
        losses = {}
        for name, ranked in {"loss_split": scores, "loss_random_split": order.argsort(1).float()}.items():
            noises = torch.Generator().manual_seed(0)
            losses[name] = generation_loss(self.backbone, tokens, labels, split_mask(ranked, self.visible, 1.0), noises)
        spread = score_spread(scores, torch.ones_like(scores, dtype=torch.bool)).mean()
        return {"score_std": spread.item()} | {name: loss.item() for name, loss in losses.items()}

    def _warn(self, score_std: float, step: int, warned: list[str]) -> None:
        """Say once that the scores have collapsed, and once that they have exploded."""
        c = self.config
        limits = {
            "collapsed": (score_std < c.collapse, f"below collapse={c.collapse:g}: all orders are alike to the head"),
            "exploded": (score_std > c.explosion, f"above explosion={c.explosion:g}: the soft mask has no gradient"),
        }
        for what, (wrong, meaning) in limits.items():
            if wrong and not any(what in line for line in warned):
                warned.append(f"scores have {what} at step {step}: score_std {score_std:.3g} is {meaning}")
                print_main(f"ste: warning: {warned[-1]}")


def _check(setup: Setup, config: Config) -> None:
    layers = config.layers if config.body == "top" else 0
    require_tunable(setup.backbone, layers, "ste", (OrderRobustTransformer, MaskedTransformer))
    if config.judged and setup.labels.kind != CLASSIFIER:
        raise ValueError(
            f"agent.oracle_coeff={config.oracle_coeff:g} and agent.reinforce_coeff={config.reinforce_coeff:g} need "
            f"labels=classifier, which says how important blocks are; got labels.kind={setup.labels.kind}"
        )
    if config.oracle_coeff:  # before the classifier is trained
        require_clusters(setup.labels.grouping, setup.backbone.geometry, setup.labels.clusters, scored=True)
    if setup.planner.network != "orderhead":
        raise ValueError(f"agent=ste trains planner=orderhead, got planner.network={setup.planner.network}")
    for what, count in (
        ("blocks, which it splits", setup.backbone.geometry.num_blocks),
        ("planner images, of which it keeps some back", len(load_split(setup.data, "planner"))),
    ):
        if count < 2:
            raise ValueError(f"agent=ste needs at least 2 {what}; got {count}")


def _idle(config: Config) -> list[str]:
    """Settings of bodies that are not trained and of terms that weigh nothing."""
    unused = {"layers", "rank"} - {"top": {"layers"}, "lora": {"rank"}}.get(config.body, set())
    unused |= {"body_learning_rate"} if config.body == "frozen" else set()
    unused |= {f"{name}_coeff" for name in ("reinforce", "spread", "entropy") if not getattr(config, f"{name}_coeff")}
    return sorted(unused | (set() if config.reinforce_coeff else {"splits"}))


def _describe(setup: Setup, config: Config) -> dict[str, Any]:
    """The classifier, which the labels' settings determine."""
    return {"labels": label_settings(setup.labels)} if config.judged else {}


AGENT = Agent(
    Config,
    train,
    environment=False,
    judged=True,
    check=_check,
    idle=_idle,
    describe=_describe,
    scores_alone=True,
    alone=True,
)
