"""The tables of a page as plain values for its template: cells, what they are sorted by, and headers."""

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

_COMPARISONS = (
    ("pair", "", "ascending", True),
    ("metric", "", "ascending", True),
    ("mean difference", "", "descending", False),
    ("95 % interval", "Of this comparison alone. Sorted by its lower end.", "descending", False),
    ("effect size", "Paired Cohen's d: mean difference over the standard deviation over images.", "descending", False),
    ("p (Holm)", "Two-sided bootstrap p-value, corrected for the number of comparisons.", "ascending", False),
)
"""Columns of the paired comparisons: header, explanation, order of the first sort, whether values are words."""


def results_values(
    rows: Sequence[dict[str, Any]], learned: Sequence[str], groups: dict[str, list[Column]]
) -> dict[str, Any]:
    """What `results.html.jinja` shows of rows; learned policies are tinted, columns come from `shown_columns`."""
    columns = [column for members in groups.values() for column in members]
    return {
        "groups": list(groups),
        "columns": [_header_cell(column, rows, groups) for column in columns],
        "rows": [
            {
                "kind": "learned" if row["policy"] in learned else "raster" if row["policy"] == "raster" else "",
                "cells": {column.name: cell_of(row, column) for column in columns},
            }
            for row in rows
        ],
    }


def comparison_values(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `comparisons.html.jinja` shows of paired comparisons."""
    return {
        "comparison_columns": [
            {"header": header, "meaning": meaning, "order": order, "text": text}
            for header, meaning, order, text in _COMPARISONS
        ],
        "comparisons": [_comparison_cells(entry) for entry in entries],
        "rule": RULE,
    }


def protocol_values(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What `protocol.html.jinja` shows."""
    return {"protocol": {key.replace("_", " "): _protocol_value(value) for key, value in protocol.items()}}


def loss_unit(rows: Sequence[dict[str, Any]]) -> str:
    """The unit of losses and gains: masked models have no nats."""
    return "DiffLoss per token" if any(row.get("decode_loss") is not None for row in rows) else "nats per token"


def _header_cell(column: Column, rows: Sequence[dict[str, Any]], groups: dict[str, list[Column]]) -> dict[str, Any]:
    header = in_features(column, rows).header
    group = next(group for group, members in groups.items() if column in members)
    starts = any(column is members[0] for members in list(groups.values())[1:])
    return {
        "key": column.name,
        "header": header,
        "unit": column.unit.replace("nats per token", loss_unit(rows)),
        "meaning": column.help,
        "text": column.text,
        "main": group == "policy" or "screen" in column.places.split(),
        "group": group,
        "order": "descending" if column.direction > 0 else "ascending",
        "starts": starts,
    }


def _comparison_cells(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of a paired comparison, in the order of the columns."""
    column = column_of(entry["metric"])
    name = entry["name"].replace(" - ", f" {MINUS} ")
    cells: list[dict[str, Any]] = [
        {"shown": name, "sort": name, "text": True},
        {"shown": column.header, "sort": column.header, "text": True, "unit": column.unit},
        {
            "shown": show_difference(entry["metric"], entry["mean"]),
            "sort": entry["mean"],
            "bold": is_significant(entry),
        },
        {"shown": show_interval(entry), "sort": entry["low"]},
        {"shown": f"{entry['effect_size']:+.2f}".replace("-", MINUS), "sort": entry["effect_size"]},
        {"shown": show_p(entry["p_holm"]), "sort": entry["p_holm"]},
    ]
    return [{"text": False, "bold": False, "unit": ""} | cell for cell in cells]


def _protocol_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_protocol_value(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_protocol_value, value))
    return DASH if value is None else str(value)
