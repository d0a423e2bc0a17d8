"""Intervals of sample quality, over the samples; what they are compared with is held fixed.

The Fréchet distance is resampled. Precision, recall and class accuracy are shares of images: Wilson's interval. The
inception score and the kernel distance have none: they are means over parts and subsets of the same samples.
"""

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor

from orderrl.metrics.references import Gaussian
from orderrl.metrics.statistics import LEVEL, Interval


def frechet_interval(features: Tensor, reference: Gaussian, distance: float, resamples: int, seed: int = 0) -> Interval:
    """Normal interval of a Fréchet distance, its standard error from a bootstrap over samples.

    Not a percentile interval: a resample holds fewer different images than the sample, so resampled distances are
    too large by about the bias that the distance itself has. The interval says how much the distance would move with
    other samples *of the same number*; it is not one of the distance of infinitely many (see `fid_infinity`).

    Costs n d^2 and an eigenproblem of dimension d for every resample, at least 2, of features (n, d).
    """
    distances = frechet_resamples(features, reference, resamples, seed)
    reach = float(scipy.stats.norm.ppf((1 + LEVEL) / 2) * distances.std(ddof=1))
    return Interval(distance, distance - reach, distance + reach)


def frechet_resamples(features: Tensor, reference: Gaussian, resamples: int, seed: int = 0) -> NDArray[np.float64]:
    """Fréchet distances of resampled features, (resamples,) float64; arguments as in `frechet_interval`."""
    if resamples < 2:
        raise ValueError(f"distance_resamples must be at least 2, or 0 for no interval, got {resamples}")
    x = features.double()  # (n, d)
    count = len(x)
    mean, covariance = torch.from_numpy(reference.mean), torch.from_numpy(reference.covariance)
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(resamples):
        weights = torch.from_numpy(rng.multinomial(count, np.full(count, 1 / count))).double()  # how often each occurs
        centre = weights @ x / count
        spread = (x - centre) * weights.sqrt()[:, None]
        sampled = spread.T @ spread / (count - 1)  # (d, d)
        cross = torch.linalg.eigvalsh(root @ sampled @ root).clamp_min(0).sqrt().sum()
        distance = (centre - mean).square().sum() + sampled.trace() + covariance.trace() - 2 * cross
        distances.append(float(distance))
    return np.array(distances)
