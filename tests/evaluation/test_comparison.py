"""Families of paired comparisons: the numbers of each pair, and the correction for their number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from orderrl.evaluation.columns import empty_row
from orderrl.evaluation.comparison import Pair, code_length_at, compare, comparisons
from orderrl.evaluation.rows import Evaluated
from orderrl.metrics.statistics import cohens_d, holm


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_every_pair_is_compared_on_the_images_that_both_saw() -> None:
    image = noise(0, 100)
    policy, opponent = (image + 0.4 + 0.1 * noise(1, 100))[None], image[None, :40]
    (found,) = compare([Pair("a - b", "gain_auc", policy, opponent)], resamples=500, seed=0)
    difference = (policy[0, :40] - opponent[0]).numpy()
    assert found["images"] == 40 and found["seeds"] == 1 and found["seed_std"] is None
    assert found["mean"] == pytest.approx(difference.mean())
    assert found["low"] < 0.4 < found["high"] and found["high"] - found["low"] < 0.1
    assert found["effect_size"] == pytest.approx(cohens_d(difference)) and found["effect_size"] > 2
    assert found["p_value"] == found["p_holm"] and found["significant"] is True


def test_the_family_is_corrected_by_holm_with_resamples_enough_to_decide() -> None:
    """A clear difference among 60 comparisons must survive; with 100 resamples no p-value could be small enough."""
    same = noise(2, 1, 80)
    pairs = [Pair(f"n{k}", "gain_auc", same + 0.1 * noise(10 + k, 1, 80), same) for k in range(59)]
    pairs.append(Pair("clear", "gain_auc", same + 1 + 0.1 * noise(3, 1, 80), same))
    found = compare(pairs, resamples=100, seed=0)
    p_values = [row["p_value"] for row in found]
    np.testing.assert_allclose([row["p_holm"] for row in found], holm(p_values))
    assert found[-1]["significant"] and found[-1]["p_holm"] < 0.05
    assert sum(row["significant"] for row in found[:-1]) == 0 < sum(p < 0.05 for p in p_values[:-1])
    assert p_values[-1] < stats.norm.sf(3)


def test_seeds_are_averaged_and_their_spread_is_given() -> None:
    opponent, shift = noise(4, 50), torch.tensor([0.1, 0.5, 0.3]).double()
    policy = opponent + shift[:, None]
    (found,) = compare([Pair("a - b", "gain_auc", policy, opponent[None])], resamples=200, seed=0)
    assert found["mean"] == pytest.approx(0.3) and found["seeds"] == 3
    assert found["seed_std"] == pytest.approx(np.std([0.1, 0.5, 0.3], ddof=1))


def test_no_comparisons_are_none() -> None:
    assert compare([], 100, 0) == []


def row(policy: str, shift: float, **values: object) -> Evaluated:
    base = noise(5, 60)
    per_image = {"gain_auc": base + shift, "decode_nll": 80 - base - shift, "steps": torch.full((60,), 16.0)}
    return Evaluated(empty_row() | {"policy": policy, "budgets": [1]} | values, per_image)


def test_planners_are_compared_with_baselines_on_what_they_were_trained_for() -> None:
    rows = [
        row("raster", 0.0),
        row("random", 0.1),
        row("bc", 0.5, R=2, objective="context", seed=0),
        row("ppo", 0.7, R=2, objective="likelihood", seed=0),
        Evaluated(empty_row() | {"policy": "token_raster"}, {"decode_nll": 80 - noise(5, 60)}),
    ]
    found = {(entry["name"], entry["metric"]): entry for entry in comparisons(rows, 200, 0)}
    assert set(found) == {
        ("bc - raster", "gain_auc"),
        ("bc - random", "gain_auc"),
        ("ppo - raster", "decode_nll"),
    }
    assert found["bc - random", "gain_auc"]["mean"] == pytest.approx(0.4)
    assert found["ppo - raster", "decode_nll"]["mean"] == pytest.approx(-0.7)


def test_a_users_policy_is_compared_with_raster() -> None:
    rows = [row("raster", 0.0), row("random", 0.1), row("mine:play", 0.5, own=True)]
    several = row("mine:play@4", 0.5, own=True, budgets=[4])
    (found,) = comparisons([*rows, several], 200, 0)
    assert (found["name"], found["metric"]) == ("mine:play - raster", "gain_auc")
    assert found["mean"] == pytest.approx(0.5)


def test_two_planners_are_compared_once_the_first_less_the_second() -> None:
    planners = [row(name, shift, R=2, objective="context", seed=0) for name, shift in (("ppo", 0.7), ("bc", 0.5))]
    found = {entry["name"]: entry["mean"] for entry in comparisons([*planners, row("raster", 0.0)], 200, 0)}
    assert set(found) == {"ppo - bc", "ppo - raster", "bc - raster"} and found["ppo - bc"] == pytest.approx(0.2)


def test_code_length_is_interpolated_at_equal_steps() -> None:
    def row(steps: float, nll: float) -> Evaluated:
        return Evaluated({}, {"decode_nll": torch.full((3,), nll), "steps": torch.full((3,), float(steps))})

    family = [row(16, 70.0), row(8, 74.0), row(4, 80.0)]
    at_six = code_length_at(family, 6.0)
    assert at_six is not None and torch.allclose(at_six, torch.full((3,), 77.0))
    assert code_length_at(family, 2.0) is None


def test_a_poor_schedule_does_not_weaken_its_order() -> None:
    """Equal mean steps are reached by mixing any two schedules: the best mixture is the opponent."""

    def row(steps: float, *nll: float) -> Evaluated:
        return Evaluated({}, {"decode_nll": torch.tensor(nll), "steps": torch.full((2,), float(steps))})

    family = [row(16, 70.0, 60.0), row(8, 74.0, 80.0), row(9, 99.0, 85.0), row(10, 90.0, 90.0)]
    at_nine = code_length_at(family, 9.0)
    assert at_nine is not None and torch.allclose(at_nine, torch.tensor([73.5, 77.5]))
    at_eight, alone = code_length_at(family, 8.0), code_length_at([family[1]], 8.0)
    assert at_eight is not None and alone is not None and torch.equal(at_eight, alone)
    better = code_length_at([*family, row(9, 70.0, 70.0)], 9.0)
    assert better is not None and torch.equal(better, torch.tensor([70.0, 70.0]))
