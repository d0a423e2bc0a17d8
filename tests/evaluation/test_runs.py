"""Runs that are compared or collected: paired over the same images, of one protocol, or refused with the difference."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orderrl import compare, compose
from orderrl.backbones import Sampling, load_backbone
from orderrl.data import load_split
from orderrl.data.encode import tokenize_folder
from orderrl.data.folder import FolderConfig
from orderrl.evaluation.columns import METRICS, all_columns
from orderrl.evaluation.comparison import compare as compare_pairs
from orderrl.evaluation.comparison import run_pairs
from orderrl.evaluation.protocol import PARTS, EvaluationProtocol, open_protocol
from orderrl.evaluation.rows import Evaluated
from orderrl.evaluation.runs import (
    VALUES,
    collected_rows,
    open_evaluation,
    open_evaluations,
    ranked_rows,
    save_results,
)
from orderrl.evaluation.settings import EvalConfig, eval_config
from orderrl.factory import section, setup_of
from orderrl.metrics.statistics import holm, paired_bootstrap
from orderrl.runtime.storage import read_sealed, write_sealed
from tests.report.test_report import Page
from tests.report_data import row
from tests.tokenizers.helpers import image_folder, save_tiny_vq, tiny_vq

IDENTITY = {"data": "digits", "split": "test", "images": 60, "backbone": "abc", "features": None, "seed": 0}
DATA = "digits/test, 60 images"


def gains(seed: int, shift: float = 0.0) -> torch.Tensor:
    """Gain AUC of sixty images; all seeds share most of their variance, as policies on the same images do."""
    shared, own = (np.random.default_rng(s).normal(size=60) for s in (99, seed))
    return torch.from_numpy((0.08 + shift + 0.05 * shared + 0.005 * own).astype(np.float32))


def evaluated(policy: str, values: torch.Tensor, R: int | None = None, seed: int | None = None) -> Evaluated:
    mean = float(values.double().mean())
    return Evaluated(row(policy, mean, R, seed=seed, seconds_per_image=0.1), {"gain_auc": values})


def write_run(folder: Path, rows: list[Evaluated], **changes: Any) -> Path:
    """A run folder as `orderrl.evaluate` leaves it."""
    folder.mkdir(parents=True)
    identity = IDENTITY | changes
    floor = [row("real images", None, frechet_distance=0.3, features="orderrl-digits")]
    results = {"protocol": {"data": DATA}, "identity": identity, "rows": [r.row for r in rows] + floor}
    save_results(folder, results, rows)
    return folder


@pytest.fixture
def before(tmp_path: Path) -> Path:
    rows = [evaluated("raster", gains(0)), evaluated("bc", gains(1), R=2, seed=0), evaluated("bc", gains(2), 2, 1)]
    return write_run(tmp_path / "before", rows)


@pytest.fixture
def after(tmp_path: Path) -> Path:
    rows = [evaluated("raster", gains(0)), evaluated("bc", gains(3, 0.01), 2, 0), evaluated("ppo", gains(4), 2, 0)]
    return write_run(tmp_path / "after", rows)


def test_a_run_is_read_back_with_the_values_of_its_images(before: Path) -> None:
    found = open_evaluation(before)
    assert found.name == "before" and found.identity == IDENTITY
    assert [r.row["policy"] for r in found.rows] == ["raster", "bc", "bc", "real images"]
    assert torch.equal(found.rows[2].per_image["gain_auc"], gains(2)) and found.rows[3].per_image == {}


def test_differences_are_paired_over_images_and_corrected(before: Path, after: Path) -> None:
    pairs, equal = run_pairs(
        open_evaluations([str(before), str(after)]), [column.name for column in all_columns("compare")]
    )
    assert [pair["name"] for pair in equal] == ["raster (after) - raster (before)"]  # nothing to test
    names = ["bc (after) - bc (before)", "ppo (after) - bc (before)"]
    assert [pair.name for pair in pairs] == names and {pair.metric for pair in pairs} == {"gain_auc"}
    found = compare_pairs(pairs, 500, 0)
    both = torch.stack([gains(1), gains(2)])
    expected = [paired_bootstrap(own[None], both, 500) for own in (gains(3, 0.01), gains(4))]
    for entry, difference in zip(found, expected, strict=True):
        assert (entry["mean"], entry["low"], entry["high"]) == (difference.mean, difference.low, difference.high)
    assert [e["p_holm"] for e in found] == pytest.approx(holm([d.p_value for d in expected]))
    assert found[0]["significant"] and found[0]["mean"] == pytest.approx(0.01, abs=0.003)


def test_without_pairing_the_difference_would_drown(before: Path, after: Path) -> None:
    one, other = gains(3, 0.01), gains(1)
    unpaired = (one.var() / 60 + other.var() / 60).sqrt().item()
    assert 1.96 * unpaired > 0.01
    pairs, _ = run_pairs(
        open_evaluations([str(before), str(after)]), [column.name for column in all_columns("compare")]
    )
    assert compare_pairs(pairs, 500, 0)[0]["low"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 50}, r"images \(60 in before, 50 in other\)$"),
        ({"backbone": "xyz"}, r"backbone \(abc in before, xyz in other\)$"),
        ({"features": "dinov2", "seed": 1}, r"features \(none in before, dinov2 in other\); seed \(0 in before, 1"),
        ({"reference": "abcd"}, r"reference \(none in before, abcd in other\)$"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--rank", "gain_auc"]], ids=["compare", "rank"])
def test_other_protocols_are_refused_by_name(
    before: Path, changes: dict[str, Any], message: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(before.parent / "other", [evaluated("raster", gains(0))], **changes)
    assert compare.main([str(before), str(other), *options, "--output-dir", str(before.parent / "runs")]) == 2
    error = capsys.readouterr().err
    assert "different protocols" in error and re.search(message, error.strip())
    assert not (before.parent / "runs").exists()


def test_what_is_no_evaluation_is_refused(before: Path, after: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no finished evaluation: it has no results\.json"):
        open_evaluation(tmp_path)
    with pytest.raises(ValueError, match="is given twice"):
        open_evaluations([str(before), f"again={before}"])
    with pytest.raises(ValueError, match="must have different names, got x, x"):
        open_evaluations([f"x={before}", f"x={after}"])
    (before / VALUES).write_bytes((after / VALUES).read_bytes()[:100])
    with pytest.raises(ValueError, match=r"per_image\.safetensors: is truncated or altered .*; evaluate again"):
        open_evaluation(before)
    (before / VALUES).unlink()
    with pytest.raises(ValueError, match=r"per_image\.safetensors: is missing; evaluate again"):
        open_evaluation(before)
    (after / "results.json").write_text('{"loss": 1.0}')  # of another command
    with pytest.raises(ValueError, match="is no evaluation, or an older version's"):
        open_evaluation(after)


def test_runs_without_anything_in_common_are_refused(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_run(before.parent / "other", [evaluated("spiral", gains(0))])
    assert compare.main([str(before), str(other)]) == 2
    assert "no policies in common" in capsys.readouterr().err
    assert compare.main([str(before)]) == 2
    assert "at least two runs" in capsys.readouterr().err


def test_folders_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "1", [evaluated("raster", gains(0))]) for name in ("a", "b")]
    assert [run.name for run in open_evaluations(list(map(str, runs)))] == ["a/1", "b/1"]


def test_equal_rows_stand_once_with_all_their_runs(before: Path, after: Path) -> None:
    rows = collected_rows(open_evaluations([f"one={before}", f"two={after}"]))
    names = ["raster: one, two", "bc: one", "bc: one", "real images: one, two", "bc: two", "ppo: two"]
    assert [f"{r['policy']}: {r['run']}" for r in rows] == names
    results = read_sealed(after / "results.json")
    results["rows"][0] |= {"seconds_per_image": 0.2, "not measured": None}
    write_sealed(after / "results.json", results)
    assert collected_rows(open_evaluations([str(before), str(after)]))[0]["run"] == "before, after"


def test_the_comparison_is_written_and_shown(before: Path, after: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = before.parent / "runs"
    assert compare.main([str(before), f"new={after}", "--output-dir", str(out), "--resamples", "300"]) == 0
    shown = capsys.readouterr().out
    assert "bc (new) − bc (before)" in shown and "Equal on every image: raster." in shown
    (folder,) = (out / "compare").iterdir()
    results = json.loads((folder / "comparison.json").read_text())
    assert results["runs"] == {"before": str(before), "new": str(after)} and len(results["comparisons"]) == 2
    text = (folder / "comparison.html").read_text()
    page = Page(text)
    assert page.lines[0] and {"before, new", "new", "before"} <= {cell for line in page.lines for cell in line}
    assert "compared with before" in text and "://" not in text


def test_the_figures_of_a_comparison_show_the_chosen_rows(before: Path, after: Path) -> None:
    out = before.parent / "figures"
    chosen = ["--rank", "gain_auc", "--rows", "raster", "bc", "--output-dir", str(out)]
    assert compare.main([str(before), str(after), *chosen]) == 0
    (folder,) = (out / "compare").iterdir()
    assert sorted(path.name for path in (folder / "figures").iterdir()) == [
        f"gain_auc.{x}" for x in ("pdf", "png", "svg")
    ]
    drawn = set(re.findall(r"<text[^>]*>([^<]*)</text>", (folder / "figures" / "gain_auc.svg").read_text()))
    assert {"raster", "bc (before, seed 0)", "bc (after, seed 0)", "gain AUC ↑ (share of loss)"} <= drawn
    assert not any("random" in text or "real" in text for text in drawn)
    assert compare.main([str(before), str(after), "--rows", "rastre"]) == 2


def test_the_leaderboard_ranks_best_first(before: Path, after: Path) -> None:
    runs = open_evaluations([str(before), str(after)])
    rows = ranked_rows(runs, "gain_auc")
    values = [r["gain_auc"] for r in rows if r["gain_auc"] is not None]
    assert values == sorted(values, reverse=True) and rows[-1]["policy"] == "real images"
    assert ranked_rows(runs, "frechet_distance")[0]["policy"] == "real images"
    with pytest.raises(ValueError, match=r"rank='steps' cannot be ranked by; choose one of gain_auc"):
        ranked_rows(runs, "steps")


def test_the_leaderboard_is_written(before: Path, after: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = before.parent / "runs"
    assert compare.main([str(before), str(after), "--rank", "gain_auc", "--output-dir", str(out)]) == 0
    (folder,) = (out / "compare").iterdir()
    assert len(json.loads((folder / "leaderboard.json").read_text())["rows"]) == 6
    assert f"6 rows of 2 runs of one protocol, on {DATA}" in (folder / "leaderboard.html").read_text()
    assert "rank" in capsys.readouterr().out


# ---------------------------------------------------------------------- what a protocol is


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> EvaluationProtocol:
    folder = tmp_path_factory.mktemp("protocol")
    small = ["backbone=digits", "eval.images=20", "eval.lookahead_states=null", "eval.states=8", "eval.real_images=50"]
    config = compose("evaluate", [*small, f"cache_dir={folder / 'cache'}", f"output_dir={folder}"])
    settings = eval_config(section(config, "eval"), "digits")
    return open_protocol(settings, setup_of(config, load_backbone("digits")))


def with_settings(protocol: EvaluationProtocol, **changes: Any) -> EvaluationProtocol:
    return replace(protocol, config=replace(protocol.config, **changes))


def test_the_identity_tells_protocols_apart_and_nothing_else(protocol: EvaluationProtocol) -> None:
    identity = protocol.identity()
    assert json.loads(json.dumps(identity)) == identity  # survives results.json
    assert with_settings(protocol, resamples=5).identity() == identity
    data = load_split("digits", "test")
    fewer = replace(data, tokens=data.tokens[:20].flip(0), labels=data.labels[:20].flip(0))
    changed = {
        "content": replace(protocol, data=fewer),
        "states": replace(protocol, states=None),
        "sampling": with_settings(protocol, top_k=3),
        "seed": replace(protocol, seed=1),
        "samples": with_settings(protocol, samples=2),
        "kid_subsets": with_settings(protocol, kid_subsets=2),
        "reference_images": with_settings(protocol, reference_images=2),
        "recognisability": replace(protocol, recogniser=None),
    }
    for key, other in changed.items():
        found = other.identity()
        assert {name for name in identity if found[name] != identity[name]} == {key}


def test_every_setting_names_its_part_or_chooses_rows(
    protocol: EvaluationProtocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those without a part, or with one that has no identity, may change between runs that compare."""
    monkeypatch.setattr(METRICS, "members", {})
    parts = {part.key: part for part in PARTS}
    other = {"sweep": [2], "step_costs": [0.5], "budgets": [2], "token_raster": [], "planners": [], "sampled": []}
    other |= {"metrics": ["tests.evaluation.test_columns:LOSS"]}
    other |= {
        "modes": ["fast"],
        "specialists": ["specialist.safetensors"],
        "specialist_orders": ["raster"],
        "foreign": ["adm=samples.npz"],
        "policies": [],
        "keep_samples": True,
        "resamples": 5,
        "distance_resamples": 0,
        "fid_infinity": True,
    }
    identity = protocol.identity()
    for field in fields(EvalConfig):
        if field.name in {sampled.name for sampled in fields(Sampling)}:
            continue
        part = field.metadata.get("part")
        assert part is None or part in parts
        free = part is None or parts[part].identity is None
        assert free == (field.name in other), field.name
        if free:
            assert with_settings(protocol, **{field.name: other[field.name]}).identity() == identity


def test_the_keys_of_identity_and_wording_are_those_of_stored_runs(protocol: EvaluationProtocol) -> None:
    assert set(protocol.identity()) == {
        *("version", "data", "split", "images", "content", "backbone", "blocks", "states", "lookahead"),
        *("reference_images", "recognisability", "samples", "sampling", "features", "feature_weights", "reference"),
        *("kid_subsets", "clip_score", "real_images", "seed", "importance"),
    }
    said = protocol.described()
    assert said["data"] == "digits/test, 20 images" and said["backbone"].startswith("digits (")
    assert list(said) == [
        *("data", "backbone", "block_grid", "calibration", "references", "samples", "features", "clip_score"),
        *("recognisability", "losses", "sampling", "seconds_per_image", "lookahead_regret", "reliability"),
        *("intervals", "extrapolation", "comparisons", "seeds", "seed"),
    ]


def test_a_reference_is_known_by_its_content(protocol: EvaluationProtocol, tmp_path: Path) -> None:
    found = []
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(content)
        (tmp_path / f"{name}.npz").write_bytes(content)
        for path in (tmp_path / name, tmp_path / f"{name}.npz"):
            found.append(with_settings(protocol, reference=str(path)).identity()["reference"])
    assert found[0] == found[2] != found[4] and found[1] == found[3] != found[5]
    assert protocol.identity()["reference"] not in found


def test_a_token_set_is_known_by_its_tokens_and_tokeniser(protocol: EvaluationProtocol, tmp_path: Path) -> None:
    weights = save_tiny_vq(tmp_path / "tokenizer.safetensors")
    found = []
    for name, per_class in (("a", 10), ("b", 10), ("c", 8)):
        images = image_folder(tmp_path / f"images-{name}", per_class=per_class)
        source = FolderConfig(str(images), image_size=8)
        tokens = tokenize_folder(tiny_vq(), source, tmp_path / name, weights, shard_size=4)
        found.append(with_settings(protocol, reference=str(tokens)).identity()["reference"])
    assert found[0] == found[1] != found[2]
