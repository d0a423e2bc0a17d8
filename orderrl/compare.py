"""Compare evaluations of one protocol: `python -m orderrl.compare RUN RUN ...`; or rank their rows: `--rank KEY`.

Every policy of a later run is compared with the policy of the same name in the first run, and every learned planner
that only one of the two has with all learned planners of the other, on the same images. Ranking takes any number of
runs, and tests nothing.
"""

import argparse
import sys
from collections.abc import Sequence

from orderrl.evaluation.columns import all_columns
from orderrl.evaluation.comparison import compare_runs
from orderrl.evaluation.runs import leaderboard, open_evaluations
from orderrl.metrics.statistics import RESAMPLES
from orderrl.report.runs_page import chosen_rows, save_metric_figures, write_runs_page
from orderrl.report.screen import print_comparisons, print_leaderboard
from orderrl.runtime.run import Run
from orderrl.runtime.terminal import one_line, show_anything


def parser() -> argparse.ArgumentParser:
    """Arguments of the command line."""
    made = argparse.ArgumentParser(prog="python -m orderrl.compare", description=__doc__)
    usual = [column.name for column in all_columns("compare")]
    made.add_argument("runs", nargs="+", metavar="RUN", help="runs/evaluate/DATE, or NAME=FOLDER to call it NAME")
    made.add_argument("--rank", metavar="KEY", help="rank all rows by this metric, such as gain_auc, and test nothing")
    made.add_argument("--metrics", nargs="+", default=usual, metavar="KEY", help=f"default: {' '.join(usual)}")
    made.add_argument(
        "--rows", nargs="+", metavar="POLICY", help="policies in the figures of the metrics, for papers (default: all)"
    )
    made.add_argument("--resamples", type=int, default=RESAMPLES, help="bootstrap resamples (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: %(default)s)")
    made.add_argument("--output-dir", default="runs", help="where run folders are made (default: %(default)s)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 0, or 2 if the runs cannot be compared."""
    show_anything()
    options = parser().parse_args(arguments)
    try:
        # what is wrong is refused before a run folder is made
        evaluations = open_evaluations(options.runs)
        chosen_rows([row.row for run in evaluations for row in run.rows], options.rows)
        if options.rank is not None:
            name, metrics, results = "leaderboard", [options.rank], leaderboard(evaluations, options.rank)
        else:
            name, metrics = "comparison", options.metrics
            results = compare_runs(evaluations, metrics, options.resamples, options.seed)
        with Run("compare", vars(options)) as run:
            run.write_json(f"{name}.json", results)
            page = write_runs_page(run.folder / f"{name}.html", results, evaluations[0].protocol)
            save_metric_figures(run.folder / "figures", chosen_rows(results["rows"], options.rows), metrics)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    if options.rank is not None:
        print_leaderboard(results["rows"], options.rank)
    else:
        print_comparisons(results["comparisons"])
    print(f"{results['summary']}\npage: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
