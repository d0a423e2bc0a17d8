"""The tables of a page as plain values for its template: cells, what they are sorted by, and headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orderrl.evaluation.columns import (
    DASH,
    MINUS,
    Column,
    cell_of,
    column_of,
    in_features,
    show_difference,
    show_interval,
    show_p,
)
from orderrl.metrics.statistics import RULE, is_significant

_COMPARISONS = {
    "pair": ("pair", ""),
    "metric": ("metric", ""),
    "mean": ("mean difference", ""),
    "interval": ("95 % interval", "Of this comparison alone. Sorted by its lower end."),
    "effect_size": ("effect size", "Paired Cohen's d: mean difference over the standard deviation over images."),
    "p_holm": ("p (Holm)", "Two-sided bootstrap p-value, corrected for the number of comparisons."),
}
"""Headers and explanations of the paired comparisons."""


def results_values(
    rows: Sequence[dict[str, Any]], learned: Sequence[str], groups: dict[str, list[Column]]
) -> dict[str, Any]:
    """What `results.html.jinja` shows.

    Args:
        rows: of `results.json`.
        learned: names of the policies that are tinted.
        groups: the columns, from `shown_columns`.
    """
    columns = [column for members in groups.values() for column in members]
    return {
        "groups": list(groups),
        "columns": [_header_cell(column, rows, groups) for column in columns],
        "rows": [_line_cells(row, learned, columns) for row in rows],
    }


def comparison_values(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `comparisons.html.jinja` shows of paired comparisons."""
    columns = _comparison_columns()
    return {
        "comparison_columns": columns,
        "comparisons": [_comparison_cells(entry, columns) for entry in entries],
        "rule": RULE,
    }


def protocol_values(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What `protocol.html.jinja` shows."""
    return {"protocol": {key.replace("_", " "): _protocol_value(value) for key, value in protocol.items()}}


def loss_unit(rows: Sequence[dict[str, Any]]) -> str:
    """The unit of losses and gains: masked models have no nats."""
    return "DiffLoss per token" if any(row.get("decode_loss") is not None for row in rows) else "nats per token"


def _comparison_columns() -> list[dict[str, Any]]:
    """The columns of the paired comparisons."""
    ascending = ("pair", "metric", "p_holm")
    return [
        {
            "key": key,
            "header": header,
            "meaning": meaning,
            "text": key in ("pair", "metric"),
            "order": "ascending" if key in ascending else "descending",
        }
        for key, (header, meaning) in _COMPARISONS.items()
    ]


def _header_cell(column: Column, rows: Sequence[dict[str, Any]], groups: dict[str, list[Column]]) -> dict[str, Any]:
    header = in_features(column, rows).header
    starts = any(column is members[0] for members in list(groups.values())[1:])
    return {
        "key": column.name,
        "header": header,
        "unit": column.unit.replace("nats per token", loss_unit(rows)),
        "meaning": column.help,
        "text": column.text,
        "group": next(group for group, members in groups.items() if column in members),
        "order": "descending" if column.direction > 0 else "ascending",
        "starts": starts,
    }


def _line_cells(row: dict[str, Any], learned: Sequence[str], columns: Sequence[Column]) -> dict[str, Any]:
    """One line of the table."""
    kind = "learned" if row["policy"] in learned else "raster" if row["policy"] == "raster" else ""
    return {"kind": kind, "cells": {column.name: cell_of(row, column) for column in columns}}


def _comparison_cells(entry: dict[str, Any], columns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells of a paired comparison."""
    column = column_of(entry["metric"])
    name = entry["name"].replace(" - ", f" {MINUS} ")
    cells = {
        "pair": (name, name),
        "metric": (column.header, column.header),
        "mean": (show_difference(entry["metric"], entry["mean"]), entry["mean"]),
        "interval": (show_interval(entry), entry["low"]),
        "effect_size": (f"{entry['effect_size']:+.2f}".replace("-", MINUS), entry["effect_size"]),
        "p_holm": (show_p(entry["p_holm"]), entry["p_holm"]),
    }
    return [
        {
            "shown": cells[shown["key"]][0],
            "sort": cells[shown["key"]][1],
            "text": shown["text"],
            "bold": shown["key"] == "mean" and is_significant(entry),
            "unit": column.unit if shown["key"] == "metric" else "",
        }
        for shown in columns
    ]


def _protocol_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_protocol_value(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_protocol_value, value))
    return DASH if value is None else str(value)
