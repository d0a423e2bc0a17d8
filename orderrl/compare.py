"""Compare evaluations of one protocol: `python -m orderrl.compare RUN RUN ...`.

Every policy of a later run is compared with the policy of the same name in the first run, and every learned planner
that only one of the two has with all learned planners of the other, on the same images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from orderrl.evaluation.comparison import Pair, by_policy, compare, stacked
from orderrl.evaluation.protocol import Evaluated
from orderrl.evaluation.runs import Evaluation, collected_rows, open_evaluations
from orderrl.metrics.statistics import RESAMPLES, is_significant
from orderrl.report.runs_page import write_runs_page
from orderrl.report.screen import print_comparisons
from orderrl.runtime.run import Run

METRICS = ("gain_auc", "decode_nll", "recognisability_auc", "steps")


class RunPairs(NamedTuple):
    """What is to be compared, and what need not be.

    Attributes:
        pairs: the family of comparisons.
        equal: those whose values are equal on every image and metric, as "name", "policy" and "opponent".
    """

    pairs: list[Pair]
    equal: list[dict[str, str]]


def run_pairs(evaluations: Sequence[Evaluation], metrics: Sequence[str] = METRICS) -> RunPairs:
    """The pairs of several runs of one protocol, later ones against the first.

    Values that are equal on every image leave nothing to test, and would only make the correction harsher.

    Raises:
        ValueError: if no policy of the runs has values for any of the metrics.
    """
    first, *others = evaluations
    pairs: list[Pair] = []
    equal: list[dict[str, str]] = []
    for other in others:
        mine, theirs = by_policy(other.rows), by_policy(first.rows)
        for policy, opponent in _matched(mine, theirs):
            name = f"{policy} ({other.name}) - {opponent} ({first.name})"
            named = {"policy": policy, "opponent": opponent}
            found = _metric_pairs(name, named, mine[policy], theirs[opponent], metrics)
            different = [pair for pair in found if not _equal(pair.policy, pair.opponent)]
            pairs += different
            equal += [{"name": name, **named}] if found and not different else []
    if not pairs and not equal:
        measured = sorted({key for run in evaluations for row in run.rows for key in row.per_image})
        raise ValueError(
            f"the runs have no policies in common, and no learned planners to compare, with values of "
            f"{', '.join(metrics)}; they have {', '.join(measured) or 'none'}"
        )
    return RunPairs(pairs, equal)


def _matched(mine: dict[str, list[Evaluated]], theirs: dict[str, list[Evaluated]]) -> list[tuple[str, str]]:
    """Names of the policies that are compared."""
    common = [name for name in mine if name in theirs]
    learned = [[name for name, rows in run.items() if rows[0].row["R"] is not None] for run in (mine, theirs)]
    crossed = [(a, b) for a in learned[0] for b in learned[1] if a != b and (a not in common or b not in common)]
    return [(name, name) for name in common] + crossed


def _metric_pairs(
    name: str, named: dict[str, Any], mine: Sequence[Evaluated], theirs: Sequence[Evaluated], metrics: Sequence[str]
) -> list[Pair]:
    found = []
    for metric in metrics:
        one, other = stacked(mine, metric), stacked(theirs, metric)
        if one is not None and other is not None:
            masked = metric == "decode_nll" and mine[0].row["decode_nll"] is None  # masked models have no nats
            found.append(Pair(name, "decode_loss" if masked else metric, one, other, named))
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())


def compare_runs(
    evaluations: Sequence[Evaluation],
    folder: Path,
    metrics: Sequence[str] = METRICS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare runs, and write `comparison.json` and `comparison.html` into a folder.

    Args:
        evaluations: at least two, of one protocol.
        folder: an existing one.
        metrics: keys of values of single images.
        resamples, seed: of the bootstrap, as in `orderrl.evaluation.comparison.compare`.

    Returns:
        What `comparison.json` holds: identity, runs (name to folder), rows (each with the names of its runs),
        comparisons (as `compare` gives them) and equal.
    """
    pairs, equal = run_pairs(evaluations, metrics)
    results: dict[str, Any] = {
        "identity": evaluations[0].identity,
        "runs": {run.name: str(run.folder) for run in evaluations},
        "rows": collected_rows(evaluations),
        "comparisons": compare(pairs, resamples, seed),
        "equal": equal,
    }
    write_runs_page(
        folder / "comparison.html",
        "Next-block order: comparison of runs",
        summary(results),
        results["rows"],
        results["comparisons"],
        evaluations[0].protocol | {"runs": results["runs"]},
    )
    return results


def summary(results: dict[str, Any]) -> str:
    """How many differences were found, in a sentence or two."""
    entries, equal = results["comparisons"], results["equal"]
    found = sum(map(is_significant, entries))
    first = next(iter(results["runs"]))
    told = f"{found} of {len(entries)} differences are significant."
    sentences = [
        f"{len(results['runs'])} runs of one protocol, compared with {first}: {told if entries else 'no differences.'}"
    ]
    if equal:
        sentences.append(f"Equal on every image: {', '.join(dict.fromkeys(pair['policy'] for pair in equal))}.")
    return " ".join(sentences)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 0, or 2 if the runs can't be compared."""
    parser = argparse.ArgumentParser(prog="python -m orderrl.compare", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs/evaluate/DATE, or NAME=FOLDER to call it NAME")
    parser.add_argument("--metrics", nargs="+", default=METRICS, metavar="KEY", help=f"default: {' '.join(METRICS)}")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument("--output-dir", default="runs", help="where run folders are made (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if len(options.runs) < 2:
            raise ValueError("compare needs at least two runs")
        evaluations = open_evaluations(options.runs)
        run_pairs(evaluations, options.metrics)  # refused before a run folder is made
        with Run("compare", vars(options)) as run:
            results = compare_runs(evaluations, run.folder, options.metrics, options.resamples, options.seed)
            run.write_json("comparison.json", results)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print_comparisons(results["comparisons"])
    print(summary(results))
    print(f"page: {run.folder / 'comparison.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
