"""Quality against cost: what every policy with several budgets reaches in how many steps and seconds."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from orderrl.evaluation.columns import all_columns, column_of, is_rival
from orderrl.report.style import COLOURS, INK, MARKERS, MUTED, WIDTH, grid_lines, new_figure, shorten


@dataclass(frozen=True)
class Point:
    """One policy at one schedule, averaged over training seeds."""

    policy: str  # as in the table
    cost: float  # mean steps, or seconds, per image
    quality: float  # value of the metric
    family: str  # the policy without its schedule


def cost_points(rows: Sequence[dict[str, Any]], cost: str, quality: str) -> list[Point]:
    """The points of a panel, in the order of the table.

    Left out are references, which know or try out hidden tokens and are evaluated on fewer images, and rows of plain
    raster token order. Only rows with samples have seconds.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        known = row.get(cost) is not None and row.get(quality) is not None
        if known and row.get("budgets") and is_rival(row):
            groups[row["policy"]].append(row)

    def mean(group: list[dict[str, Any]], key: str) -> float:
        return sum(row[key] for row in group) / len(group)

    return [
        Point(policy, mean(group, cost), mean(group, quality), group[0].get("family") or policy)
        for policy, group in groups.items()
    ]


def pareto_front(points: Sequence[Point], higher: bool) -> list[Point]:
    """The points that no other one beats in cost and quality, cheapest first.

    Of points that are equal in both, the first one stands for all.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.quality if higher else p.quality)):
        if not front or (point.quality > front[-1].quality if higher else point.quality < front[-1].quality):
            front.append(point)
    return front


def cost_panels(rows: Sequence[dict[str, Any]], cost: str) -> dict[str, list[Point]]:
    """The metrics worth drawing against a cost, those with a policy at several costs, with their points."""
    panels = {column.name: cost_points(rows, cost, column.name) for column in all_columns("quality")}
    return {quality: points for quality, points in panels.items() if _families(points)}


def cost_figure(rows: Sequence[dict[str, Any]], cost: str, ink: str = INK) -> Figure:
    """Every metric of quality against a cost, one panel each, with the Pareto front marked.

    A line joins those schedules of one policy that none of its others beats in cost and quality; all others are single
    points.
    """
    panels = cost_panels(rows, cost)
    families = list(dict.fromkeys(family for points in panels.values() for family in _families(points)))
    learned = dict.fromkeys(row.get("family") or row["policy"] for row in rows if row.get("R") is not None)
    named = list(dict.fromkeys([*learned, *families, "raster"]))
    named = [name for name in named if any(p.family == name for points in panels.values() for p in points)]
    looks = {name: _look(index, name, ink) for index, name in enumerate(named)}
    with new_figure(WIDTH, 0.5 + 2.3 * max(len(panels), 1) + 0.2 * ((len(named) + 3) // 2), ink) as figure:
        grid = figure.subplots(max(len(panels), 1), sharex=True, squeeze=False)
        for axes, (quality, points) in zip(grid[:, 0], panels.items(), strict=False):
            _panel(axes, points, cost, quality, looks, ink)
        grid[-1, 0].set_xlabel(column_of(cost).title)
        handles = [Line2D([], [], label=shorten(name, 24), **look) for name, look in looks.items()]
        if any(point.family not in looks for points in panels.values() for point in points):
            handles.append(Line2D([], [], color=MUTED, linestyle="", marker=".", label="other policies"))
        handles.append(Line2D([], [], label="Pareto front", **_FRONT, color=ink))
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, labelcolor=ink)
    return figure


_FRONT: Any = {"linewidth": 5, "alpha": 0.15, "solid_capstyle": "round", "solid_joinstyle": "round"}


def _look(index: int, name: str, ink: str) -> dict[str, Any]:
    colour = ink if name == "raster" else COLOURS[index % len(COLOURS)]
    return {"color": colour, "marker": MARKERS[index % len(MARKERS)], "markersize": 5, "linewidth": 1.2}


def _families(points: Sequence[Point]) -> list[str]:
    """Policies at more than one cost."""
    costs: dict[str, set[float]] = defaultdict(set)
    for point in points:
        costs[point.family].add(point.cost)
    return [family for family, values in costs.items() if len(values) > 1]


def _panel(
    axes: Any, points: Sequence[Point], cost: str, quality: str, looks: dict[str, dict[str, Any]], ink: str
) -> None:
    column = column_of(quality)
    across, up, higher = column_of(cost).scale, column.scale, column.direction > 0
    front = pareto_front(points, higher)
    axes.plot([across * p.cost for p in front], [up * p.quality for p in front], color=ink, zorder=1, **_FRONT)
    for family in dict.fromkeys(point.family for point in points):
        members = [p for p in points if p.family == family]
        look = looks.get(family, {"color": MUTED, "marker": ".", "markersize": 5, "linewidth": 0.7})
        best = pareto_front(members, higher)  # joining all of them would draw a zigzag
        axes.plot([across * p.cost for p in best], [up * p.quality for p in best], zorder=3, **look)
        rest, alone = [p for p in members if p not in best], {**look, "linestyle": "", "alpha": 0.5}
        axes.plot([across * p.cost for p in rest], [up * p.quality for p in rest], zorder=2, **alone)
    for point in front:
        axes.plot(
            across * point.cost, up * point.quality, "o",
            markersize=10, markerfacecolor="none", markeredgecolor=ink, markeredgewidth=0.8, zorder=4,
        )  # fmt: skip
    axes.set_ylabel(f"{column.header}\n({column.unit})")
    axes.set_xscale("log", base=2)
    values = [across * p.cost for p in points]
    narrow = max(values) < 4 * min(values)
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.25, 1.5, 1.75) if narrow else (1.0,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    grid_lines(axes)
