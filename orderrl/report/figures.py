"""Figures of the report: each is one function that returns a matplotlib figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from torch import Tensor

from orderrl.data.pictures import hide_blocks
from orderrl.evaluation.detail import Curve, Drawn, Examples, PolicyDetail
from orderrl.geometry import BlockGrid
from orderrl.report.style import (
    COLOUR_MAP,
    DASHES,
    INK,
    MUTED,
    WIDTH,
    grid_lines,
    in_column,
    new_figure,
    percent,
    shorten,
)
from orderrl.report.viewer import steps_at

STRIP_FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


def metric_figure(
    rows: Sequence[dict[str, Any]], metric: str, label: str, colours: dict[str, str], ink: str = INK
) -> Figure:
    """A metric of every row that has it, the highest on top, with its interval; one row is drawn as one line.

    Policies without a colour are grey; a dashed line stands at raster's value.
    """
    shown = sorted((row for row in rows if row.get(metric) is not None), key=lambda row: float(row[metric]))
    with new_figure(WIDTH, 0.9 + 0.23 * len(shown), ink) as figure:
        axes = figure.subplots()
        for height, row in enumerate(shown):
            colour = colours.get(row["policy"], MUTED)
            low, high = row.get(f"{metric}_ci") or (row[metric], row[metric])
            axes.plot([low, high], [height, height], color=colour, linewidth=1.6, solid_capstyle="round")
            axes.plot(row[metric], height, "o", color=colour, markersize=4.5)
            if row["policy"] == "raster":
                axes.axvline(row[metric], color=ink, linewidth=0.7, linestyle=(0, (4, 3)), zorder=0)
        axes.set_yticks(range(len(shown)), [_row_name(row, rows) for row in shown])
        for name, row in zip(axes.get_yticklabels(), shown, strict=True):
            name.set_color(ink)
            name.set_alpha(1.0 if row["policy"] in colours else 0.7)
        axes.set_ylim(-0.7, len(shown) - 0.3)
        axes.set_xlabel(label)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        grid_lines(axes, "x")
    return figure


def curves_figure(
    curves: Mapping[str, Curve], label: str, unit: str, colours: dict[str, str], ink: str = INK
) -> Figure:
    """A curve over the revealed fraction with 95 % bands; below it, each mean minus raster's where raster was run.

    Policies without a colour are thin and grey, without bands.
    """
    raster = curves.get("raster")
    highlighted = [name for name in colours if name in curves]
    others = [name for name in curves if name not in colours]
    dashes = dict(zip(highlighted, [(0, (5, 2)), *DASHES] if raster else DASHES, strict=False))
    handles = []
    height = 3.0 + (1.7 if raster else 0) + 0.2 * ((len(highlighted) + 2) // 2)
    with new_figure(WIDTH, height, ink) as figure:
        panels = figure.subplots(
            2 if raster else 1, sharex=True, squeeze=False, height_ratios=(1.6, 1)[: 1 + bool(raster)]
        )
        axes = panels[0, 0]
        for name in (*others, *highlighted):
            curve, known = curves[name], name in colours
            line: Any = {"color": colours.get(name, MUTED), "linewidth": 1.6 if known else 0.7}
            line["linestyle"] = dashes.get(name, "solid")
            axes.plot(curve.fraction, curve.mean, alpha=1.0 if known else 0.55, **line)
            if raster:
                ahead = np.subtract(curve.mean, np.interp(curve.fraction, raster.fraction, raster.mean))
                panels[1, 0].plot(curve.fraction, ahead, alpha=1.0 if known else 0.55, **line)
            if known:
                band: Any = {"color": line["color"], "alpha": 0.16, "linewidth": 0}
                axes.fill_between(curve.fraction, curve.low, curve.high, **band)
                handles.append(Line2D([], [], label=name, **line))
        if others:
            handles.append(Line2D([], [], color=MUTED, linewidth=0.7, label=_others(len(others))))
        axes.set_ylabel(f"{label}\n({unit})")
        if raster:
            panels[1, 0].set_ylabel(f"minus raster\n({unit})")
        for panel in panels[:, 0]:
            panel.set_xlim(0, 1)
            grid_lines(panel)
        panels[-1, 0].set_xlabel("revealed fraction of the blocks")
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, labelcolor=ink)
    return figure


def calibration_figure(
    reliability: Mapping[str, Mapping[str, Any]], colours: dict[str, str], unit: str, ink: str = INK
) -> Figure:
    """Reliability: mean utility against the utility that scores predict, in bins of equal numbers.

    A policy has predicted and actual, one number for each bin, and r2. Policies without a colour are grey.
    """
    highlighted = [name for name in colours if name in reliability]
    others = [name for name in reliability if name not in colours]
    ends = [value for found in reliability.values() for value in (*found["predicted"], *found["actual"])]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    handles = [Line2D([], [], color=ink, linewidth=0.7, linestyle=(0, (4, 3)), label="perfect")]
    with new_figure(WIDTH, 3.4 + 0.2 * ((len(highlighted) + 3) // 2), ink) as figure:
        axes = figure.subplots()
        axes.plot([low, high], [low, high], color=ink, linewidth=0.7, linestyle=(0, (4, 3)), zorder=0)
        for name in (*others, *highlighted):
            found, colour = reliability[name], colours.get(name, MUTED)
            line: Any = {"color": colour, "linewidth": 1.4 if name in colours else 0.7, "marker": "o"}
            line |= {"markersize": 4 if name in colours else 2, "alpha": 1.0 if name in colours else 0.55}
            axes.plot(found["predicted"], found["actual"], **line)
            if name in colours:
                label = f"{shorten(name, 22)} (R² {found['r2']:.2f})"
                handles.append(Line2D([], [], label=label, **line))
        if others:
            handles.append(Line2D([], [], color=MUTED, linewidth=0.7, label=_others(len(others))))
        axes.set_xlabel(f"utility predicted from the score ({unit})")
        axes.set_ylabel(f"mean utility ({unit})")
        grid_lines(axes)
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, labelcolor=ink)
    return figure


def orders_figure(details: Sequence[PolicyDetail], colours: dict[str, str], ink: str = INK) -> Figure:
    """Mean reveal step of every block, one small map a policy, on one colour scale; names with a colour are bold."""
    columns = min(3 if in_column() else 6, max(len(details), 1))
    lines = -(-len(details) // columns)
    rows, width = np.shape(details[0].mean_reveal_step) if details else (1, 1)
    pitch = (1.15 * width, rows + 0.3 * width)  # of the maps, in blocks
    with new_figure(1.25 * columns + 0.7, 1.25 * pitch[1] / pitch[0] * max(lines, 1) + 0.2, ink) as figure:
        axes = figure.subplots()
        axes.set_aspect("equal")
        axes.set_axis_off()
        for index, detail in enumerate(details):
            left, top = index % columns * pitch[0], index // columns * pitch[1] + 0.2 * width
            place = (left, left + width, top + rows, top)
            image = axes.imshow(detail.mean_reveal_step, cmap=COLOUR_MAP, vmin=0, vmax=1, extent=place)
            weight = "bold" if detail.name in colours else "normal"
            name, size = (shorten(detail.name, 14), 6) if in_column() else (shorten(detail.name, 20), 7)
            axes.text(left, top - 0.04 * width, name, fontsize=size, va="bottom", fontweight=weight, clip_on=False)
        axes.set(xlim=(0, columns * pitch[0]), ylim=(lines * pitch[1], 0))
        if details:
            bar = figure.colorbar(image, ax=axes, shrink=0.8)
            bar.set_ticks([0, 1], labels=["first", "last"])
    return figure


def strips_figure(details: Sequence[PolicyDetail], examples: Examples, index: int, ink: str = INK) -> Figure:
    """One example image as it appears under every policy: rows = policies, columns = revealed fractions."""
    moments, grid = len(STRIP_FRACTIONS), BlockGrid(examples.rows, examples.columns, 1)
    image = examples.images[index]
    height, width = image.shape[-2:]
    down, across = height + max(1, height // 12), width + max(1, width // 12)  # with the gap between pictures
    sheet = torch.full((len(details) * down, moments * across, 3), 255, dtype=torch.uint8)
    for line, detail in enumerate(details):
        episode = detail.episodes[index]
        shown = torch.tensor([[steps_at(episode, fraction)] for fraction in STRIP_FRACTIONS])
        partial = hide_blocks(image, torch.tensor(episode.reveal_step) < shown, grid)  # (moments, 3, H, W)
        for moment, picture in enumerate(partial.permute(0, 2, 3, 1)):
            top, left = line * down, moment * across
            sheet[top : top + height, left : left + width] = picture
    with new_figure(0.62 * moments + 1.8, 0.62 * down / across * len(details) + 0.35, ink) as figure:
        axes = figure.subplots()
        axes.imshow(sheet.numpy(), interpolation="nearest")
        axes.set_xticks([m * across + width / 2 for m in range(moments)], list(map(percent, STRIP_FRACTIONS)))
        names = [shorten(detail.name, 24) for detail in details]
        axes.set_yticks([line * down + height / 2 for line in range(len(details))], names)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.set_frame_on(False)
    return figure


def samples_figure(drawn: Sequence[Drawn], distances: Mapping[str, str], ink: str = INK) -> Figure:
    """Images that policies drew, a line each, beside their Fréchet distances as text."""
    lines = [sample_line(line.images, len(line.images)) for line in drawn]
    height, width = (max(line.shape[side] for line in lines) for side in (0, 1))
    sheet = np.full((len(lines) * height, width, 3), 255, dtype=np.uint8)
    for number, line in enumerate(lines):
        sheet[number * height : number * height + line.shape[0], : line.shape[1]] = line
    with new_figure(WIDTH, (WIDTH - 1.8) * len(lines) * height / width + 0.3, ink) as figure:
        axes = figure.subplots()
        axes.imshow(sheet, interpolation="nearest")
        names = [f"{shorten(line.name, 24)}\n{distances.get(line.name, '')}".rstrip() for line in drawn]
        axes.set_yticks([(number + 0.5) * height for number in range(len(lines))], names)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.set_frame_on(False)
    return figure


def sample_line(images: Tensor, count: int) -> NDArray[np.uint8]:
    """Images (n, 3, H, W) uint8 side by side in two lines, with gaps of white: (rows, columns, 3) uint8."""
    columns, (height, width) = -(-count // 2), images.shape[-2:]
    gap = max(1, height // 12)
    sheet = np.full((2 * (height + gap), columns * (width + gap), 3), 255, dtype=np.uint8)
    for number, image in enumerate(images[:count].permute(0, 2, 3, 1).numpy()):
        line, column = divmod(number, columns)
        top, left = line * (height + gap), column * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def _others(number: int) -> str:
    return f"{number} other {'policy' if number == 1 else 'policies'}"


def _row_name(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The policy, with its run or its seed where several rows have the same policy."""
    twins = [other for other in rows if other["policy"] == row["policy"]]
    differ = [key for key in ("run", "seed") if len({str(other.get(key)) for other in twins}) > 1]
    told = [row[key] if key == "run" else f"seed {row[key]}" for key in differ if row.get(key) is not None]
    return shorten(row["policy"], 28) + (f" ({', '.join(told)})" if told else "")
