"""One rule says which differences count, on screen, in Markdown, on pages and in sentences."""

import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from orderrl.evaluation.columns import empty_row
from orderrl.evaluation.comparison import by_policy, compare_runs, comparisons, in_order
from orderrl.evaluation.detail import Pictures
from orderrl.evaluation.rows import Evaluated
from orderrl.evaluation.runs import Evaluation
from orderrl.metrics.statistics import RULE, is_significant
from orderrl.report import analysis, write_report
from orderrl.report.markdown import markdown_comparisons
from orderrl.report.runs_page import write_runs_page
from orderrl.report.screen import print_comparisons, print_results
from orderrl.report.summary import summary

IMAGES = 100


def noise(seed: int) -> torch.Tensor:
    return torch.randn(IMAGES, generator=torch.Generator().manual_seed(seed)).double()


def evaluated(policy: str, gains: torch.Tensor, **values: Any) -> Evaluated:
    row = empty_row() | {"policy": policy, "budgets": [1], "gain_auc": float(gains.mean())} | values
    return Evaluated(row, {"gain_auc": gains})


def shifted(seed: int, standard_errors: float) -> torch.Tensor:
    """Differences of images whose mean is so many standard errors above zero, exactly."""
    values = noise(seed)
    values = (values - values.mean()) / values.std()
    return 0.01 * (values + standard_errors / IMAGES**0.5)


@pytest.fixture(scope="module")
def rows() -> list[Evaluated]:
    """A planner clearly ahead of one order, and of raster by 2.3 standard errors: p = 0.02 alone, 0.4 among 20."""
    planner = 0.2 + 0.02 * noise(0)
    ahead = {"raster": 2.3, "random": 8.0} | {f"order{k}": 0.0 for k in range(18)}
    orders = [evaluated(name, planner - shifted(k + 1, by)) for k, (name, by) in enumerate(ahead.items())]
    return [*orders, evaluated("planner", planner, R=2, objective="context", seed=0)]


@pytest.fixture(scope="module")
def entries(rows: list[Evaluated]) -> list[dict[str, Any]]:
    return comparisons(rows, 2000, 0)


def test_a_difference_whose_interval_alone_excludes_zero_is_not_significant(entries: list[dict[str, Any]]) -> None:
    found = {entry["name"]: entry for entry in entries}
    alone, clear = found["planner - raster"], found["planner - random"]
    assert alone["low"] > 0 and alone["p_value"] < 0.05 < alone["p_holm"]
    assert not is_significant(alone) and alone["significant"] is False
    assert is_significant(clear) and clear["significant"] is True
    assert sum(map(is_significant, entries)) == 1


def test_everything_that_is_printed_or_written_follows_the_rule_and_says_it(
    rows: list[Evaluated], entries: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`planner - random` is marked everywhere and `planner - raster` nowhere."""
    results: dict[str, Any] = {"protocol": {}, "rows": [row.row for row in rows], "comparisons": entries}

    print_comparisons(entries)
    screen = capsys.readouterr().out
    marked = [line for line in screen.splitlines() if " * " in line]
    assert len(marked) == 1 and "planner − random" in marked[0] and RULE in screen

    print_results(results["rows"], entries)
    (planner,) = [line for line in capsys.readouterr().out.splitlines() if "planner" in line]
    assert "[+0.0" in planner and "*" not in planner

    text = markdown_comparisons(entries)
    assert re.findall(r"\| (.*) - (.*) \| gain_auc \| \*\*", text) == [("planner", "random")] and RULE in text

    page = html.unescape(write_report(tmp_path, results, Pictures()).read_text(encoding="utf-8"))
    (bold,) = re.findall(r"<tr>(?:(?!</tr>).)*<b>(?:(?!</tr>).)*</tr>", page, re.DOTALL)
    assert "planner − random" in bold.replace("<wbr>", "") and RULE in page
    assert "No learned planner beats raster beyond chance" in summary(results)


def test_names_with_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_results([empty_row() | {"policy": "a [/b] [red]c", "gain_auc": 0.5}], [])
    assert "a [/b] [red]c" in capsys.readouterr().out


def test_comparing_runs_follows_the_same_rule(rows: list[Evaluated], tmp_path: Path) -> None:
    """The planner of one run with the orders of another called by the same names, as one family of 20."""
    planner = next(row for row in rows if row.row["R"] is not None)
    names = [row.row["policy"] for row in rows if row is not planner]
    same = [evaluated(name, planner.per_image["gain_auc"]) for name in names]
    others = [row for row in rows if row is not planner]
    runs = [Evaluation(name, tmp_path, {}, {"data": ""}, found) for name, found in (("a", others), ("b", same))]
    results = compare_runs(runs, ["gain_auc"])
    assert "1 of 20 differences are significant" in results["summary"]
    page = write_runs_page(tmp_path / "comparison.html", results, {}).read_text(encoding="utf-8")
    assert page.count("<b>") == 1 and RULE in html.unescape(page)


def test_analyses_mark_a_difference_by_the_same_rule(entries: list[dict[str, Any]]) -> None:
    stars = [analysis._difference(entry).endswith("*") for entry in entries]
    assert stars == [is_significant(entry) for entry in entries]


def test_rows_come_planners_first_and_the_best_of_each_kind_first(rows: list[Evaluated]) -> None:
    second = evaluated("weaker", rows[-1].per_image["gain_auc"] - 0.01, R=0, objective="context", seed=0)
    other_seed = evaluated("weaker", rows[-1].per_image["gain_auc"] + 0.005, R=0, objective="context", seed=1)
    oracle = evaluated("oracle", rows[-1].per_image["gain_auc"] + 1, rival=False)
    tokens = Evaluated(empty_row() | {"policy": "token_raster"}, {})
    ordered = in_order([tokens, oracle, second, *rows, other_seed])
    names = [row.row["policy"] for row in ordered]
    assert names[:3] == ["planner", "weaker", "weaker"] and names[-2:] == ["oracle", "token_raster"]
    means = [float(group[0].per_image["gain_auc"].mean()) for group in list(by_policy(ordered).values())[2:-2]]
    assert means == sorted(means, reverse=True) and len(means) == 20
