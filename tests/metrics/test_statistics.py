"""Bootstrap intervals: coverage in simulation, pairing, seeds."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike
from scipy import stats

from orderrl.metrics.statistics import (
    Interval,
    bootstrap_band,
    bootstrap_sums,
    cohens_d,
    holm,
    paired_bootstrap,
    ratio,
    share_interval,
)


def bootstrap_mean(values: ArrayLike, **settings: Any) -> Interval:
    """The interval of a single row."""
    return Interval(*(float(end[0]) for end in bootstrap_band(np.asarray(values)[None], **settings)))


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_95_percent_intervals_cover_the_mean_of_297_images_in_93_to_97_percent_of_simulations(draw: str) -> None:
    simulations = getattr(np.random.default_rng(0), draw)(size=(1500, 297))  # standard error of the coverage 0.6 %
    truth = 1.0 if draw == "exponential" else 0.0
    _, low, high = bootstrap_band(simulations, resamples=400)
    assert 0.93 <= np.mean((low <= truth) & (truth <= high)) <= 0.97


def test_95_percent_intervals_of_a_ratio_over_clusters_cover_it() -> None:
    """Images with 1 to 4 states each, all states of an image shifted together: the mean over states."""
    rng = np.random.default_rng(6)
    covered = 0
    for seed in range(500):
        count = rng.integers(1, 5, 150)
        value = count * (2.0 + rng.normal(0, 1, 150)) + np.sqrt(count) * rng.normal(0, 0.5, 150)
        found = bootstrap_sums([value, count], ratio, resamples=300, seed=seed)
        covered += found.low <= 2.0 <= found.high
    assert 0.93 <= covered / 500 <= 0.97


def test_a_mean_is_a_ratio_of_sums_with_the_same_interval() -> None:
    values = np.random.default_rng(7).random(80)
    found = bootstrap_sums([values, np.ones(80)], ratio, seed=3)
    expected = bootstrap_mean(values, seed=3)
    assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))


def test_a_sum_has_the_interval_of_the_mean_times_the_images() -> None:
    values = np.random.default_rng(14).random(80)
    found, mean = bootstrap_sums([values], lambda sums: sums[0], seed=3), bootstrap_mean(values, seed=3)
    assert (found.mean, found.low, found.high) == pytest.approx((80 * mean.mean, 80 * mean.low, 80 * mean.high))


def test_states_of_one_image_stay_together() -> None:
    """Ten copies of every state say nothing new."""
    values = np.random.default_rng(8).normal(0, 1, 100)
    once = bootstrap_sums([values, np.ones(100)], ratio)
    tenfold = bootstrap_sums([10 * values, np.full(100, 10.0)], ratio)
    assert (tenfold.mean, tenfold.low, tenfold.high) == pytest.approx((once.mean, once.low, once.high))


def test_p_values_under_the_null_are_uniform_and_agree_with_the_interval() -> None:
    rng = np.random.default_rng(9)
    found = [paired_bootstrap(rng.normal(0, 1, 120), np.zeros(120), resamples=400, seed=k) for k in range(800)]
    p_values = np.array([difference.p_value for difference in found])
    assert stats.kstest(p_values, "uniform").pvalue > 0.001
    assert 0.03 <= np.mean(p_values < 0.05) <= 0.07
    agreeing = [(difference.p_value < 0.05) == (difference.low > 0 or difference.high < 0) for difference in found]
    assert np.mean(agreeing) > 0.98  # they differ only where the end of the interval all but touches zero


def test_p_value_of_a_shift_agrees_with_the_t_test() -> None:
    values = np.random.default_rng(10).normal(0.25, 1, 120)
    ours = paired_bootstrap(values, np.zeros(120), resamples=20000).p_value
    assert ours == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=0.35)
    assert paired_bootstrap(values + 2, np.zeros(120), resamples=999).p_value == pytest.approx(2 / 1000)
    assert paired_bootstrap(values, values).p_value == 1


def test_holm_is_as_computed_by_hand() -> None:
    """0.005 * 4, 0.01 * 3, 0.03 * 2, 0.04 * 1 made to rise; the second example is that of R's p.adjust."""
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.01, 0.02, 0.03, 0.04, 0.05]), [0.05, 0.08, 0.09, 0.09, 0.09])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])
    assert len(holm([])) == 0


def test_holm_rejects_as_its_step_down_definition() -> None:
    rng = np.random.default_rng(11)
    for _ in range(50):
        p = rng.random(12) ** 4
        rejected, order = np.zeros(12, dtype=bool), np.argsort(p)
        for rank, k in enumerate(order):
            if p[k] > 0.05 / (12 - rank):
                break
            rejected[k] = True
        assert (rejected == (holm(p) <= 0.05)).all()


def test_holm_keeps_the_chance_of_any_false_finding_below_5_percent() -> None:
    rng = np.random.default_rng(12)
    p = stats.ttest_1samp(rng.normal(0, 1, (1500, 10, 40)), 0, axis=-1).pvalue
    wrong = np.mean([(holm(family) < 0.05).any() for family in p])
    assert 0.03 <= wrong <= 0.065 < np.mean((p < 0.05).any(1))


def test_effect_size_is_the_t_statistic_over_the_root_of_n() -> None:
    values = np.random.default_rng(13).normal(0.5, 1, 64)
    assert cohens_d(values) == pytest.approx(stats.ttest_1samp(values, 0).statistic / 8)
    assert paired_bootstrap(values, np.zeros(64)).effect_size == cohens_d(values)
    assert cohens_d(np.zeros(5)) == 0 and cohens_d(np.full(5, -2.0)) == -np.inf


def test_shares_have_wilsons_interval() -> None:
    found = share_interval(0.2, 50)
    centre, z = (10 + 1.96**2 / 2) / (50 + 1.96**2), 1.96
    reach = z / (50 + z**2) * np.sqrt(10 * 40 / 50 + z**2 / 4)
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, centre - reach, centre + reach), abs=1e-4)
    assert share_interval(1.0, 50).low < share_interval(1.0, 50).high == 1.0


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
    assert 0 < paired.low < 0.3 < paired.high
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
    joint = bootstrap_mean(values.mean(0))
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([1.0]), "n >= 2 images"),
        (lambda: bootstrap_mean([1.0, float("nan")]), "values must be finite, got 1"),
        (lambda: bootstrap_mean([1.0, 2.0], resamples=0), "resamples must be at least 1, got 0"),
        (lambda: paired_bootstrap([1.0, 2.0], [1.0, 2.0, 3.0]), "same images, got 2 and 3"),
        (lambda: bootstrap_band([1.0, 2.0]), r"shape \(rows, n\)"),
        (lambda: holm([0.5, 1.2]), r"p_values must have shape \(m,\) and lie in \[0, 1\]"),
        (lambda: holm([float("nan")]), "p_values must"),
        (lambda: bootstrap_sums([1.0, 2.0], ratio), r"sums must have shape"),
    ],
)
def test_bad_input_is_named(call: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
