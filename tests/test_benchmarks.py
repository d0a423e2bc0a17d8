"""The benchmarks: counts against PyTorch's own counter, naive twins against the package, the command as a whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as command
from benchmarks.counts import Counter
from benchmarks.naive import naive_label
from benchmarks.shapes import SHAPES, Shape
from benchmarks.suites import every_length, rank_agreement
from orderrl.backbones.cpu_linear import pack_weights
from orderrl.backbones.registry import new_backbone
from orderrl.oracle import LabelConfig, label_contexts
from tests.helpers import tiny_images

SHAPE = {
    "height": 8,
    "width": 8,
    "block_size": 2,
    "vocab_size": 50,
    "num_classes": 3,
    "dim": 64,
    "layers": 4,
    "heads": 4,
}


def tiny(family: str) -> Any:
    torch.manual_seed(0)
    backbone: Any = new_backbone(family, SHAPE)
    for name, parameter in backbone.named_parameters():
        if name in ("output.weight", "head.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
    return backbone.eval().requires_grad_(False)


@pytest.mark.parametrize("family", ["randar", "arpg"])
def test_counts_are_the_operations_that_are_done(family: str) -> None:
    """Attention over a chain's own future is computed and masked, so a few per cent more are done than counted."""
    backbone = tiny(family)
    pack_weights(backbone, False)  # PyTorch's counter does not know oneDNN's products
    data, counter, visible = tiny_images(backbone, 3), Counter(backbone), 6
    order = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)).argsort(1)
    length = torch.full((3,), visible)
    prefix = backbone.extend(backbone.start(data.labels), data.tokens, order[:, :visible], length)
    with FlopCounterMode(display=False) as chains:
        _, past = backbone.context_loss(prefix, data.tokens, order[:, visible:], whole=True)
    assert chains.get_total_flops() == pytest.approx(3 * counter.chain(10, visible, whole=True), rel=0.03)
    pairs = order[:, visible:].repeat(1, 10)
    with FlopCounterMode(display=False) as behind:
        backbone.context_loss(prefix, data.tokens, pairs, past=past)
    assert behind.get_total_flops() == pytest.approx(3 * counter.chain(100, visible, past=True), rel=0.03)
    with FlopCounterMode(display=False) as appending:
        backbone.extend(backbone.start(data.labels), data.tokens, order[:, :visible], length)
    assert appending.get_total_flops() == pytest.approx(3 * counter.append(visible, 0), rel=0.1)
    assert counter.label(visible) == pytest.approx(
        counter.chain(10, visible, whole=True) + counter.chain(90, visible, past=True)
    )


@pytest.mark.parametrize("family", ["randar", "arpg"])
def test_the_naive_twin_gives_the_same_labels(family: str) -> None:
    backbone = tiny(family)
    contexts = every_length(backbone, 2)
    data = tiny_images(backbone, len(contexts.length))
    config = LabelConfig(contexts=len(contexts.length))
    row = 0
    for part in label_contexts(backbone, data.tokens, data.labels, config, contexts):
        count = len(part["label"])
        naive = naive_label(backbone, data, contexts.select(torch.arange(row, row + count)))
        hidden = part["order"][:, int(part["length"][0]) :]
        gains = (
            part["gains"]
            .gather(1, hidden[..., None].expand(-1, -1, 16))
            .gather(2, hidden[:, None].expand(-1, hidden.shape[1], -1))
        )
        others = ~torch.eye(hidden.shape[1], dtype=torch.bool)
        assert torch.allclose(gains[:, others].view_as(naive), naive, atol=1e-4)
        row += count
    assert row == len(contexts.length)


def test_rank_agreement_is_over_hidden_blocks() -> None:
    exact = torch.tensor([[1.0, 2.0, 3.0, 9.0], [1.0, 2.0, 3.0, 4.0]])
    other = torch.tensor([[10.0, 20.0, 30.0, -9.0], [4.0, 3.0, 2.0, 1.0]])
    hidden = torch.tensor([[True, True, True, False], [True, True, True, True]])
    assert rank_agreement(exact, other, hidden) == pytest.approx(0.0)
    assert rank_agreement(exact[:1], other[:1], hidden[:1]) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["env", "context", "generation"])
def test_the_command_writes_its_rows(suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    monkeypatch.setitem(SHAPES, "tiny", Shape("tiny", lambda dtype: tiny("randar"), batch=2))
    arguments = ["--suite", suite, "--shape", "tiny", "--runs", "1", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, "--json", str(file)])
    command.main()
    rows = json.loads(file.read_text())
    assert {"suite", "shape", "variant", "seconds", "items_per_second", "ratio_to_naive", "fraction_of_limit"} <= set(
        rows[0]
    )
    naive = next(row for row in rows if row["variant"].startswith("naive"))
    assert naive["ratio_to_naive"] == 1 and len(rows) > 1
    assert all(row["seconds"] > 0 and (row["fraction_of_limit"] or 0) < 1.1 for row in rows)
