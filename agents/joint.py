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

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from orderrl.agents.bc import BCConfig, cloning_losses, score_targets, split_images
from orderrl.agents.play import roll_out
from orderrl.agents.policies import RankingPolicy, planner_scorer
from orderrl.backbones import Backbone, OrderRobustTransformer
from orderrl.backbones.pretraining import block_orders, mean_loss, order_losses, training_loss
from orderrl.backbones.protocol import backbone_device
from orderrl.backbones.registry import with_block_size
from orderrl.data import TokenSet
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.planner import OrderHead, PlannerOutput
from orderrl.runtime import distributed
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.job import Part, Unfinished, steps_of
from orderrl.runtime.values import at_least, between, check_fields, positive

OH_KEYS = ("target", "temperature", "weight", "sigma", "held_out")  # of L_OH, shared by the clone
Augmentation = Callable[[Tensor, torch.Generator, float], Tensor]


@dataclass(frozen=True)
class JointConfig:
    """How planner and backbone are tuned together.

    Attributes:
        layers: top transformer layers that are tuned, with the final norm and the output matrix; 0 tunes none.
        oh_coeff: lambda, the weight of L_OH.
        steps: optimiser steps.
        batch_size: images a step, for L_AR.
        contexts: labelled contexts a step, for L_OH.
        learning_rate: of the planner, peak of the cosine schedule.
        backbone_learning_rate: of the backbone's top, peak of the cosine schedule.
        weight_decay: of AdamW, for the planner.
        label_dropout: share of labels replaced by the dropped label in L_AR, for guidance.
        augmentation: strength of the data set's augmentation in L_AR; 0 is none.
        target, temperature, weight, sigma, held_out: of L_OH, see `BCConfig`.
        held_out_images: held-out images on which orders are played and losses measured at an evaluation.
        held_out_contexts: held-out contexts on which the planner is measured at an evaluation.
        evaluate_every: steps between evaluations.
        collapse: training stops when score_std falls below this share of its start.
        explosion: training stops when the loss under random orders exceeds its start by more than this share.
        seed: of the split and batches; the clone's, so that held-out images are those that it never learnt from.
    """

    layers: int = 1
    oh_coeff: float = 0.1
    steps: int = 300
    batch_size: int = 64
    contexts: int = 64
    learning_rate: float = 3e-4
    backbone_learning_rate: float = 3e-5
    weight_decay: float = 0.05
    label_dropout: float = 0.1
    augmentation: float = 1.0
    target: str = "utility"
    temperature: float = 0.5
    weight: str = "uniform"
    sigma: float = 1.5
    held_out: float = 0.1
    held_out_images: int = 64
    held_out_contexts: int = 256
    evaluate_every: int = 25
    collapse: float = 0.5
    explosion: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            at_least(1, "steps", "batch_size", "contexts", "held_out_images", "held_out_contexts", "evaluate_every"),
            at_least(0, "layers", "oh_coeff", "weight_decay", "augmentation", "explosion", "seed"),
            positive("learning_rate", "backbone_learning_rate"),
            between("[0, 1]", "label_dropout", "collapse"),
        )
        _ = self.cloning  # checks what L_OH shares with cloning
        if self.target == "pairs":
            raise ValueError("target='pairs' is for agent=bc; L_OH learns scores: label, soft, utility or charged")

    @property
    def cloning(self) -> BCConfig:
        """L_OH as a cloning loss."""
        return BCConfig(**{key: getattr(self, key) for key in OH_KEYS}, seed=self.seed)


def copy_to_tune(backbone: Backbone, layers: int) -> OrderRobustTransformer:
    """A copy of a backbone, to be tuned while the original stays as it is.

    Raises:
        ValueError: if it is no order-robust causal transformer in float32, or has fewer layers.
    """
    if type(backbone) is not OrderRobustTransformer:
        raise ValueError(
            f"agent=joint tunes backbones of type OrderRobustTransformer (digits, canvas, small, RandAR), got "
            f"{type(backbone).__name__}; use agent=bc or agent=ppo, which leave the backbone as it is"
        )
    dtype = backbone.output.weight.dtype
    if dtype != torch.float32:
        raise ValueError(f"agent=joint makes steps too small for {dtype}; use backbone.dtype=float32")
    if layers > backbone.config.layers:
        raise ValueError(f"layers={layers} exceed the backbone's; use 0 to {backbone.config.layers}")
    tuned = with_block_size(backbone, backbone.config.block_size)
    tuned.packing = backbone.packing
    return tuned


def top_of(backbone: OrderRobustTransformer, layers: int) -> nn.ModuleList:
    """The part that is tuned: the last layers, the final norm and the output matrix; nothing for layers=0."""
    return nn.ModuleList([*backbone.layers[-layers:], backbone.norm, backbone.output] if layers else [])


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
    return TensorDict(
        {
            "hidden": hidden.masked_fill(visible[..., None], 0.0),
            "entropy": entropy.masked_fill(visible, 0.0),
            "visible": visible,
            "label": labels,
            "fraction": visible.float().mean(-1, keepdim=True),
            "action_mask": ~visible,
        },
        batch_size=[len(visible)],
    )


class JointTuning:
    """Tunes a planner and the top of a backbone.

    Args:
        planner: trained in place; started from a clone.
        backbone: tuned in place; a copy, see `copy_to_tune`.
        labels: contexts as `label_contexts` stores them, made by the frozen backbone.
        labelled: the images that they name, of the planner split.
        images: for L_AR, of the backbone split.
        config: hyper-parameters.
        augment: the data set's augmentation, called with tokens, generator and strength.

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
        config: JointConfig,
        augment: Augmentation | None = None,
    ) -> None:
        self.planner, self.backbone, self.config = planner, backbone, config
        self.labels, self.labelled, self.images, self.augment = labels, labelled, images, augment
        self.contexts = labels.select("image", "order", "length", "label", "visible")  # not the large gains
        self.top = top_of(backbone, config.layers).requires_grad_(True)
        self.utility, _ = score_targets(labels, backbone.geometry, config.cloning)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.learnt, held_out = split_images(labels["image"], config.held_out, self.generator)
        self.watched = held_out[:: -(-len(held_out) // config.held_out_contexts)]
        shown = labels["image"][held_out].unique()[: config.held_out_images]
        self.shown = replace(labelled, tokens=labelled.tokens[shown], labels=labelled.labels[shown], identity=None)
        self.outcome: dict[str, Any] = {}

    @isolated_float32
    def train(self, work: Unfinished | None = None) -> Iterator[dict[str, float]]:
        """Train in place; on return planner and backbone are in the state of least held-out loss.

        Of several processes each takes its rows of every batch, and the gradient is that of the whole batch.

        Args:
            work: keeps the training's state, so that an interrupted one continues.

        Yields:
            One dict of metrics a step: step, loss (L), loss_ar (nats per token), loss_oh; at evaluations, and for step
            0 before the first, also what `watch` gives.
        """
        c = self.config
        groups = [
            {"params": list(self.planner.parameters()), "weight_decay": c.weight_decay},
            {"params": list(self.top.parameters()), "weight_decay": 0.0},  # it is to stay near its start, not near 0
        ]
        optimizer = torch.optim.AdamW(groups)
        peaks = [c.learning_rate, c.backbone_learning_rate]
        # 0.11 and not 0.1: a warm-up of exactly one step would make OneCycleLR divide by zero
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, c.steps, pct_start=0.11)
        start = distributed.on_main(self.watch)
        yield {"step": 0, **start}
        best: dict[str, Any] = {"step": 0, "watched": start, "weights": self._weights()}
        parts: dict[str, Part] = {
            "planner": self.planner, "top": self.top, "optimizer": optimizer, "schedule": schedule,
            "generator": self.generator, "best": best,
        }  # fmt: skip
        stopped = None
        for step in steps_of(work, c.steps, **parts):
            row = self._step(optimizer) | {"step": step + 1}
            schedule.step()
            if not math.isfinite(row["loss"]):
                stopped = f"explosion at step {step + 1}: the training loss is {row['loss']}"
            elif (step + 1) % c.evaluate_every == 0 or step + 1 == c.steps:
                now = distributed.on_main(self.watch)
                row |= now
                stopped = self._failure(start, now, step + 1)
                if stopped is None and now["held_out_loss"] < best["watched"]["held_out_loss"]:
                    best |= {"step": step + 1, "watched": now, "weights": self._weights()}
            yield row
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
        rows = torch.randint(len(self.images), (c.batch_size,), generator=generator)
        tokens, labels = self.images.tokens[rows], self.images.labels[rows]
        if self.augment is not None and c.augmentation > 0:
            tokens = self.augment(tokens, generator, c.augmentation)
        dropped = torch.rand(c.batch_size, generator=generator) < c.label_dropout
        labels = torch.where(dropped, self.backbone.num_classes, labels)
        order = block_orders(self.backbone.geometry, c.batch_size, 1.0, generator)
        mine = distributed.rows_of(torch.arange(c.batch_size))
        device = backbone_device(self.backbone)
        self.backbone.train()
        tokens, labels, order = (part[mine].to(device) for part in (tokens, labels, order))
        return training_loss(self.backbone, tokens, labels, order, generator) * (len(mine) / c.batch_size)

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
        """What some contexts contribute to the mean L_OH of all that were drawn; on the CPU, where labels are."""
        there = PlannerOutput(*(part.cpu() for part in output))
        losses = cloning_losses(there, self.utility, None, self.labels, rows, drawn, self.config.cloning)
        return losses["scores"]

    def _score_watched(self) -> tuple[float, float]:
        """Mean standard deviation of block scores over the hidden blocks of a watched context, and L_OH."""
        spread, loss = 0.0, 0.0
        for rows in self.watched.split(self.config.contexts):
            observation = self._observe(rows)
            output = self.planner(observation)
            spread += _spread(output.scores, observation["action_mask"]).sum().item() / len(self.watched)
            loss += self._loss_of(output, rows, self.watched).item()
        return spread, loss

    def _play(self) -> tuple[Tensor, float]:
        """The planner's own order (n, B) of the held-out images, block by block, and its information-gain AUC."""
        core = NextBlockCore(self.backbone, self.shown, len(self.shown), CoreConfig())  # objective context
        policy = RankingPolicy(planner_scorer(self.planner), core.geometry)
        played = roll_out(core, policy, torch.Generator(), torch.arange(len(self.shown)))
        return played.order.cpu(), played.gain_auc.mean().item()

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


def _spread(scores: Tensor, hidden: Tensor) -> Tensor:
    """Standard deviation of scores (M, B) over the hidden blocks of each context, (M,)."""
    count = hidden.sum(-1, keepdim=True)
    mean = scores.masked_fill(~hidden, 0.0).sum(-1, keepdim=True) / count
    return ((scores - mean).masked_fill(~hidden, 0.0).square().sum(-1) / count[:, 0]).sqrt()
