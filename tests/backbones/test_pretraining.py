"""Pretraining: the curriculum, what is learnt, and which checkpoint is kept."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from orderrl.backbones import OrderRobustTransformer, TransformerConfig, load_backbone
from orderrl.backbones.pretraining import (
    PretrainConfig,
    block_orders,
    mean_loss,
    order_losses,
    pretrain,
    random_share,
    raster_token_orders,
)
from orderrl.data import AUGMENTATIONS, TokenSet, load_split
from orderrl.geometry import BlockGrid
from orderrl.runtime.learning_rate import warmed_cosine_factor
from tests.helpers import tiny_backbone, tiny_images
from tests.jobs import logged

QUICK = PretrainConfig(steps=40, batch_size=16, learning_rate=1e-2, warmup=5, ema=0.8, evaluate_every=20, bf16=False)


def striped(count: int, seed: int) -> TokenSet:
    """4x4 images of stripes: token = (column + phase) mod 3, the phase unknown, the direction the label."""
    generator = torch.Generator().manual_seed(seed)
    phase = torch.randint(3, (count, 1), generator=generator)
    labels = torch.randint(2, (count,), generator=generator)
    place = torch.arange(16)
    along = torch.where(labels[:, None] == 0, place % 4, place // 4)
    return TokenSet("stripes", "train", (along + phase) % 3, labels, 4, 4, 3, 2)


def fresh() -> OrderRobustTransformer:
    torch.manual_seed(0)
    return OrderRobustTransformer(TransformerConfig(4, 4, 2, 3, 2, dim=32, layers=2, heads=2))


def test_a_few_steps_learn() -> None:
    backbone, held_out = fresh(), striped(60, 1)
    before = order_losses(backbone, held_out)
    assert before["loss_random"] == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-4)  # zero output matrix
    rows = logged(pretrain, backbone, striped(200, 0), held_out, QUICK)
    after = order_losses(backbone, held_out)
    for name, value in after.items():
        assert value < 0.6 * before[name]
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row["step"] for row in rows if "loss_random" in row] == [20, 40]
    assert rows[-1]["loss_raster"] == pytest.approx(after["loss_raster"], abs=1e-5)  # the averaged weights are returned
    assert not backbone.training


def test_the_same_seed_gives_the_same_weights() -> None:
    short = replace(QUICK, steps=4)
    results = []
    for seed in (0, 0, 1):
        backbone = fresh()
        pretrain(backbone, striped(50, 0), striped(20, 1), replace(short, seed=seed))
        results.append(backbone.output.weight.detach().clone())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_share_of_random_orders() -> None:
    config = replace(QUICK, steps=100, anneal_from=0.6)
    shares = [random_share(step, config) for step in range(100)]
    assert shares[:61] == [1.0] * 61
    assert all(a > b for a, b in pairwise(shares[60:]))
    assert shares[80] == pytest.approx(0.5) and shares[99] == pytest.approx(0.025)
    assert {random_share(step, replace(config, anneal_from=1.0)) for step in range(100)} == {1.0}
    assert {random_share(step, replace(config, order="token_raster")) for step in range(100)} == {0.0}


def test_orders_follow_the_share() -> None:
    grid, generator = BlockGrid(6, 6, 2), torch.Generator().manual_seed(0)
    raster = grid.token_order(torch.arange(9))
    for share in (0.0, 0.3, 1.0):
        orders = block_orders(grid, 4000, share, generator)
        assert torch.equal(orders.sort(1).values, torch.arange(36).expand(4000, -1))
        blocks = grid.token_block[orders].unflatten(1, (9, 4))
        assert (blocks == blocks[..., :1]).all()  # no block is interrupted
        is_raster = (orders == raster).all(1).float().mean().item()
        assert is_raster == pytest.approx(1 - share, abs=0.03)
    first = grid.token_block[block_orders(grid, 9000, 1.0, generator)[:, 0]].bincount(minlength=9)
    assert first.min() > 850 and first.max() < 1150
    assert torch.equal(raster_token_orders(grid, 2), torch.arange(36).expand(2, -1))


@pytest.mark.parametrize(
    ("order", "anneal_from", "calls"), [("random", 0.5, 1), ("random", 1.0, 0), ("token_raster", 0.5, 0)]
)
def test_the_last_random_checkpoint_is_handed_out(order: str, anneal_from: float, calls: int) -> None:
    """It holds the averaged weights as they were before the first step that trained on raster orders."""
    config = replace(QUICK, steps=8, order=order, anneal_from=anneal_from)
    kept: list[torch.Tensor] = []
    backbone, seen = fresh(), []

    def keep(averaged: Any) -> None:
        kept.append(averaged.get_parameter("output.weight").detach().clone())

    def see(row: dict[str, float]) -> None:
        seen.append((row["random_share"], len(kept)))

    logged(pretrain, backbone, striped(50, 0), striped(20, 1), config, keep, see=see)
    assert len(kept) == calls
    if calls:
        assert all(count == (share < 1) for share, count in seen)
        mirror, weights = fresh(), []

        def take(row: dict[str, float]) -> None:
            weights.append(mirror.output.weight.detach().clone())

        logged(pretrain, mirror, striped(50, 0), striped(20, 1), config, see=take, until=5)
        average = weights[0]
        for weight in weights[1:]:
            average = config.ema * average + (1 - config.ema) * weight
        assert torch.allclose(kept[0], average, atol=1e-6)
        assert not torch.allclose(kept[0], backbone.output.weight, atol=1e-4)


def test_augmentation_is_used_with_its_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    strengths = []

    def augment(tokens: torch.Tensor, generator: torch.Generator, strength: float) -> torch.Tensor:
        strengths.append(strength)
        return tokens

    monkeypatch.setitem(AUGMENTATIONS, striped(1, 0).name, augment)
    for strength in (0.5, 0.0):
        config = replace(QUICK, steps=2, augmentation=strength)
        pretrain(fresh(), striped(50, 0), striped(20, 1), config)
    assert strengths == [0.5, 0.5]


def test_labels_are_dropped_for_guidance() -> None:
    backbone = fresh()
    table = backbone.cls_embedding.embedding_table.weight
    start = table.detach().clone()
    config = replace(QUICK, steps=5, label_dropout=1.0, weight_decay=0.0)
    pretrain(backbone, striped(50, 0), striped(9, 1), config)
    moved = (table.detach() - start).abs().amax(1) > 1e-6
    assert moved.tolist() == [False, False, True]


def test_held_out_losses_are_means_over_the_set() -> None:
    backbone = tiny_backbone()
    data = tiny_images(backbone, 7)
    losses = order_losses(backbone, data, repeats=2)
    grid, n = backbone.geometry, len(data)
    generator = torch.Generator().manual_seed(0)
    expected = [mean_loss(backbone, data, block_orders(grid, n, 1.0, generator)) for _ in range(2)]
    assert losses["loss_random"] == pytest.approx(sum(expected) / 2, abs=1e-5)
    logits = backbone.teacher_forced(data.tokens, data.labels, torch.arange(36).expand(n, -1))
    raster = -logits.log_softmax(-1).gather(-1, data.tokens[..., None]).mean()
    assert losses["loss_token_raster"] == pytest.approx(raster.item(), abs=1e-5)
    assert losses["loss_raster"] != pytest.approx(losses["loss_token_raster"], abs=1e-5)


@pytest.mark.slow
def test_the_shipped_backbones_are_what_they_are_called() -> None:
    """`digits` is order-robust (good in random block orders, raster not special); `digits_raster` is at home in raster.

    Measured on the test split, nats per token.
    """
    losses = {}
    for name in ("digits", "digits_raster"):
        backbone = load_backbone(name)
        assert isinstance(backbone, OrderRobustTransformer)
        losses[name] = order_losses(backbone, load_split("digits", "test").first(120), repeats=1)
    robust, raster = losses["digits"], losses["digits_raster"]
    assert robust["loss_random"] <= 1.25
    assert abs(robust["loss_raster"] - robust["loss_random"]) < 0.03
    assert raster["loss_token_raster"] < robust["loss_token_raster"]
    assert raster["loss_random"] > robust["loss_random"] + 0.3


def test_learning_rate_warms_up_and_falls() -> None:
    factors = [warmed_cosine_factor(step, steps=100, warmup=10) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == factors[10] == pytest.approx(1.0)
    assert factors[100] == pytest.approx(0.02)
    assert factors[10:] == sorted(factors[10:], reverse=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"random_share": 0.5}, "random_share=0.5 stands beside a policy's order"),
        ({"steps": 0}, "steps"),
        ({"ema": 1.5}, "ema"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, str | float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainConfig(**wrong)  # type: ignore[arg-type]
