"""Tables on screen: the main columns of an evaluation or of many, and paired comparisons with the rule behind stars."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from orderrl.evaluation.columns import (
    DASH,
    MINUS,
    Column,
    all_columns,
    column_of,
    measured,
    show_difference,
    show_interval,
    show_p,
)
from orderrl.metrics.statistics import RULE, is_significant
from orderrl.runtime.terminal import new_console


def print_tables(*tables: Table) -> None:
    """Tables as wide as the terminal, or 160 characters in a file.

    No word is broken or cut: a table that is too wide has no lines between its columns, or is printed row by row.
    """
    console = new_console(160)
    for table in tables:
        if not _fit(table, console.width, frame=3 * len(table.columns) + 1):
            table.box, table.show_edge, table.padding = box.SIMPLE_HEAD, False, (0, 0, 0, 0)
            for column in table.columns:
                column.no_wrap = False
            if not _fit(table, console.width, frame=len(table.columns) - 1):
                _print_rows(table, console)
                continue
        console.print(table)


def _fit(table: Table, width: int, frame: int) -> bool:
    """Set the widths of the columns: no word is broken, then cells have one line, then titles; False if too wide."""
    cells = [list(map(str, column.cells)) for column in table.columns]
    titles = [[str(column.header)] for column in table.columns]
    words = [
        title + lines if column.no_wrap else [word for line in title + lines for word in line.split()]
        for column, title, lines in zip(table.columns, titles, cells, strict=True)
    ]
    widths, spare = [0] * len(cells), width - frame
    for wanted in (words, cells, titles):
        for place, parts in enumerate(wanted):
            more = max((cell_len(part) for part in parts), default=0) - widths[place]
            if wanted is not words:
                more = min(more, spare)
            widths[place] += max(more, 0)
            spare -= max(more, 0)
    for column, fitted in zip(table.columns, widths, strict=True):
        column.width = fitted
    return spare >= 0


def _print_rows(table: Table, console: Console) -> None:
    """A table as one list of its columns for each row."""
    first, *others = (column.header for column in table.columns)
    for name, *cells in zip(*(column.cells for column in table.columns), strict=True):
        console.print(f"{first}: {name}", style="bold")
        for header, cell in zip(others, cells, strict=True):
            if cell:
                console.print(f"  {header}: {cell}")


def print_results(rows: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]]) -> None:
    """The main columns; beside the gain of planners for context their gain minus that of raster order."""
    columns = measured(all_columns("screen"), rows)
    on_raster = {
        entry["policy"]: entry
        for entry in comparisons
        if entry["metric"] == "gain_auc" and entry["opponent"] == "raster"
    }
    table = Table("policy", "seed", title="held-out images")
    for column in columns:
        table.add_column(column.title, justify="right")
        if column.name == "gain_auc" and on_raster:
            table.add_column("minus raster, paired [95 %]", no_wrap=True)
    shown: set[str] = set()
    for row in rows:
        cells = [row["policy"], _cell(column_of("seed"), row, "")]
        for column in columns:
            cells.append(_cell(column, row))
            if column.name == "gain_auc" and on_raster:  # of all seeds together, so beside the first
                entry = None if row["policy"] in shown else on_raster.get(row["policy"])
                cells.append("" if entry is None else f"{marked(entry)} [{show_interval(entry)}]")
        table.add_row(*cells)
        shown.add(row["policy"])
    print_tables(table)


def print_leaderboard(rows: Sequence[dict[str, Any]], rank: str) -> None:
    """Rank, policy, run, the metric that ranks and the main columns."""
    ranked = column_of(rank)
    others = [column for column in measured(all_columns("screen"), rows) if column.name != rank]
    table = Table("rank", "policy", "seed", "run", *(column.title for column in (ranked, *others)))
    for number, row in enumerate(rows, 1):
        place = DASH if row.get(rank) is None else str(number)
        cells = [_cell(column, row) for column in (ranked, *others)]
        table.add_row(place, row["policy"], _cell(column_of("seed"), row, ""), row["run"], *cells)
    print_tables(table)


def print_comparisons(entries: Sequence[dict[str, Any]]) -> None:
    """Paired differences, with a star where one is significant."""
    if not entries:
        return
    table = Table("pair", "metric", "difference", "95 % interval", "p (Holm)", "effect size")
    for entry in entries:
        table.add_row(
            entry["name"].replace(" - ", f" {MINUS} "),
            entry["metric"],
            marked(entry),
            show_interval(entry),
            show_p(entry["p_holm"]),
            f"{entry['effect_size']:+.2f}",
        )
    print_tables(table)
    print(f"* {RULE}")


def marked(entry: dict[str, Any]) -> str:
    """A difference, with a star where it is significant."""
    return show_difference(entry["metric"], entry["mean"]) + (" *" if is_significant(entry) else "")


def _cell(column: Column, row: dict[str, Any], absent: str = DASH) -> str:
    value = row.get(column.name)
    return absent if value is None else column.show(value)
