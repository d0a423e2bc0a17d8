"""Bootstrap intervals: coverage in simulation, pairing, seeds."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from orderrl.metrics.statistics import Interval, bootstrap_band, bootstrap_mean, mean_over_seeds, paired_bootstrap


def test_interval_of_skewed_data_covers_its_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    draws = rng.exponential(1.0, (300, 120))
    found = [bootstrap_mean(x, resamples=300, level=0.9, seed=k) for k, x in enumerate(draws)]
    coverage = np.mean([interval.low <= 1.0 <= interval.high for interval in found])
    assert 0.84 <= coverage <= 0.95


def test_interval_agrees_with_scipy_bca_and_the_normal_interval_on_symmetric_data() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    ours = bootstrap_mean(values, resamples=4000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="BCa", rng=2).confidence_interval
    width = 2 * 1.96 * values.std(ddof=1) / 20
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * width)
    assert ours.high - ours.low == pytest.approx(width, rel=0.06)


def test_pairing_removes_what_the_images_share() -> None:
    rng = np.random.default_rng(2)
    image = rng.normal(0, 5, 200)
    a, b = image + 0.3 + rng.normal(0, 0.1, 200), image + rng.normal(0, 0.1, 200)
    paired = paired_bootstrap(a, b)
    assert paired.excludes_zero
    assert paired.low < 0.3 < paired.high
    assert paired.high - paired.low < 0.1 * (bootstrap_mean(a).high - bootstrap_mean(a).low)


def test_paired_differences_change_sign_with_their_order() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(50), rng.random(50)
    there, back = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))


def test_seeds_are_averaged_and_images_resampled_jointly() -> None:
    rng = np.random.default_rng(4)
    image = rng.normal(0, 1, 150)
    values = image + rng.normal(0, 0.01, (3, 150))
    joint = mean_over_seeds(values)
    assert joint == bootstrap_mean(values.mean(0))
    # treating the seeds' images as independent would claim an interval narrower by sqrt(3)
    independent = bootstrap_mean(values.flatten())
    assert joint.high - joint.low > 1.5 * (independent.high - independent.low)
    assert paired_bootstrap(values, image) == paired_bootstrap(values.mean(0), image)


def test_band_rows_are_the_intervals_of_the_rows() -> None:
    values = np.random.default_rng(5).random((4, 60))
    mean, low, high = bootstrap_band(values, seed=7)
    rows = [bootstrap_mean(row, seed=7) for row in values]
    np.testing.assert_allclose(mean, [row.mean for row in rows])
    np.testing.assert_allclose(low, [row.low for row in rows])
    np.testing.assert_allclose(high, [row.high for row in rows])


def test_constant_values_have_a_width_of_zero() -> None:
    assert bootstrap_mean(np.full(10, 2.0)) == Interval(2.0, 2.0, 2.0)


@pytest.mark.parametrize(("low", "high", "excluded"), [(0.1, 1, True), (-1, -0.1, True), (-1, 1, False), (0, 1, False)])
def test_excludes_zero(low: float, high: float, excluded: bool) -> None:
    assert Interval(0.5 * (low + high), low, high).excludes_zero is excluded


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([1.0]), "n >= 2 images"),
        (lambda: bootstrap_mean([1.0, float("nan")]), "values must be finite, got 1"),
        (lambda: bootstrap_mean([1.0, 2.0], level=1.5), r"level must lie in \(0, 1\), got 1.5"),
        (lambda: bootstrap_mean([1.0, 2.0], resamples=0), "resamples must be at least 1, got 0"),
        (lambda: paired_bootstrap([1.0, 2.0], [1.0, 2.0, 3.0]), "same images, got 2 and 3"),
        (lambda: mean_over_seeds([1.0, 2.0]), r"shape \(rows, n\)"),
    ],
)
def test_bad_input_is_named(call: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
