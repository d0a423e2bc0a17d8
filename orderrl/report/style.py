"""House style of the report's figures, and figures and pictures as PNG and SVG."""

import base64
import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

INK = "#1f2328"
_INK_ON_PAGE = "#010203"  # stands for the page's text colour in inline SVG
MUTED = "#8b949e"
# Paul Tol's "vibrant" scheme: distinct for colour-blind readers, legible on white and on near-black. Lines and markers
# change with the colour, so that colour alone distinguishes nothing in a figure.
COLOURS = ("#0077bb", "#ee7733", "#009988", "#ee3377", "#cc3311", "#33bbee")
DASHES: tuple[Any, ...] = ("solid", (0, (6, 1.5)), (0, (3, 1, 1, 1)), (0, (1.5, 1)), (0, (8, 2, 2, 2)), (0, (4, 3)))
MARKERS = "osD^vPX<>*"
COLOUR_MAP = "viridis"
WIDTH = 4.5  # inches; the text keeps its size from a phone to a desktop column
_COLUMN, _COLUMN_FONT = 3.3, 7  # inches and points in a paper's column
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,  # TrueType, embedded, as publishers ask for
    "text.parse_math": False,
    "figure.dpi": 72,
}

Draw = Callable[[str], Figure]
"""Makes a figure from the colour of its ink."""


def policy_colours(names: Sequence[str], ink: str = INK) -> dict[str, str]:
    """Colours of the highlighted policies, raster's that of the text."""
    return {"raster": ink} | {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}


_in_column: ContextVar[bool] = ContextVar("in_column", default=False)


@contextmanager
def for_column() -> Iterator[None]:
    """Inside, figures are drawn in the width of a paper's column, in its small print."""
    token = _in_column.set(True)
    yield
    _in_column.reset(token)


def in_column() -> bool:
    """Whether figures are drawn for a paper's column."""
    return _in_column.get()


@contextmanager
def new_figure(width: float, height: float, ink: str) -> Iterator[Figure]:
    """A figure of the house style that no window system knows about; sizes in inches."""
    colours = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), ink)
    style, scale = _STYLE | colours, 1.0
    if in_column():
        style, scale = style | {"font.size": _COLUMN_FONT}, _COLUMN / max(width, WIDTH)
    with matplotlib.rc_context(style):
        yield Figure(figsize=(scale * width, scale * height), layout="constrained")


def grid_lines(axes: Any, axis: str = "both") -> None:
    """Faint grid lines behind the data."""
    axes.grid(axis=axis, linewidth=0.4, alpha=0.35, color=MUTED)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: Any) -> None:
    """Write a figure on white in the format of the file's suffix; PNG with 144 dots per inch."""
    FigureCanvasAgg(figure)
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)  # a second time: pictures of fixed proportions are moved by the first
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": path.stem}):
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
        figure.savefig(path, dpi=144, facecolor="white", metadata=metadata)


def to_svg(draw: Draw, name: str, description: str) -> str:
    """An inline SVG that takes the page's text colour and font.

    The name tells the identifiers of several figures apart; assistive technology reads the description out.
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
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)


def colour_pixels(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Values in [0, 1] on the common colour scale: (...) -> (..., 3) uint8."""
    pixels: NDArray[np.uint8] = matplotlib.colormaps[COLOUR_MAP](values, bytes=True)[..., :3]
    return pixels


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """(H, W, 3 or 4) uint8 -> data URI of a PNG with exactly these pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def percent(fraction: float) -> str:
    """A fraction as it is written over a strip: 12.5%, 50%."""
    return f"{round(100 * fraction, 1):g}%"


def shorten(name: str, length: int) -> str:
    """A name cut to a length in its middle: names of one planner differ at their ends, in schedule and step cost."""
    start = (length - 1) // 2
    return name if len(name) <= length else f"{name[:start]}…{name[start + 1 - length :]}"
