"""The suites: each measures the package against the naive twin in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.counts import Counter, Pass
from benchmarks.limits import Limits, measured_limits, timed
from benchmarks.naive import naive_episode, naive_label, raster_images
from benchmarks.profile import planner_share, share_inside
from benchmarks.shapes import Shape, raster_twin
from orderrl.agents.policies import PlannerPolicy, RankingPolicy, fixed_order
from orderrl.agents.ppo import PPO
from orderrl.agents.ppo import Config as PPOConfig
from orderrl.agents.schedules import fixed
from orderrl.backbones import Backbone
from orderrl.backbones.cpu_linear import pack_weights
from orderrl.backbones.protocol import backbone_device
from orderrl.data import TokenSet
from orderrl.envs import NextBlockTorchRLEnv
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.evaluation.drawing import generate_images
from orderrl.oracle import Contexts, LabelConfig, distance_weights, label_contexts, utilities
from orderrl.planner import OrderHead, PlannerConfig

LABEL_REPEATS = {"digits": 8}  # contexts of each length; elsewhere 1
TARGET_FRACTIONS = (0.5, 0.25)
PLAIN = ", weights not packed"


@dataclass(frozen=True)
class Settings:
    """What a run measures.

    Attributes:
        shape: which model.
        dtypes: what the backbone computes in; the first is the naive twin's.
        runs: repetitions of every variant, in turn, after one warm-up.
        batch: images at once; None is the shape's own.
        device: where.
    """

    shape: Shape
    dtypes: tuple[str, ...]
    runs: int
    batch: int | None
    device: torch.device

    def backbone(self, dtype: str, packed: bool = True) -> Any:
        """The model in a dtype on the device, its weights packed or not."""
        made: Any = self.shape.make(dtype)
        pack_weights(made, packed)
        return made.to(self.device)

    @property
    def images_at_once(self) -> int:
        """Batch size."""
        return self.batch or self.shape.batch

    def limits(self, dtype: str) -> Limits:
        """The device's roofs in a dtype."""
        return measured_limits(self.device, getattr(torch, dtype))


@dataclass
class Variant:
    """One way to do the same work.

    Attributes:
        name: `naive` is what the others are compared with.
        call: does the work.
        items: how many items it makes.
        limit: least seconds for it on this machine; None if not counted.
        seconds: of every run.
        extra: more columns.
    """

    name: str
    call: Callable[[], Any]
    items: int
    limit: float | None = None
    seconds: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


Row = dict[str, Any]


def measure(suite: str, settings: Settings, variants: list[Variant], unit: str) -> Iterator[Row]:
    """Run all variants in turn and give a row for each; ratios are medians of ratios within a run."""
    for run in range(settings.runs + 1):
        for variant in variants:
            seconds = timed(variant.call, settings.device)
            if run:
                variant.seconds.append(seconds)
    naive = next(v for v in variants if v.name.startswith("naive"))
    for variant in variants:
        per_item = [s / variant.items for s in variant.seconds]
        ratios = sorted(
            (n / naive.items) / s for n, s in zip(naive.seconds, per_item, strict=True)
        )  # of the time that an item takes
        middle = statistics.median(variant.seconds)
        yield {
            "suite": suite,
            "shape": settings.shape.name,
            "variant": variant.name,
            "unit": unit,
            "seconds": middle,
            "items_per_second": variant.items / middle,
            "ratio_to_naive": statistics.median(ratios),
            "ratio_low": ratios[0],
            "ratio_high": ratios[-1],
            "fraction_of_limit": None if variant.limit is None else variant.limit / middle,
        } | variant.extra


# ---------------------------------------------------------------------- suites


def every_length(backbone: Backbone, repeats: int) -> Contexts:
    """Contexts of every length 0 .. B - 2, equally many of each."""
    blocks = backbone.geometry.num_blocks
    length = torch.arange(max(blocks - 1, 1)).repeat_interleave(repeats)
    number = torch.arange(len(length))
    order = torch.rand(len(length), blocks, generator=torch.Generator().manual_seed(0)).argsort(1)
    return Contexts(number, number, order, length)


@torch.no_grad()
def labels(settings: Settings) -> Iterator[Row]:
    """Gains of every pair of hidden blocks, contexts of all lengths."""
    repeats = LABEL_REPEATS.get(settings.shape.name, 1)
    first = settings.backbone(settings.dtypes[0])
    contexts, counter = every_length(first, repeats), Counter(first)
    data = settings.shape.images(first, len(contexts.length))
    lengths = contexts.length.tolist()
    naive_operations = sum(map(counter.naive_label, lengths))
    variants = [
        Variant(
            f"naive {settings.dtypes[0]}",
            lambda: [naive_label(first, data, contexts.select(contexts.length == t)) for t in sorted(set(lengths))],
            len(lengths),
            settings.limits(settings.dtypes[0]).seconds(naive_operations),
        )
    ]
    found: dict[str, Tensor] = {}
    ways = [(dtype, True, fraction) for dtype in settings.dtypes for fraction in (1.0, *TARGET_FRACTIONS)]
    for dtype, packed, fraction in [(settings.dtypes[0], False, 1.0), *ways]:
        backbone = settings.backbone(dtype, packed)
        config = LabelConfig(contexts=len(lengths), batch_size=settings.images_at_once, target_fraction=fraction)
        name = dtype + ("" if packed else PLAIN) + ("" if fraction == 1 else f" target_fraction={fraction}")
        operations = 0.0
        for t in lengths:
            others = counter.blocks - t - 1
            operations += counter.label(t, max(1, round(fraction * others)) if others else 0)
        variants.append(
            Variant(
                name,
                partial(_keep_utilities, found, name, backbone, data, config, contexts),
                len(lengths),
                settings.limits(dtype).seconds(operations),
            )
        )
    rows = list(measure("labels", settings, variants, "contexts"))
    exact, hidden = found[settings.dtypes[0]], _hidden(first, contexts)
    for row in rows:
        if row["variant"] in found:
            row["spearman"] = rank_agreement(exact, found[row["variant"]], hidden)
    yield from rows


def _keep_utilities(
    found: dict[str, Tensor], name: str, backbone: Backbone, data: TokenSet, config: LabelConfig, contexts: Contexts
) -> None:
    """Label contexts and keep their U (n, B) under a name."""
    parts = label_contexts(backbone, data.tokens, data.labels, config, contexts)
    gains = torch.cat([part["gains"] for part in parts])
    found[name] = utilities(gains, backbone.geometry, distance_weights(backbone.geometry, "uniform", 1.0))


def _hidden(backbone: Backbone, contexts: Contexts) -> Tensor:
    """(n, B) bool: hidden blocks of each context."""
    place = torch.arange(backbone.geometry.num_blocks)
    shown = (place < contexts.length[:, None]).to(torch.int64)
    return torch.zeros_like(contexts.order).scatter(1, contexts.order, shown) == 0


def rank_agreement(exact: Tensor, other: Tensor, hidden: Tensor) -> float:
    """Mean over states of Spearman's correlation of two utilities (n, B) over the hidden blocks (n, B)."""
    values = []
    for one, two, mask in zip(exact.float(), other.float(), hidden, strict=True):
        if mask.sum() > 2:
            values.append(float(spearmanr(one[mask], two[mask]).statistic))
    defined = [value for value in values if value == value]
    return statistics.mean(defined) if defined else float("nan")


@torch.no_grad()
def env(settings: Settings) -> Iterator[Row]:
    """An episode of one block a step with context losses on."""
    count = settings.images_at_once
    first = settings.backbone(settings.dtypes[0])
    data, counter, blocks = settings.shape.images(first, count), Counter(first), first.geometry.num_blocks
    orders = torch.rand(count, blocks, generator=torch.Generator().manual_seed(0)).argsort(1).to(settings.device)
    variants = [
        Variant(
            f"naive {settings.dtypes[0]}",
            lambda: naive_episode(first, data, orders),
            count * blocks,
            settings.limits(settings.dtypes[0]).seconds(count * counter.naive_episode()),
        )
    ]
    for dtype, packed in [(settings.dtypes[0], False), *((dtype, True) for dtype in settings.dtypes)]:
        backbone = settings.backbone(dtype, packed)
        limit = settings.limits(dtype).seconds(count * counter.episode())
        name = dtype if packed else dtype + PLAIN
        variants.append(Variant(name, partial(_episode, backbone, data, orders), count * blocks, limit))
    yield from measure("env", settings, variants, "reveals")


def _episode(backbone: Backbone, data: TokenSet, orders: Tensor) -> None:
    core = NextBlockCore(backbone, data, len(orders), CoreConfig(strict=True))
    core.reset(index=torch.arange(len(orders), device=orders.device) % len(data))
    for step in range(orders.shape[1]):
        core.step(orders[:, step])


@torch.no_grad()
def context(settings: Settings) -> Iterator[Row]:
    """Context losses of the hidden blocks of half-visible images, the prefix at hand."""
    count = settings.images_at_once
    first = settings.backbone(settings.dtypes[0])
    data, counter, blocks = settings.shape.images(first, count), Counter(first), first.geometry.num_blocks
    order = torch.rand(count, blocks, generator=torch.Generator().manual_seed(0)).argsort(1).to(settings.device)
    half = blocks // 2
    tokens, classes = data.tokens[:count].to(settings.device), data.labels[:count].to(settings.device)
    length = torch.full_like(classes, half)

    def prefix(backbone: Backbone) -> Any:
        return backbone.extend(backbone.start(classes), tokens, order[:, :half], length)

    chains = count * counter.chain(blocks - half, half)
    naive_limit = settings.limits(settings.dtypes[0]).seconds(chains + count * counter.append(half, 0))
    variants = [
        Variant(
            f"naive {settings.dtypes[0]}",
            lambda: first.context_loss(prefix(first), tokens, order[:, half:]),
            count * (blocks - half),
            naive_limit,
        )
    ]
    for dtype in settings.dtypes:
        backbone = settings.backbone(dtype)
        state = prefix(backbone)
        variants.append(
            Variant(
                dtype,
                partial(backbone.context_loss, state, tokens, order[:, half:]),
                count * (blocks - half),
                settings.limits(dtype).seconds(chains),
            )
        )
        if not counter.two_pass:
            raster = raster_twin(backbone)
            operations = count * Counter(backbone).operations(
                Pass(1, first.geometry.num_tokens, first.geometry.num_tokens, 0)
            )
            variants.append(
                Variant(
                    f"{dtype} teacher-forced raster LlamaGen",
                    partial(raster.teacher_forced, tokens, classes),
                    count * blocks,
                    settings.limits(dtype).seconds(operations),
                )
            )
    yield from measure("context", settings, variants, "block losses")


def generation(settings: Settings) -> Iterator[Row]:
    """Images drawn block by block against cached decoding of the raster model, one token at a time.

    The naive twin computes with plain products, as published; beside it stands raster with packed weights.
    """
    count = settings.images_at_once
    first = settings.backbone(settings.dtypes[0])
    data, grid = settings.shape.images(first, count), first.geometry
    order = torch.randperm(grid.num_blocks, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(count) % first.num_classes
    variants = []
    for dtype in settings.dtypes:
        backbone = settings.backbone(dtype)
        limits, counter = settings.limits(dtype), Counter(backbone)
        for name, packed in ((f"naive {dtype}: raster, token by token{PLAIN}", False), (f"{dtype}: raster", True)):
            raster = raster_twin(backbone)
            pack_weights(raster, packed)
            variants.append(Variant(name, partial(raster_images, raster, classes), count))
        for budget in (1, 4):
            policy = RankingPolicy(fixed_order(order), grid, (budget,), fixed(0))
            variants.append(
                Variant(
                    f"{dtype}: {budget} block{'s' * (budget > 1)} a step",
                    partial(generate_images, backbone, data, policy, (budget,), classes),
                    count,
                    _generation_limit(counter, limits, count, budget),
                )
            )
        variants.append(_planned(dtype, backbone, data, classes))
    for dtype in settings.dtypes:  # each type against plain decoding in the same type
        yield from measure("generation", settings, [v for v in variants if f"{dtype}:" in v.name], "images")


def _planned(dtype: str, backbone: Any, data: TokenSet, classes: Tensor) -> Variant:
    """Drawing in a planner's order, and what share of the time the planner itself takes."""
    planner = OrderHead(PlannerConfig.for_backbone(backbone, reasoning_steps=2)).to(backbone_device(backbone)).eval()
    variant = Variant(f"{dtype}: 1 block a step, planner R = 2", lambda: None, len(classes))

    def draw() -> None:
        variant.extra = planner_share(planner, lambda: _draw_planned(backbone, data, planner, classes))

    variant.call = draw
    return variant


def _draw_planned(backbone: Any, data: TokenSet, planner: OrderHead, classes: Tensor) -> None:
    generate_images(backbone, data, PlannerPolicy(planner), (1,), classes)


def _generation_limit(counter: Counter, limits: Limits, count: int, budget: int) -> float:
    """Least seconds of drawing: every pass reads all weights, or is bound by its operations."""
    seconds, steps = 0.0, counter.blocks // budget
    for step in range(steps):
        seen = counter.prefix(step * budget)
        for token in range(counter.tokens):
            one = Pass(count * budget, counter.per_token if token else counter.per_token - 1, 1, seen)
            seconds += limits.seconds(counter.operations(one), counter.weight_bytes)
        if step + 1 < steps:  # the first block's entries are known but for its last token
            entries = counter.per_token * counter.tokens * (budget - 1) + 1
            seconds += limits.seconds(counter.operations(Pass(count, entries, 0, seen)), counter.weight_bytes)
    return seconds


def ppo(settings: Settings) -> Iterator[Row]:
    """A round of PPO, and how much of it the models take."""
    count = settings.images_at_once
    first = settings.backbone(settings.dtypes[0])
    data, blocks = settings.shape.images(first, count), first.geometry.num_blocks
    planner = OrderHead(PlannerConfig.for_backbone(first, reasoning_steps=2)).to(settings.device)
    orders = torch.rand(count, blocks, generator=torch.Generator().manual_seed(0)).argsort(1).to(settings.device)
    variants = [
        Variant(f"naive {settings.dtypes[0]}: losses alone", lambda: naive_episode(first, data, orders), count * blocks)
    ]
    for dtype in settings.dtypes:
        backbone = settings.backbone(dtype)
        config = PPOConfig(
            iterations=1, num_envs=count, frames_per_batch=count * blocks, minibatch_size=count * blocks // 2
        )
        variant = Variant(dtype, lambda: None, count * blocks)

        def one_round(backbone: Any = backbone, config: PPOConfig = config, variant: Variant = variant) -> None:
            agent = PPO(planner, NextBlockTorchRLEnv(core=_core(backbone, data, count), privileged=True), config)
            variant.extra = share_inside(backbone, agent, agent.train)

        variant.call = one_round
        variants.append(variant)
    yield from measure("ppo", settings, variants, "frames")


def _core(backbone: Backbone, data: TokenSet, count: int) -> NextBlockCore:
    return NextBlockCore(backbone, data, count, CoreConfig())


SUITES = {"labels": labels, "env": env, "generation": generation, "ppo": ppo, "context": context}
