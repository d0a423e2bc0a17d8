"""The page: results and pictures of an evaluation in one HTML file that needs no network."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from torch.nn import functional as F

from orderrl.evaluation.columns import (
    all_columns,
    column_of,
    in_features,
    learned_policies,
    own_policies,
    shown_columns,
)
from orderrl.evaluation.detail import Curve, Drawn, Examples, Pictures, PolicyDetail
from orderrl.report import cost, figures, style
from orderrl.report.summary import summary
from orderrl.report.tables import comparison_values, loss_unit, protocol_values, results_values
from orderrl.report.viewer import partial_drawing, steps_at, viewer_data

STRIPS = 3  # example images drawn under every policy; the viewer has all of them
SMALL = 100  # pixels; smaller pictures are enlarged without smoothing

PICTURES, IN_COLUMN = ("png", "svg"), ("pdf",)  # formats of a figure, and of it in a column's width


@dataclass(frozen=True)
class Plot:
    """A figure on the page and beside it."""

    name: str  # of its files
    title: str  # on the page
    caption: str  # on the page
    draw: style.Draw  # makes it


def write_report(folder: Path, results: dict[str, Any], pictures: Pictures) -> Path:
    """Write `report.html` (self-contained), and its figures as `figures/NAME.png`, `.svg` and `.pdf` beside it.

    The PDF is as wide as a paper's column, with its fonts embedded.

    Args:
        folder: an existing or new folder.
        results: as in `results.json`: "protocol" (key to value), "rows" (dicts of the columns and intervals
            "<name>_ci", null where a metric does not apply) and optionally "comparisons", as
            `orderrl.evaluation.comparison.comparisons` gives them.

    Returns:
        The path of the page.
    """
    text, beside = report_page(results, pictures)
    save_figures(folder / "figures", beside)
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def report_page(results: dict[str, Any], pictures: Pictures) -> tuple[str, dict[str, Callable[[], Figure]]]:
    """The page as HTML, and the figures beside it by name; as `write_report`, which writes them."""
    rows = results["rows"]
    learned = learned_policies(rows)
    highlighted = [*learned, *own_policies(rows)]
    several = {row["policy"] for row in rows if _several_blocks(row)} - set(learned)
    shown = replace(pictures, details=[detail for detail in pictures.details if detail.name not in several])
    plots = _plots(rows, shown.details, highlighted)
    distances = _distances(rows)
    beside = _figures_beside(plots, shown, distances, style.policy_colours(highlighted))
    text = render(
        "report.html.jinja",
        summary=summary(results),
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        plots=[_on_page(plot) for plot in plots],
        scale=style.png_uri(style.colour_pixels(np.linspace(0, 1, 64)[None])),
        maps=[
            {
                "name": detail.name,
                "image": style.png_uri(style.colour_pixels(np.asarray(detail.mean_reveal_step, dtype=np.float64))),
                "alt": _order_text(detail),
            }
            for detail in shown.details
        ],
        samples=[_line_of_samples(line, distances) for line in shown.drawn],
        highlighted=["raster", *highlighted],
        **results_values(rows, learned, shown_columns(rows)),
        **comparison_values(results.get("comparisons") or []),
        **protocol_values(results["protocol"]),
        **_images(pictures, shown, learned, loss_unit(rows)),
    )
    return text, beside


def render(template: str, **values: Any) -> str:
    """A page from one of this package's templates; names go through the filter `breakable`."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> Environment:
    """This package's templates, each compiled once."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _several_blocks(row: dict[str, Any]) -> bool:
    return (row.get("budgets") or [1]) != [1]


# -- figures ----------------------------------------------------------------------------------------------------------


def _plots(rows: Sequence[dict[str, Any]], details: Sequence[PolicyDetail], highlighted: Sequence[str]) -> list[Plot]:
    unit, colours = loss_unit(rows), partial(style.policy_colours, highlighted)
    plots: list[Plot] = []

    def add(name: str, title: str, caption: str, draw: style.Draw) -> None:
        plots.append(Plot(name, title, caption, draw))

    caption = "Dots: mean over test images. Bars: 95 % bootstrap interval. Dashed: raster."
    label = "information-gain AUC"
    draw = partial(figures.metric_figure, rows, "gain_auc", label)
    add("gain_auc", "Information-gain AUC", caption, lambda ink: draw(colours(ink), ink))
    caption = "Coloured: learned planners and own policies, with 95 % bands over images. Below: mean minus raster's."
    if details:
        title, gain = "Information gained against revealed fraction", {detail.name: detail.gain for detail in details}
        quantity = ("gain so far", unit)
        add("gain_curves", title, caption, lambda ink: figures.curves_figure(gain, *quantity, colours(ink), ink))
    if known := _recognisability(rows):
        title, score = "Recognisability against revealed fraction", ("confidence", "in the true class")
        name = "recognisability_curves"
        add(name, title, caption, lambda ink: figures.curves_figure(known, *score, colours(ink), ink))
    caption = (
        "Lines join those schedules of one policy that none of its others beats. Rings on the thick line: the Pareto "
        "front, which no other policy shown beats in cost and quality. Oracle and lookahead are left out."
    )
    for column in all_columns("cost"):
        if cost.cost_panels(rows, column.name):
            name, title = f"quality_{column.name.removesuffix('_per_image')}", f"Quality against {column.heading}"
            add(name, title, caption, partial(cost.cost_figure, rows, column.name))
    # the oracle's scores are the utilities themselves
    judged = [row for row in _of_first_seed(rows) if row.get("reliability") and row.get("family") != "oracle"]
    reliability = {row["policy"]: row["reliability"] for row in judged}
    if reliability:
        caption = (
            "Scores, mapped to utilities by one least-squares line for each policy, against the hindsight oracle's "
            "utility: means in bins of equal numbers of candidates on the shared states. On the dashed line, "
            "predictions are right on average; R² says how much of the utility they explain."
        )
        draw_with = partial(figures.calibration_figure, reliability)
        add("calibration", "Calibration", caption, lambda ink: draw_with(colours(ink), unit, ink))
    return plots


def _of_first_seed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row of each policy, of those that reveal one block a step or are learned."""
    found = {row["policy"]: row for row in reversed(rows) if not _several_blocks(row) or row.get("R") is not None}
    return list(reversed(found.values()))


def _recognisability(rows: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    curves = {
        row["policy"]: row["recognisability_curve"] for row in _of_first_seed(rows) if row.get("recognisability_curve")
    }
    keys = ("fraction", "confidence", "confidence_low", "confidence_high")
    return {policy: Curve(*(curve[key] for key in keys)) for policy, curve in curves.items()}


def _on_page(plot: Plot) -> dict[str, Any]:
    description = f"{plot.title}. {plot.caption}"
    svg = Markup(style.to_svg(plot.draw, plot.name, description))
    return {"title": plot.title, "caption": plot.caption, "svg": svg}


def _figures_beside(
    plots: Sequence[Plot], shown: Pictures, distances: dict[str, str], colours: dict[str, str]
) -> dict[str, Callable[[], Figure]]:
    """The figures for slides and papers, by the names of their files."""
    found: dict[str, Callable[[], Figure]] = {plot.name: partial(plot.draw, style.INK) for plot in plots}
    if shown.details:
        found["mean_orders"] = partial(figures.orders_figure, shown.details, colours)
    if shown.drawn:
        found["samples"] = partial(figures.samples_figure, shown.drawn, distances)
    if shown.examples is not None:
        details = [detail for detail in shown.details if detail.episodes]
        for index in range(_strip_count(details)):
            found[f"strips_{index + 1}"] = partial(figures.strips_figure, details, shown.examples, index)
    return found


def save_figures(folder: Path, wanted: Mapping[str, Callable[[], Figure]]) -> None:
    """Draw figures and write each as PNG and SVG, and in a column's width as PDF."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in wanted.items():
        figure = draw()
        for suffix in PICTURES:
            style.save_figure(figure, folder / f"{name}.{suffix}")
            figure.set_layout_engine("none")  # it is laid out, and looks the same in all formats
        for suffix in IN_COLUMN:
            with style.for_column():
                style.save_figure(draw(), folder / f"{name}.{suffix}")


def _breakable(name: str) -> Markup:
    """A name, escaped, that may be broken after its underscores and in its schedule."""
    return Markup(re.sub(r"[_@+]", r"\g<0><wbr>", str(escape(name))))


# -- images -----------------------------------------------------------------------------------------------------------


def _images(pictures: Pictures, shown: Pictures, learned: Sequence[str], unit: str) -> dict[str, Any]:
    """The parts of the page with example images: their pictures, the viewer of all policies, strips of those shown."""
    examples, known = pictures.examples, [detail for detail in pictures.details if detail.episodes]
    if examples is None or not known:
        return {"pictures": [], "grid": None, "viewer": None, "strips": []}
    data, count = viewer_data(known, examples, unit)
    names = [detail.name for detail in known]
    return {
        "pictures": [
            {"uri": style.png_uri(image.permute(1, 2, 0).numpy()), "small": image.shape[-1] < SMALL}
            for image in examples.images[:count]
        ],
        "grid": {"rows": examples.rows, "columns": examples.columns},
        "viewer": {
            "json": Markup(data),
            "labels": examples.labels[:count],
            "names": names,
            "start": next((name for name in learned if name in names), names[0]),
            "unit": unit,
        },
        "strips": [
            _strip(index, [detail for detail in shown.details if detail.episodes], examples)
            for index in range(min(count, _strip_count(shown.details)))
        ],
    }


def _distances(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The Fréchet distance of each policy of the first seed, in words."""
    column = in_features(column_of("frechet_distance"), rows)
    known = {row["policy"]: row for row in reversed(rows) if row.get(column.name) is not None}
    return {name: f"{column.heading} {column.show(row[column.name])}" for name, row in known.items()}


def _line_of_samples(line: Drawn, distances: dict[str, str]) -> dict[str, Any]:
    """The images that a policy drew, made small where they are large."""
    images = line.images
    if images.shape[-1] > SMALL:
        images = F.interpolate(images.float(), scale_factor=SMALL / images.shape[-1], mode="area").round().byte()
    uri = style.png_uri(figures.sample_line(images, len(images)))
    alt = f"{len(images)} images drawn by {line.name}"
    return {"name": line.name, "uri": uri, "alt": alt, "distance": distances.get(line.name, "")}


def _strip_count(details: Sequence[PolicyDetail]) -> int:
    return min([STRIPS, *(len(detail.episodes) for detail in details if detail.episodes)]) if details else 0


def _strip(index: int, details: Sequence[PolicyDetail], examples: Examples) -> dict[str, Any]:
    """One example image at five moments under every policy."""
    fractions = list(map(style.percent, figures.STRIP_FRACTIONS))
    lines = []
    for detail in details:
        episode = detail.episodes[index]
        drawings = [
            partial_drawing(f"example-{index + 1}", examples, episode.reveal_step, steps_at(episode, fraction))
            for fraction in figures.STRIP_FRACTIONS
        ]
        alt = f"Image {index + 1} under {detail.name}, revealed {', '.join(fractions)}"
        lines.append({"name": detail.name, "drawings": drawings, "alt": alt})
    return {"label": examples.labels[index], "fractions": fractions, "lines": lines}


def _order_text(detail: PolicyDetail) -> str:
    """Alternative text of an order map: the blocks revealed first and last on average."""
    steps = np.asarray(detail.mean_reveal_step)
    first, last = (np.unravel_index(index, steps.shape) for index in (steps.argmin(), steps.argmax()))
    return (
        f"Mean order of {detail.name}: earliest block in row {first[0] + 1}, column {first[1] + 1} "
        f"({steps.min():.2f}); latest in row {last[0] + 1}, column {last[1] + 1} ({steps.max():.2f})."
    )
