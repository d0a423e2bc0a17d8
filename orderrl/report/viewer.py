"""Data of the order viewer, and partly revealed images as drawings that share one picture."""

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from orderrl.evaluation.detail import Episode, Examples, PolicyDetail
from orderrl.report.style import colour_pixels

LEVELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
"""Scores are drawn in as many colours as there are characters here, and stored as one of them each."""

MAX_CHARACTERS = 8_000_000
"""Of the viewer's data; fewer images are shown where more would be needed."""


def viewer_data(details: Sequence[PolicyDetail], examples: Examples, unit: str) -> tuple[str, int]:
    """What the viewer's script reads, as JSON that is safe inside a page, and the number of images in it.

    Args:
        details: the policies; those without episodes are left out.

    Returns:
        JSON of {"rows", "columns", "unit", "levels", "palette", "policies": [{"name", "episodes": [{"steps", "loss",
        "scores", "ranges"}]}]}. "scores" has a string for each step with a character of "levels" for each hidden block
        in raster order, from the lowest score of the step to the highest; "ranges" has these two. Both are null for
        policies without scores.
    """
    shown = [detail for detail in details if detail.episodes]
    count = min([len(examples.images), *(len(detail.episodes) for detail in shown)])
    encoded = [[_encoded(episode) for episode in detail.episodes[:count]] for detail in shown]
    sizes = np.cumsum([sum(len(json.dumps(episodes[image])) for episodes in encoded) for image in range(count)])
    fitting = max(1, int(np.searchsorted(sizes, MAX_CHARACTERS, side="right")))
    data = {
        "rows": examples.rows,
        "columns": examples.columns,
        "unit": unit,
        "levels": LEVELS,
        "palette": ["#" + bytes(colour).hex() for colour in colour_pixels(np.linspace(0, 1, len(LEVELS)))],
        "policies": [
            {"name": detail.name, "episodes": episodes[:fitting]}
            for detail, episodes in zip(shown, encoded, strict=True)
        ],
    }
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"), min(fitting, count)


def _encoded(episode: Episode) -> dict[str, Any]:
    found: dict[str, Any] = {
        "steps": [list(step) for step in episode.steps],
        "loss": [float(f"{value:.4g}") for value in episode.loss],
        "scores": None,
        "ranges": None,
    }
    if episode.scores is not None:
        reveal_step = np.asarray(episode.reveal_step)
        found["scores"], found["ranges"] = [], []
        for step, row in enumerate(episode.scores.numpy()):
            levels, low, high = _quantised(row[reveal_step >= step])
            found["scores"].append("".join(LEVELS[level] for level in levels))
            found["ranges"].append([float(f"{low:.4g}"), float(f"{high:.4g}")])
    return found


def _quantised(scores: NDArray[np.float32]) -> tuple[NDArray[np.int64], float, float]:
    """Scores as levels between their lowest and highest; all in the middle if they are equal."""
    low, high = float(scores.min()), float(scores.max())
    if high <= low:
        return np.full(len(scores), (len(LEVELS) - 1) // 2), low, high
    share = (scores.astype(np.float64) - low) / (high - low)
    return np.rint(share * (len(LEVELS) - 1)).astype(np.int64), low, high


def partial_drawing(identifier: str, examples: Examples, reveal_step: Sequence[int], shown: int) -> Markup:
    """A partly revealed image as the inside of an SVG whose unit is a block: the picture, hidden blocks covered.

    Args:
        identifier: of the picture's `<image>` elsewhere on the page.
        examples: give the block grid.
        reveal_step: (B,) when each block is revealed.
        shown: steps that have been taken.
    """
    hidden = np.asarray(reveal_step).reshape(examples.rows, examples.columns) >= shown
    path = "".join(
        f"M{start} {row}h{length}v1h-{length}z" for row, line in enumerate(hidden) for start, length in _runs(line)
    )
    cover = f'<path class="cover" d="{path}"/>' if path else ""
    return Markup(f'<use href="#{identifier}"/>{cover}')


def _runs(line: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Start and length of the runs of true values."""
    found = []
    for value, group in groupby(enumerate(line), key=lambda pair: bool(pair[1])):
        places = [place for place, _ in group]
        if value:
            found.append((places[0], len(places)))
    return found


def steps_at(episode: Episode, fraction: float) -> int:
    """Steps after which no more than a fraction of the blocks is visible."""
    visible = np.cumsum([len(step) for step in episode.steps]) / len(episode.reveal_step)
    return int((visible <= fraction + 1e-6).sum())
