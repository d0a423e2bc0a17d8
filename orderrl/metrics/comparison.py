"""Paired comparisons of policies over the same images, at equal mean steps where they reveal several blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from orderrl.metrics.evaluation import Evaluated
from orderrl.metrics.statistics import paired_bootstrap


def by_policy(rows: Sequence[Evaluated]) -> dict[str, list[Evaluated]]:
    """Rows by policy name; several training seeds share a name."""
    groups: dict[str, list[Evaluated]] = defaultdict(list)
    for row in rows:
        groups[row.row["policy"]].append(row)
    return dict(groups)


def stacked(rows: Sequence[Evaluated], metric: str) -> Tensor | None:
    """Per-image values of a policy, (seeds, n), or None where they were not measured."""
    values = [getattr(row, metric) for row in rows]
    return None if any(value is None for value in values) else torch.stack(values)


def code_length_at(rows: Sequence[Evaluated], steps: float) -> Tensor | None:
    """Code length of a family of schedules at a given mean number of steps, per image.

    Args:
        rows: the same order at several budgets.
        steps: mean planner steps.

    Returns:
        (n,) nats per image, linear between the two nearest schedules; None if steps lie outside them.
    """
    known = [(float(r.steps.mean()), r.decode_nll) for r in rows if r.steps is not None and r.decode_nll is not None]
    for (fewer, low), (more, high) in pairwise(sorted(known, key=lambda point: point[0])):
        if fewer <= steps <= more:
            share = (steps - fewer) / (more - fewer) if more > fewer else 0.0
            return (1 - share) * low + share * high
    return None


def _entry(name: str, metric: str, one: Tensor, other: Tensor, resamples: int, seed: int) -> dict[str, Any]:
    images = min(one.shape[-1], other.shape[-1])  # references are evaluated on the first images
    interval = paired_bootstrap(one[..., :images], other[..., :images], resamples, seed=seed)
    return {"name": name, "metric": metric, "mean": interval.mean, "low": interval.low, "high": interval.high}


def comparisons(rows: Sequence[Evaluated], resamples: int, seed: int) -> list[dict[str, Any]]:
    """Every learned planner against every baseline, on the metric it was trained for.

    Planners for "context" are compared in information-gain AUC with the baselines that reveal one block a step and with
    each other; planners for "likelihood" in code length, with raster at one block a step and with every order at equal
    mean steps (interpolated between its schedules).

    Returns:
        Dicts of name "<policy> - <opponent>", metric, mean, low, high (95 % interval over images).
    """
    groups = by_policy(rows)
    learned = {name: group for name, group in groups.items() if group[0].row["R"] is not None}
    families: dict[str, list[Evaluated]] = defaultdict(list)
    for row in rows:
        if row.row["R"] is None and row.decode_nll is not None:
            families[row.row["policy"].partition("@")[0]].append(row)
    found = []
    for name, group in learned.items():
        if group[0].row["objective"] == "context":
            mine = stacked(group, "gain_auc")
            assert mine is not None
            for other, rival in groups.items():
                theirs = stacked(rival, "gain_auc")
                comparable = theirs is not None and rival[0].row["objective"] in (None, "context")
                if other != name and comparable and rival[0].row["budgets"] == [1]:
                    assert theirs is not None
                    found.append(_entry(f"{name} - {other}", "gain_auc", mine, theirs, resamples, seed))
        if group[0].row["objective"] == "likelihood":
            found += _code_length_comparisons(name, group, groups, families, resamples, seed)
    return found


def _code_length_comparisons(
    name: str,
    group: list[Evaluated],
    groups: dict[str, list[Evaluated]],
    families: dict[str, list[Evaluated]],
    resamples: int,
    seed: int,
) -> list[dict[str, Any]]:
    mine, steps = stacked(group, "decode_nll"), stacked(group, "steps")
    assert mine is not None and steps is not None
    found = []
    if "raster" in groups and (raster := stacked(groups["raster"], "decode_nll")) is not None:
        found.append(_entry(f"{name} - raster", "decode_nll", mine, raster, resamples, seed))
    for family, members in families.items():
        rivals = [code_length_at(members, float(s)) for s in steps.mean(1)]
        if len(members) > 1 and all(rival is not None for rival in rivals):
            theirs = torch.stack([rival for rival in rivals if rival is not None])
            at = f"{family} at {steps.mean():.1f} steps"
            found.append(_entry(f"{name} - {at}", "decode_nll", mine, theirs, resamples, seed))
    return found
