"""The columns of the table: how the rows of `results.json` are written and explained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from orderrl.metrics.quality import INCEPTION, distance_name

DASH = "–"
MINUS = "−"


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        key: in a row of `results.json`; "<key>_ci" is the interval of the value, if a row has it.
        header: ends in an arrow, ↑ or ↓, where higher or lower is better.
        unit: "" is none.
        show: formats a value.
        meaning: explains the column in a line.
        text: whether values are words.
    """

    key: str
    header: str
    unit: str
    show: Callable[[Any], str]
    meaning: str
    text: bool = False


def _number(digits: int) -> Callable[[Any], str]:
    return lambda value: f"{value:.{digits}f}".replace("-", MINUS)


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}".replace("-", MINUS)


def _milliseconds(value: Any) -> str:
    return f"{1000 * value:.1f}"


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


GROUPS: dict[str, tuple[Column, ...]] = {
    "policy": (Column("policy", "policy", "", _words, "What chooses the next block.", text=True),),
    "planning": (
        Column(
            "gain_auc",
            "gain AUC ↑",
            "share of loss",
            _number(4),
            "Information-gain AUC: area under gain against revealed fraction, divided by the image's loss with nothing "
            "revealed.",
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
        ),
        Column(
            "recognisability_auc",
            "recognisability ↑",
            "area",
            _number(3),
            "Area under the classifier's confidence in the true class against revealed fraction.",
        ),
        Column(
            "recognisability_accuracy_auc",
            "recognised ↑",
            "area",
            _number(3),
            "Area under the classifier's accuracy against revealed fraction.",
        ),
    ),
    "agreement": (
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
            "oracle_kendall",
            "oracle Kendall ↑",
            "rank corr.",
            _number(3),
            "Kendall's tau-b of block scores and hindsight utility, on the same states.",
        ),
        Column(
            "regret",
            "regret ↓",
            "nats per token",
            _number(4),
            "Best hindsight utility minus that of the first-ranked block, on the same states.",
        ),
        Column(
            "lookahead_regret",
            "lookahead regret ↓",
            "nats per token",
            _number(4),
            "Best expected utility over the backbone's own draws minus that of the first-ranked block: what a policy "
            "without hindsight could have gained.",
        ),
        Column(
            "calibration_error",
            "calibration error ↓",
            "nats per token",
            _number(4),
            "Mean distance of the utility predicted from the score and the utility found, in bins of equal numbers; "
            "read it beside R².",
        ),
        Column(
            "calibration_r2",
            "R² ↑",
            "",
            _number(3),
            "Share of the variance of utilities that the scores explain by one line.",
        ),
        Column(
            "score_std",
            "score spread",
            "score",
            _number(3),
            "Standard deviation of the scores of a state's hidden blocks, in their own unit.",
        ),
    ),
    "order": (
        Column(
            "consecutive_distance",
            "jump",
            "blocks",
            _number(2),
            "Mean distance between the centres of blocks that follow each other.",
        ),
        Column(
            "visible_neighbours",
            "visible neighbours",
            "%",
            _percent,
            "Share of a block's neighbours that are visible when it is revealed.",
        ),
        Column(
            "first_choice_entropy",
            "first-choice entropy",
            "nats",
            _number(2),
            "Entropy over images of the block that is revealed first: 0 if it is always the same.",
        ),
    ),
    "cost": (
        Column("steps", "steps", "per image", _number(1), "Planner steps until the image is complete."),
        Column("decode_calls", "decode calls", "per image", _number(1), "Sequential calls of the backbone's decoder."),
        Column(
            "seconds_per_image",
            "time",
            "ms per image",
            _milliseconds,
            "Wall time of drawing the samples, batched, with the policy's own time.",
        ),
        Column(
            "rollout_seconds_per_image",
            "rollout time",
            "ms per image",
            _milliseconds,
            "Wall time of scoring a test image in the policy's order, batched: the context losses of every step.",
        ),
    ),
    "samples": (
        Column(
            "frechet_distance",
            "Fréchet distance ↓",
            "squared features",
            _number(2),
            "Distance of samples from all real images in the features named beside it; FID only in Inception features.",
        ),
        Column(
            "frechet_distance_infinity",
            "Fréchet ∞ ↓",
            "squared features",
            _number(2),
            "The Fréchet distance extrapolated to endlessly many samples, which takes away its bias.",
        ),
        Column(
            "inception_score",
            "inception score ↑",
            "",
            _number(2),
            "How sure the extractor's classifier is of each sample, and how evenly the samples cover its classes.",
        ),
        Column(
            "kid",
            "kernel distance ↓",
            "squared",
            _number(4),
            "Samples against real images by a cubic kernel: unbiased, so it may fall a little below 0; KID in "
            "Inception features.",
        ),
        Column(
            "cmmd",
            "CMMD ↓",
            "times 1,000",
            _number(3),
            "Samples against real images by a Gaussian kernel on CLIP features of unit length; published numbers are "
            "in the features clip-vit-l-14-336px.",
        ),
        Column("precision", "precision ↑", "%", _percent, "Samples that lie near a real image."),
        Column("recall", "recall ↑", "%", _percent, "Real images that lie near a sample."),
        Column(
            "spatial_frechet_distance",
            "spatial Fréchet ↓",
            "squared features",
            _number(2),
            "Fréchet distance of spatial features, before places are averaged; sFID in Inception features.",
        ),
        Column("features", "features", "", _words, "Feature extractor of the distances.", text=True),
        Column(
            "clip_score",
            "CLIP score ↑",
            "of 100",
            _number(2),
            "100 times the cosine of the CLIP features of a sample and of a caption that names its class, at least 0.",
        ),
        Column("accuracy", "accuracy ↑", "%", _percent, "Samples that a classifier assigns to their class."),
    ),
    "setting": (
        Column("objective", "objective", "", _words, "What a learned planner was trained for.", text=True),
        Column("budgets", "budgets", "blocks", _words, "How many blocks it may reveal in one step.", text=True),
        Column("R", "R", "passes", _words, "Latent reasoning passes of the planner."),
        Column("seed", "seed", "", _words, "Training seed."),
        Column(
            "step_cost",
            "step cost",
            "nats per image",
            _words,
            "What a step cost the planner in training, or what a planner that was trained on a range is told.",
        ),
    ),
}
"""Columns by what they are about; a column without a value in any row is left out."""

COLUMNS = tuple(chain.from_iterable(GROUPS.values()))


def shown_columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Column]]:
    """The columns of the table by group: the policy, and all others that have a value in some row."""
    groups = {
        group: [c for c in columns if c.key == "policy" or any(row.get(c.key) is not None for row in rows)]
        for group, columns in GROUPS.items()
    }
    return {group: columns for group, columns in groups.items() if columns}


def header_of(column: Column, rows: Sequence[dict[str, Any]]) -> str:
    """The column's header; distances are headed FID, KID and sFID if all are in Inception features."""
    inception = {
        "frechet_distance": distance_name(INCEPTION),
        "kid": "KID",
        "spatial_frechet_distance": f"s{distance_name(INCEPTION)}",
    }
    used = {row.get("features") for row in rows if row.get("frechet_distance") is not None}
    return f"{inception[column.key]} ↓" if column.key in inception and used == {INCEPTION} else column.header


def cell_of(row: dict[str, Any], column: Column) -> dict[str, Any]:
    """A cell as text: what is shown, its interval if there is one, and the number or word to sort by."""
    value, interval = row.get(column.key), row.get(f"{column.key}_ci")
    if value is None:
        return {"shown": DASH, "note": "", "sort": ""}
    note = f"{column.show(interval[0])} to {column.show(interval[1])}" if interval else ""
    shown = column.show(value)
    return {"shown": shown, "note": note, "sort": shown if column.text else value}


def show_value(metric: str, value: float) -> str:
    """A value in the digits and units of its metric's column."""
    return next((column.show for column in COLUMNS if column.key == metric), _number(4))(value)


def show_difference(metric: str, value: float) -> str:
    """A difference, with its sign."""
    return ("+" if value > 0 else "") + show_value(metric, value)


def show_interval(entry: dict[str, Any]) -> str:
    """The interval of a paired comparison."""
    low, high = (show_difference(entry["metric"], entry[end]) for end in ("low", "high"))
    return f"{low} to {high}"


def show_p(p_value: float) -> str:
    """A p-value to three digits."""
    return f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001"
