"""Training a backbone: the block-RAR curriculum in random orders, and fine-tuning on the orders of a policy.

Block order is random, tokens inside a block stay in raster order (block form of RAR, Yu et al., 2024). An optional
anneal moves to raster at the end; the last checkpoint of the random phase is kept beside the final one and is the
default, because annealed weights forget random orders.

A specialist learns every image in the order that a policy chose for it (OAR, arXiv:2504.17069). The orders are
extracted by `orderrl.distillation` and learnt here. Where a step reveals several blocks, the training sequence is the
sampler's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from orderrl.backbones.fsdp import WholeTraining, split_weights
from orderrl.backbones.mar_backbone import MaskedTransformer
from orderrl.backbones.randar import OrderRobustTransformer, cross_entropy
from orderrl.backbones.registry import TrainableBackbone
from orderrl.data import TokenSet, augmented
from orderrl.geometry import BlockGrid
from orderrl.runtime import distributed
from orderrl.runtime.devices import has_bfloat16, moved
from orderrl.runtime.isolation import isolated, isolated_float32
from orderrl.runtime.job import Job, Part
from orderrl.runtime.learning_rate import warmed_cosine
from orderrl.runtime.optimisation import descend, parameter_groups
from orderrl.runtime.values import at_least, between, check_fields, positive, setting

RANDOM, TOKEN_RASTER = "random", "token_raster"
MAX_LOGITS = 2**26  # in one evaluation forward
_PROCESS_SEEDS = 1_000_000_007  # between the random numbers of processes


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How a backbone is trained."""

    order: str = setting(
        RANDOM,
        "Order of training: random (random block order, raster inside), token_raster (plain raster tokens), or a "
        "policy, such as diagonal, confidence or a planner's file: every image in the order that it chooses",
    )
    start: str | None = setting(
        None, "Backbone whose weights the training starts from, by name or path; null starts from nothing"
    )
    rounds: int = setting(
        1,
        "How often a policy's orders are extracted, from the weights of the moment; 0 trains random orders",
        at_least(0),
    )
    views: int = setting(4, "Augmented views of every image that a round extracts orders for", at_least(1))
    random_share: float = setting(0.0, "Share of images in random orders beside a policy's", between("[0, 1]"))
    locality: float = setting(
        0.0,
        "Distance regularisation of random orders: the next block is drawn with weight exp(-locality * distance in "
        "blocks); 0 is uniform",
        at_least(0),
    )
    position_weight: float = setting(
        0.1, "Weight of the position head's cross-entropy, where the backbone has one", at_least(0)
    )
    anneal_from: float = setting(
        1.0, "Share of the training after which random orders fade out; 1 never fades them", between("[0, 1]")
    )
    steps: int = setting(1500, "Optimiser steps", at_least(1))
    batch_size: int = setting(64, "Images of a step", at_least(1))
    learning_rate: float = setting(1e-3, "Peak learning rate", positive())
    warmup: int = setting(100, "Steps of linear warm-up", at_least(0))
    weight_decay: float = setting(0.05, "Weight decay of AdamW on matrices", at_least(0))
    label_dropout: float = setting(0.1, "Share of labels that are dropped, for guidance", between("[0, 1]"))
    augmentation: float = setting(0.0, "Strength of the data set's mild augmentation; 0 is none", at_least(0))
    ema: float = setting(0.998, "Decay of the averaged weights that are saved", between("[0, 1]"))
    evaluate_every: int = setting(500, "Steps between evaluations", at_least(1))
    bf16: bool = setting(True, "Compute in bfloat16 where the device has it")
    seed: int = 0  # of initialisation, batches, orders and augmentation

    def __post_init__(self) -> None:
        check_fields(self, at_least(0, "seed"))
        if self.policy is None and self.random_share:
            raise ValueError(f"random_share={self.random_share} stands beside a policy's order, got order={self.order}")

    @property
    def policy(self) -> str | None:
        """The policy whose orders are extracted; None trains random or plain raster orders."""
        return None if self.order in (RANDOM, TOKEN_RASTER) or not self.rounds else self.order


@dataclass(frozen=True)
class OrderedImages:
    """Images with an order each: what a specialist learns from.

    Attributes:
        tokens: (n, N) int64, or (n, N, C) float32.
        labels: (n,) int64.
        order: (n, B) int64, blocks in the order in which they are revealed.
        seen: (n, B) int64, for each of them in this order, how many blocks are visible when it is drawn.
    """

    tokens: Tensor
    labels: Tensor
    order: Tensor
    seen: Tensor

    def __len__(self) -> int:
        return len(self.order)


class OrderSource(Protocol):
    """Where the orders of a training come from: `orderrl.distillation.ImageOrders`."""

    @property
    def label(self) -> str:
        """What tables call the policy."""

    @property
    def hindsight(self) -> bool:
        """Whether the orders carry information about the tokens, so that no code length belongs to them."""

    def extract(self, backbone: TrainableBackbone, round: int) -> str:
        """Extract the orders of a round and say where they are; all processes call it."""

    def images(self, where: str, round: int) -> OrderedImages:
        """The images and orders that `extract` left for a round; all processes call it."""

    def of(self, data: TokenSet, backbone: TrainableBackbone) -> OrderedImages:
        """The orders of other images."""

    def keep(self, folder: Path) -> dict[str, Any]:
        """Copy what the policy needs to the folder of a specialist; what its `Origin` says of it."""


def random_share(step: int, config: PretrainConfig) -> float:
    """Probability that an image is trained in a random block order at this step; else raster blocks."""
    if config.order == TOKEN_RASTER:
        return 0.0
    if config.policy is not None:
        return config.random_share
    start = config.anneal_from * config.steps
    if step < start:
        return 1.0
    return 1.0 - (step - start) / max(config.steps - start, 1)


def block_orders(
    geometry: BlockGrid, count: int, share: float, generator: torch.Generator, locality: float = 0.0
) -> Tensor:
    """Token orders (count, N) int64: random block order with probability `share`, else raster blocks."""
    shuffled = random_blocks(geometry, count, generator, locality)
    raster = torch.arange(geometry.num_blocks).expand_as(shuffled)
    chosen = torch.rand(count, 1, generator=generator, dtype=torch.float32) < share
    return geometry.token_order(torch.where(chosen, shuffled, raster))


def random_blocks(geometry: BlockGrid, count: int, generator: torch.Generator, locality: float = 0.0) -> Tensor:
    """Random block orders (count, B) int64; with locality the next block is drawn with weight exp(-locality * d).

    d is the distance to the block before, in blocks; the first block is drawn uniformly.
    """
    if not locality:
        return torch.rand(count, geometry.num_blocks, generator=generator, dtype=torch.float32).argsort(1)
    weights = (-locality * geometry.distances).exp()
    order = [torch.randint(geometry.num_blocks, (count, 1), generator=generator)]
    hidden = torch.ones(count, geometry.num_blocks, dtype=torch.float32)
    for _ in range(geometry.num_blocks - 1):
        hidden.scatter_(1, order[-1], 0.0)
        left = hidden * weights[order[-1][:, 0]].clamp_min(torch.finfo(torch.float32).tiny)
        order.append(torch.multinomial(left, 1, generator=generator))
    return torch.cat(order, 1)


def raster_token_orders(geometry: BlockGrid, count: int) -> Tensor:
    """Plain raster token order for `count` images, (count, N) int64: what a raster-only model is trained on."""
    return torch.arange(geometry.num_tokens).expand(count, -1)


@torch.no_grad()
def mean_loss(backbone: TrainableBackbone, data: TokenSet, orders: Tensor, seen: Tensor | None = None) -> float:
    """Mean teacher-forced loss of a token set under given token orders (n, N), nats (or DiffLoss units) per token.

    Where blocks of a step do not see each other, `seen` (n, B) is as in `OrderedImages`.
    """
    device = next(backbone.parameters()).device
    batch_size = min(500, max(1, MAX_LOGITS // (orders.shape[1] * max(backbone.vocab_size, 1024))))
    total = 0.0
    for rows in torch.arange(len(data)).split(batch_size):
        tokens, order, labels = (moved(part[rows], device) for part in (data.tokens, orders, data.labels))
        if isinstance(backbone, MaskedTransformer):
            total += backbone.mean_loss(tokens, labels, order) * order.numel()
            continue
        if seen is None:
            logits = backbone.teacher_forced(tokens, labels, order)
        else:
            logits, _ = _order_robust(backbone).sampler_forced(tokens, labels, order, seen[rows].to(device))
        total += cross_entropy(logits, tokens, order).sum().item()
    return total / orders.numel()


@isolated
def order_losses(
    backbone: TrainableBackbone, data: TokenSet, seed: int = 0, repeats: int = 4, own: OrderedImages | None = None
) -> dict[str, float]:
    """Loss under random block orders (mean of several), raster blocks and plain raster tokens, nats per token.

    A masked model draws the tokens of a block together, so it has no plain raster tokens. With `own` orders of the
    images the loss under them is "loss_own".
    """
    geometry = backbone.geometry
    generator = torch.Generator().manual_seed(seed)
    random = [mean_loss(backbone, data, block_orders(geometry, len(data), 1.0, generator)) for _ in range(repeats)]
    losses = {
        "loss_random": sum(random) / repeats,
        "loss_raster": mean_loss(backbone, data, block_orders(geometry, len(data), 0.0, generator)),
    }
    if not isinstance(backbone, MaskedTransformer):
        losses["loss_token_raster"] = mean_loss(backbone, data, raster_token_orders(geometry, len(data)))
    if own is not None:
        losses["loss_own"] = mean_loss(backbone, data, geometry.token_order(own.order), steps_of(own.seen))
    return losses


def steps_of(seen: Tensor) -> Tensor | None:
    """`OrderedImages.seen` of some images, or None where every step reveals one block."""
    one_by_one = torch.arange(seen.shape[1], device=seen.device)
    return None if bool((seen == one_by_one).all()) else seen


def training_loss(
    backbone: TrainableBackbone,
    tokens: Tensor,
    labels: Tensor,
    token_order: Tensor,
    generator: torch.Generator,
    seen: Tensor | None = None,
    position_weight: float = 0.0,
) -> dict[str, Tensor]:
    """Mean losses of a batch, scalars: "loss" per token, which is minimised, and what it is made of.

    Cross-entropy in the order, or a masked model's diffusion loss. With a position head, "position_loss" is that of the
    next block among the hidden ones, in nats.

    Args:
        seen: (M, B) int64 as in `OrderedImages`; None is one block a step.
        position_weight: of the position head's loss; 0 leaves it out.
    """
    if isinstance(backbone, MaskedTransformer):
        return {"loss": backbone.training_loss(tokens, labels, token_order, generator, seen)}
    has_head = position_weight > 0 and isinstance(backbone, OrderRobustTransformer) and backbone.config.position_head
    if seen is None and not has_head:
        logits = backbone.teacher_forced(tokens, labels, token_order)
        return {"loss": cross_entropy(logits, tokens, token_order).mean()}
    model = _order_robust(backbone)
    logits, states = model.sampler_forced(tokens, labels, token_order, seen)
    content = cross_entropy(logits, tokens, token_order).mean()
    if not has_head:
        return {"loss": content}
    geometry = backbone.geometry
    order = geometry.token_block.to(token_order.device)[token_order[:, :: geometry.tokens_per_block]]
    place = next_block_loss(model.position_head(states).float(), order)
    return {"loss": content + position_weight * place, "content_loss": content, "position_loss": place}


def next_block_loss(scores: Tensor, order: Tensor) -> Tensor:
    """Cross-entropy of the next block among those that are hidden, mean over images and places, nats.

    Scores (M, B, B) stand before every block of the order (M, B).
    """
    rank = torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    shown = rank[:, None] < torch.arange(order.shape[1], device=order.device)[:, None]  # (M, place, block)
    return F.cross_entropy(scores.masked_fill(shown, -torch.inf).flatten(0, 1), order.flatten())


def _order_robust(backbone: TrainableBackbone) -> OrderRobustTransformer:
    if not isinstance(backbone, OrderRobustTransformer):
        raise ValueError(
            f"steps of several blocks are learnt by models with instruction tokens (family randar), not by a "
            f"{type(backbone).__name__}; give an order of one block a step"
        )
    return backbone


@isolated_float32
def pretrain(
    backbone: TrainableBackbone,
    train: TokenSet,
    held_out: TokenSet,
    config: PretrainConfig,
    on_random_phase_end: Callable[[TrainableBackbone], None] | None = None,
    job: Job | None = None,
    split_on: str | None = None,
    orders: OrderSource | None = None,
) -> None:
    """Train in place; on return the backbone holds the averaged weights.

    Of several processes each takes its rows of every batch. All draw the whole batch alike, so without dropout the
    losses are those of one process; a masked model's noise is drawn by each process on its own.

    Args:
        backbone: trained in place.
        train: images to learn from.
        held_out: images for the logged losses; never trained on.
        on_random_phase_end: receives the averaged backbone at the last step with random orders only.
        split_on: device on which the weights are split over all processes; None leaves them whole.
        orders: extracts the orders of `config.policy`, every round from the averaged weights of the moment.

    Metrics: loss (nats per token), learning_rate, random_share; with held-out losses at every evaluation.

    Raises:
        ValueError: if the config names a policy and nothing extracts its orders, or weights that are split are to
            choose them.
    """
    if config.policy is not None and (orders is None or split_on is not None):
        why = "whose orders nothing extracts here" if orders is None else "which fsdp=true cannot extract; leave it out"
        raise ValueError(f"order={config.order!r} is a policy, {why}")
    generator = torch.Generator().manual_seed(config.seed)
    averaged = AveragedModel(backbone, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    mean = cast(TrainableBackbone, averaged.module).eval()
    if split_on is not None:
        split_weights(backbone, split_on)
        split_weights(mean, split_on)
    device = next(backbone.parameters()).device
    optimizer = torch.optim.AdamW(
        parameter_groups(backbone, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.95)
    )
    schedule = warmed_cosine(optimizer, config.steps, config.warmup)
    phase: dict[str, Any] = {"kept_random": False, "round": -1, "orders": None}
    images: OrderedImages | None = None
    parts: dict[str, Part] = {"schedule": schedule, "generator": generator, "phase": phase}
    if split_on is not None:
        parts["training"] = WholeTraining(backbone, averaged, optimizer)
    else:
        parts |= {"backbone": backbone, "averaged": averaged, "optimizer": optimizer}
    if distributed.rank():  # dropout of its own in every process
        torch.manual_seed(config.seed + _PROCESS_SEEDS * distributed.rank())
    # round 0 reads the weights of the start, which a training that continues has here alone
    first = "" if config.policy is None or orders is None else orders.extract(mean, 0)
    job = job or Job()
    for step in job.steps(config.steps, f"pretraining ({config.order} order)", "steps", "loss {loss:.3f}", **parts):
        # the orders of this step
        if config.policy is not None:
            assert orders is not None
            round = step * config.rounds // config.steps
            if phase["round"] != round:
                phase |= {"round": round, "orders": orders.extract(mean, round) if round else first}
                images = None
            if images is None:  # a new round, or a training that continues
                images = orders.images(phase["orders"] if round else first, round)
        share = random_share(step, config)
        if share < 1 and config.order == RANDOM and not phase["kept_random"]:
            phase["kept_random"] = True
            if on_random_phase_end is not None:
                on_random_phase_end(mean)
        # a batch in its orders
        source = train if images is None else images
        rows, tokens, _, labels = draw_batch(
            source, config.batch_size, config.label_dropout, backbone.num_classes, generator, config.augmentation
        )
        order, seen = _batch_orders(backbone.geometry, config, share, images, rows, generator)
        mine = distributed.rows_of(torch.arange(config.batch_size))
        tokens, labels, order = (moved(part[mine], device) for part in (tokens, labels, order))
        seen = None if seen is None else moved(seen[mine], device)
        # a step of the optimiser
        backbone.train()
        noise = _noise_generator(generator, config.seed, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16 and has_bfloat16(device)):
            losses = training_loss(backbone, tokens, labels, order, noise, seen, config.position_weight)
        total = descend(optimizer, losses.pop("loss"), backbone, weight=len(mine) / config.batch_size)
        schedule.step()
        averaged.update_parameters(backbone)
        row: dict[str, float] = {
            "loss": total,
            "learning_rate": float(schedule.get_last_lr()[0]),
            "random_share": share,
            **{name: value.item() for name, value in losses.items()},
        }
        if (step + 1) % config.evaluate_every == 0 or step + 1 == config.steps:
            row |= order_losses(mean, held_out, repeats=1)
        job.log(**row)
    backbone.load_state_dict(mean.state_dict())
    backbone.eval()


def draw_batch(
    images: TokenSet | OrderedImages,
    count: int,
    label_dropout: float,
    dropped: int,
    generator: torch.Generator,
    augmentation: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random images: their places (M,), their tokens, augmented, their labels, and these with a share `dropped`.

    The augmentation is the strength of the data set's, if it has one; images with orders are views already.
    """
    rows = torch.randint(len(images), (count,), generator=generator)
    tokens, labels = images.tokens[rows], images.labels[rows]
    if isinstance(images, TokenSet):
        tokens = augmented(images.name, tokens, generator, augmentation)
    without = torch.rand(count, generator=generator) < label_dropout
    return rows, tokens, labels, torch.where(without, dropped, labels)


def _batch_orders(
    geometry: BlockGrid,
    config: PretrainConfig,
    share: float,
    images: OrderedImages | None,
    rows: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None]:
    """Token orders (M, N) of a batch, and the blocks seen by each (M, B) where steps reveal several of them."""
    if config.order == TOKEN_RASTER:
        return raster_token_orders(geometry, len(rows)), None
    if images is None:
        return block_orders(geometry, len(rows), share, generator, config.locality), None
    order, seen = images.order[rows], images.seen[rows]
    if share:
        shuffled = random_blocks(geometry, len(rows), generator, config.locality)
        chosen = torch.rand(len(rows), 1, generator=generator, dtype=torch.float32) < share
        order = torch.where(chosen, shuffled, order)
        seen = torch.where(chosen, torch.arange(geometry.num_blocks), seen)
    return geometry.token_order(order), steps_of(seen)


def _noise_generator(generator: torch.Generator, seed: int, step: int) -> torch.Generator:
    """Source of a masked model's noise: the training's own, or of many processes one for each.

    How much is drawn depends on the rows, so processes that shared one would no longer draw the same batches.
    """
    if distributed.size() == 1:
        return generator
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * distributed.size() + distributed.rank())
