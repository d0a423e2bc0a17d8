"""The sentences on top of the page: what was compared with what, on what data, and who won by how much."""

from collections.abc import Sequence
from typing import Any

from orderrl.evaluation.columns import (
    column_of,
    is_rival,
    learned_policies,
    metric_of,
    own_policies,
    show_difference,
    show_interval,
)
from orderrl.metrics.statistics import is_significant


def summary(results: dict[str, Any]) -> str:
    """What was compared, and how the best learned planner of each objective did, whichever way it turned out.

    "Best" is the best value of the objective's metric, averaged over the rows (seeds) of a policy. Intervals are those
    of the paired comparisons "<planner> - <opponent>"; without one no claim of a difference is made.
    """
    learned = learned_policies(results["rows"])
    sentences = [_compared(results, learned)]
    if not learned:
        sentences.append("No learned planner was evaluated.")
    objectives = {row["policy"]: row.get("objective") for row in results["rows"]}
    by_metric: dict[str, list[str]] = {}
    for name in learned:
        by_metric.setdefault(metric_of(objectives[name]), []).append(name)
    for metric, names in sorted(by_metric.items(), key=lambda item: item[0] != "gain_auc"):
        of_code_length = metric == "decode_nll"
        sentences += (
            _code_length_sentences(results, names) if of_code_length else _gain_sentences(results, names, metric)
        )
    for name in own_policies(results["rows"]):
        if paired := _paired(results, name, "raster", "gain_auc"):
            relation = {1: "is above", 0: "does not differ significantly from", -1: "is below"}[_sign(paired)]
            sentences.append(f"{name} {relation} raster in information-gain AUC ({_difference(paired)}).")
    return " ".join(sentences)


def _compared(results: dict[str, Any], learned: Sequence[str]) -> str:
    policies = {row["policy"] for row in results["rows"] if row.get("budgets") or row["policy"] in learned}
    others = len(policies - set(learned))
    parts = [_count(len(learned), "learned planner")] if learned else []
    parts += [_count(others, "other policy" if others == 1 else "other policies", "")] if others else []
    what = " and ".join(parts) or "Nothing"
    data = results["protocol"].get("data")
    return f"{what[0].upper()}{what[1:]} on {data}." if data else f"{what[0].upper()}{what[1:]}."


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural if number != 1 else ''}"


def _gain_sentences(results: dict[str, Any], learned: Sequence[str], metric: str) -> list[str]:
    """The best planner in information-gain AUC, or in the return of a user's objective."""
    means = _means(results["rows"], metric)
    known = [name for name in learned if name in means]
    if not known:
        return []
    best = max(known, key=lambda name: means[name])
    others = {row["policy"] for row in results["rows"] if is_rival(row)} - {*learned, "raster"}
    rivals = [name for name in means if name in others]
    rivals = [name for name in rivals if _paired(results, best, name, metric)]
    strongest = max(rivals, key=lambda name: means[name], default=None)
    found = [_against_raster(results, best, means, metric)]
    if strongest is not None:
        paired = _paired(results, best, strongest, metric)
        assert paired is not None
        relation = {1: "It is ahead of", 0: "It does not differ significantly from", -1: "It is behind"}[_sign(paired)]
        found.append(f"{relation} the strongest other order, {strongest} ({_difference(paired)}).")
    return found


def _against_raster(results: dict[str, Any], best: str, means: dict[str, float], metric: str) -> str:
    gain, raster = means[best], means.get("raster")
    quantity = "information-gain AUC" if metric == "gain_auc" else column_of(metric).heading
    if raster is None:
        return f"The best learned planner, {best}, has {quantity} {gain:.4f}; raster was not run."
    values = f"{quantity} {gain:.4f} against {raster:.4f}"
    if raster > 0:
        values += f", {gain / raster:.2f} times raster's"
    paired = _paired(results, best, "raster", metric)
    if paired is None:
        relation = "is above" if gain > raster else "is not above"
        return f"The best learned planner, {best}, {relation} raster ({values}); no paired interval was computed."
    if _sign(paired) > 0:
        return f"The best learned planner, {best}, beats raster: {values}; {_difference(paired)}."
    if _sign(paired) < 0:
        return f"No learned planner beats raster: the best, {best}, is worse; {values}; {_difference(paired)}."
    return f"No learned planner beats raster beyond chance: the best is {best}; {values}; {_difference(paired)}."


def _code_length_sentences(results: dict[str, Any], learned: Sequence[str]) -> list[str]:
    """The best planner for code length against raster and the strongest order at its number of steps."""
    rows = results["rows"]
    metric = "decode_loss" if any(row.get("decode_loss") is not None for row in rows) else "decode_nll"
    means, steps = _means(rows, metric), _means(rows, "steps")
    known = [name for name in learned if name in means]
    if not known:
        return []
    best = min(known, key=lambda name: means[name])
    quantity, unit = ("code length", "nats") if metric == "decode_nll" else ("decode loss", "DiffLoss")
    intro = f"For {quantity} {best} needs {column_of(metric).show(means[best])} {unit} per image"
    if best in steps:
        intro += f" in {steps[best]:.1f} steps"
    paired = [entry for entry in results.get("comparisons") or [] if entry["metric"] == "decode_nll"]
    rivals = [entry for entry in paired if entry["policy"] == best]
    raster = [entry for entry in rivals if entry["opponent"] == "raster" and entry.get("at_steps") is None]
    no_rivals = {row.get("family") for row in rows if not is_rival(row)}
    equal = [e for e in rivals if e.get("at_steps") is not None and e["opponent"] not in no_rivals]
    equal.sort(key=lambda entry: float(entry["mean"]))
    parts = [f"raster's is {_relation(entry)} ({_difference(entry)})" for entry in raster]
    parts += [
        f"that of {entry['opponent']} at {entry['at_steps']:.1f} steps is {_relation(entry)} ({_difference(entry)})"
        for entry in equal[-1:]
    ]
    return [f"{intro}; {'; '.join(parts)}." if parts else f"{intro}; no paired interval was computed."]


def _relation(entry: dict[str, Any]) -> str:
    """How the opponent's code length compares with the planner's."""
    return {1: "shorter", 0: "the same within chance", -1: "longer"}[_sign(entry)]


def _means(rows: Sequence[dict[str, Any]], metric: str) -> dict[str, float]:
    """Mean over the rows of each policy that have the metric."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row.get(metric) is not None:
            values.setdefault(row["policy"], []).append(row[metric])
    return {name: sum(found) / len(found) for name, found in values.items()}


def _paired(results: dict[str, Any], policy: str, opponent: str, metric: str) -> dict[str, Any] | None:
    wanted = (policy, opponent, metric)
    entries = results.get("comparisons") or []
    return next((c for c in entries if (c["policy"], c["opponent"], c["metric"]) == wanted), None)


def _sign(entry: dict[str, Any]) -> int:
    """1 or -1 where a difference is significant, else 0."""
    return (1 if entry["mean"] > 0 else -1) if is_significant(entry) else 0


def _difference(entry: dict[str, Any]) -> str:
    mean = show_difference(entry["metric"], entry["mean"])
    return f"paired difference {mean}, 95 % interval {show_interval(entry)}"
