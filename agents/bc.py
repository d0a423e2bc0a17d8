"""Behaviour cloning on oracle labels: learn the value of every hidden block from stored contexts.

Targets: "utility" regresses U of every candidate (default: the label's argmax is noisy, its utilities
are less so; design, section 3, fact 5), "soft" is listwise cross-entropy to softmax(U / temperature), "label"
is cross-entropy on the argmax (the first version of the research plan). "charged" regresses minus the block's own
loss: what the likelihood objective charges for revealing it now (the greedy policy of the reward's other form).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional as F

from orderrl import distributed
from orderrl.geometry import BlockGrid
from orderrl.oracle import WEIGHTS, distance_weights, utilities
from orderrl.planner import OrderHead
from orderrl.resuming import Part, Unfinished, steps_of

TARGETS = ("label", "soft", "utility", "charged")
_CHUNK = 4096  # contexts whose gains are read at a time


@dataclass(frozen=True)
class BCConfig:
    """How a planner is cloned from labels.

    Attributes:
        target: "utility", "soft", "label" or "charged".
        steps: optimiser steps.
        batch_size: contexts per step.
        learning_rate: peak of the cosine schedule.
        weight_decay: of AdamW.
        temperature: of target "soft", in standard deviations of U.
        weight: weight of the utility, "uniform" or "far".
        sigma: reach of "far", in blocks.
        held_out: share of the images kept for choosing the best checkpoint.
        evaluate_every: steps between evaluations on the held-out images.
        seed: of the split and batches.
    """

    target: str = "utility"
    steps: int = 400
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    temperature: float = 0.5
    weight: str = "uniform"
    sigma: float = 1.5
    held_out: float = 0.1
    evaluate_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("target", TARGETS), ("weight", WEIGHTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        for name in ("steps", "batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie in (0, 1), got {self.held_out}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")


def bc_loss(scores: Tensor, utility: Tensor, hidden: Tensor, target: str, temperature: float) -> Tensor:
    """Loss of predicted block scores.

    Args:
        scores: (M, B).
        utility: (M, B), the worth of each candidate, in standard deviations.
        hidden: (M, B) bool, the candidates.
        target: see `BCConfig`.
        temperature: of target "soft".

    Returns:
        () mean over states (targets "label", "soft") or candidates ("utility").
    """
    if target in ("utility", "charged"):
        return F.mse_loss(scores[hidden], utility[hidden])
    log_probs = scores.masked_fill(~hidden, -1e9).log_softmax(-1)
    masked = utility.masked_fill(~hidden, -torch.inf)
    if target == "label":
        return F.nll_loss(log_probs, masked.argmax(-1))
    goal = (masked / temperature).softmax(-1)
    return -(goal * log_probs).sum(-1).mean()


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
        mean U of the first-ranked block, in standard deviations ("chosen"), and the mean regret to the best.
    """
    planner.eval()
    hidden = ~data["visible"]
    scores = planner(data)[0].masked_fill(~hidden, -torch.inf)
    chosen = utility.gather(1, scores.argmax(-1, keepdim=True))[:, 0]
    best = utility.masked_fill(~hidden, -torch.inf).amax(-1)
    return {"chosen": chosen.mean().item(), "regret": (best - chosen).mean().item()}


def clone(
    planner: OrderHead, labels: TensorDict, geometry: BlockGrid, config: BCConfig, work: Unfinished | None = None
) -> Iterator[dict[str, float]]:
    """Train in place; on return the planner holds the weights that chose best on held-out images.

    Labels are read batch by batch from where they are, memory or disk. Of several processes each takes its rows of
    every batch, and the gradient is that of the whole batch.

    Args:
        planner: trained in place.
        labels: contexts as `label_contexts` stores them.
        geometry: the block grid.
        config: hyper-parameters.
        work: keeps the training's state, so that an interrupted one continues.

    Yields:
        One dict of metrics a step: step, loss, reasoning_steps; at evaluations also chosen and regret
        (standard deviations of U).

    Raises:
        ValueError: if the labels come from a single image, so that none can be kept back, or there are more processes
            than contexts in a batch.
    """
    generator = torch.Generator().manual_seed(config.seed)
    utility = _targets(labels, geometry, config)
    train, held_out = _split(labels["image"], config.held_out, generator)
    kept_back = _observations(labels, held_out)
    optimizer = torch.optim.AdamW(planner.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    # 0.11 and not 0.1: a warm-up of exactly one step would make OneCycleLR divide by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps, pct_start=0.11)
    best: dict[str, Any] = {"chosen": -float("inf"), "weights": _copy(planner)}
    final = planner.config.reasoning_steps
    parts: dict[str, Part] = {
        "planner": planner, "optimizer": optimizer, "schedule": schedule, "generator": generator, "best": best,
    }  # fmt: skip
    for step in steps_of(work, config.steps, **parts):
        drawn = train[torch.randint(len(train), (config.batch_size,), generator=generator)]
        rows = distributed.rows_of(drawn)
        batch = _observations(labels, rows)
        planner.train()
        reasoning = reasoning_steps_at(step, config.steps, final)
        scores, _, _ = planner(batch, reasoning)
        loss = bc_loss(scores, utility[rows], batch["action_mask"], config.target, config.temperature)
        optimizer.zero_grad()
        mean = distributed.backward(loss, planner.parameters(), _weight(labels, rows, drawn, config.target))
        torch.nn.utils.clip_grad_norm_(planner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        row = {"step": step + 1, "loss": mean, "reasoning_steps": float(reasoning)}
        if (step + 1) % config.evaluate_every == 0 or step + 1 == config.steps:
            row |= held_out_metrics(planner, kept_back, utility[held_out])
            trained = reasoning == final or step + 1 == config.steps
            if trained and row["chosen"] > best["chosen"]:
                best |= {"chosen": row["chosen"], "weights": _copy(planner)}
        yield row
    planner.load_state_dict(best["weights"])
    planner.eval()


def _targets(labels: TensorDict, geometry: BlockGrid, config: BCConfig) -> Tensor:
    """(n, B) worth of every block, in standard deviations over all candidates."""
    if config.target == "charged":
        utility = -labels["loss"]
    else:
        weights = distance_weights(geometry, config.weight, config.sigma)
        chunks = torch.arange(len(labels)).split(_CHUNK)  # gains (n, B, B) may be larger than the memory
        utility = torch.cat([utilities(labels["gains"][rows], geometry, weights) for rows in chunks])
    return utility / utility[~labels["visible"]].std().clamp_min(1e-12)  # a backbone may see no difference


def _split(image: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows (int64) of contexts to learn from and of those kept back, by image."""
    images = image.unique()
    if len(images) < 2:
        raise ValueError(f"labels must come from at least 2 images, one is kept back; got {len(images)}")
    count = min(max(1, int(share * len(images))), len(images) - 1)
    kept_back = torch.isin(image, images[torch.randperm(len(images), generator=generator)[:count]])
    return (~kept_back).nonzero().flatten(), kept_back.nonzero().flatten()


def _observations(labels: TensorDict, rows: Tensor) -> TensorDict:
    """What a planner sees of some contexts."""
    batch = labels.exclude("order", "length", "gains", "loss")[rows]
    batch["action_mask"] = ~batch["visible"]
    batch["fraction"] = batch["visible"].float().mean(-1, keepdim=True)
    return batch


def _weight(labels: TensorDict, rows: Tensor, drawn: Tensor, target: str) -> float:
    """Share of some rows in the mean loss of the batch: in candidates where they are regressed, else in states."""
    if target in ("utility", "charged"):
        return int((~labels["visible"][rows]).sum()) / int((~labels["visible"][drawn]).sum())
    return len(rows) / len(drawn)


def _copy(planner: OrderHead) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in planner.state_dict().items()}
