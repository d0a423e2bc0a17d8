"""The page of several evaluations of one protocol: their rows in one table, and paired differences if there are any."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from orderrl.evaluation.columns import Column, column_of, in_features, learned_policies, own_policies, shown_columns
from orderrl.report import style
from orderrl.report.figures import metric_figure
from orderrl.report.page import render, save_figures
from orderrl.report.tables import comparison_values, protocol_values, results_values

RUN = Column("run", "run", "", None, "The runs that have this row; their folders stand under Protocol.", text=True)


def write_runs_page(path: Path, results: Mapping[str, Any], protocol: Mapping[str, Any]) -> Path:
    """Write a self-contained page of what `compare_runs` or `leaderboard` gives; the protocol is in words."""
    rows = results["rows"]
    groups = shown_columns(rows)
    groups["policy"] = [*groups["policy"], RUN]
    page = render(
        "runs.html.jinja",
        title=f"Next-block order: {'comparison of runs' if 'comparisons' in results else 'leaderboard'}",
        summary=results["summary"],
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        numbers=path.with_suffix(".json").name,
        **results_values(rows, learned_policies(rows), groups),
        **comparison_values(results.get("comparisons", [])),
        **protocol_values({**protocol, "runs": results["runs"]}),
    )
    path.write_text(page, encoding="utf-8")
    return path


def chosen_rows(rows: Sequence[Mapping[str, Any]], policies: Sequence[str] | None) -> list[dict[str, Any]]:
    """The rows of some policies, or with None all; a policy without a row is refused with those that there are."""
    known = list(dict.fromkeys(row["policy"] for row in rows))
    unknown = [name for name in policies or () if name not in known]
    if unknown:
        raise ValueError(f"no row of {', '.join(unknown)}; choose of {', '.join(known)}")
    return [dict(row) for row in rows if policies is None or row["policy"] in policies]


def save_metric_figures(folder: Path, rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> None:
    """Write a figure of each metric that some row has: values with their intervals, `METRIC.png`, `.svg`, `.pdf`."""
    colours, wanted = style.policy_colours([*learned_policies(rows), *own_policies(rows)]), {}
    for metric in metrics:
        if any(row.get(metric) is not None for row in rows):
            label = in_features(column_of(metric), rows).title
            wanted[metric] = partial(metric_figure, rows, metric, label, colours)
    save_figures(folder, wanted)
