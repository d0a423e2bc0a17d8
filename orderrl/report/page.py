"""The page: results and pictures of an evaluation in one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from orderrl.metrics.quality import INCEPTION, distance_name
from orderrl.report import figures
from orderrl.report.figures import PolicyDetail

DASH = "–"
MINUS = "−"


@dataclass(frozen=True)
class Column:
    """One column of the table: its key in `results.json`, header, unit, format and one-line explanation.

    An optional column is shown only if a row has a value in it.
    """

    key: str
    header: str
    unit: str
    show: Callable[[Any], str]
    meaning: str
    text: bool = False
    optional: bool = False


def _number(digits: int) -> Callable[[Any], str]:
    return lambda value: f"{value:.{digits}f}".replace("-", MINUS)


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}".replace("-", MINUS)


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


COLUMNS = (
    Column("policy", "policy", "", _words, "What chooses the next block.", text=True),
    Column("objective", "objective", "", _words, "What a learned planner was trained for.", text=True),
    Column("budgets", "budgets", "blocks", _words, "How many blocks it may reveal in one step.", text=True),
    Column("R", "R", "passes", _words, "Latent reasoning passes of the planner."),
    Column("seed", "seed", "", _words, "Training seed."),
    Column(
        "gain_auc",
        "gain AUC ↑",
        "share of loss",
        _number(4),
        "Information-gain AUC: area under gain against revealed fraction, divided by the image's loss with nothing "
        "revealed; with its 95 % bootstrap interval over images.",
    ),
    Column(
        "likelihood_return",
        "likelihood return ↑",
        "nats per token",
        _number(3),
        "Sum of rewards of the likelihood objective.",
    ),
    Column(
        "far_gain",
        "far gain ↑",
        "%",
        _percent,
        "Far-context gain: share of the gain that falls on blocks which do not touch the revealed one.",
    ),
    Column(
        "decode_nll",
        "decode NLL ↓",
        "nats per image",
        _number(2),
        "Code length of the image under the parallel block sampler with this schedule.",
    ),
    Column(
        "decode_loss",
        "decode loss ↓",
        "DiffLoss per image",
        _number(3),
        "Sum of the diffusion losses charged by the parallel block sampler: masked models have no code length.",
        optional=True,
    ),
    Column(
        "recognisability_auc",
        "recognisability ↑",
        "area",
        _number(3),
        "Area under the classifier's confidence in the true class against revealed fraction.",
    ),
    Column(
        "oracle_top1",
        "oracle top-1 ↑",
        "%",
        _percent,
        "How often the first-ranked block is the hindsight oracle's, on a shared set of states.",
    ),
    Column(
        "oracle_spearman",
        "oracle Spearman ↑",
        "rank corr.",
        _number(3),
        "Rank correlation of block scores with the hindsight utility, on the same states.",
    ),
    Column(
        "regret",
        "regret ↓",
        "nats per token",
        _number(4),
        "Best hindsight utility minus that of the first-ranked block, on the same states.",
    ),
    Column("steps", "steps", "per image", _number(1), "Planner steps until the image is complete."),
    Column("decode_calls", "decode calls", "per image", _number(1), "Sequential calls of the backbone's decoder."),
    Column(
        "seconds_per_image", "time", "ms per image", lambda v: f"{1000 * v:.1f}", "Wall time of generating, batched."
    ),
    Column(
        "frechet_distance",
        "Fréchet distance ↓",
        "squared features",
        _number(2),
        "Distance of samples from all real images in the features named beside it; FID only in Inception features.",
    ),
    Column(
        "inception_score",
        "inception score ↑",
        "",
        _number(2),
        "How sure the extractor's classifier is of each sample, and how evenly the samples cover its classes.",
        optional=True,
    ),
    Column(
        "kid",
        "kernel distance ↓",
        "squared",
        _number(4),
        "Samples against real images by a cubic kernel: unbiased, so it may fall a little below 0; KID in Inception "
        "features.",
        optional=True,
    ),
    Column("precision", "precision ↑", "%", _percent, "Samples that lie near a real image.", optional=True),
    Column("recall", "recall ↑", "%", _percent, "Real images that lie near a sample.", optional=True),
    Column(
        "spatial_frechet_distance",
        "spatial Fréchet ↓",
        "squared features",
        _number(2),
        "Fréchet distance of spatial features, before places are averaged; sFID in Inception features.",
        optional=True,
    ),
    Column("features", "features", "", _words, "Feature extractor of the distances.", text=True),
    Column("accuracy", "accuracy ↑", "%", _percent, "Samples that a classifier assigns to their class."),
)


def write_report(folder: Path, results: dict[str, Any], details: Sequence[PolicyDetail]) -> Path:
    """Write `report.html` (self-contained) and its figures as PNG files beside it.

    Args:
        folder: an existing or new folder.
        results: as in `results.json`: "protocol" (key to value), "rows" (dicts with the keys of `COLUMNS` and
            "gain_auc_ci", null where a metric does not apply) and optionally "comparisons", a list of
            {"name", "metric", "mean", "low", "high"} where name is "<policy> - <opponent>".
        details: what the pictures show, one for each policy with pictures.

    Returns:
        The path of the page.

    Raises:
        ValueError: if results lack protocol or rows, or a row lacks its policy.
    """
    for key in ("protocol", "rows"):
        if key not in results:
            raise ValueError(f"results must have the key {key!r}, got {', '.join(map(repr, results)) or 'none'}")
    rows = results["rows"]
    if not all(row.get("policy") for row in rows):
        raise ValueError("results['rows'] must name a policy in every row")
    folder.mkdir(parents=True, exist_ok=True)
    columns = shown_columns(rows)
    learned = learned_policies(rows)
    colours = figures.policy_colours(learned)
    plots = [
        _plot(
            "gain_auc",
            "Information-gain AUC",
            "Dots: mean over test images. Bars: 95 % bootstrap interval. Dashed: raster.",
            lambda ink: figures.gain_figure(rows, figures.policy_colours(learned, ink), ink),
        )
    ]
    if details:
        plots.append(
            _plot(
                "gain_curves",
                "Gain against revealed fraction",
                "Learned planners and raster are highlighted, with 95 % bands over images. "
                "Below: mean gain minus raster's.",
                lambda ink: figures.curves_figure(details, figures.policy_colours(learned, ink), ink),
            )
        )
    _save_pngs(folder, plots, details, colours)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    page = environment.get_template("report.html.jinja").render(
        summary=summary(results),
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        protocol={key.replace("_", " "): _protocol_value(value) for key, value in results["protocol"].items()},
        columns=[_renamed(column, rows) for column in columns],
        rows=[_cells(row, learned, columns) for row in rows],
        comparisons=[_comparison(entry) for entry in results.get("comparisons") or []],
        plots=plots,
        scale=figures.png_uri(figures.colour_pixels(np.linspace(0, 1, 64)[None])),
        maps=[
            {"name": detail.name, "image": figures.png_uri(figures.order_pixels(detail)), "alt": _order_text(detail)}
            for detail in details
        ],
        examples=_examples(details),
        highlighted=list(colours),
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def shown_columns(rows: Sequence[dict[str, Any]]) -> list[Column]:
    """The columns of the table: all but optional ones without a value."""
    return [column for column in COLUMNS if not column.optional or any(row.get(column.key) is not None for row in rows)]


def learned_policies(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the learned planners, those with a number of reasoning passes R, in the order of the table."""
    return list(dict.fromkeys(row["policy"] for row in rows if row.get("R") is not None))


def summary(results: dict[str, Any]) -> str:
    """One sentence: the best learned planner against raster, whichever way it turned out.

    "Best" is the highest information-gain AUC, averaged over the rows (seeds) of a policy. The interval is that of
    the paired comparison "<planner> - raster" if there is one; without it no claim of a difference is made.
    """
    means = {name: _mean_gain(results["rows"], name) for name in learned_policies(results["rows"])}
    known = {name: value for name, value in means.items() if value is not None}
    if not known:
        return "No learned planner was evaluated."
    best = max(known, key=lambda name: known[name])
    gain, raster = known[best], _mean_gain(results["rows"], "raster")
    if raster is None:
        return f"The best learned planner, {best}, reaches an information-gain AUC of {gain:.4f}; raster was not run."
    figures_text = f"information-gain AUC {gain:.4f} against {raster:.4f}"
    if raster > 0:
        figures_text += f", {gain / raster:.2f} times raster's"
    paired = _paired_with_raster(results.get("comparisons") or [], best)
    if paired is None:
        relation = "is above" if gain > raster else "is not above"
        return f"The best learned planner, {best}, {relation} raster ({figures_text}); no paired interval was computed."
    interval = f"paired difference {_signed(paired['mean'])}, 95 % interval {_interval(paired)}"
    if paired["low"] > 0:
        return f"The best learned planner, {best}, beats raster: {figures_text}; {interval}."
    if paired["high"] < 0:
        return f"No learned planner beats raster: the best, {best}, is worse; {figures_text}; {interval}."
    return f"No learned planner beats raster beyond chance: the best is {best}; {figures_text}; {interval}."


def _mean_gain(rows: Sequence[dict[str, Any]], policy: str) -> float | None:
    values = [row["gain_auc"] for row in rows if row["policy"] == policy and row.get("gain_auc") is not None]
    return sum(values) / len(values) if values else None


def _paired_with_raster(comparisons: Sequence[dict[str, Any]], policy: str) -> dict[str, Any] | None:
    wanted = f"{policy} - raster"
    return next((c for c in comparisons if c["name"] == wanted and c["metric"] == "gain_auc"), None)


def _signed(value: float, metric: str = "gain_auc") -> str:
    """A difference in the digits and units of the metric's column."""
    show = next((column.show for column in COLUMNS if column.key == metric), _number(4))
    return ("+" if value > 0 else "") + show(value)


def _interval(entry: dict[str, Any]) -> str:
    return f"{_signed(entry['low'], entry['metric'])} to {_signed(entry['high'], entry['metric'])}"


def _comparison(entry: dict[str, Any]) -> dict[str, Any]:
    """One line of the paired comparisons as text."""
    column = next((column for column in COLUMNS if column.key == entry["metric"]), None)
    return {
        "name": entry["name"].replace(" - ", f" {MINUS} "),
        "metric": column.header if column else entry["metric"].replace("_", " "),
        "unit": column.unit if column else "",
        "mean": _signed(entry["mean"], entry["metric"]),
        "interval": _interval(entry),
        "excludes_zero": entry["low"] > 0 or entry["high"] < 0,
    }


def _renamed(column: Column, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A column for the template; distances are headed FID, KID and sFID if all are in Inception features."""
    header = column.header
    inception = {
        "frechet_distance": distance_name(INCEPTION),
        "kid": "KID",
        "spatial_frechet_distance": f"s{distance_name(INCEPTION)}",
    }
    used = {row.get("features") for row in rows if row.get("frechet_distance") is not None}
    if column.key in inception and used == {INCEPTION}:
        header = f"{inception[column.key]} ↓"
    return {"header": header, "unit": column.unit, "meaning": column.meaning, "text": column.text}


def _breakable(name: str) -> Markup:
    """A name, escaped, that may be broken after its underscores."""
    return escape(name).replace("_", Markup("_<wbr>"))


def _cells(row: dict[str, Any], learned: Sequence[str], columns: Sequence[Column]) -> dict[str, Any]:
    """One line of the table as text."""
    kind = "learned" if row["policy"] in learned else "raster" if row["policy"] == "raster" else ""
    cells = []
    for column in columns:
        value = row.get(column.key)
        shown = DASH if value is None else column.show(value)
        note = ""
        if column.key == "gain_auc" and value is not None and row.get("gain_auc_ci"):
            note = f"{column.show(row['gain_auc_ci'][0])} to {column.show(row['gain_auc_ci'][1])}"
        cells.append({"shown": shown, "note": note, "text": column.text})
    return {"kind": kind, "cells": cells}


def _protocol_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_protocol_value(inner)}" for key, inner in value.items())
    return DASH if value is None else _words(value)


def _plot(name: str, title: str, caption: str, draw: Callable[[str], figures.Figure]) -> dict[str, Any]:
    svg = Markup(figures.to_svg(draw, name, f"{title}. {caption} The numbers are in the table."))
    return {"name": name, "title": title, "caption": caption, "svg": svg, "draw": draw}


def _order_text(detail: PolicyDetail) -> str:
    """Alternative text of an order map: the blocks revealed first and last on average."""
    steps = np.asarray(detail.mean_reveal_step)
    first, last = (np.unravel_index(index, steps.shape) for index in (steps.argmin(), steps.argmax()))
    return (
        f"Mean order of {detail.name}: earliest block in row {first[0] + 1}, column {first[1] + 1} "
        f"({steps.min():.2f}); latest in row {last[0] + 1}, column {last[1] + 1} ({steps.max():.2f})."
    )


def _examples(details: Sequence[PolicyDetail]) -> list[dict[str, Any]]:
    """The strips of each example image, one line for each policy."""
    count = min((len(detail.strips) for detail in details), default=0)
    examples = []
    for example in range(count):
        lines = []
        for detail in details:
            pixels = figures.strip_pixels(detail.strips[example])
            moments = ", ".join(map(figures.percent, detail.strip_fractions))
            lines.append(
                {
                    "name": detail.name,
                    "image": figures.png_uri(pixels),
                    "height": pixels.shape[0],
                    "width": pixels.shape[1],
                    "alt": f"Image {example + 1} under {detail.name}, revealed {moments}",
                }
            )
        examples.append({"fractions": list(map(figures.percent, details[0].strip_fractions)), "lines": lines})
    return examples


def _save_pngs(
    folder: Path, plots: Sequence[dict[str, Any]], details: Sequence[PolicyDetail], colours: dict[str, str]
) -> None:
    """The figures for slides and papers, beside the page."""
    drawn = {plot["name"]: plot["draw"](figures.INK) for plot in plots}
    if details:
        drawn["mean_orders"] = figures.orders_figure(details, colours)
        for example in range(min(len(detail.strips) for detail in details)):
            drawn[f"strips_{example + 1}"] = figures.strips_figure(details, example)
    for name, figure in drawn.items():
        (folder / f"{name}.png").write_bytes(figures.to_png(figure))
