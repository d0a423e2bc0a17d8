"""Forwards of bounded size: the plan covers everything once, the budget is kept, results do not move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.memory import held, table
from orderrl.backbones import OrderRobustTransformer, build_backbone, load_backbone
from orderrl.backbones.memory import Packing, free_memory, plan
from orderrl.envs.core import CoreConfig, NextBlockCore
from tests.backbones.families import tiny
from tests.envs.helpers import play
from tests.helpers import random_orders, tiny_images


@pytest.mark.parametrize("most", [1, 7, 20, 60, 1000])
@pytest.mark.parametrize(("states", "groups", "cost"), [(1, 1, 1), (5, 4, 3), (3, 10, 7), (4, 0, 0), (2, 3, 500)])
def test_a_plan_covers_every_group_of_every_state_once(states: int, groups: int, cost: int, most: int) -> None:
    seen: list[tuple[int, int]] = []
    for rows, parts in plan(states, groups, cost, most):
        for part in parts:
            block = [(row, group) for row in range(*rows.indices(states)) for group in range(*part.indices(groups))]
            assert len(block) <= 1 or len(block) * cost <= most or (rows.stop - rows.start == 1 and len(parts) == 1)
            seen += block
    assert sorted(seen) == [(row, group) for row in range(states) for group in range(groups)]


def entries_of_forwards(backbone: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Entries of every forward from here on."""
    sizes: list[int] = []
    encode = type(backbone).encode

    def counted(self: Any, x: Tensor, *rest: Any, **kw: Any) -> Any:
        sizes.append(x[..., 0].numel())
        return encode(self, x, *rest, **kw)

    monkeypatch.setattr(type(backbone), "encode", counted)
    return sizes


def test_less_memory_means_smaller_forwards_and_the_same_losses(
    backbone: OrderRobustTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, orders = tiny_images(backbone, 6), random_orders(backbone, 6)
    prefix = backbone.start(data.labels)
    whole, entries = backbone.context_loss(prefix, data.tokens, orders, whole=True)
    sizes = entries_of_forwards(backbone, monkeypatch)
    largest, seen = [], []
    for memory in (10.0, 1e-4, 1e-9):
        monkeypatch.setattr(backbone, "packing", Packing(memory), raising=False)
        shown, revealed = torch.tensor([0, 1, 2, 3, 2, 1]), backbone.start(data.labels)
        extended = backbone.extend(revealed, data.tokens, orders[:, :3], shown)
        first, _ = backbone.observe(extended, orders[:, 3:])
        seen.append((extended.length, first))
        sizes.clear()
        losses, again = backbone.context_loss(prefix, data.tokens, orders, whole=True)
        assert torch.allclose(losses.loss, whole.loss, atol=1e-5)
        assert torch.allclose(losses.hidden, whole.hidden, atol=1e-5)
        assert again is not None and entries is not None
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(again.values, entries.values, strict=True))
        largest.append(max(sizes))
    assert all(torch.equal(seen[0][0], length) for length, _ in seen)
    assert all(torch.allclose(seen[0][1], first, atol=1e-5) for _, first in seen)
    assert largest[0] > largest[1] > largest[2] == 8  # a chain of one block is never split


def test_a_chain_is_picked_from_the_forwards_that_made_it(
    backbone: OrderRobustTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, orders = tiny_images(backbone, 6), random_orders(backbone, 6)
    prefix, index = backbone.start(data.labels), torch.tensor([3, 0, 8, 8, 1, 5])
    for memory in (10.0, 1e-4, 1e-9):  # all states in one forward, a few, a chain
        monkeypatch.setattr(backbone, "packing", Packing(memory), raising=False)
        _, parts = backbone.context_loss(prefix, data.tokens, orders)
        picked, expected = parts.chain(index), parts.whole().chain(index)
        assert picked.length == 7 and picked.count == 1
        for one, other in zip(picked.keys + picked.values, expected.keys + expected.values, strict=True):
            assert torch.equal(one, other)


def test_states_at_once_follow_the_budget(backbone: OrderRobustTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "packing", Packing(1e-3), raising=False)
    few = backbone.states_at_once(9)
    monkeypatch.setattr(backbone, "packing", Packing(1e-2), raising=False)
    assert backbone.states_at_once(9) == pytest.approx(10 * few, abs=10) and backbone.states_at_once(1) > 10 * few
    monkeypatch.setattr(backbone, "packing", Packing(1e-12), raising=False)
    assert backbone.states_at_once(9) == 1


def test_entries_that_memory_does_not_hold_are_computed_again(
    backbone: OrderRobustTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = []
    for memory in (10.0, 2e-4):  # the entries of all episodes, of a few
        monkeypatch.setattr(backbone, "packing", Packing(memory), raising=False)
        core = NextBlockCore(backbone, tiny_images(backbone), 12, CoreConfig(budgets=(1, 2)), seed=0)
        rewards.append(play(core).rewards)
        kept = core.num_envs if memory == 10.0 else 0
        core.reset()
        assert sum(len(look.rows.here) for look in core._looks) == kept
    assert torch.allclose(rewards[0], rewards[1], atol=1e-5)


def test_what_is_free_is_the_default() -> None:
    device = torch.device("cpu")
    assert 0 < Packing().budget(device) < free_memory(device)
    with pytest.raises(ValueError, match=r"memory_gb must be positive, got 0"):
        Packing(0)


def test_the_budget_and_the_compiler_are_arguments_of_loading() -> None:
    backbone: Any = load_backbone("digits", memory_gb=0.5)
    assert backbone.packing == Packing(0.5)
    with pytest.raises(ValueError, match="compile='fast' is unknown; choose one of default"):
        load_backbone("digits", compile="fast")
    shape: dict[str, Any] = {"height": 4, "width": 4, "block_size": 2, "dim": 16, "layers": 2, "heads": 2}
    assert isinstance(build_backbone("arpg_l", shape=shape | {"vocab_size": 8, "num_classes": 2}), torch.nn.Module)


def test_compiled_layers_equal_eager_ones(backbone: OrderRobustTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's form of attention, traced as a whole and run without code generation."""
    data, orders = tiny_images(backbone, 3), random_orders(backbone, 3)
    prefix = backbone.extend(backbone.start(data.labels), data.tokens, orders[:, :2], torch.tensor([2, 1, 0]))
    eager, past = backbone.context_loss(prefix, data.tokens, orders[:, 2:], whole=True)
    after, _ = backbone.context_loss(prefix, data.tokens, orders[:, 2:].repeat(1, 1), past=past)
    layer = next(iter(backbone._blocks()))  # of layers that are alike one is enough: each is traced by itself
    compiled = torch.compile(layer.chain, backend="aot_eager", dynamic=True, fullgraph=True)
    monkeypatch.setattr(layer, "chain", compiled)
    losses, past = backbone.context_loss(prefix, data.tokens, orders[:, 2:], whole=True)
    assert torch.allclose(losses.loss, eager.loss, atol=1e-5)
    again, _ = backbone.context_loss(prefix, data.tokens, orders[:, 2:], past=past)
    assert torch.allclose(again.loss, after.loss, atol=1e-5)


@pytest.mark.parametrize("family", ["randar", "arpg"])
def test_what_is_counted_as_held_is_what_is_held(family: str) -> None:
    backbone = tiny(family)
    counted = held(backbone)
    prefix = backbone.start(torch.zeros(3, dtype=torch.int64))
    assert 3 * counted.per_image == prefix.keys.nbytes + prefix.values.nbytes
    tokens, blocks = torch.zeros(3, backbone.geometry.num_tokens).long(), torch.arange(backbone.geometry.num_blocks)
    _, entries = backbone.context_loss(prefix, tokens, blocks.expand(3, -1))
    whole = entries.whole()
    assert 3 * counted.kept_chains == sum(part.nbytes for part in whole.keys + whole.values)
    assert counted.weights == sum(parameter.nbytes for parameter in backbone.parameters())


def test_the_memory_page_holds_the_counted_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "gpu.md"
    assert table() in page.read_text(encoding="utf-8")
