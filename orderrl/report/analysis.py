"""The tables of `orderrl.analyze` on screen."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from orderrl.evaluation.ablations import REMOVALS
from orderrl.evaluation.columns import DASH, all_columns, cell_of
from orderrl.metrics.statistics import RULE, is_significant
from orderrl.report.screen import print_tables


def print_analysis(results: Mapping[str, Any]) -> None:
    """All tables, and the rule behind the stars."""
    tables = [
        _content_table(results["content"]),
        _injection_table(results["injection"]),
        _order_table(results["orders"]),
        _curve_table(results["curves"]),
    ]
    if results["headroom"] is not None:
        tables.append(_headroom_table(results["headroom"]))
    if results["latents"]:
        tables.append(_variant_table(results["latents"]))
    print_tables(*tables)
    print(f"* {RULE}")


def _shown(mean: float, interval: Sequence[float], digits: int = 3, sign: str = "") -> str:
    value, low, high = (f"{number:{sign}.{digits}f}" for number in (mean, *interval))
    return f"{value} [{low}, {high}]"


def _interval(entry: Mapping[str, float] | None, sign: str = "", digits: int = 3) -> str:
    return DASH if entry is None else _shown(entry["mean"], (entry["low"], entry["high"]), digits, sign)


def _difference(entry: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A difference with its interval, a star where it is significant."""
    return _interval(entry, "+", digits) + (" *" if entry is not None and is_significant(entry) else "")


def _content_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    titles = ("with content", *(f"with minus {n}" for n in REMOVALS), "R² with", *(f"R² {n}" for n in REMOVALS))
    table = Table("policy", *titles, title="Spearman of scores and oracle, mean over images (* significant)")
    for entry in entries:
        spearman, r2 = entry["spearman"], entry["r2"]
        table.add_row(
            entry["policy"],
            _shown(spearman["true"], spearman["true_ci"]),
            *(_difference(entry["spearman_difference"][name]) for name in REMOVALS),
            *(f"{r2[name]['mean']:.3f}" for name in ("true", *REMOVALS)),
        )
    return table


def _injection_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        "blocks", "policy", "drop", "against random", "share of loss",
        title="drop of the loss of the rest when the best-scored blocks are revealed, nats per token (* significant)",
    )  # fmt: skip
    for entry in entries:
        table.add_row(
            str(entry["blocks"]),
            entry["policy"],
            _shown(entry["drop"], entry["drop_ci"], digits=4),
            _difference(entry["against_random"], 4),
            f"{entry['drop'] / entry['loss_before']:.3f}",
        )
    return table


def _order_table(found: Mapping[str, Any]) -> Table:
    columns = all_columns("orders")
    first = found["agreement"]["policies"][0]
    titles = (column.title for column in columns)
    table = Table("policy", *titles, f"Spearman with {first}", title="orders, means over images")
    for row, agreement in zip(found["rows"], found["agreement"]["spearman"][0], strict=True):
        cells = [cell_of(row, column) for column in columns]
        shown = [f"{cell['shown']} [{cell['note']}]" if cell["note"] else cell["shown"] for cell in cells]
        table.add_row(row["policy"], *shown, f"{agreement:+.2f}")
    return table


def _curve_table(curves: Mapping[str, Any]) -> Table:
    names = list(next(iter(curves.values())))
    table = Table("policy", *names, title="areas under the curves against the revealed fraction, means over images")
    for policy, found in curves.items():
        table.add_row(policy, *(_shown(found[name]["area"][0], found[name]["area"][1:]) for name in names))
    return table


def _headroom_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        "states", "predictor", "R² of U", "over", "R² of pairs", "over", "Spearman", "regret",
        title="what explains gains on held-out images (over: class minus positions, all others minus class)",
    )  # fmt: skip
    for entry in entries:
        cells = [
            text
            for key in ("utility", "dependence")
            for text in (_interval(entry[f"r2_{key}"]), _interval(entry[f"gain_{key}"], "+"))
        ]
        cells += [  # a predictor that ranks nothing has no correlation
            _shown(entry[key], entry[f"{key}_ci"], digits) if key in entry else DASH
            for key, digits in (("spearman", 3), ("regret", 4))
        ]
        table.add_row(str(entry["states"]), entry["predictor"], *cells)
    return table


def _variant_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("policy", "variant", "Spearman", "minus trained", "regret", "minus trained")
    table = Table(*columns, title="latent reasoning without its passes or latents (* significant)")
    for entry in entries:
        for name, variant in entry["variants"].items():
            cells = []
            for metric, digits in (("spearman", 3), ("regret", 4)):
                cells.append(_shown(variant[metric], variant[f"{metric}_ci"], digits))
                cells.append(_difference(variant[f"{metric}_difference"], digits))
            table.add_row(entry["policy"], name, *cells)
    return table
