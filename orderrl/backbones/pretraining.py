"""Training an order-robust backbone: the block-RAR curriculum.

Block order is random, tokens inside a block stay in raster order (block form of RAR, Yu et al., 2024).
An optional anneal moves to raster at the end; the last checkpoint of the random phase is kept beside
the final one and is the default, because annealed weights forget random orders.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from orderrl.backbones.mar_backbone import MaskedTransformer
from orderrl.backbones.randar import cross_entropy
from orderrl.backbones.registry import TrainableBackbone
from orderrl.backbones.sharding import WholeTraining, shard_backbone
from orderrl.data import TokenSet
from orderrl.geometry import BlockGrid
from orderrl.runtime import distributed
from orderrl.runtime.devices import moved
from orderrl.runtime.isolation import isolated, isolated_float32
from orderrl.runtime.job import Job, Part
from orderrl.runtime.learning_rate import warmed_cosine
from orderrl.runtime.optimisation import parameter_groups
from orderrl.runtime.values import at_least, between, check_fields, one_of, positive, setting

ORDERS = ("random", "raster")
MAX_LOGITS = 2**26  # in one evaluation forward
_PROCESS_SEEDS = 1_000_000_007  # between the random numbers of processes


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How a backbone is trained."""

    order: str = setting(
        "random", "Order of training: random (random block order, raster inside) or raster", one_of(ORDERS)
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


def random_share(step: int, config: PretrainConfig) -> float:
    """Probability that an image is trained in a random block order at this step; else raster blocks."""
    if config.order == "raster":
        return 0.0
    start = config.anneal_from * config.steps
    if step < start:
        return 1.0
    return 1.0 - (step - start) / max(config.steps - start, 1)


def block_orders(geometry: BlockGrid, count: int, share: float, generator: torch.Generator) -> Tensor:
    """Token orders (count, N) int64: random block order with probability `share`, else raster blocks."""
    shuffled = torch.rand(count, geometry.num_blocks, generator=generator, dtype=torch.float32).argsort(1)
    raster = torch.arange(geometry.num_blocks).expand_as(shuffled)
    chosen = torch.rand(count, 1, generator=generator, dtype=torch.float32) < share
    return geometry.token_order(torch.where(chosen, shuffled, raster))


def raster_token_orders(geometry: BlockGrid, count: int) -> Tensor:
    """Plain raster token order for `count` images, (count, N) int64: what a raster-only model is trained on."""
    return torch.arange(geometry.num_tokens).expand(count, -1)


@torch.no_grad()
def mean_loss(backbone: TrainableBackbone, data: TokenSet, orders: Tensor) -> float:
    """Mean teacher-forced loss of a token set under given token orders (n, N), nats (or DiffLoss units) per token."""
    device = next(backbone.parameters()).device
    batch_size = min(500, max(1, MAX_LOGITS // (orders.shape[1] * max(backbone.vocab_size, 1024))))
    total = 0.0
    for rows in torch.arange(len(data)).split(batch_size):
        tokens, order, labels = (moved(part[rows], device) for part in (data.tokens, orders, data.labels))
        if isinstance(backbone, MaskedTransformer):
            total += backbone.mean_loss(tokens, labels, order) * order.numel()
        else:
            total += cross_entropy(backbone.teacher_forced(tokens, labels, order), tokens, order).sum().item()
    return total / orders.numel()


@isolated
def order_losses(backbone: TrainableBackbone, data: TokenSet, seed: int = 0, repeats: int = 4) -> dict[str, float]:
    """Loss under random block orders (mean of several), raster blocks and plain raster tokens, nats per token.

    A masked model draws the tokens of a block together, so it has no plain raster tokens.
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
    return losses


def training_loss(
    backbone: TrainableBackbone, tokens: Tensor, labels: Tensor, token_order: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean loss per token of a batch, scalar: cross-entropy in the order, or a masked model's diffusion loss."""
    if isinstance(backbone, MaskedTransformer):
        return backbone.training_loss(tokens, labels, token_order, generator)
    return cross_entropy(backbone.teacher_forced(tokens, labels, token_order), tokens, token_order).mean()


@isolated_float32
def pretrain(
    backbone: TrainableBackbone,
    train: TokenSet,
    held_out: TokenSet,
    config: PretrainConfig,
    augment: Callable[[Tensor, torch.Generator, float], Tensor] | None = None,
    on_random_phase_end: Callable[[TrainableBackbone], None] | None = None,
    job: Job | None = None,
    shard_on: str | None = None,
) -> None:
    """Train in place; on return the backbone holds the averaged weights.

    Of several processes each takes its rows of every batch. All draw the whole batch alike, so without dropout the
    losses are those of one process; a masked model's noise is drawn by each process on its own.

    Args:
        backbone: trained in place.
        train: images to learn from.
        held_out: images for the logged losses; never trained on.
        augment: the data set's augmentation, called with tokens, generator and strength.
        on_random_phase_end: receives the averaged backbone at the last step with random orders only.
        shard_on: device on which the weights are split over all processes; None leaves them whole.

    Metrics: loss (nats per token), learning_rate, random_share; with held-out losses at every evaluation.
    """
    generator = torch.Generator().manual_seed(config.seed)
    averaged = AveragedModel(backbone, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    mean = cast(TrainableBackbone, averaged.module).eval()
    if shard_on is not None:
        shard_backbone(backbone, shard_on)
        shard_backbone(mean, shard_on)
    device = next(backbone.parameters()).device
    optimizer = torch.optim.AdamW(
        parameter_groups(backbone, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.95)
    )
    schedule = warmed_cosine(optimizer, config.steps, config.warmup)
    phase = {"kept_random": False}
    parts: dict[str, Part] = {"schedule": schedule, "generator": generator, "phase": phase}
    if shard_on is not None:
        parts["training"] = WholeTraining(backbone, averaged, optimizer)
    else:
        parts |= {"backbone": backbone, "averaged": averaged, "optimizer": optimizer}
    if distributed.rank():  # dropout of its own in every process
        torch.manual_seed(config.seed + _PROCESS_SEEDS * distributed.rank())
    job = job or Job()
    for step in job.steps(config.steps, f"pretraining ({config.order} order)", "steps", "loss {loss:.3f}", **parts):
        share = random_share(step, config)
        if share < 1 and config.order == "random" and not phase["kept_random"]:
            phase["kept_random"] = True
            if on_random_phase_end is not None:
                on_random_phase_end(mean)
        rows = torch.randint(len(train), (config.batch_size,), generator=generator)
        tokens, labels = train.tokens[rows], train.labels[rows]
        if augment is not None and config.augmentation > 0:
            tokens = augment(tokens, generator, config.augmentation)
        dropped = torch.rand(config.batch_size, generator=generator) < config.label_dropout
        labels = torch.where(dropped, backbone.num_classes, labels)
        if config.order == "raster":
            order = raster_token_orders(backbone.geometry, config.batch_size)
        else:
            order = block_orders(backbone.geometry, config.batch_size, share, generator)
        mine = distributed.rows_of(torch.arange(config.batch_size))
        tokens, labels, order = (moved(part[mine], device) for part in (tokens, labels, order))
        backbone.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            loss = training_loss(backbone, tokens, labels, order, _noise_generator(generator, config.seed, step))
        optimizer.zero_grad()
        total = distributed.backward(loss, backbone.parameters(), len(mine) / config.batch_size)
        nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(backbone)
        row: dict[str, float] = {
            "loss": total,
            "learning_rate": float(schedule.get_last_lr()[0]),
            "random_share": share,
        }
        if (step + 1) % config.evaluate_every == 0 or step + 1 == config.steps:
            row |= order_losses(mean, held_out, repeats=1)
        job.log(**row)
    backbone.load_state_dict(mean.state_dict())
    backbone.eval()


def _noise_generator(generator: torch.Generator, seed: int, step: int) -> torch.Generator:
    """Source of a masked model's noise: the training's own, or of many processes one for each.

    How much is drawn depends on the rows, so processes that shared one would no longer draw the same batches.
    """
    if distributed.size() == 1:
        return generator
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * distributed.size() + distributed.rank())
