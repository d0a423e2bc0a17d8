"""Intervals: bootstrap over images, paired where two policies saw the same images; p-values, Holm, effect sizes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
LEVEL = 0.95
RULE = "p < 0.05 after Holm's correction for all comparisons of the table; intervals are those of single comparisons"
"""The rule of `is_significant` in words, which stand wherever a difference is marked."""


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap confidence interval, all in the unit of the values."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """A mean of paired differences.

    Attributes:
        p_value: two-sided bootstrap p-value of a mean of zero, from the same resamples as the interval: p < 0.05
            where the interval excludes zero. No smaller than 2 / (resamples + 1).
        effect_size: paired Cohen's d, mean over standard deviation of the differences of single images (0.2 is called
            small, 0.5 medium, 0.8 large); infinite if they are all equal and not zero.
    """

    p_value: float
    effect_size: float


def _checked(values: ArrayLike, name: str, ndim: int) -> NDArray[np.float64]:
    """A finite float64 array of `ndim` axes with at least two images on the last one."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim or array.shape[-1] < 2 or array.size == 0:
        axes = "(n,)" if ndim == 1 else "(rows, n)"
        raise ValueError(f"{name} must have shape {axes} with n >= 2 images, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {np.count_nonzero(~np.isfinite(array))} non-finite values")
    return array


def bootstrap_band(
    values: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean of each row with percentile intervals; images are resampled jointly for all rows.

    Args:
        values: (rows, n), for example gain at several revealed fractions of n images.

    Returns:
        mean, low, high: each (rows,) float64.

    Raises:
        ValueError: if values have another shape or are not finite, or an argument is out of range.
    """
    array = _checked(values, "values", ndim=2)
    low, high, _ = _resampled(array, np.mean, resamples, seed)
    return array.mean(-1), low, high


def _resampled(
    array: NDArray[np.number], statistic: Callable[..., Any], resamples: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Percentile interval and resampled values of a statistic of each row of (rows, n); images are resampled jointly.

    Returns:
        low and high, each (rows,), and the values of the resamples, (rows, resamples).
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    result = scipy.stats.bootstrap(
        (array,),
        statistic,
        n_resamples=resamples,
        batch=100,
        axis=-1,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return result.confidence_interval.low, result.confidence_interval.high, result.bootstrap_distribution


def bootstrap_sums(
    sums: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """A function of sums over images, such as a ratio or a pooled correlation, with a percentile interval.

    An image is resampled with all that belongs to it, so several states of one image stay together (cluster bootstrap).
    The statistic takes sums over images (k, ...) of the k quantities (k, n) and gives the value, (...).
    """
    array = _checked(sums, "sums", ndim=2)
    images = np.arange(array.shape[1])[None]

    def of_images(chosen: NDArray[np.int64], axis: int) -> NDArray[np.float64]:
        return statistic(array[:, chosen].sum(axis))

    low, high, _ = _resampled(images, of_images, resamples, seed)
    return Interval(float(statistic(array.sum(-1))), float(low[0]), float(high[0]))


def sums_difference(
    one: NDArray[np.float64],
    other: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    resamples: int,
    seed: int,
) -> Interval:
    """A function of `one` minus that of `other`, as in `bootstrap_sums`, paired over the same images."""
    k = len(one)
    both = np.concatenate([one, other])
    return bootstrap_sums(both, lambda sums: statistic(sums[:k]) - statistic(sums[k:]), resamples, seed=seed)


def ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The first sum over the second: (2, ...) -> (...); for `bootstrap_sums`."""
    return sums[0] / sums[1]


def share_interval(share: float, count: int) -> Interval:
    """Wilson's interval of a share of `count` independent cases (`scipy.stats.binomtest`)."""
    found = scipy.stats.binomtest(round(share * count), count).proportion_ci(LEVEL, method="wilson")
    return Interval(share, float(found.low), float(found.high))


def paired_bootstrap(a: ArrayLike, b: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Mean of a - b over images that both saw, with a percentile interval of the paired differences.

    Args:
        a: (n,), or (seeds, n): seeds are averaged first. The interval says how the mean of *these* training seeds
            varies with the images, not how another seed would do.
        b: likewise, about the same images in the same order; its number of seeds may differ.
        resamples: as in `bootstrap_band`; p-values are no finer than 2 / (resamples + 1).

    Raises:
        ValueError: if the images of a and b differ in number, else as `bootstrap_band`.
    """
    first, second = _image_means(a, "a"), _image_means(b, "b")
    if first.shape != second.shape:
        raise ValueError(f"a and b must be about the same images, got {len(first)} and {len(second)}")
    difference = first - second
    low, high, means = _resampled(difference[None], np.mean, resamples, seed)
    tail = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    p_value = min(1.0, 2 * (tail + 1) / (resamples + 1))
    return Difference(float(difference.mean()), float(low[0]), float(high[0]), p_value, cohens_d(difference))


def cohens_d(difference: NDArray[np.float64]) -> float:
    """Paired Cohen's d of differences (n,): mean over standard deviation (n - 1); 0 if all are 0."""
    mean, spread = difference.mean(), difference.std(ddof=1)
    return float(mean / spread) if spread > 0 else float(np.sign(mean) * np.inf if mean else 0.0)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """p-values adjusted for their number by Holm's step-down procedure (1979), (m,) float64.

    Rejecting where the adjusted value is below alpha keeps the chance of any false rejection among the m hypotheses
    below alpha, however they depend on each other.

    Raises:
        ValueError: if they are not (m,) numbers in [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p_values must have shape (m,) and lie in [0, 1], got {p_values!r}")
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1.0)[np.argsort(order)]


def is_significant(entry: Mapping[str, Any]) -> bool:
    """Whether a paired difference is significant: `RULE`, the only one, on screen, in tables, pages and sentences.

    Such a difference has an interval that excludes zero; the converse does not hold, since the interval is that of the
    single comparison.

    Args:
        entry: of `orderrl.evaluation.comparison.compare`; its "p_holm" decides.
    """
    return bool(entry["p_holm"] < 1 - LEVEL)


def _image_means(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """(n,) as it is, (seeds, n) averaged over seeds."""
    array = np.asarray(values, dtype=np.float64)
    return _checked(array, name, ndim=2).mean(0) if array.ndim == 2 else _checked(array, name, ndim=1)
