"""Gains and utilities against recomputation one at a time, and expectations against enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from orderrl.backbones import OrderRobustTransformer, load_backbone
from orderrl.backbones.memory import Packing
from orderrl.data import load_split
from orderrl.geometry import BlockGrid
from orderrl.oracle import (
    Contexts,
    LabelConfig,
    block_gains,
    distance_weights,
    gain_uniforms,
    label_contexts,
    random_contexts,
    sampled_targets,
    utilities,
)
from tests.helpers import block_loss, tiny_backbone, tiny_images


def gains_of(
    backbone: OrderRobustTransformer,
    tokens: Tensor,
    labels: Tensor,
    order: Tensor,
    visible: int,
    kind: str = "pointwise",
    samples: int = 1,
    keys: Tensor | None = None,
) -> Tensor:
    """G of states whose first `visible` blocks of an order (M, B) are revealed."""
    prefix = backbone.start(labels)
    if visible:
        prefix = backbone.extend(prefix, tokens, order[:, :visible], torch.full_like(labels, visible))
    keys = torch.arange(len(labels)) if keys is None else keys
    uniforms = None if kind == "pointwise" else gain_uniforms(backbone.geometry, (0, keys), samples, tokens.device)
    return block_gains(backbone, prefix, tokens, order[:, visible:], kind, uniforms, samples)


def states(backbone: OrderRobustTransformer, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    data = tiny_images(backbone, count)
    generator = torch.Generator().manual_seed(5)
    return data.tokens, data.labels, torch.rand(count, backbone.geometry.num_blocks, generator=generator).argsort(1)


@pytest.mark.parametrize("shape", [(4, 6, 2), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("visible", [0, 3])
def test_gains_equal_the_naive_form(shape: tuple[int, int, int], visible: int) -> None:
    backbone = tiny_backbone(*shape)
    tokens, labels, order = states(backbone)
    gains = gains_of(backbone, tokens, labels, order, visible)
    for row in range(len(tokens)):
        shown, hidden = order[row, :visible].tolist(), order[row, visible:].tolist()
        expected = torch.zeros_like(gains[row])
        for a, b in itertools.permutations(hidden, 2):
            now = block_loss(backbone, tokens[row], labels[row], shown, b)
            expected[a, b] = now - block_loss(backbone, tokens[row], labels[row], [*shown, a], b)
        assert torch.allclose(gains[row], expected, atol=2e-5)
    assert gains.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["pointwise", "kl", "expected"])
def test_gains_do_not_depend_on_chunks_or_batch(
    backbone: OrderRobustTransformer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, labels, order = states(backbone, 5)
    whole = gains_of(backbone, tokens, labels, order, 3, kind, samples=2)
    for entries in (1, 50, 500):
        monkeypatch.setattr(Packing, "entries", lambda self, keys, seen, entries=entries: entries)
        chunked = gains_of(backbone, tokens, labels, order, 3, kind, 2)
        assert torch.allclose(chunked, whole, atol=1e-5)
    rows = torch.tensor([4, 1])
    alone = gains_of(backbone, tokens[rows], labels[rows], order[rows], 3, kind, 2, keys=rows)
    assert torch.allclose(alone, whole[rows], atol=1e-5)


def test_a_single_hidden_block_has_no_gain(backbone: OrderRobustTransformer) -> None:
    tokens, labels, order = states(backbone)
    assert (gains_of(backbone, tokens, labels, order, 8) == 0).all()


def test_utilities_weigh_and_sum_gains() -> None:
    grid = BlockGrid(4, 6, 2)
    gains = torch.randn(2, 6, 6)
    for weight in ("uniform", "far"):
        weights = distance_weights(grid, weight, sigma=1.5)
        values = utilities(gains, grid, weights)
        for a in range(6):
            total = torch.zeros(2)
            for b in range(6):
                squared = (a // 3 - b // 3) ** 2 + (a % 3 - b % 3) ** 2
                w = 1.0 if weight == "uniform" else 1 - torch.exp(torch.tensor(-squared / 1.5**2)).item()
                total += w * gains[:, a, b]
            assert torch.allclose(values[:, a], total / 24, atol=1e-5)
    with pytest.raises(ValueError, match=r"weight='near'.*uniform, far"):
        distance_weights(grid, "near", 1.0)


# ---------------------------------------------------------------------- expectations


def chain_log_probs(
    backbone: OrderRobustTransformer, tokens: Tensor, label: Tensor, visible: list[int], block: int
) -> tuple[Tensor, Tensor]:
    """All values of a block and the log-probabilities (V, p*p, vocab) of its chain, by teacher forcing."""
    geometry = backbone.geometry
    n = geometry.tokens_per_block
    values = torch.tensor(list(itertools.product(range(backbone.vocab_size), repeat=n)))
    rest = [b for b in range(geometry.num_blocks) if b not in visible and b != block]
    order = geometry.token_order(torch.tensor([*visible, block, *rest])).expand(len(values), -1)
    images = tokens.expand(len(values), -1).clone()
    images[:, geometry.block_tokens[block]] = values
    logits = backbone.teacher_forced(images, label.expand(len(values)), order)
    start = len(visible) * n
    return values, logits[:, start : start + n].log_softmax(-1)


def enumerated_kl(
    backbone: OrderRobustTransformer, tokens: Tensor, label: Tensor, visible: list[int], a: int, b: int
) -> float:
    """KL( q(x_b | S + a) || q(x_b | S) ) over all values of block b, given the true or drawn block a."""
    values, informed = chain_log_probs(backbone, tokens, label, [*visible, a], b)
    _, uninformed = chain_log_probs(backbone, tokens, label, visible, b)
    log_p, log_q = (x.gather(-1, values[..., None]).sum((1, 2)) for x in (informed, uninformed))
    return (log_p.exp() * (log_p - log_q)).sum().item()


def enumerated_expected(
    backbone: OrderRobustTransformer, tokens: Tensor, label: Tensor, visible: list[int], a: int, b: int
) -> float:
    """Expectation of `enumerated_kl` over block a drawn from q(x_a | S)."""
    values, chain = chain_log_probs(backbone, tokens, label, visible, a)
    probability = chain.gather(-1, values[..., None]).sum((1, 2)).exp()
    total = 0.0
    for value, weight in zip(values, probability.tolist(), strict=True):
        image = tokens.clone()
        image[backbone.geometry.block_tokens[a]] = value
        total += weight * enumerated_kl(backbone, image, label, visible, a, b)
    return total


def pairs(hidden: list[int]) -> Iterator[tuple[int, int]]:
    return itertools.permutations(hidden, 2)


def test_kl_is_exact_for_single_tokens() -> None:
    """With p = 1 nothing is drawn inside a block, so one draw is the expectation."""
    backbone = tiny_backbone(2, 3, 1, 4)
    tokens, labels, order = states(backbone)
    gains = gains_of(backbone, tokens, labels, order, 2, "kl")
    for row in range(len(tokens)):
        shown, hidden = order[row, :2].tolist(), order[row, 2:].tolist()
        for a, b in pairs(hidden):
            expected = enumerated_kl(backbone, tokens[row], labels[row], shown, a, b)
            assert gains[row, a, b].item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("kind", ["kl", "expected"])
def test_draws_average_to_the_enumerated_expectation(kind: str) -> None:
    """2x2 blocks of binary tokens: the chain is drawn, so many draws must agree within standard errors."""
    backbone, draws = tiny_backbone(4, 4, 2, 2), 3000
    tokens, labels, order = states(backbone, 1)
    many = [x.expand(draws, *x.shape[1:]) for x in (tokens, labels, order)]
    gains = gains_of(backbone, many[0], many[1], many[2], 1, kind)
    shown, hidden = order[0, :1].tolist(), order[0, 1:].tolist()
    enumerated = {"kl": enumerated_kl, "expected": enumerated_expected}[kind]
    for a, b in pairs(hidden):
        values = gains[:, a, b]
        expected = enumerated(backbone, tokens[0], labels[0], shown, a, b)
        assert expected > 0.001
        assert abs(values.mean().item() - expected) < 4 * values.std().item() / draws**0.5 + 1e-5


def test_several_samples_are_averaged(backbone: OrderRobustTransformer) -> None:
    tokens, labels, order = states(backbone, 2)
    uniforms = gain_uniforms(backbone.geometry, (0, torch.arange(2)), 3, tokens.device)
    prefix = backbone.start(labels)
    single = [block_gains(backbone, prefix, tokens, order, "kl", uniforms[:, [i]]) for i in range(3)]
    together = block_gains(backbone, prefix, tokens, order, "kl", uniforms, samples=3)
    assert torch.allclose(together, torch.stack(single).mean(0), atol=1e-5)
    assert not torch.allclose(single[0], single[1], atol=1e-3)


def test_expected_gains_use_no_hindsight(backbone: OrderRobustTransformer) -> None:
    tokens, labels, order = states(backbone, 2)
    geometry = backbone.geometry
    visible = geometry.block_tokens[order[:, :3]].flatten(1)
    other = ((tokens + 1) % backbone.vocab_size).scatter(1, visible, tokens.gather(1, visible))
    for kind, same in (("expected", True), ("kl", False), ("pointwise", False)):
        one = gains_of(backbone, tokens, labels, order, 3, kind)
        two = gains_of(backbone, other, labels, order, 3, kind)
        assert torch.allclose(one, two, atol=1e-6) == same


def test_wrong_settings_are_refused() -> None:
    cases: list[dict[str, Any]] = [{"kind": "exact"}, {"contexts": 0}, {"samples": 0}]
    for wrong in cases:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LabelConfig(**wrong)


# ---------------------------------------------------------------------- a part of the targets


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9, 1.0])
def test_a_candidate_has_as_many_targets_as_asked_and_never_itself(fraction: float) -> None:
    geometry = BlockGrid(8, 8, 2)
    hidden = torch.rand(20, 16, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :11]
    uniforms = torch.rand(20, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = torch.rand(20, 11) * 5
    place, weight = sampled_targets(geometry, hidden, losses, fraction, uniforms)
    assert place.shape == weight.shape == (20, 11, max(1, round(fraction * 10)))
    assert (place != torch.arange(11)[:, None]).all() and (weight >= 1 - 1e-6).all()
    assert (place.sort(-1).values.diff(dim=-1) > 0).all()  # all different


def test_sums_over_a_part_of_the_targets_are_unbiased() -> None:
    """Systematic sampling: the mean over equally spaced starting points is the expectation, exactly in the limit."""
    geometry, points = BlockGrid(6, 6, 2), 20_000
    hidden, losses = torch.arange(8)[None], torch.tensor([[0.0, 0.1, 3.0, 1.0, 8.0, 2.0, 0.5, 4.0]])
    gains = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).double().fill_diagonal_(0.0)
    uniforms = ((torch.arange(points) + 0.5) / points).double()[:, None].expand(-1, 8)
    place, weight = sampled_targets(geometry, hidden.expand(points, -1), losses.expand(points, -1), 0.4, uniforms)
    sums = (gains.expand(points, -1, -1).gather(2, place) * weight).sum(-1).mean(0)
    assert torch.allclose(sums, gains.sum(-1), atol=5e-3)
    assert not torch.allclose(gains.gather(1, place[0]).sum(-1), gains.sum(-1), atol=0.1)


def test_a_part_of_the_targets_gives_weighted_gains(backbone: OrderRobustTransformer) -> None:
    tokens, labels, order = states(backbone)
    exact = gains_of(backbone, tokens, labels, order, 3)
    length = torch.full((3,), 3)
    contexts = Contexts(torch.arange(3), torch.arange(3), order, length)
    config = LabelConfig(contexts=3, target_fraction=0.5)
    part = next(label_contexts(backbone, tokens, labels, config, contexts))["gains"]
    chosen = part != 0
    assert (chosen.sum(-1) <= 2).all() and chosen.any()  # round(0.5 * 5) targets, to even
    ratio = part[chosen] / exact[chosen]
    assert (ratio > 1 - 1e-3).all() and not torch.allclose(ratio, torch.ones_like(ratio), atol=1e-2)
    with pytest.raises(ValueError, match=r"target_fraction must lie in \(0, 1\], got 0"):
        LabelConfig(target_fraction=0)


# ---------------------------------------------------------------------- labels


def test_contexts_cover_images_and_lengths() -> None:
    _, image, order, length = random_contexts(LabelConfig(contexts=4000), images=50, num_blocks=9)
    assert image.bincount(minlength=50).tolist() == [80] * 50
    assert torch.equal(order.sort(1).values, torch.arange(9).expand(4000, -1))
    assert length.bincount().tolist() == pytest.approx([500] * 8, abs=90)
    assert torch.equal(length, length.sort().values)
    again = random_contexts(LabelConfig(contexts=4000), images=50, num_blocks=9)
    other = random_contexts(LabelConfig(contexts=4000, seed=1), images=50, num_blocks=9)
    assert torch.equal(order, again.order) and not torch.equal(order, other.order)


@pytest.mark.parametrize("kind", ["pointwise", "kl"])
def test_label_rows_agree_with_the_naive_form(kind: str) -> None:
    """Every row holds the context it belongs to, in order: recomputing from the row alone gives the row."""
    backbone = tiny_backbone(4, 6, 2)
    data = tiny_images(backbone, 4)
    config = LabelConfig(contexts=10, kind=kind, batch_size=3, seed=2)
    contexts = random_contexts(config, len(data), 6)
    parts = [
        TensorDict(part, batch_size=[len(part["label"])])
        for part in label_contexts(backbone, data.tokens, data.labels, config, contexts)
    ]
    assert max(len(part) for part in parts) <= 3
    rows = torch.cat(parts)
    assert len(rows) == 10
    for number, row in enumerate(rows):
        image, n = int(row["image"]), int(row["length"])
        tokens, label, order = data.tokens[image], data.labels[image], row["order"]
        shown, hidden = order[:n].tolist(), order[n:].tolist()
        assert row["label"] == label and len(set(order.tolist())) == 6
        assert row["visible"].nonzero().flatten().tolist() == sorted(shown)
        for block in range(6):
            expected = 0.0 if block in shown else block_loss(backbone, tokens, label, shown, block)
            assert row["loss"][block].item() == pytest.approx(expected, abs=1e-5)
        prefix = backbone.start(label[None])
        for block in shown:
            prefix = backbone.extend(prefix, tokens[None], torch.tensor([[block]]), torch.ones(1, dtype=torch.int64))
        first, entropy = backbone.observe(prefix, torch.tensor([hidden]))
        assert torch.allclose(row["hidden"][hidden], first[0], atol=1e-5) and (row["hidden"][shown] == 0).all()
        assert torch.allclose(row["entropy"][hidden], entropy[0], atol=1e-5) and (row["entropy"][shown] == 0).all()
        uniforms = gain_uniforms(backbone.geometry, (2, torch.tensor([number])), 1, tokens.device)
        gains = block_gains(backbone, prefix, tokens[None], torch.tensor([hidden]), kind, uniforms)
        assert torch.allclose(row["gains"], gains[0], atol=2e-5)


def test_labels_do_not_depend_on_the_batch_size() -> None:
    backbone = tiny_backbone(4, 6, 2)
    data = tiny_images(backbone, 4)
    results = []
    for batch_size in (1, 64):
        config = LabelConfig(contexts=12, kind="expected", samples=2, batch_size=batch_size)
        contexts = random_contexts(config, len(data), 6)
        parts = list(label_contexts(backbone, data.tokens, data.labels, config, contexts))
        results.append(torch.cat([part["gains"] for part in parts]))
    assert torch.allclose(results[0], results[1], atol=1e-5)


def test_labels_of_a_part_of_the_contexts_are_those_of_all() -> None:
    backbone = tiny_backbone(4, 6, 2)
    data = tiny_images(backbone, 4)
    config = LabelConfig(contexts=12, kind="kl")
    contexts = random_contexts(config, len(data), 6)
    whole = list(label_contexts(backbone, data.tokens, data.labels, config, contexts))
    rows = torch.tensor([3, 4, 9])
    part = list(label_contexts(backbone, data.tokens, data.labels, config, contexts.select(rows)))
    for key in ("order", "gains", "hidden"):
        assert torch.allclose(torch.cat([p[key] for p in whole])[rows], torch.cat([p[key] for p in part]), atol=1e-5)


def test_the_order_of_the_prefix_matters(backbone: OrderRobustTransformer) -> None:
    """Why labels store an order: a causal prefix encodes the same blocks differently in another order."""
    tokens, labels, order = states(backbone, 1)
    one = gains_of(backbone, tokens, labels, order, 4)
    swapped = torch.cat([order[:, :4].flip(1), order[:, 4:]], 1)
    assert not torch.allclose(one, gains_of(backbone, tokens, labels, swapped, 4), atol=1e-4)


def test_gains_of_the_shipped_weights() -> None:
    backbone = load_backbone("digits")
    assert isinstance(backbone, OrderRobustTransformer)
    data = load_split("digits", "planner")
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))[None]
    tokens, labels = data.tokens[:1], data.labels[:1]
    gains = gains_of(backbone, tokens, labels, order, 10)
    shown = order[0, :10].tolist()
    a, b = order[0, 10:12].tolist()
    expected = block_loss(backbone, tokens[0], labels[0], shown, b)
    expected -= block_loss(backbone, tokens[0], labels[0], [*shown, a], b)
    assert gains[0, a, b].item() == pytest.approx(expected, abs=2e-5)
    assert utilities(gains, backbone.geometry, distance_weights(backbone.geometry, "uniform", 1.5)).shape == (1, 16)
