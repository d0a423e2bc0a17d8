"""Speed, each number against the naive twin in the same run.

    python -m benchmarks --suite labels --shape llamagen-b --json labels.json

Suites: labels, env, generation, ppo, context. Shapes: digits (shipped weights), llamagen-b and arpg-b (16 x 16
tokens, blocks of 4 x 4, random weights), randar-l, randar-xl. The limit is the machine's measured matrix product and
memory bandwidth, with the threads that the process has.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.shapes import SHAPES
from benchmarks.suites import SUITES, Settings

COLUMNS = {
    "seconds": "{:.3f}",
    "items_per_second": "{:.2f}",
    "ratio_to_naive": "{:.2f}",
    "ratio_low": "{:.2f}",
    "ratio_high": "{:.2f}",
    "fraction_of_limit": "{:.0%}",
    "spearman": "{:.3f}",
    "backbone_share": "{:.0%}",
    "planner_share": "{:.0%}",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), nargs="+", required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), nargs="+", default=["digits"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=3, help="of every variant, in turn, after a warm-up")
    parser.add_argument("--batch", type=int, help="images at once; default: the shape's own")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="where the rows are written")
    options = parser.parse_args()
    if options.runs < 1 or (options.batch is not None and options.batch < 1):
        parser.error("--runs and --batch must be at least 1")
    rows = []
    for shape in options.shape:
        settings = Settings(SHAPES[shape], tuple(options.dtype), options.runs, options.batch, options.device)
        for dtype in options.dtype:
            limits = settings.limits(dtype)
            best, plain, read = (rate / 1e9 for rate in (limits.matrix_rate, limits.plain_rate, limits.bandwidth))
            print(
                f"{dtype}: matrix product {best:.0f} GFLOP/s (by matmul {plain:.0f}), reading memory {read:.1f} GB/s, "
                f"{torch.get_num_threads()} threads"
            )
        for suite in options.suite:
            rows += list(SUITES[suite](settings))
            show(rows)
            if options.json is not None:
                options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def show(rows: list[dict[str, object]]) -> None:
    """The table so far."""
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    table = Table("suite", "shape", "variant", *columns)
    for row in rows:
        cells = [COLUMNS[key].format(row[key]) if row.get(key) is not None else "–" for key in columns]
        table.add_row(str(row["suite"]), str(row["shape"]), f"{row['variant']} ({row['unit']})", *cells)
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table)


if __name__ == "__main__":
    main()
