"""Intervals of Fréchet distances: resamples one by one, and simulated coverage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orderrl.metrics.quality import gaussian_distance
from orderrl.metrics.quality_intervals import frechet_interval, frechet_resamples
from orderrl.metrics.references import Gaussian, fit_gaussian


def reference(dimensions: int = 4) -> Gaussian:
    """A Gaussian with correlated coordinates."""
    mixing = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(9)).double()
    return Gaussian(np.full(dimensions, 0.3), (mixing @ mixing.T + torch.eye(dimensions)).numpy())


def test_resampled_distances_are_those_of_the_resampled_images() -> None:
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).double()
    fast = frechet_resamples(features, reference(), resamples=5, seed=3)
    rng = np.random.default_rng(3)
    for value in fast:
        times = torch.from_numpy(rng.multinomial(30, np.full(30, 1 / 30)))
        assert times.sum() == 30
        copies = fit_gaussian(features.repeat_interleave(times, dim=0))
        assert value == pytest.approx(gaussian_distance(copies, reference()), rel=1e-6)


def test_resamples_also_work_with_fewer_images_than_features() -> None:
    features = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert np.isfinite(frechet_resamples(features, reference(8), resamples=3)).all()


def test_intervals_cover_the_expected_distance_of_so_many_samples_in_93_to_97_percent_of_simulations() -> None:
    """Samples whose mean is off, as those of a generator are; the truth is the mean distance of 300 samples."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(300, 3, generator=generator).double() * 1.2 + 0.6 for _ in range(400)]
    unit = Gaussian(np.zeros(3), np.eye(3))
    distances = [gaussian_distance(fit_gaussian(x), unit) for x in drawn]
    truth = np.mean(distances)
    covered = 0
    for seed, (x, distance) in enumerate(zip(drawn, distances, strict=True)):
        found = frechet_interval(x, unit, distance, resamples=40, seed=seed)
        assert found.mean == distance and found.low < distance < found.high
        covered += int(found.low <= truth <= found.high)
    assert 0.93 <= covered / 400 <= 0.97


def test_the_percentile_interval_would_be_shifted_by_the_bias() -> None:
    """Why the interval is normal: resamples of many-dimensional samples are farther away than the sample."""
    features = torch.randn(200, 30, generator=torch.Generator().manual_seed(2)).double()
    unit = Gaussian(np.zeros(30), np.eye(30))
    distance = gaussian_distance(fit_gaussian(features), unit)
    assert np.quantile(frechet_resamples(features, unit, 50), 0.025) > distance


def test_a_single_resample_is_refused() -> None:
    with pytest.raises(ValueError, match="distance_resamples must be at least 2, or 0 for no interval, got 1"):
        frechet_interval(torch.randn(10, 4), reference(), 1.0, resamples=1)
