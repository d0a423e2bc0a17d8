"""Results, details and example images for tests of the report, made up but of the true form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from orderrl.evaluation.columns import empty_row
from orderrl.evaluation.detail import Curve, Drawn, Episode, Examples, PolicyDetail

ROWS = COLUMNS_OF_BLOCKS = 4
BLOCKS = ROWS * COLUMNS_OF_BLOCKS


def row(policy: str, gain: float | None, R: int | None = None, **values: Any) -> dict[str, Any]:
    """A row of `results.json`."""
    interval = None if gain is None else [gain - 0.01, gain + 0.01]
    named = {"policy": policy, "family": policy, "rival": policy not in ("oracle", "lookahead"), "R": R}
    return empty_row() | named | {"gain_auc": gain, "gain_auc_ci": interval} | values


def comparison(low: float, high: float, name: str = "bc_utility - raster", metric: str = "gain_auc") -> dict[str, Any]:
    """A paired comparison of a family of one, so that its interval decides."""
    policy, _, rest = name.partition(" - ")
    opponent, at, steps = rest.partition(" at ")
    named = {"policy": policy, "opponent": opponent, "at_steps": float(steps.split()[0]) if at else None}
    numbers = {"mean": (low + high) / 2, "low": low, "high": high, "effect_size": 0.5}
    return {"name": name, **named, "metric": metric, **numbers, "p_holm": 0.002 if low > 0 or high < 0 else 0.4}


def episode(rng: np.random.Generator, budget: int = 1, scored: bool = True) -> Episode:
    """A random order of all blocks, some at a time."""
    order = rng.permutation(BLOCKS).tolist()
    steps = [order[start : start + budget] for start in range(0, BLOCKS, budget)]
    loss = np.linspace(1.5, 0, len(steps) + 1).tolist()
    scores = torch.from_numpy(rng.normal(size=(len(steps), BLOCKS)).astype(np.float32)) if scored else None
    return Episode(steps, loss, scores)


def detail(name: str, seed: int = 0, budget: int = 1, scored: bool = True, images: int = 4) -> PolicyDetail:
    """A policy with pictures."""
    rng = np.random.default_rng(seed)
    gain = np.sort(rng.random(5))
    curve = Curve([0, 0.25, 0.5, 0.75, 1], gain.tolist(), (gain - 0.1).tolist(), (gain + 0.1).tolist())
    episodes = [episode(rng, budget, scored) for _ in range(images)]
    return PolicyDetail(name, curve, rng.random((ROWS, COLUMNS_OF_BLOCKS)).tolist(), episodes)


def examples(images: int = 4, size: int = 8) -> Examples:
    """Images of noise."""
    pixels = np.random.default_rng(1).integers(0, 256, (images, 3, size, size), dtype=np.uint8)
    return Examples(torch.from_numpy(pixels), list(range(images)), ROWS, COLUMNS_OF_BLOCKS)


def drawn(*names: str, images: int = 6, size: int = 8) -> list[Drawn]:
    """Images of noise that policies drew."""
    pixels = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (images, 3, size, size), dtype=np.uint8))
    return [Drawn(name, pixels) for name in names]


def reliability(r2: float) -> dict[str, Any]:
    """The entry of a row."""
    return {"predicted": [0.0, 0.01, 0.02], "actual": [0.001, 0.008, 0.024], "count": [5, 5, 5], "r2": r2}


def recognisability(level: float) -> dict[str, Any]:
    """The entry of a row."""
    values = [0.1, level, 1.0]
    return {"fraction": [0, 0.5, 1], "confidence": values, "confidence_low": values, "confidence_high": values}


RESULTS: dict[str, Any] = {
    "protocol": {"data": "digits/test, 297 images", "split": "test", "guidance": None},
    "rows": [
        row("raster", 0.064, steps=16.0, decode_nll=76.1, budgets=[1]),
        row("random", 0.07, steps=16.0, decode_nll=77.0, budgets=[1], seconds_per_image=0.016, regret=0.03),
        row("random@4", 0.05, family="random", steps=4.0, decode_nll=79.1, budgets=[4], seconds_per_image=0.004),
        row("oracle", 0.148, budgets=[1], decode_nll=69.0, steps=16.0),
        row(
            "bc_utility", 0.09, R=2, seed=0, objective="context", budgets=[1, 2, 4], regret=0.0123, steps=5.3,
            decode_nll=77.2, reliability=reliability(0.2), recognisability_curve=recognisability(0.8),
        ),
        row("real images", None, frechet_distance=0.31, features="orderrl-digits"),
    ],
    "comparisons": [comparison(0.02, 0.03), comparison(-0.4, 0.2, "bc_utility - multiscale", "decode_nll")],
}  # fmt: skip


def details() -> list[PolicyDetail]:
    """Pictures of the policies of `RESULTS`; one reveals four blocks a step, one has no scores."""
    return [
        detail("raster"),
        detail("random", 1, scored=False),
        detail("random@4", 2, budget=4),
        detail("oracle", 3),
        detail("bc_utility", 4),
    ]
