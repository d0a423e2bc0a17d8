"""Blocks drawn as CUDA graphs, on a real device or the simulated one; `tests/test_cuda.py` runs this file too."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from orderrl.backbones import Sampling, load_backbone
from tests.backbones.families import images
from tests.on_cuda import LIMITS, device, on_cuda, pytestmark, simulated_only, within  # noqa: F401  # fixture and mark
from tests.simulated_cuda import counting


@simulated_only
@torch.no_grad()
def test_a_block_is_one_graph_however_many_layers_there_are() -> None:
    backbone = on_cuda("randar")
    backbone.graphs.wanted = True
    zeros = torch.zeros(2, 1).long().to("cuda")
    prefix, uniforms = backbone.start(zeros[:, 0]), torch.rand(2, 1, backbone.geometry.tokens_per_block).to("cuda")
    for _ in range(2):
        with counting() as counts:
            backbone.decode(prefix, zeros, uniforms, Sampling())
    within("a block as a graph", counts)
    assert counts.launched["graph"] == 1


def drawn(backbone: Any, count: Tensor, guided: bool, seed: int) -> Any:
    """Two blocks of three states, of which `count` (3,) blocks are visible."""
    generator, data = torch.Generator().manual_seed(seed), images(backbone)
    order = torch.rand(3, backbone.geometry.num_blocks, generator=generator).argsort(1)
    uniforms = torch.rand(3, 2, backbone.geometry.tokens_per_block, generator=generator, dtype=torch.float64)
    order, uniforms, tokens = (part.to("cuda") for part in (order, uniforms, data.tokens[:3]))
    sides = []
    for class_ in (0, backbone.num_classes)[: 1 + guided]:
        start = backbone.start(torch.full((3,), class_).to("cuda"))
        sides.append(backbone.extend(start, tokens, order[:, :2], count))
    sampling = Sampling(guidance=1.5 if guided else 1.0, guidance_schedule="linear", top_k=3, temperature=0.9)
    return backbone.decode(sides[0], order[:, 2:], uniforms, sampling, *sides[1:])


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("count", [[1, 1, 1], [2, 0, 1]])
@pytest.mark.parametrize("family", ["randar", "arpg"])
@torch.no_grad()
def test_a_recorded_block_is_the_eager_one(family: str, count: list[int], guided: bool) -> None:
    graphed, eager = on_cuda(family), on_cuda(family)
    graphed.graphs.wanted, eager.graphs.wanted = True, False
    for seed in range(2):  # the second replays what the first recorded
        mine, expected = (drawn(backbone, torch.tensor(count), guided, seed) for backbone in (graphed, eager))
        assert torch.equal(mine.tokens.cpu(), expected.tokens.cpu())
        for side, other in ((mine.entries, expected.entries), (mine.unconditional, expected.unconditional)):
            for one, two in (
                zip(side.keys + side.values, other.keys + other.values, strict=True) if guided or side else ()
            ):
                torch.testing.assert_close(one.cpu(), two.cpu())
    assert len(graphed.graphs) == 1 and len(eager.graphs) == 0


@torch.no_grad()
def test_shapes_that_come_again_are_recorded_and_moved_weights_recorded_again() -> None:
    backbone, eager = on_cuda("randar"), on_cuda("randar")
    eager.graphs.wanted = False
    recorded = []
    for seed in range(4):
        drawn(backbone, torch.tensor([1, 1, 1]), False, seed)
        recorded.append(len(backbone.graphs))
    assert recorded == [0, 0, 1, 1]
    for model in (backbone, eager):
        for parameter in model.parameters():
            parameter.data = 2 * parameter.data
    mine, expected = (drawn(model, torch.tensor([1, 1, 1]), False, 9) for model in (backbone, eager))
    assert torch.equal(mine.tokens.cpu(), expected.tokens.cpu())
    assert len(deepcopy(backbone).graphs) == 0


@torch.no_grad()
def test_what_cannot_be_recorded_is_drawn_eagerly_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = on_cuda("randar")
    wait = backbone.logits
    monkeypatch.setattr(backbone, "logits", lambda hidden: wait(hidden) * float(hidden.sum() * 0 + 1))
    backbone.graphs.wanted = True
    with pytest.raises(RuntimeError, match="captur"):
        drawn(backbone, torch.tensor([1, 1, 1]), False, 0)
    backbone.graphs.wanted = None
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        for _ in range(3):
            drawn(backbone, torch.tensor([1, 1, 1]), False, 0)
    assert backbone.graphs.wanted is False


@pytest.mark.parametrize(("name", "asked"), [("digits", {}), ("digits", {"device": "cuda", "compile": "default"})])
def test_graphs_that_are_asked_for_and_not_possible_are_refused(name: str, asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cuda_graph=true needs"):
        load_backbone(name, cuda_graph=True, **asked)
