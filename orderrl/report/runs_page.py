"""The page of several evaluations of one protocol: their rows in one table, and paired differences if there are any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from orderrl.evaluation.columns import Column, shown_columns
from orderrl.report.page import render
from orderrl.report.summary import learned_policies
from orderrl.report.tables import comparison_values, protocol_values, results_values

RUN = Column("run", "run", "", str, "The runs that have this row; their folders stand under Protocol.", text=True)


def write_runs_page(
    path: Path,
    title: str,
    summary: str,
    rows: Sequence[dict[str, Any]],
    comparisons: Sequence[dict[str, Any]],
    protocol: Mapping[str, Any],
) -> Path:
    """Write a self-contained page.

    Args:
        path: of the page; its folder exists.
        title, summary: on top of it.
        rows: of `results.json`, each with the names of its runs under "run".
        comparisons: as in `results.json`; empty shows no such table.
        protocol: key to value.
    """
    groups = shown_columns(rows)
    groups["policy"] = [*groups["policy"], RUN]
    page = render(
        "runs.html.jinja",
        title=title,
        summary=summary,
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        numbers=path.with_suffix(".json").name,
        **results_values(rows, learned_policies(rows), groups),
        **comparison_values(comparisons),
        **protocol_values(protocol),
    )
    path.write_text(page, encoding="utf-8")
    return path
