"""Tables on screen: the main columns of an evaluation, and paired comparisons with the rule that marks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from orderrl.evaluation.columns import COLUMNS, DASH, MINUS, show_difference, show_interval, show_p, show_value
from orderrl.metrics.statistics import RULE, is_significant

_MAIN = ("gain_auc", "decode_nll", "decode_loss", "steps", "recognisability_auc", "frechet_distance", "accuracy")
"""Columns of the table on screen; the report has all."""


def print_results(rows: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]]) -> None:
    """The main columns; beside the gain of planners for context what they gain on raster order."""
    titles = {column.key: f"{column.header} ({column.unit})" if column.unit else column.header for column in COLUMNS}
    keys = [key for key in _MAIN if any(row[key] is not None for row in rows)]
    on_raster = {
        entry["policy"]: entry
        for entry in comparisons
        if entry["metric"] == "gain_auc" and entry["opponent"] == "raster"
    }
    table = Table("policy", "seed", title="held-out images")
    for key in keys:
        table.add_column(titles[key], justify="right")
        if key == "gain_auc" and on_raster:
            table.add_column("less raster, paired [95 %]", no_wrap=True)
    shown: set[str] = set()
    for row in rows:
        cells = [row["policy"], "" if row["seed"] is None else str(row["seed"])]
        for key in keys:
            cells.append(DASH if row[key] is None else show_value(key, row[key]))
            if key == "gain_auc" and on_raster:  # of all seeds together, so beside the first
                entry = None if row["policy"] in shown else on_raster.get(row["policy"])
                cells.append("" if entry is None else f"{_marked(entry)} [{show_interval(entry)}]")
        table.add_row(*cells)
        shown.add(row["policy"])
    _print(table)


def print_comparisons(entries: Sequence[dict[str, Any]]) -> None:
    """Paired differences, with a star where one is significant."""
    if not entries:
        return
    table = Table("pair", "metric", "difference", "95 % interval", "p (Holm)", "effect size")
    for entry in entries:
        table.add_row(
            entry["name"].replace(" - ", f" {MINUS} "),
            entry["metric"],
            _marked(entry),
            show_interval(entry),
            show_p(entry["p_holm"]),
            f"{entry['effect_size']:+.2f}",
        )
    _print(table)
    print(f"* {RULE}")


def _marked(entry: dict[str, Any]) -> str:
    return show_difference(entry["metric"], entry["mean"]) + (" *" if is_significant(entry) else "")


def _print(table: Table) -> None:
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=160)).print(table)
