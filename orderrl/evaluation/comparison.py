"""Paired comparisons of policies over the same images, of one run or several.

Where policies reveal several blocks at once, they are compared at equal mean steps.

All comparisons of a table are one family: `orderrl.metrics.statistics.is_significant` decides on p-values corrected for
their number (Holm). Intervals are those of single comparisons.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orderrl.evaluation.columns import column_of, is_rival, metric_of, own_policies
from orderrl.evaluation.rows import Evaluated
from orderrl.evaluation.runs import Evaluation, collected
from orderrl.metrics.statistics import RESAMPLES, holm, is_significant, paired_bootstrap

RESAMPLES_PER_COMPARISON = 100
"""Resamples behind the p-values, at least, for each comparison of the family: Holm multiplies the smallest p-value by
their number, and 2 / (resamples + 1) is the smallest that there is."""


def by_policy(rows: Sequence[Evaluated]) -> dict[str, list[Evaluated]]:
    """Rows by policy name; several training seeds share a name."""
    groups: dict[str, list[Evaluated]] = defaultdict(list)
    for row in rows:
        groups[row.row["policy"]].append(row)
    return dict(groups)


def stacked(rows: Sequence[Evaluated], metric: str) -> Tensor | None:
    """Per-image values of a policy, (seeds, n), or None where they were not measured."""
    values = [row.per_image.get(metric) for row in rows]
    return None if any(value is None for value in values) else torch.stack([v for v in values if v is not None])


def in_order(rows: Sequence[Evaluated]) -> list[Evaluated]:
    """Rows as a table shows them: learned planners, other orders, references that see hidden tokens, and the rest.

    Inside these, the best policy first, by the mean of its rows: planners for "likelihood" by code length behind those
    for "context", then those for objectives of users by their returns; all others by information-gain AUC.
    """
    groups = by_policy(rows)

    def place(row: Evaluated) -> tuple[int, int, float]:
        members = groups[row.row["policy"]]
        metric = metric_of(row.row["objective"])
        values = stacked(members, metric)
        if values is None:
            return 3, 0, 0.0
        kind = 0 if row.row["R"] is not None else 1 if is_rival(row.row) else 2
        mean = float(values.mean())
        return kind, ("gain_auc", "decode_nll", metric).index(metric), -column_of(metric).direction * mean

    return sorted(rows, key=place)


def code_length_at(rows: Sequence[Evaluated], steps: float) -> Tensor | None:
    """Code length of a family of schedules at a given mean number of steps, per image.

    Args:
        rows: the same order at several budgets.
        steps: mean planner steps.

    Returns:
        (n,) nats per image, linear between the two schedules that give the least mean: what drawing some images by one
        and some by the other reaches, so no schedule of the family is left out; None if steps lie outside them.
    """
    measured = [row.per_image for row in rows if {"steps", "decode_nll"} <= set(row.per_image)]
    known = [(float(values["steps"].mean()), values["decode_nll"]) for values in measured]
    between = []
    for (fewer, low), (more, high) in combinations_with_replacement(sorted(known, key=lambda point: point[0]), 2):
        if fewer <= steps <= more:
            share = (steps - fewer) / (more - fewer) if more > fewer else 0.0
            between.append((1 - share) * low + share * high)
    return min(between, key=lambda values: float(values.mean()), default=None)


class Pair(NamedTuple):
    """A comparison to be made."""

    name: str  # "<policy> - <opponent>"
    metric: str  # key of the row
    policy: Tensor  # (seeds, n) values of each image
    opponent: Tensor  # (seeds, n) values of each image
    # what the result says besides: "policy" and "opponent", as in the table, and for a family of schedules at equal
    # mean steps, "at_steps"
    named: dict[str, Any] | None = None


def compare(pairs: Sequence[Pair], resamples: int, seed: int) -> list[dict[str, Any]]:
    """Paired differences of a family of comparisons, with p-values corrected for their number.

    Seeds are averaged; intervals and p-values say how the mean of these seeds varies with the images, `seed_std` how a
    single seed varies around it.

    Args:
        pairs: the family; a reference that was evaluated on the first images only is compared on these.
        resamples: of the bootstrap, raised to 100 for each comparison where that is more.

    Returns:
        For each pair a dict of name, metric; mean, low, high (95 % interval over images), p_value, p_holm, significant
        (`is_significant`), effect_size (paired Cohen's d over images), images, seeds (of the policy) and seed_std
        (standard deviation of the mean difference over them, None for one seed), and what the pair is named.
    """
    resamples = max(resamples, RESAMPLES_PER_COMPARISON * len(pairs))
    found = []
    for name, metric, policy, opponent, named in pairs:
        images = min(policy.shape[-1], opponent.shape[-1])
        one, other = policy[..., :images], opponent[..., :images]
        difference = paired_bootstrap(one, other, resamples, seed=seed)
        spread = (one - other.mean(0)).mean(1).std().item() if len(one) > 1 else None
        known = {"images": images, "seeds": len(one), "seed_std": spread}
        found.append({"name": name, **(named or {}), "metric": metric, **asdict(difference), **known})
    for row, adjusted in zip(found, holm([row["p_value"] for row in found]), strict=True):
        row["p_holm"] = float(adjusted)
        row["significant"] = is_significant(row)
    return found


def comparisons(rows: Sequence[Evaluated], resamples: int, seed: int) -> list[dict[str, Any]]:
    """Every learned planner against every baseline, on the metric it was trained for.

    Planners for "context" are compared in information-gain AUC with the baselines that reveal one block a step, and
    with each other once, the one that stands first less the other. Planners for "likelihood" are compared in code
    length with raster at one block a step, and with every order at equal mean steps (interpolated between its best
    schedules). Planners for a user's objective are compared in its return, as those for "context" in theirs. Policies
    of users that reveal one block a step are compared with raster in information-gain AUC.

    Returns:
        As `compare`.
    """
    groups = by_policy(rows)
    learned = {name: group for name, group in groups.items() if group[0].row["R"] is not None}
    families: dict[str, list[Evaluated]] = defaultdict(list)
    for row in rows:
        if row.row["R"] is None and "decode_nll" in row.per_image:
            families[row.row["family"] or row.row["policy"]].append(row)
    pairs: list[Pair] = []
    done: set[str] = set()
    for name, group in learned.items():
        done.add(name)
        objective = group[0].row["objective"]
        if objective == "likelihood":
            pairs += _code_length_pairs(name, group, groups, families)
        elif objective is not None:
            rivals = {other: rows for other, rows in groups.items() if other not in done}
            pairs += _return_pairs(name, group, rivals, objective)
    raster = {name: group for name, group in groups.items() if name == "raster"}
    for name in own_policies([row.row for row in rows if row.row["budgets"] == [1]]):
        pairs += _return_pairs(name, groups[name], raster, "context")
    return compare(pairs, resamples, seed)


def _return_pairs(name: str, group: list[Evaluated], rivals: dict[str, list[Evaluated]], objective: str) -> list[Pair]:
    metric = metric_of(objective)
    mine = stacked(group, metric)
    found = []
    for other, rival in rivals.items():
        theirs, first = stacked(rival, metric), rival[0].row
        if (
            mine is not None
            and theirs is not None
            and first["objective"] in (None, objective)
            and first["budgets"] == [1]
        ):
            found.append(_pair(name, other, metric, mine, theirs))
    return found


def _code_length_pairs(
    name: str, group: list[Evaluated], groups: dict[str, list[Evaluated]], families: dict[str, list[Evaluated]]
) -> list[Pair]:
    mine, steps = stacked(group, "decode_nll"), stacked(group, "steps")
    assert mine is not None and steps is not None
    found = []
    if "raster" in groups and (raster := stacked(groups["raster"], "decode_nll")) is not None:
        found.append(_pair(name, "raster", "decode_nll", mine, raster))
    for family, members in families.items():
        rivals = [code_length_at(members, float(s)) for s in steps.mean(1)]
        if len(members) > 1 and all(rival is not None for rival in rivals):
            theirs = torch.stack([rival for rival in rivals if rival is not None])
            found.append(_pair(name, family, "decode_nll", mine, theirs, float(steps.mean())))
    return found


def _pair(policy: str, opponent: str, metric: str, mine: Tensor, theirs: Tensor, at_steps: float | None = None) -> Pair:
    at = "" if at_steps is None else f" at {at_steps:.1f} steps"
    named = {"policy": policy, "opponent": opponent, "at_steps": at_steps}
    return Pair(f"{policy} - {opponent}{at}", metric, mine, theirs, named)


# ---------------------------------------------------------------------- several runs


class RunPairs(NamedTuple):
    """What is to be compared, and what need not be."""

    pairs: list[Pair]  # the family of comparisons
    equal: list[dict[str, str]]  # "name", "policy" and "opponent" where all values of all images are equal


def run_pairs(evaluations: Sequence[Evaluation], metrics: Sequence[str]) -> RunPairs:
    """The pairs of several runs of one protocol, later ones against the first.

    Values that are equal on every image leave nothing to test, and would only make the correction harsher. ValueError
    if there are fewer than two runs, or no policy of them has values for any of the metrics.
    """
    if len(evaluations) < 2:
        raise ValueError("compare needs at least two runs; rank the rows of one with --rank KEY")
    first, *others = evaluations
    pairs: list[Pair] = []
    equal: list[dict[str, str]] = []
    for other in others:
        mine, theirs = by_policy(other.rows), by_policy(first.rows)
        for policy, opponent in _matched(mine, theirs):
            name = f"{policy} ({other.name}) - {opponent} ({first.name})"
            named = {"policy": policy, "opponent": opponent}
            found = _metric_pairs(name, named, mine[policy], theirs[opponent], metrics)
            different = [pair for pair in found if not torch.equal(pair.policy, pair.opponent)]
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


def compare_runs(
    evaluations: Sequence[Evaluation], metrics: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Compare runs of one protocol, at least two, in metrics of single images.

    Returns:
        What `comparison.json` holds: as `collected`, with comparisons (as `compare` gives them) and equal.
    """
    pairs, equal = run_pairs(evaluations, metrics)
    entries = compare(pairs, resamples, seed)
    summary = run_summary([run.name for run in evaluations], entries, equal)
    return collected(evaluations, summary) | {"comparisons": entries, "equal": equal}


def run_summary(runs: Sequence[str], entries: Sequence[dict[str, Any]], equal: Sequence[dict[str, str]]) -> str:
    """How many differences were found, in a sentence or two."""
    found = f"{sum(map(is_significant, entries))} of {len(entries)} differences are significant."
    sentences = [
        f"{len(runs)} runs of one protocol, compared with {runs[0]}: {found if entries else 'no differences.'}"
    ]
    if equal:
        sentences.append(f"Equal on every image: {', '.join(dict.fromkeys(pair['policy'] for pair in equal))}.")
    return " ".join(sentences)
