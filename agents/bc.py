"""Behaviour cloning on oracle labels: learn the value of every hidden block from stored contexts.

Targets: "utility" regresses U of every candidate (default: the label's argmax is noisy, its utilities
are less so; design, section 3, fact 5), "soft" is listwise cross-entropy to softmax(U / temperature), "label"
is cross-entropy on the argmax (the first version of the research plan). "charged" regresses minus the block's own
loss: what the likelihood objective charges for revealing it now (the greedy policy of the reward's other form).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional as F

from orderrl.geometry import BlockGrid
from orderrl.oracle import WEIGHTS, distance_weights, utilities
from orderrl.planner import OrderHead

TARGETS = ("label", "soft", "utility", "charged")


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


def clone(planner: OrderHead, labels: TensorDict, geometry: BlockGrid, config: BCConfig) -> Iterator[dict[str, float]]:
    """Train in place; on return the planner holds the weights that chose best on held-out images.

    Args:
        planner: trained in place.
        labels: contexts as `label_contexts` stores them.
        geometry: the block grid.
        config: hyper-parameters.

    Yields:
        One dict of metrics a step: step, loss, reasoning_steps; at evaluations also chosen and regret
        (standard deviations of U).

    Raises:
        ValueError: if the labels come from a single image, so that none can be kept back.
    """
    generator = torch.Generator().manual_seed(config.seed)
    weights = distance_weights(geometry, config.weight, config.sigma)
    labels = labels.exclude("order", "length", inplace=False)
    labels["action_mask"] = ~labels["visible"]
    labels["fraction"] = labels["visible"].float().mean(-1, keepdim=True)
    gains, losses = labels.pop("gains"), labels.pop("loss")
    utility = -losses if config.target == "charged" else utilities(gains, geometry, weights)
    utility = utility / utility[labels["action_mask"]].std().clamp_min(1e-12)  # a backbone may see no difference
    images = labels["image"].unique()
    if len(images) < 2:
        raise ValueError(f"labels must come from at least 2 images, one is kept back; got {len(images)}")
    held_out_images = min(max(1, int(config.held_out * len(images))), len(images) - 1)
    kept_back = images[torch.randperm(len(images), generator=generator)[:held_out_images]]
    is_held_out = torch.isin(labels["image"], kept_back)
    held_out, held_out_utility = labels[is_held_out], utility[is_held_out]
    train, train_utility = labels[~is_held_out], utility[~is_held_out]
    optimizer = torch.optim.AdamW(planner.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    # 0.11 and not 0.1: a warm-up of exactly one step would make OneCycleLR divide by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps, pct_start=0.11)
    best, best_state = -float("inf"), copy.deepcopy(planner.state_dict())
    final = planner.config.reasoning_steps
    for step in range(config.steps):
        rows = torch.randint(len(train), (config.batch_size,), generator=generator)
        batch = train[rows]
        planner.train()
        reasoning = reasoning_steps_at(step, config.steps, final)
        scores, _, _ = planner(batch, reasoning)
        loss = bc_loss(scores, train_utility[rows], batch["action_mask"], config.target, config.temperature)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(planner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        row = {"step": step + 1, "loss": loss.item(), "reasoning_steps": float(reasoning)}
        if (step + 1) % config.evaluate_every == 0 or step + 1 == config.steps:
            row |= held_out_metrics(planner, held_out, held_out_utility)
            trained = reasoning == final or step + 1 == config.steps
            if trained and row["chosen"] > best:
                best, best_state = row["chosen"], copy.deepcopy(planner.state_dict())
        yield row
    planner.load_state_dict(best_state)
    planner.eval()
