"""Rows of many evaluations of one protocol in one table: `python -m orderrl.leaderboard RUN ...`.

It is a command of its own beside `orderrl.compare`: it takes any number of runs, tests nothing, and ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from orderrl.evaluation.columns import COLUMNS, show_value
from orderrl.evaluation.runs import Evaluation, collected_rows, open_evaluations
from orderrl.report.runs_page import write_runs_page
from orderrl.runtime.run import Run

RANKED_BY = "gain_auc"


def ranked_rows(evaluations: Sequence[Evaluation], key: str = RANKED_BY) -> list[dict[str, Any]]:
    """The rows of all runs, best first; those without a value come last.

    Raises:
        ValueError: if no column of the table has this key and says which direction is better.
    """
    directions = {column.key: column.header[-1] for column in COLUMNS if column.header[-1] in "↑↓"}
    if key not in directions:
        raise ValueError(f"rank={key!r} can't be ranked by; choose one of {', '.join(directions)}")
    sign = -1 if directions[key] == "↑" else 1
    rows = collected_rows(evaluations)
    return sorted(rows, key=lambda row: (row[key] is None, sign * (row[key] or 0)))


def write_leaderboard(evaluations: Sequence[Evaluation], folder: Path, key: str = RANKED_BY) -> dict[str, Any]:
    """Write `leaderboard.html` into a folder.

    Args:
        evaluations: of one protocol.
        folder: an existing one.
        key: what rows are ranked by.

    Returns:
        What `leaderboard.json` holds: identity, runs (name to folder) and rows (each with the names of its runs).
    """
    results: dict[str, Any] = {
        "identity": evaluations[0].identity,
        "runs": {run.name: str(run.folder) for run in evaluations},
        "rows": ranked_rows(evaluations, key),
    }
    write_runs_page(
        folder / "leaderboard.html",
        "Next-block order: leaderboard",
        f"{len(results['rows'])} rows of {len(evaluations)} runs of one protocol, on "
        f"{evaluations[0].protocol['data']}, ranked by {key}.",
        results["rows"],
        [],
        evaluations[0].protocol | {"runs": results["runs"]},
    )
    return results


def print_leaderboard(rows: Sequence[dict[str, Any]], key: str = RANKED_BY) -> None:
    """Rank, policy, run and the main columns on screen."""
    keys = list(dict.fromkeys([key, "gain_auc", "decode_nll", "decode_loss", "steps", "frechet_distance"]))
    keys = [name for name in keys if any(row[name] is not None for row in rows)]
    table = Table("rank", "policy", "seed", "run", *keys)
    for rank, row in enumerate(rows, 1):
        cells = [show_value(name, row[name]) if row[name] is not None else "–" for name in keys]
        seed = "" if row["seed"] is None else str(row["seed"])
        table.add_row("–" if row[key] is None else str(rank), row["policy"], seed, row["run"], *cells)
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=160)).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 0, or 2 if the runs do not belong into one table."""
    parser = argparse.ArgumentParser(prog="python -m orderrl.leaderboard", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs/evaluate/DATE, or NAME=FOLDER to call it NAME")
    parser.add_argument("--rank", default=RANKED_BY, metavar="KEY", help="column to rank by (default: %(default)s)")
    parser.add_argument("--output-dir", default="runs", help="where run folders are made (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        evaluations = open_evaluations(options.runs)
        ranked_rows(evaluations, options.rank)  # refused before a run folder is made
        with Run("leaderboard", vars(options)) as run:
            results = write_leaderboard(evaluations, run.folder, options.rank)
            run.write_json("leaderboard.json", results)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print_leaderboard(results["rows"], options.rank)
    print(f"page: {run.folder / 'leaderboard.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
