"""Intervals: bootstrap over images, paired where two policies saw the same images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap confidence interval, all in the unit of the values."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True if zero lies outside [low, high]."""
        return self.low > 0 or self.high < 0


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
    values: ArrayLike, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean of each row with percentile intervals; images are resampled jointly for all rows.

    Args:
        values: (rows, n), for example gain at several revealed fractions of n images.
        resamples: bootstrap resamples.
        level: coverage, in (0, 1).
        seed: of the resampling.

    Returns:
        mean, low, high: each (rows,) float64.

    Raises:
        ValueError: if values have another shape or are not finite, or an argument is out of range.
    """
    array = _checked(values, "values", ndim=2)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    result = stats.bootstrap(
        (array,),
        np.mean,
        n_resamples=resamples,
        batch=100,
        axis=-1,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return array.mean(-1), result.confidence_interval.low, result.confidence_interval.high


def bootstrap_mean(values: ArrayLike, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Interval:
    """Mean over images with a percentile interval (`scipy.stats.bootstrap`).

    Args:
        values: (n,) one number for each image.
        resamples: as in `bootstrap_band`.
        level: as in `bootstrap_band`.
        seed: as in `bootstrap_band`; the same seed and n resample the same images.

    Raises:
        ValueError: as `bootstrap_band`.
    """
    mean, low, high = bootstrap_band(_checked(values, "values", ndim=1)[None], resamples, level, seed)
    return Interval(float(mean[0]), float(low[0]), float(high[0]))


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Mean of a - b over images that both saw, with a percentile interval of the paired differences.

    Args:
        a: (n,), or (seeds, n): seeds are averaged first, see `mean_over_seeds`.
        b: likewise, about the same images in the same order; its number of seeds may differ.
        resamples: as in `bootstrap_band`.
        level: as in `bootstrap_band`.
        seed: as in `bootstrap_band`.

    Raises:
        ValueError: if the images of a and b differ in number, else as `bootstrap_band`.
    """
    first, second = _image_means(a, "a"), _image_means(b, "b")
    if first.shape != second.shape:
        raise ValueError(f"a and b must be about the same images, got {len(first)} and {len(second)}")
    return bootstrap_mean(first - second, resamples, level, seed)


def mean_over_seeds(values: ArrayLike, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Interval:
    """Mean over seeds and images; images are resampled jointly, seeds are kept.

    The interval says how the mean of *these* training seeds varies with the images, not how another seed
    would do. Resampling images jointly and averaging seeds is the same as resampling the seed means.

    Args:
        values: (seeds, n).
        resamples: as in `bootstrap_band`.
        level: as in `bootstrap_band`.
        seed: as in `bootstrap_band`.

    Raises:
        ValueError: as `bootstrap_band`.
    """
    return bootstrap_mean(_checked(values, "values", ndim=2).mean(0), resamples, level, seed)


def _image_means(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """(n,) as it is, (seeds, n) averaged over seeds."""
    array = np.asarray(values, dtype=np.float64)
    return _checked(array, name, ndim=2).mean(0) if array.ndim == 2 else _checked(array, name, ndim=1)
