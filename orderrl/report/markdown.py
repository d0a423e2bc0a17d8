"""The table as Markdown, for a README: seeds of a planner in one line."""

import re
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from orderrl.evaluation.columns import (
    DASH,
    Column,
    all_columns,
    in_features,
    measured,
    show_difference,
    show_interval,
    show_p,
)
from orderrl.metrics.statistics import RULE, is_significant

# What means something in a cell; an underscore inside a word stands for itself.
_MARKUP = re.compile(r"[\\|`*<>\[\]~&]|(?<![^\W_])_|_(?![^\W_])")


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `results.json` as a Markdown table of the columns on Markdown that have a value.

    Rows of one policy (training seeds) become one line: mean ± standard deviation over seeds.
    """
    columns = [in_features(column, rows) for column in measured(all_columns("markdown"), rows)]
    lines = ["| policy | seeds | " + "".join(f"{column.title} | " for column in columns)]
    lines.append("|---|---|" + "---|" * len(columns))
    for name in dict.fromkeys(row["policy"] for row in rows):
        group = [row for row in rows if row["policy"] == name]
        seeds = len(group) if group[0]["seed"] is not None else DASH
        cells = [_cell(column, [row.get(column.name) for row in group]) for column in columns]
        lines.append(f"| {escaped(name)} | {seeds} | " + "".join(f"{cell} | " for cell in cells))
    return "\n".join(map(str.rstrip, lines)) + "\n"


def markdown_comparisons(entries: Sequence[dict[str, Any]]) -> str:
    """Paired comparisons as a Markdown table, significant ones in bold, with the rule under it."""
    lines = ["| pair | metric | mean difference | 95 % interval | p (Holm) |", "|---|---|---|---|---|"]
    for entry in entries:
        value = show_difference(entry["metric"], entry["mean"])
        value = f"**{value}**" if is_significant(entry) else value
        cells = (escaped(entry["name"]), entry["metric"], value, show_interval(entry), show_p(entry["p_holm"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Paired over images. Bold: {RULE}."]) + "\n"


def escaped(name: str) -> str:
    """A name as it is to be read in a cell: on one line, and nothing in it is markup."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(name.split()))


def _cell(column: Column, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return DASH
    return column.show(mean(known)) + (f" ± {column.show(stdev(known))}" if len(known) > 1 else "")
