"""The metrics of the table, the only list of them: rows, screen, Markdown, pages, comparisons and ranks follow it.

A metric of your own is one call: its column, with the values of a policy's rollout or samples.

    register_metric(Column("first_loss", "loss after a step", "nats", 3, "Loss left after the first step.", LOWER,
                           per_image=lambda rollout, backbone: rollout.losses[1].sum(-1)), "planning")

Every process knows it by an entry point of the group "orderrl.metrics", whose name is the column's. Of an objective
that a user has registered, the sum of its rewards is a metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from orderrl.agents.play import Rollout
from orderrl.backbones import Backbone
from orderrl.envs.reward import OBJECTIVES, Step, future_loss_reduction
from orderrl.metrics.feature_names import INCEPTION
from orderrl.metrics.order import consecutive_distance, visible_neighbours
from orderrl.metrics.quality import distance_name
from orderrl.runtime.registry import Registry, is_reference

DASH = "–"
MINUS = "−"
HIGHER, LOWER = 1, -1
PLACES = ("screen", "markdown", "compare", "orders", "quality", "cost")
PerImage = Callable[[Rollout, Backbone], Tensor]
PerSample = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Column:
    """A metric, or what else a row says of a policy.

    Attributes:
        name: key in a row of `results.json`.
        heading: of its column.
        unit: of the numbers that are shown; "" is none.
        digits: behind the point; None shows the value as text.
        help: explains it in a line.
        direction: `HIGHER` or `LOWER` where that is better, else 0.
        scale: what a value is multiplied by where it is shown.
        interval: whether a row has the 95 % interval of the value as "<name>_ci", [low, high].
        text: whether values are words.
        clock: whether it was measured with a clock, and so differs between two runs of one policy.
        places: where it stands besides the page, words of `PLACES`: screen and leaderboard, Markdown, the default
            metrics of `compare`, the orders of `analyze`, and both axes of quality against cost.
        inception: its heading if it was measured in Inception features.
        per_image: gives the values of a rollout's images, (n,) float, whose mean it is; None if it is measured in
            another way.
        per_sample: gives the values of generated images (n, 3, H, W) uint8 of classes (n,) int64, (n,) float; likewise.
        group: of a metric of a user, where it stands, one of `GROUPS`.
    """

    name: str
    heading: str
    unit: str
    digits: int | None
    help: str
    direction: int = 0
    scale: float = 1.0
    interval: bool = True
    text: bool = False
    clock: bool = False
    places: str = ""
    inception: str = ""
    per_image: PerImage | None = None
    per_sample: PerSample | None = None
    group: str = ""

    def __post_init__(self) -> None:
        unknown = [place for place in self.places.split() if place not in PLACES]
        if unknown or self.direction not in (HIGHER, 0, LOWER):
            raise ValueError(
                f"column {self.name!r}: places={self.places!r} must be of {', '.join(PLACES)}, and "
                f"direction={self.direction!r} 1, 0 or -1"
            )

    @property
    def header(self) -> str:
        """The heading, and an arrow that points to better values."""
        return f"{self.heading} {'↑' if self.direction > 0 else '↓'}" if self.direction else self.heading

    @property
    def title(self) -> str:
        """The header with the unit."""
        return f"{self.header} ({self.unit})" if self.unit else self.header

    def show(self, value: Any) -> str:
        """A value as text."""
        if self.digits is None:
            return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        return f"{self.scale * value:.{self.digits}f}".replace("-", MINUS)


def _setting(name: str, heading: str, unit: str, help: str, text: bool = False) -> Column:
    """What a row says of a policy besides what was measured."""
    return Column(name, heading, unit, None, help, interval=False, text=text)


# fmt: off
GROUPS: dict[str, list[Column]] = {
    "policy": [
        _setting("policy", "policy", "", "What chooses the next block.", text=True),
    ],
    "planning": [
        Column("gain_auc", "gain AUC", "share of loss", 4,
               "Information-gain AUC: area under gain against revealed fraction, divided by the image's loss with "
               "nothing revealed.",
               HIGHER, places="screen markdown compare orders", per_image=lambda rollout, _: rollout.gain_auc),
        Column("likelihood_return", "likelihood return", "nats per token", 3,
               "Sum of rewards of the likelihood objective.",
               HIGHER, per_image=lambda rollout, _: rollout.likelihood_return),
        Column("far_gain", "far gain", "%", 1,
               "Far-context gain: share of the gain that falls on blocks which do not touch the revealed one.",
               HIGHER, scale=100, places="markdown orders"),
        Column("decode_nll", "decode NLL", "nats per image", 2,
               "Code length of the image under the parallel block sampler with this schedule.",
               LOWER, places="screen markdown compare orders quality", per_image=lambda rollout, _: rollout.decode_nll),
        Column("decode_loss", "decode loss", "DiffLoss per image", 3,
               "Sum of the diffusion losses charged by the parallel block sampler: masked models have no code length.",
               LOWER, places="screen markdown quality"),
        Column("recognisability_auc", "recognisability", "area", 3,
               "Area under the classifier's confidence in the true class against revealed fraction.",
               HIGHER, places="screen markdown compare"),
        Column("recognisability_accuracy_auc", "recognised", "area", 3,
               "Area under the classifier's accuracy against revealed fraction.", HIGHER),
    ],
    "agreement": [
        Column("oracle_top1", "oracle top-1", "%", 1,
               "How often the first-ranked block is the hindsight oracle's, on a shared set of states.",
               HIGHER, scale=100),
        Column("oracle_spearman", "oracle Spearman", "rank corr.", 3,
               "Rank correlation of block scores with the hindsight utility, on the same states.",
               HIGHER, places="markdown"),
        Column("oracle_kendall", "oracle Kendall", "rank corr.", 3,
               "Kendall's tau-b of block scores and hindsight utility, on the same states.", HIGHER),
        Column("regret", "regret", "nats per token", 4,
               "Best hindsight utility minus that of the first-ranked block, on the same states.",
               LOWER, places="markdown"),
        Column("lookahead_regret", "lookahead regret", "nats per token", 4,
               "Best expected utility over the backbone's own draws minus that of the first-ranked block: what a "
               "policy without hindsight could have gained.", LOWER),
        Column("calibration_error", "calibration error", "nats per token", 4,
               "Mean distance of the utility predicted from the score and the utility found, in bins of equal "
               "numbers; read it beside R².", LOWER, interval=False),
        Column("calibration_r2", "R²", "", 3,
               "Share of the variance of utilities that the scores explain by one line.", HIGHER, interval=False),
        Column("importance_spearman", "importance Spearman", "rank corr.", 3,
               "Rank correlation of being revealed early with the classifier's importance, image by image "
               "(labels=classifier).", HIGHER, places="compare"),
        Column("content_spearman", "with true content", "rank corr.", 3,
               "Rank correlation with that importance of scores that see the whole true image: what content could add "
               "(network orderhead).", HIGHER),
        Column("content_match", "content match", "rank corr.", 3,
               "Rank correlation of scores that see the whole true image with those of the empty one: 1 is a mere "
               "spatial prior (network orderhead)."),
        Column("score_std", "score spread", "score", 3,
               "Standard deviation of the scores of a state's hidden blocks, in their own unit."),
    ],
    "order": [
        Column("consecutive_distance", "jump", "blocks", 2,
               "Mean distance between the centres of blocks that follow each other.",
               places="orders", per_image=lambda rollout, _: consecutive_distance(rollout.order, rollout.geometry)),
        Column("visible_neighbours", "visible neighbours", "%", 1,
               "Share of a block's neighbours that are visible when it is revealed.",
               scale=100, places="orders", per_image=lambda rollout, _: visible_neighbours(rollout).mean(1)),
        Column("first_choice_entropy", "first-choice entropy", "nats", 2,
               "Entropy over images of the block that is revealed first: 0 if it is always the same.", interval=False),
        Column("place_entropy", "place entropy", "nats", 2,
               "Entropy over images of the block at each place of the order, mean over the places: 0 for a fixed "
               "order.", interval=False),
    ],
    "cost": [
        Column("steps", "steps", "per image", 1,
               "Planner steps until the image is complete.",
               places="screen markdown compare cost", per_image=lambda rollout, _: rollout.steps),
        Column("decode_calls", "decode calls", "per image", 1,
               "Sequential calls of the backbone's decoder.",
               per_image=lambda rollout, backbone: rollout.steps * backbone.draws_per_block),
        Column("scorings", "scorings", "per image", 1,
               "Times that a policy's block scores are made: once in mode fast, at every step in mode slow.",
               interval=False),
        Column("seconds_per_image", "time", "ms per image", 1,
               "Wall time of drawing the samples, batched, with the policy's own time.",
               scale=1000, interval=False, clock=True, places="cost"),
        Column("rollout_seconds_per_image", "rollout time", "ms per image", 1,
               "Wall time of scoring a test image in the policy's order, batched: the context losses of every step.",
               scale=1000, interval=False, clock=True),
    ],
    "samples": [
        Column("frechet_distance", "Fréchet distance", "squared features", 2,
               "Distance of samples from all real images in the features named beside it; FID only in Inception "
               "features.", LOWER, places="screen markdown quality", inception=distance_name(INCEPTION)),
        Column("frechet_distance_infinity", "Fréchet ∞", "squared features", 2,
               "The Fréchet distance extrapolated to infinitely many samples, which takes away its bias.",
               LOWER, interval=False),
        Column("inception_score", "inception score", "", 2,
               "How sure the extractor's classifier is of each sample, and how evenly the samples cover its classes.",
               HIGHER, interval=False, places="markdown"),
        Column("kid", "kernel distance", "squared", 4,
               "Samples against real images by a cubic kernel: unbiased, so it may fall a little below 0; KID in "
               "Inception features.", LOWER, interval=False, places="markdown", inception="KID"),
        Column("cmmd", "CMMD", "times 1,000", 3,
               "Samples against real images by a Gaussian kernel on CLIP features of unit length; published numbers "
               "are in the features clip-vit-l-14-336px.", LOWER, interval=False, places="markdown"),
        Column("precision", "precision", "%", 1,
               "Samples that lie near a real image.", HIGHER, scale=100, places="markdown"),
        Column("recall", "recall", "%", 1, "Real images that lie near a sample.", HIGHER, scale=100, places="markdown"),
        Column("spatial_frechet_distance", "spatial Fréchet", "squared features", 2,
               "Fréchet distance of spatial features, before places are averaged; sFID in Inception features.",
               LOWER, places="markdown", inception=f"s{distance_name(INCEPTION)}"),
        _setting("features", "features", "", "Feature extractor of the distances.", text=True),
        Column("clip_score", "CLIP score", "of 100", 2,
               "100 times the cosine of the CLIP features of a sample and of a caption that names its class, at "
               "least 0.", HIGHER, places="markdown"),
        Column("accuracy", "accuracy", "%", 1,
               "Samples that a classifier assigns to their class.",
               HIGHER, scale=100, places="screen markdown quality"),
    ],
    "setting": [
        _setting("objective", "objective", "", "What a learned planner was trained for.", text=True),
        _setting("budgets", "budgets", "blocks", "How many blocks it may reveal in one step.", text=True),
        _setting("R", "R", "passes", "Latent reasoning passes of the planner."),
        _setting("seed", "seed", "", "Training seed."),
        _setting("step_cost", "step cost", "nats per image",
                 "What a step cost the planner in training, or the cost given to a planner that was trained on a "
                 "range."),
    ],
}
# fmt: on
"""Columns by what they are about; one without a value in any row is left out."""

_WITHOUT_COLUMN = (
    *("family", "rival", "own", "recognisability_curve", "visible_neighbours_curve", "reliability"),
    *("decode_bits", "decode_bits_ci"),
)
"""Entries of a row that no table shows. `family` is the policy without schedule and step cost; `rival` is false for
oracle and lookahead, which know or try out hidden tokens and are evaluated on the first images only;
`own` is true for policies of users."""


def _check(name: str, column: Any) -> None:
    if not isinstance(column, Column) or (column.name != name and not is_reference(name)):
        raise ValueError(f"metric {name!r} must be a Column of this name, got {column!r:.60}")
    if column.name in METRICS.taken:
        raise ValueError(f"metric {column.name!r}: the package has a meaning for the name; choose another name")
    if _group(column) not in GROUPS:
        raise ValueError(f"group={column.group!r} is unknown; choose one of {', '.join(GROUPS)}")
    if (column.per_image is None) == (column.per_sample is None):
        raise ValueError(f"metric {name!r} must have either per_image or per_sample")


_SHIPPED = [column for columns in GROUPS.values() for column in columns]
METRICS: Registry[Column] = Registry(
    "metric",
    "orderrl.metrics",
    check=_check,
    taken=(*_WITHOUT_COLUMN, *(f"{column.name}{end}" for column in _SHIPPED for end in ("", "_ci"))),
)
"""The metrics of users."""


def register_metric(column: Column, group: str = "", *, overwrite: bool = False) -> Column:
    """Add a metric, which every table then shows where a row has a value: the mean with its interval.

    Args:
        column: with a function `per_image` or `per_sample`.
        group: one of `GROUPS`; "" takes the column's own, or else that of its function, "planning" or "samples".
        overwrite: replace the metric of this name, as when a notebook's cell runs again.

    Raises:
        ValueError: if the name is taken, there is no such group, or the column has not one of the two functions.
    """
    column = replace(column, group=group or column.group)
    METRICS.register(column.name, column, overwrite=overwrite)
    return column


def _group(column: Column) -> str:
    return column.group or ("planning" if column.per_sample is None else "samples")


def _grouped() -> dict[str, list[Column]]:
    """The columns by group, those of users last."""
    objectives = {OBJECTIVES.find(name): name for name in OBJECTIVES.own()}  # one with two names has the later one
    own = {column.name: column for column in (*METRICS.values(), *map(_return_of, objectives.values()))}.values()
    return {name: columns + [column for column in own if _group(column) == name] for name, columns in GROUPS.items()}


def _return_of(objective: str) -> Column:
    """The sum of rewards of a user's objective, uniformly weighted and without the cost of steps."""

    def per_image(rollout: Rollout, backbone: Backbone) -> Tensor:
        before, after = (losses.flatten(0, 1) for losses in (rollout.losses[:-1], rollout.losses[1:]))  # (T n, B)
        seen, visible = (blocks.flatten(0, 1) for blocks in (rollout.visible[:-1], rollout.visible[1:]))
        revealed, utility = visible & ~seen, future_loss_reduction(before, after, ~visible)
        value = OBJECTIVES.find(objective)(Step(utility, before, after, revealed, visible, rollout.geometry))
        value = value.where(revealed.any(-1), 0.0)  # nothing is paid after an episode's end
        return value.unflatten(0, rollout.losses[:-1].shape[:2]).sum(0) / rollout.geometry.num_tokens

    said = f"Sum of rewards of the objective {objective}."
    return Column(
        metric_of(objective), f"{objective} return", "nats per token", 4, said, HIGHER,
        places="screen markdown compare", per_image=per_image,
    )  # fmt: skip


def metric_of(objective: str | None) -> str:
    """The metric that a planner for an objective is compared in."""
    if objective is None or objective in OBJECTIVES.shipped:
        return "decode_nll" if objective == "likelihood" else "gain_auc"
    return f"{objective}_return"


def all_columns(place: str | None = None) -> list[Column]:
    """All columns in the order of the table, or those of one of `PLACES`."""
    found = [column for columns in _grouped().values() for column in columns]
    return found if place is None else [column for column in found if place in column.places.split()]


def column_of(name: str) -> Column:
    """The column of a metric; of one that no table has, such as an analysis's own, its name with four digits."""
    made = Column(name, name.replace("_", " "), "", 4, "")
    return next((column for column in all_columns() if column.name == name), made)


def empty_row() -> dict[str, Any]:
    """A row of `results.json` in which nothing is known: every entry, and None."""
    entries = [*(column.name for column in all_columns()), *_WITHOUT_COLUMN]
    return dict.fromkeys([*entries, *(f"{column.name}_ci" for column in all_columns() if column.interval)])


def is_rival(row: Mapping[str, Any]) -> bool:
    """False for rows of policies that know or try out hidden tokens, and are evaluated on the first images only."""
    return row.get("rival") is not False


def learned_policies(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the learned planners, those with a number of reasoning passes R, in the order of the table."""
    return list(dict.fromkeys(row["policy"] for row in rows if row.get("R") is not None))


def own_policies(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the user's policies, in the order of the table."""
    return list(dict.fromkeys(row["policy"] for row in rows if row.get("own")))


def measured(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns that have a value in some row."""
    return [column for column in columns if any(row.get(column.name) is not None for row in rows)]


def shown_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Column]]:
    """The columns of the table by group: the policy, and all others that have a value in some row."""
    groups = {group: columns if group == "policy" else measured(columns, rows) for group, columns in _grouped().items()}
    return {group: list(columns) for group, columns in groups.items() if columns}


def in_features(column: Column, rows: Sequence[Mapping[str, Any]]) -> Column:
    """The column with its heading for the features used: distances are FID, KID and sFID if all are in Inception's."""
    used = {row.get("features") for row in rows if row.get("frechet_distance") is not None}
    return replace(column, heading=column.inception) if column.inception and used == {INCEPTION} else column


def cell_of(row: Mapping[str, Any], column: Column) -> dict[str, Any]:
    """A cell as text: what is shown, its interval if there is one, and the number or word to sort by."""
    value, interval = row.get(column.name), row.get(f"{column.name}_ci")
    if value is None:
        return {"shown": DASH, "note": "", "sort": ""}
    note = f"{column.show(interval[0])} to {column.show(interval[1])}" if interval else ""
    shown = column.show(value)
    return {"shown": shown, "note": note, "sort": shown if column.text else value}


def show_difference(metric: str, value: float) -> str:
    """A difference in the digits and units of its metric's column, with its sign."""
    return ("+" if value > 0 else "") + column_of(metric).show(value)


def show_interval(entry: Mapping[str, Any]) -> str:
    """The interval of a paired comparison."""
    low, high = (show_difference(entry["metric"], entry[end]) for end in ("low", "high"))
    return f"{low} to {high}"


def show_p(p_value: float) -> str:
    """A p-value to three digits."""
    return f"{p_value:.3f}" if p_value >= 0.001 else "< 0.001"
