"""Figures of the report: each is one function that returns a matplotlib figure."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

INK = "#1f2328"
_INK_ON_PAGE = "#010203"  # stands for the page's text colour in inline SVG
MUTED = "#8b949e"
COLOURS = ("#2f81d6", "#d9762b", "#2a9d73", "#a371d9", "#d1495b", "#b58900")
COLOUR_MAP = "viridis"
WIDTH = 4.5  # inches; the text keeps its size from a phone to a desktop column
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "figure.dpi": 72,
}


@dataclass(frozen=True)
class PolicyDetail:
    """What the pictures show of one policy.

    Attributes:
        name: the policy, as in the table.
        fraction: F revealed fractions in [0, 1], increasing.
        gain_mean, gain_low, gain_high: information gained up to these fractions with its 95 % band, nats per token.
        mean_reveal_step: rows x columns of blocks, mean step at which a block is revealed, 0 first and 1 last.
        strips: (examples, moments, 3, H, W) uint8, partly revealed images with hidden blocks grey.
        strip_fractions: revealed fraction at each moment of the strips.

    Raises:
        ValueError: if lengths or shapes do not fit each other.
    """

    name: str
    fraction: list[float]
    gain_mean: list[float]
    gain_low: list[float]
    gain_high: list[float]
    mean_reveal_step: list[list[float]]
    strips: Tensor
    strip_fractions: list[float]

    def __post_init__(self) -> None:
        for field in ("gain_mean", "gain_low", "gain_high"):
            if len(getattr(self, field)) != len(self.fraction):
                raise ValueError(
                    f"{field} of {self.name!r} must have one value for each of the {len(self.fraction)} fractions, "
                    f"got {len(getattr(self, field))}"
                )
        if len({len(row) for row in self.mean_reveal_step}) != 1:
            raise ValueError(f"mean_reveal_step of {self.name!r} must be a grid of rows of equal length")
        moments = len(self.strip_fractions)
        if self.strips.dtype != torch.uint8 or self.strips.ndim != 5 or self.strips.shape[1:3] != (moments, 3):
            raise ValueError(
                f"strips of {self.name!r} must be uint8 of shape (examples, {moments}, 3, H, W), "
                f"got {str(self.strips.dtype).removeprefix('torch.')} {tuple(self.strips.shape)}"
            )


def policy_colours(learned: Sequence[str], ink: str = INK) -> dict[str, str]:
    """Colours of the highlighted policies: learned planners in colour, raster in the colour of the text."""
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(learned)}
    return {"raster": ink} | colours


def gain_figure(rows: Sequence[dict[str, Any]], colours: dict[str, str], ink: str = INK) -> Figure:
    """Information-gain AUC of every row that has one, best first, with its interval.

    Args:
        rows: of `results.json`; one row is drawn as one line.
        colours: of the highlighted policies; the others are grey.
        ink: colour of text and axes.
    """
    shown = sorted((row for row in rows if row.get("gain_auc") is not None), key=lambda row: float(row["gain_auc"]))
    with _figure(WIDTH, 0.9 + 0.23 * len(shown), ink) as figure:
        axes = figure.subplots()
        for height, row in enumerate(shown):
            colour = colours.get(row["policy"], MUTED)
            low, high = row.get("gain_auc_ci") or (row["gain_auc"], row["gain_auc"])
            axes.plot([low, high], [height, height], color=colour, linewidth=1.6, solid_capstyle="round")
            axes.plot(row["gain_auc"], height, "o", color=colour, markersize=4.5)
            if row["policy"] == "raster":
                axes.axvline(row["gain_auc"], color=ink, linewidth=0.7, linestyle=(0, (4, 3)), zorder=0)
        axes.set_yticks(range(len(shown)), [_row_name(row, rows) for row in shown])
        for label, row in zip(axes.get_yticklabels(), shown, strict=True):
            label.set_color(ink)
            label.set_alpha(1.0 if row["policy"] in colours else 0.7)
        axes.set_ylim(-0.7, len(shown) - 0.3)
        axes.set_xlabel("information-gain AUC (share of the image's loss)")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", linewidth=0.4, alpha=0.35, color=MUTED)
        axes.set_axisbelow(True)
    return figure


def curves_figure(details: Sequence[PolicyDetail], colours: dict[str, str], ink: str = INK) -> Figure:
    """Gain against revealed fraction with 95 % bands; below it, each mean minus raster's where raster was run.

    Args:
        details: the policies.
        colours: of the highlighted policies; the others are thin and grey, without bands.
        ink: colour of text and axes.
    """
    raster = next((detail for detail in details if detail.name == "raster"), None)
    others = [detail for detail in details if detail.name not in colours]
    highlighted = [detail for detail in details if detail.name in colours]
    handles = []
    height = 3.0 + (1.7 if raster else 0) + 0.2 * ((len(highlighted) + 2) // 2)
    with _figure(WIDTH, height, ink) as figure:
        panels = figure.subplots(
            2 if raster else 1, sharex=True, squeeze=False, height_ratios=(1.6, 1)[: 1 + bool(raster)]
        )
        axes = panels[0, 0]
        for detail in (*others, *highlighted):
            known = detail.name in colours
            style: Any = (0, (5, 2)) if detail.name == "raster" else "solid"
            line = {"color": colours.get(detail.name, MUTED), "linewidth": 1.6 if known else 0.7, "linestyle": style}
            axes.plot(detail.fraction, detail.gain_mean, alpha=1.0 if known else 0.55, **line)
            if raster:
                ahead = np.subtract(detail.gain_mean, np.interp(detail.fraction, raster.fraction, raster.gain_mean))
                panels[1, 0].plot(detail.fraction, ahead, alpha=1.0 if known else 0.55, **line)
            if known:
                axes.fill_between(
                    detail.fraction, detail.gain_low, detail.gain_high, color=line["color"], alpha=0.16, linewidth=0
                )
                handles.append(Line2D([], [], label=detail.name, **line))
        if others:
            handles.append(Line2D([], [], color=MUTED, linewidth=0.7, label=f"{len(others)} other policies"))
        axes.set_ylabel("gain so far\n(nats per token)")
        if raster:
            panels[1, 0].set_ylabel("minus raster\n(nats per token)")
        for panel in panels[:, 0]:
            panel.set_xlim(0, 1)
            panel.grid(linewidth=0.4, alpha=0.35, color=MUTED)
        panels[-1, 0].set_xlabel("revealed fraction of the blocks")
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, labelcolor=ink)
    return figure


def orders_figure(details: Sequence[PolicyDetail], colours: dict[str, str], ink: str = INK) -> Figure:
    """Mean reveal step of every block, one small map for each policy, on one colour scale.

    Args:
        details: the policies.
        colours: highlighted policies have their names in bold.
        ink: colour of text.
    """
    columns = min(6, max(len(details), 1))
    lines = -(-len(details) // columns)
    with _figure(1.25 * columns + 0.7, 1.5 * max(lines, 1), ink) as figure:
        grid = figure.subplots(max(lines, 1), columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, detail in zip(grid.flat, details, strict=False):
            image = axes.imshow(detail.mean_reveal_step, cmap=COLOUR_MAP, vmin=0, vmax=1)
            weight = "bold" if detail.name in colours else "normal"
            axes.set_title(_shorten(detail.name, 20), fontsize=7, color=ink, fontweight=weight)
        if details:
            bar = figure.colorbar(image, ax=grid, shrink=0.6, ticks=[0, 0.5, 1])
            bar.set_label("mean reveal step (0 first, 1 last)", color=ink)
    return figure


def strips_figure(details: Sequence[PolicyDetail], example: int, ink: str = INK) -> Figure:
    """One image as it appears under every policy: rows = policies, columns = revealed fractions.

    Args:
        details: the policies.
        example: index into the strips.
        ink: colour of text.
    """
    moments = max(len(detail.strip_fractions) for detail in details)
    with _figure(0.62 * moments + 1.8, 0.66 * len(details) + 0.3, ink) as figure:
        grid = figure.subplots(len(details), moments, squeeze=False)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.set_frame_on(False)
        for line, detail in zip(grid, details, strict=True):
            line[0].set_ylabel(_shorten(detail.name, 24), rotation=0, ha="right", va="center", color=ink)
            for axes, picture in zip(line, detail.strips[example], strict=False):
                axes.imshow(picture.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
        for axes, fraction in zip(grid[0], details[0].strip_fractions, strict=False):
            axes.set_title(percent(fraction), color=ink)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as PNG on white, 144 dots per inch."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=144, facecolor="white")
    return buffer.getvalue()


def to_svg(draw: Callable[[str], Figure], name: str, description: str) -> str:
    """An inline SVG that takes the page's text colour and font.

    Args:
        draw: makes the figure from the colour of its ink.
        name: distinguishes the identifiers of several figures on a page.
        description: what assistive technology reads out.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        draw(_INK_ON_PAGE).savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK_ON_PAGE, "currentColor").replace("'DejaVu Sans'", "inherit")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\1{name}-", svg)  # two drawings on a page share no identifier
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{_attribute(description)}"', 1)


def order_pixels(detail: PolicyDetail) -> NDArray[np.uint8]:
    """Mean order as a picture of one pixel a block: (rows, columns, 3) uint8."""
    return colour_pixels(np.asarray(detail.mean_reveal_step, dtype=np.float64))


def colour_pixels(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Values in [0, 1] on the common colour scale: (...) -> (..., 3) uint8."""
    pixels: NDArray[np.uint8] = matplotlib.colormaps[COLOUR_MAP](values, bytes=True)[..., :3]
    return pixels


def strip_pixels(strip: Tensor) -> NDArray[np.uint8]:
    """Moments side by side with transparent gaps: (moments, 3, H, W) uint8 -> (H, width, 4) uint8."""
    opaque = torch.full_like(strip[:, :1], 255)
    gap = max(1, strip.shape[-1] // 8)
    pictures = torch.nn.functional.pad(torch.cat([strip, opaque], dim=1), (0, gap))  # (moments, 4, H, W + gap)
    pixels: NDArray[np.uint8] = pictures.permute(2, 0, 3, 1).flatten(1, 2)[:, :-gap].cpu().numpy()
    return pixels


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """(H, W, 3 or 4) uint8 -> data URI of a PNG with exactly these pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def _figure(width: float, height: float, ink: str) -> Iterator[Figure]:
    """A figure of the house style that no window system knows about; sizes in inches."""
    colours = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), ink)
    with matplotlib.rc_context(_STYLE | colours):
        yield Figure(figsize=(width, height), layout="constrained")


def _row_name(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The policy, with its seed where several rows have the same policy."""
    twins = sum(other["policy"] == row["policy"] for other in rows)
    return _shorten(row["policy"], 28) + (f" (seed {row['seed']})" if twins > 1 and row.get("seed") is not None else "")


def percent(fraction: float) -> str:
    """A fraction as it is written over a strip: 12.5%, 50%."""
    return f"{round(100 * fraction, 1):g}%"


def _shorten(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
