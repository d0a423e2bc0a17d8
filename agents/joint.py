"""Limited joint tuning: the planner and the top layers of a copy of the backbone on L = L_AR + lambda * L_OH.

Notable:
- L_AR is the backbone's own loss in random block orders on images of the *backbone* split, so that it stays
  order-robust; L_OH is the planner's cloning loss on labelled contexts of the *planner* split (research plan, stage 5).
- The observation of those contexts is computed anew by the tuned backbone, so the gradient of L_OH reaches its top
  layers. The utilities stay those of the frozen backbone that made the labels.
- Watched on held-out images: the spread of the planner's scores, which a collapse takes away, and the losses of the
  backbone under several orders, which an explosion raises. Either ends the training; the best state before it is kept.
- `layers=0` is the frozen run beside it: as many planner steps on the same batches, the backbone equal to the last bit.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from orderrl.agents import bc
from orderrl.agents.agent import Agent, Trained
from orderrl.agents.bc import cloning_losses, score_spread, score_targets, split_images
from orderrl.agents.body import optimiser_of, require_tunable, top_of, tunable_copy
from orderrl.agents.play import play
from orderrl.agents.policies import RankingPolicy, planner_scorer
from orderrl.backbones import OrderRobustTransformer
from orderrl.backbones.pretraining import block_orders, draw_batch, mean_loss, order_losses, training_loss
from orderrl.backbones.protocol import backbone_device
from orderrl.data import TokenSet, load_split
from orderrl.envs.core import CoreConfig, NextBlockCore, Transition
from orderrl.envs.observation import observed
from orderrl.factory import Setup
from orderrl.labels import open_labels, random_label_sets
from orderrl.planner import OrderHead, PlannerOutput
from orderrl.runtime import distributed
from orderrl.runtime.distributed import print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.job import Job
from orderrl.runtime.values import Settings, at_least, between, positive, setting

OH_KEYS = ("target", "temperature", "weight", "sigma", "held_out")  # of L_OH, shared by the clone


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """How planner and backbone are tuned together.

    The settings target, temperature, weight, sigma and held_out are those of L_OH and of the clone to start from.
    """

    start: str | None = setting(
        None,
        "Planner checkpoint to start from, or newest (the newest clone in the cache); null finds or trains the clone "
        "of this config",
    )
    layers: int = setting(
        1, "Top transformer layers that are tuned, with the final norm and the output; 0 tunes none", at_least(0)
    )
    oh_coeff: float = setting(0.1, "Lambda of L = L_AR + lambda * L_OH", at_least(0))
    steps: int = setting(300, "Optimiser steps", at_least(1))
    batch_size: int = setting(64, "Images a step, for L_AR", at_least(1))
    contexts: int = setting(64, "Labelled contexts a step, for L_OH", at_least(1))
    learning_rate: float = setting(3e-4, "Peak learning rate of the planner", positive())
    backbone_learning_rate: float = setting(3e-5, "Peak learning rate of the backbone's top", positive())
    weight_decay: float = setting(0.05, "Weight decay of AdamW, for the planner", at_least(0))
    label_dropout: float = setting(
        0.1, "Share of labels replaced by the dropped label in L_AR, for guidance", between("[0, 1]")
    )
    augmentation: float = setting(1.0, "Strength of the data set's augmentation in L_AR; 0 is none", at_least(0))
    target: str = setting("utility", "What L_OH learns and the clone learnt: utility, soft, label or charged")
    temperature: float = setting(0.5, "Temperature of target soft, in standard deviations of U")
    weight: str = setting("uniform", "Weight of the utility: uniform, or far (far structure counts)")
    sigma: float = setting(1.5, "Reach of weight far, in blocks")
    held_out: float = setting(0.1, "Share of the planner images that are watched and never learnt from")
    held_out_images: int = setting(
        64, "Images of them on which orders are played and losses measured at an evaluation", at_least(1)
    )
    held_out_contexts: int = setting(
        256, "Contexts of them on which the planner is measured at an evaluation", at_least(1)
    )
    evaluate_every: int = setting(25, "Steps between evaluations", at_least(1))
    collapse: float = setting(
        0.5, "Training stops when score_std falls below this share of its start", between("[0, 1]")
    )
    explosion: float = setting(
        0.05,
        "Training stops when the loss under random orders rises above its start by more than this share",
        at_least(0),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.cloning  # checks what L_OH shares with cloning
        if self.target == "pairs":
            raise ValueError("target='pairs' is for agent=bc; L_OH learns scores: label, soft, utility or charged")

    @property
    def cloning(self) -> bc.Config:
        """L_OH as a cloning loss, and the clone to start from."""
        return bc.Config(**{key: getattr(self, key) for key in OH_KEYS})


def train(setup: Setup, config: Config, job: Job) -> Trained:
    """Tune the planner that the setup starts from and a copy of its backbone."""
    assert setup.start is not None
    assert isinstance(setup.backbone, OrderRobustTransformer)
    tuned = tunable_copy(setup.backbone)
    torch.manual_seed(setup.seed)
    tuning = JointTuning(
        setup.start,
        tuned,
        open_labels(setup.label_sets[0], setup.backbone),
        load_split(setup.data, "planner"),
        load_split(setup.data, "backbone"),
        config,
        setup.seed,
    )
    tuning.train(job)
    outcome = tuning.outcome
    print_main(f"joint: {outcome['stopped'] or 'no collapse, no explosion'}; kept step {outcome['kept_step']}")
    return Trained(tuning.planner, tuned, outcome)


def observe(backbone: OrderRobustTransformer, images: TokenSet, contexts: TensorDict) -> TensorDict:
    """The environment's observation of labelled contexts, with gradients for the backbone.

    Args:
        backbone: computes hidden states and entropies.
        images: those that the contexts name.
        contexts: batch (M,), with image, order, length, label and visible as `label_contexts` stores them.

    Returns:
        What `NextBlockCore.observation` gives for budgets (1,), batch (M,), on the backbone's device.
    """
    device = backbone_device(backbone)
    tokens, labels = images.tokens[contexts["image"]].to(device), contexts["label"].to(device)
    visible, length = contexts["visible"].to(device), contexts["length"].to(device)
    revealed = contexts["order"][:, : int(contexts["length"].max())].to(device)
    hidden, entropy = backbone.observe_contexts(tokens, labels, revealed, length)
    return observed(hidden.masked_fill(visible[..., None], 0.0), entropy.masked_fill(visible, 0.0), visible, labels)


class JointTuning:
    """Tunes a planner and the top of a backbone.

    Args:
        planner: trained in place; started from a clone.
        backbone: tuned in place; a copy, see `tunable_copy`.
        labels: contexts as `label_contexts` stores them, made by the frozen backbone.
        labelled: the images that they name, of the planner split.
        images: for L_AR, of the backbone split.
        seed: of the split and batches; the clone's, so that held-out images are those that it never learnt from.

    Attributes:
        outcome: after training what was measured at the start and in the state that is kept, its step, and why
            training stopped before its end (None if it did not).

    Raises:
        ValueError: if the labels come from a single image, so that none can be kept back.
    """

    @isolated_float32
    def __init__(
        self,
        planner: OrderHead,
        backbone: OrderRobustTransformer,
        labels: TensorDict,
        labelled: TokenSet,
        images: TokenSet,
        config: Config,
        seed: int = 0,
    ) -> None:
        self.planner, self.backbone, self.config = planner, backbone, config
        self.labels, self.labelled, self.images = labels, labelled, images
        self.contexts = labels.select("image", "order", "length", "label", "visible")  # not the large gains
        self.top = top_of(backbone, config.layers).requires_grad_(True)
        self.utility, _ = score_targets(labels, backbone.geometry, config.cloning)
        self.generator = torch.Generator().manual_seed(seed)
        self.learnt, held_out = split_images(labels["image"], config.held_out, self.generator)
        self.watched = held_out[:: -(-len(held_out) // config.held_out_contexts)]
        shown = labels["image"][held_out].unique()[: config.held_out_images]
        self.outcome: dict[str, Any] = {}
        self.shown = labelled.at(shown)

    @isolated_float32
    def train(self, job: Job | None = None) -> None:
        """Train in place; on return planner and backbone are in the state of least held-out loss.

        Of several processes each takes its rows of every batch, and the gradient is that of the whole batch.

        Metrics: loss (L), loss_ar (nats per token), loss_oh; at evaluations, and for step 0 before the first, also what
        `watch` gives.
        """
        c, job = self.config, job or Job()
        rates = c.learning_rate, c.backbone_learning_rate
        optimizer, schedule = optimiser_of(self.planner, self.top, c.weight_decay, rates, c.steps)
        # what was measured before
        start = distributed.on_main(self.watch)
        job.log(**start)
        best: dict[str, Any] = {"step": 0, "watched": start, "weights": self._weights()}
        what = f"the top {c.layers} layers" if c.layers else "a frozen backbone"
        steps = job.steps(
            c.steps, f"tuning planner and {what}", "steps", "loss {loss:.3f}", planner=self.planner, top=self.top,
            optimizer=optimizer, schedule=schedule, generator=self.generator, best=best,
        )  # fmt: skip
        stopped = None
        for step in steps:
            row = self._step(optimizer)
            schedule.step()
            # the best state so far, or the end
            if not math.isfinite(row["loss"]):
                stopped = f"explosion at step {step + 1}: the training loss is {row['loss']}"
            elif (step + 1) % c.evaluate_every == 0 or step + 1 == c.steps:
                now = distributed.on_main(self.watch)
                row |= now
                stopped = self._failure(start, now, step + 1)
                if stopped is None and now["held_out_loss"] < best["watched"]["held_out_loss"]:
                    best |= {"step": step + 1, "watched": now, "weights": self._weights()}
            job.record(**row)
            if stopped is not None:
                break
        self.planner.load_state_dict(best["weights"]["planner"])
        self.top.load_state_dict(best["weights"]["top"])
        self.planner.eval()
        self.backbone.eval().requires_grad_(False)
        self.outcome = {"start": start, "kept": best["watched"], "kept_step": best["step"], "stopped": stopped}

    @torch.no_grad()
    def watch(self) -> dict[str, float]:
        """What shows a collapse or an explosion, on held-out images and their contexts.

        Returns:
            loss_random, loss_raster, loss_token_raster and loss_planner: of the backbone in random block orders, raster
            blocks, raster tokens and the planner's own order, nats per token; gain_auc of the planner under the
            backbone; held_out_oh, its L_OH; score_std, the standard deviation of block scores over the hidden blocks of
            a context, its mean; held_out_loss = loss_random + lambda * held_out_oh.
        """
        self.planner.eval()
        self.backbone.eval()
        order, gain_auc = self._play()
        score_std, held_out_oh = self._score_watched()
        losses = order_losses(self.backbone, self.shown, repeats=1)
        return {
            **losses,
            "loss_planner": mean_loss(self.backbone, self.shown, self.backbone.geometry.token_order(order)),
            "gain_auc": gain_auc,
            "held_out_oh": held_out_oh,
            "score_std": score_std,
            "held_out_loss": losses["loss_random"] + self.config.oh_coeff * held_out_oh,
        }

    def _step(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """One step on L; none if it is not finite, so that no weight is lost."""
        loss_ar, loss_oh = self._backbone_loss(), self._planner_loss()
        trained = [*self.planner.parameters(), *self.top.parameters()]
        optimizer.zero_grad()
        loss = distributed.backward(loss_ar + self.config.oh_coeff * loss_oh.to(loss_ar.device), trained, 1.0)
        if math.isfinite(loss):
            for group in filter(lambda group: group["params"], optimizer.param_groups):
                nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()
        shares = distributed.gather((loss_ar.item(), loss_oh.item()))
        ar, oh = (sum(part) for part in zip(*shares, strict=True))
        return {"loss": loss, "loss_ar": ar, "loss_oh": oh}

    def _backbone_loss(self) -> Tensor:
        """L_AR of the next batch: this process's share of its mean."""
        c, generator = self.config, self.generator
        null = self.backbone.num_classes
        _, tokens, _, labels = draw_batch(self.images, c.batch_size, c.label_dropout, null, generator, c.augmentation)
        order = block_orders(self.backbone.geometry, c.batch_size, 1.0, generator)
        mine = distributed.rows_of(torch.arange(c.batch_size))
        device = backbone_device(self.backbone)
        self.backbone.train()
        tokens, labels, order = (part[mine].to(device) for part in (tokens, labels, order))
        losses = training_loss(self.backbone, tokens, labels, order, generator)
        return losses["loss"] * (len(mine) / c.batch_size)

    def _planner_loss(self) -> Tensor:
        """L_OH of the next contexts: this process's share of its mean."""
        c = self.config
        drawn = self.learnt[torch.randint(len(self.learnt), (c.contexts,), generator=self.generator)]
        rows = distributed.rows_of(drawn)
        self.planner.train()
        self.backbone.eval()  # the environment's observation knows no dropout
        return self._loss_of(self.planner(self._observe(rows)), rows, drawn)

    def _observe(self, rows: Tensor) -> TensorDict:
        return observe(self.backbone, self.labelled, self.contexts[rows])

    def _loss_of(self, output: PlannerOutput, rows: Tensor, drawn: Tensor) -> Tensor:
        """What some contexts contribute to the mean L_OH of all that were drawn."""
        losses = cloning_losses(output, self.utility, None, self.labels, rows, drawn, self.config.cloning)
        return losses["scores"]

    def _score_watched(self) -> tuple[float, float]:
        """Mean standard deviation of block scores over the hidden blocks of a watched context, and L_OH."""
        spread, loss = 0.0, 0.0
        for rows in self.watched.split(self.config.contexts):
            observation = self._observe(rows)
            output = self.planner(observation)
            spread += score_spread(output.scores, observation["action_mask"]).sum().item() / len(self.watched)
            loss += self._loss_of(output, rows, self.watched).item()
        return spread, loss

    def _play(self) -> tuple[Tensor, float]:
        """The planner's own order (n, B) of the held-out images, block by block, and its information-gain AUC."""
        core = NextBlockCore(self.backbone, self.shown, len(self.shown), CoreConfig())  # objective context
        core.reset(index=torch.arange(len(self.shown)))
        start, area = core.losses.sum(-1) / core.geometry.num_tokens, torch.zeros(len(self.shown), device=core.device)
        policy = RankingPolicy(planner_scorer(self.planner), core.geometry)

        def pay(actions: Tensor, transition: Transition) -> None:
            area.add_(transition.reward)

        play(core, policy, record=pay)
        return core.reveal_step.argsort(1).cpu(), (area / start).mean().item()

    def _failure(self, start: dict[str, float], now: dict[str, float], step: int) -> str | None:
        """Why training must stop, if it must."""
        c = self.config
        if not all(map(math.isfinite, now.values())):
            return (
                f"explosion at step {step}: {', '.join(k for k, v in now.items() if not math.isfinite(v))} not finite"
            )
        if now["loss_random"] > (1 + c.explosion) * start["loss_random"]:
            return (
                f"explosion at step {step}: loss_random rose from {start['loss_random']:.4f} to "
                f"{now['loss_random']:.4f} nats per token, by more than explosion={c.explosion:g} of its start"
            )
        if now["score_std"] < c.collapse * start["score_std"]:
            return (
                f"collapse at step {step}: score_std fell from {start['score_std']:.4f} to {now['score_std']:.4f}, "
                f"below collapse={c.collapse:g} of its start"
            )
        return None

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """A copy of what is trained."""
        parts = {"planner": self.planner.state_dict(), "top": self.top.state_dict()}
        return {name: {key: value.clone() for key, value in part.items()} for name, part in parts.items()}


AGENT = Agent(
    Config,
    train,
    environment=False,
    start=True,
    label_sets=random_label_sets,
    check=lambda setup, config: require_tunable(setup.backbone, config.layers, "joint"),
)
