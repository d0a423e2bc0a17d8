"""The table as Markdown, for a README: seeds of a planner in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from orderrl.evaluation.columns import show_p
from orderrl.metrics.statistics import RULE, is_significant

COLUMNS = {
    "gain_auc": ("gain AUC ↑", 4),
    "decode_nll": ("decode_nll ↓ (nats/image)", 2),
    "decode_loss": ("decode_loss ↓ (DiffLoss/image)", 3),
    "steps": ("steps", 1),
    "far_gain": ("far gain", 3),
    "recognisability_auc": ("recognisability ↑", 3),
    "oracle_spearman": ("Spearman", 3),
    "regret": ("regret ↓", 4),
    "frechet_distance": ("Fréchet ↓", 2),
    "inception_score": ("inception score ↑", 2),
    "kid": ("kernel distance ↓", 4),
    "cmmd": ("CMMD ↓", 3),
    "precision": ("precision ↑", 3),
    "recall": ("recall ↑", 3),
    "spatial_frechet_distance": ("spatial Fréchet ↓", 2),
    "clip_score": ("CLIP score ↑", 2),
    "accuracy": ("accuracy ↑", 3),
}
OPTIONAL = (
    "decode_loss",
    "inception_score",
    "kid",
    "cmmd",
    "precision",
    "recall",
    "spatial_frechet_distance",
    "clip_score",
)
"""Columns that are left out where no row has a value."""
# What means something in a cell; an underscore inside a word stands for itself.
_MARKUP = re.compile(r"[\\|`*<>\[\]~&]|(?<![^\W_])_|_(?![^\W_])")


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `results.json` as a Markdown table.

    Rows of one policy (training seeds) become one line: mean ± standard deviation over seeds.
    """
    columns = {
        key: value
        for key, value in COLUMNS.items()
        if key not in OPTIONAL or any(row.get(key) is not None for row in rows)
    }
    names = list(dict.fromkeys(row["policy"] for row in rows))
    lines = ["| policy | seeds | " + " | ".join(title for title, _ in columns.values()) + " |"]
    lines.append("|---|---|" + "---|" * len(columns))
    for name in names:
        group = [row for row in rows if row["policy"] == name]
        cells = [_cell([row.get(key) for row in group], digits) for key, (_, digits) in columns.items()]
        seeds = len(group) if group[0]["seed"] is not None else "–"
        lines.append(f"| {escaped(name)} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def markdown_comparisons(entries: Sequence[dict[str, Any]]) -> str:
    """Paired comparisons as a Markdown table, significant ones in bold, with the rule under it."""
    lines = ["| pair | metric | mean difference | 95 % interval | p (Holm) |", "|---|---|---|---|---|"]
    for entry in entries:
        digits = COLUMNS.get(entry["metric"], ("", 4))[1]
        value = f"{entry['mean']:+.{digits}f}"
        value = f"**{value}**" if is_significant(entry) else value
        interval = f"{entry['low']:+.{digits}f} to {entry['high']:+.{digits}f}"
        lines.append(
            f"| {escaped(entry['name'])} | {entry['metric']} | {value} | {interval} | {show_p(entry['p_holm'])} |"
        )
    return "\n".join([*lines, "", f"Paired over images. Bold: {RULE}."]) + "\n"


def escaped(name: str) -> str:
    """A name as it is to be read in a cell: on one line, and nothing in it is markup."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(name.split()))


def _cell(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean(known):.{digits}f}{spread}"
