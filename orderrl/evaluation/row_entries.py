"""Entries of a row: a number under its key, and its 95 % interval under the same key with `_ci` behind it."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orderrl.backbones import Backbone
from orderrl.metrics.features import Features
from orderrl.metrics.quality_intervals import frechet_interval
from orderrl.metrics.recognisability import Recognisability, area_over_fraction, at_fractions
from orderrl.metrics.references import Reference
from orderrl.metrics.statistics import Interval, bootstrap_band, bootstrap_sums, ratio, share_interval


def entry(key: str, interval: Interval) -> dict[str, Any]:
    """A number and its interval, [low, high]."""
    return {key: interval.mean, f"{key}_ci": [interval.low, interval.high]}


def image_means(per_image: Mapping[str, Tensor], resamples: int, seed: int) -> dict[str, Any]:
    """Means over images with bootstrap intervals, of values (n,) by key; images are resampled jointly for all keys."""
    mean, low, high = bootstrap_band(torch.stack([v.double() for v in per_image.values()]), resamples, seed=seed)
    found: dict[str, Any] = {}
    for key, *values in zip(per_image, mean, low, high, strict=True):
        found |= entry(key, Interval(*map(float, values)))
    return found


def state_mean(key: str, values: Tensor, image: Tensor, resamples: int, seed: int) -> dict[str, Any]:
    """Mean over states with an interval over images, whose states stay together.

    Args:
        values: (m,), NaN where a state has no value: it is left out.
        image: (m,) int64, whose states they are.
        resamples, seed: as in `image_means`.

    Returns:
        Nothing if fewer than two images have a value.
    """
    known = ~values.isnan()
    if len(image[known].unique()) < 2:
        return {}
    sums = image_sums(torch.stack([values[known].double(), known[known].double()]), image[known])
    return entry(key, bootstrap_sums(sums, ratio, resamples, seed=seed))


def image_sums(values: Tensor, image: Tensor) -> NDArray[np.float64]:
    """Sums over the states of each image, images ascending: values (k, m), image (m,) int64 -> (k, images)."""
    images, group = image.unique(return_inverse=True)
    sums = torch.zeros(len(values), len(images), dtype=torch.float64)
    return sums.index_add_(1, group, values.double()).numpy()


def image_average(values: Tensor, image: Tensor) -> Tensor:
    """Mean over the states of each image, (images,) float64, images ascending; values (m,), image (m,) int64."""
    return torch.from_numpy(ratio(image_sums(torch.stack([values.double(), torch.ones(len(image))]), image)))


def code_lengths(row: Mapping[str, Any], backbone: Backbone) -> dict[str, Any]:
    """Code length in nats and bits, or as a loss under a model of continuous tokens, from a row's `decode_nll`."""
    mean, interval = row["decode_nll"], row["decode_nll_ci"]
    if mean is None:
        return {}
    if not backbone.vocab_size:
        return {"decode_nll": None, "decode_nll_ci": None, "decode_loss": mean, "decode_loss_ci": interval}
    bits = None if interval is None else [end / math.log(2) for end in interval]
    return {"decode_bits": mean / math.log(2), "decode_bits_ci": bits}


def recognisability_areas(found: Recognisability, fraction: Tensor) -> dict[str, Tensor]:
    """Areas under confidence and accuracy of each image, (n,); fraction (T, n) of the same moments."""
    return {
        "recognisability_auc": area_over_fraction(found.confidence.cpu(), fraction.cpu()),
        "recognisability_accuracy_auc": area_over_fraction(found.correct.cpu(), fraction.cpu()),
    }


def recognisability_curve(
    found: Recognisability, fraction: Tensor, at: Tensor, resamples: int, seed: int
) -> dict[str, list[float]]:
    """Confidence and accuracy at given revealed fractions (F,), means over images with 95 % bands.

    Returns:
        Lists of F numbers: fraction, confidence, confidence_low, confidence_high, and the same of accuracy.
    """
    curve: dict[str, list[float]] = {"fraction": at.tolist()}
    for name, values in (("confidence", found.confidence), ("accuracy", found.correct.float())):
        band = bootstrap_band(at_fractions(values.cpu(), fraction.cpu(), at), resamples, seed=seed)
        curve |= {key: end.tolist() for key, end in zip((name, f"{name}_low", f"{name}_high"), band, strict=True)}
    return curve


def quality_intervals(
    scores: Mapping[str, Any], samples: Features, reference: Reference, resamples: int, seed: int
) -> dict[str, Any]:
    """Entries of the scores of samples that have an interval.

    Args:
        scores: by key: precision, recall, accuracy (shares) and Fréchet distances; None where not measured.
        reference: what they were compared with.
        resamples: of the Fréchet distances; 0 gives them no interval.
    """
    real = 0 if reference.found is None else len(reference.found)
    found: dict[str, Any] = {}
    for key, count in (("precision", len(samples)), ("recall", real), ("accuracy", len(samples))):
        if scores.get(key) is not None:
            found |= entry(key, share_interval(scores[key], count))
    distances = (
        ("frechet_distance", samples.pooled, reference.pooled),
        ("spatial_frechet_distance", samples.spatial, reference.spatial),
    )
    for key, features, gaussian in distances if resamples else ():
        if features is not None and gaussian is not None:
            found |= entry(key, frechet_interval(features, gaussian, scores[key], resamples, seed=seed))
    return found
