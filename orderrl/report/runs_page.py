"""The page of several evaluations of one protocol: their rows in one table, and paired differences if there are any."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from orderrl.evaluation.columns import Column, learned_policies, shown_columns
from orderrl.report.page import render
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
