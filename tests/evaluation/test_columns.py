"""The one list of metrics: a metric is registered in one call, and every table follows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from orderrl import compare, compose
from orderrl.agents.play import Rollout
from orderrl.backbones import Backbone, save_backbone
from orderrl.evaluate import evaluate
from orderrl.evaluation.columns import (
    HIGHER,
    LOWER,
    METRICS,
    Column,
    all_columns,
    column_of,
    empty_row,
    measured,
    register_metric,
)
from orderrl.metrics.quality import Quality
from tests.helpers import tiny_backbone


def loss_after_a_step(rollout: Rollout, backbone: Backbone) -> Tensor:
    return rollout.losses[1].sum(-1) / backbone.geometry.num_tokens


def brightness(images: Tensor, labels: Tensor) -> Tensor:
    return images.float().mean((1, 2, 3))


LOSS = Column(
    "loss_after_a_step", "loss after a step", "nats per token", 3, "Loss that one step leaves.", LOWER,
    places="screen markdown compare", per_image=loss_after_a_step,
)  # fmt: skip
BRIGHTNESS = Column("brightness", "brightness", "of 255", 1, "Mean pixel.", HIGHER, per_sample=brightness)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(METRICS, "members", {})
    register_metric(LOSS, "planning")
    register_metric(BRIGHTNESS, "samples")
    yield


def test_a_registered_metric_is_in_every_table(
    registered: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_backbone(tmp_path / "tiny.safetensors", tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    small = ["eval.images=8", "eval.samples=10", "eval.states=8", "eval.resamples=50", "eval.features=null"]
    small += ["eval.policies=[raster,random]", "eval.planners=[]", "eval.token_raster=[]", "eval.classifier=null"]
    folders = [f"output_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"]
    backbone = ["backbone=digits", f"backbone.name={tmp_path / 'tiny.safetensors'}"]
    folder = evaluate(compose("evaluate", [*backbone, *small, *folders]))
    assert "loss after a step ↓ (nats per token)" in " ".join(capsys.readouterr().out.split())
    rows = {row["policy"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}
    low, high = rows["raster"]["loss_after_a_step_ci"]
    assert low <= rows["raster"]["loss_after_a_step"] <= high
    assert rows["raster"]["brightness_ci"] is not None and rows["random"]["brightness"] is None  # it is not sampled
    assert "loss after a step ↓ (nats per token)" in (folder / "results.md").read_text()
    page = (folder / "report.html").read_text()
    assert LOSS.help in page and BRIGHTNESS.help in page and "brightness ↑" in page

    other = evaluate(compose("evaluate", [*backbone, *small, *folders, "eval.policies=[raster]", "eval.resamples=60"]))
    runs = [f"a={folder}", f"b={other}", "--output-dir", str(tmp_path / "runs")]
    assert compare.main([*runs, "--metrics", "loss_after_a_step"]) == 0
    assert compare.main([*runs, "--rank", "loss_after_a_step"]) == 0
    (ranked,) = (tmp_path / "runs" / "compare").glob("*/leaderboard.json")
    values = [row["loss_after_a_step"] for row in json.loads(ranked.read_text())["rows"]]
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("column", "group", "said"),
    [
        (column_of("gain_auc"), "planning", "'gain_auc': the package has a meaning for the name"),
        (LOSS, "beauty", "group='beauty' is unknown; choose one of policy, planning"),
        (Column("empty", "empty", "", 1, "Nothing."), "planning", "either per_image or per_sample"),
    ],
)
def test_a_wrong_registration_is_refused(column: Column, group: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        register_metric(column, group)
    with pytest.raises(ValueError, match="places='wall' must be of screen"):
        Column("x", "x", "", 1, "X.", places="wall")


def test_every_entry_of_a_row_has_a_column_or_is_no_number_of_its_own() -> None:
    shown = [column.name for column in all_columns()]
    assert len(shown) == len(set(shown)) and all(column.help for column in all_columns())
    known: dict[str, Any] = empty_row()
    others = set(known) - set(shown) - {f"{name}_ci" for name in shown}
    curves = {"recognisability_curve", "visible_neighbours_curve", "reliability"}
    assert others == {"family", "rival", "own", "decode_bits", "decode_bits_ci"} | curves
    assert {field.name for field in fields(Quality)} <= set(shown)


def test_a_value_is_shown_in_its_columns_unit() -> None:
    assert column_of("accuracy").show(0.725) == "72.5" and column_of("seconds_per_image").show(0.0123) == "12.3"
    assert column_of("kid").show(-0.0012) == "−0.0012" and column_of("budgets").show([1, 2]) == "1, 2"
    assert column_of("drop").show(0.5) == "0.5000"  # an analysis's own
    assert column_of("decode_nll").title == "decode NLL ↓ (nats per image)"


def test_only_columns_with_a_value_are_shown() -> None:
    rows: list[dict[str, Any]] = [{"policy": "raster", "kid": None}, {"policy": "random", "kid": 0.1}]
    assert [column.name for column in measured(all_columns("markdown"), rows)] == ["kid"]
