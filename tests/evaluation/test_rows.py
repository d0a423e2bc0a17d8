"""Rows of the table on a tiny backbone: every mean has its interval, and what belongs together agrees."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from orderrl.agents.registry import make_policy
from orderrl.backbones.pretraining import mean_loss, raster_token_orders
from orderrl.data import load_split
from orderrl.evaluation.columns import all_columns, empty_row
from orderrl.evaluation.drawing import balanced_labels, generate_images
from orderrl.evaluation.protocol import EvaluationProtocol
from orderrl.evaluation.row_entries import code_lengths, image_means, quality_intervals, state_mean
from orderrl.evaluation.rows import Evaluated, evaluate_foreign, evaluate_policy, evaluate_token_raster
from orderrl.evaluation.settings import EvalConfig
from orderrl.metrics.calibration import lookahead_utility
from orderrl.metrics.feature_names import DIGITS
from orderrl.metrics.features import extract_features
from orderrl.metrics.quality import fid_infinity
from orderrl.metrics.recognisability import make_recogniser
from orderrl.metrics.references import reference_of
from orderrl.oracle import LabelConfig, label_contexts, random_contexts
from tests.helpers import tiny_backbone

BACKBONE = tiny_backbone(8, 8, vocab_size=17, num_classes=10)


@pytest.fixture(scope="module")
def protocol() -> EvaluationProtocol:
    """Sixteen digits, a tiny backbone, forty states, seventy samples; everything that a row can hold."""
    whole = load_split("digits", "test")
    data = replace(whole, tokens=whole.tokens[:16], labels=whole.labels[:16])
    labels = LabelConfig(contexts=40)
    parts = label_contexts(BACKBONE, data.tokens, data.labels, labels, random_contexts(labels, 16, 16))
    states = TensorDict.cat([TensorDict(part, batch_size=[len(part["label"])]) for part in parts])
    real = extract_features(whole.images(whole.tokens), DIGITS)
    return EvaluationProtocol(
        config=EvalConfig(
            samples=70, reference_images=4, resamples=200, kid_subsets=2, distance_resamples=20, fid_infinity=True
        ),
        seed=0,
        backbone=BACKBONE,
        backbone_name="tiny",
        data=data,
        real=real,
        reference=reference_of(real, DIGITS),
        states=states,
        lookahead=lookahead_utility(BACKBONE, data, states, 6, 2),
        recogniser=make_recogniser("own", data),
    )


def with_settings(protocol: EvaluationProtocol, **changes: Any) -> EvaluationProtocol:
    return replace(protocol, config=replace(protocol.config, **changes))


@pytest.fixture(scope="module")
def random_row(protocol: EvaluationProtocol) -> Evaluated:
    return evaluate_policy(protocol, make_policy("random@4", BACKBONE), sampled=True)


def test_every_mean_of_a_row_has_an_interval_around_it(random_row: Evaluated) -> None:
    row = random_row.row
    assert list(row) == list(empty_row())
    with_interval = {key.removesuffix("_ci") for key in row if key.endswith("_ci")}
    absent = {key for key in with_interval if row[key] is None}
    # of models of continuous tokens; of a CLIP network; of labels=classifier and heads that read visible states
    assert absent == {"decode_loss", "clip_score", "importance_spearman", "content_spearman", "content_match"}
    for key in with_interval - absent:
        low, high = row[f"{key}_ci"]
        assert low <= row[key] <= high, key
    # without an interval: nothing, names, lists, and what is no mean over images
    plain = {"calibration_error", "calibration_r2", "first_choice_entropy", "place_entropy", "scorings"}
    seconds = {column.name for column in all_columns() if column.clock}
    scores = {"frechet_distance_infinity", "inception_score", "kid"}
    assert {key for key in set(row) - with_interval if isinstance(row[key], float)} == plain | seconds | scores


def test_values_of_single_images_have_the_rows_means(random_row: Evaluated) -> None:
    for key, values in random_row.per_image.items():
        assert values.shape == (16,) and values.mean().item() == pytest.approx(random_row.row[key], rel=1e-5), key
    assert random_row.row["decode_bits"] == pytest.approx(random_row.row["decode_nll"] / math.log(2))
    assert random_row.row["decode_calls"] == 4 * random_row.row["steps"] == 16


def test_curves_and_bins_are_plain_lists(random_row: Evaluated) -> None:
    row = random_row.row
    curve = row["recognisability_curve"]
    assert curve["fraction"] == [k / 16 for k in range(17)]
    for name in ("confidence", "accuracy"):
        for low, mean, high in zip(curve[f"{name}_low"], curve[name], curve[f"{name}_high"], strict=True):
            assert low <= mean + 1e-6 and mean <= high + 1e-6
        area = sum(curve[name][:16]) / 16  # constant between the moments, which are multiples of 1/16
        key = {"confidence": "recognisability_auc", "accuracy": "recognisability_accuracy_auc"}[name]
        assert area == pytest.approx(row[key], abs=1e-5)
    assert row["visible_neighbours_curve"][:4] == [0, 0, 0, 0]
    assert sum(row["reliability"]["count"]) == int((~protocol_states(random_row)).sum())


def protocol_states(row: Evaluated) -> Tensor:
    """Visible blocks of the fixture's states: the same contexts, drawn again."""
    contexts = random_contexts(LabelConfig(contexts=40), 16, 16)
    rank = contexts.order.argsort(1)
    return rank < contexts.length[:, None]


def test_the_oracle_has_no_regret_and_agrees_with_itself(protocol: EvaluationProtocol) -> None:
    found = evaluate_policy(protocol, make_policy("oracle", BACKBONE), sampled=True)
    row = found.row
    assert row["oracle_top1"] == 1 and row["regret"] == pytest.approx(0, abs=1e-6)
    assert row["oracle_spearman"] == pytest.approx(1, abs=0.01) and row["oracle_kendall"] == pytest.approx(1, abs=0.01)
    assert row["lookahead_regret"] > 0 and row["frechet_distance"] is None
    assert found.per_image["gain_auc"].shape == (4,)  # the first images alone


def test_samples_are_extrapolated_and_their_distances_lie_in_their_intervals(
    protocol: EvaluationProtocol, random_row: Evaluated
) -> None:
    row = random_row.row
    assert row["frechet_distance_infinity"] < row["frechet_distance"]
    without_intervals = with_settings(protocol, fid_infinity=False, distance_resamples=0)
    without = evaluate_policy(
        replace(without_intervals, lookahead=None, recogniser=None),
        make_policy("random@4", BACKBONE),
        sampled=True,
    ).row
    assert without["frechet_distance"] == row["frechet_distance"] and without["frechet_distance_ci"] is None
    assert without["frechet_distance_infinity"] is without["lookahead_regret"] is without["recognisability_auc"] is None
    assert without["precision_ci"] == row["precision_ci"]


def test_the_same_samples_from_elsewhere_have_the_same_numbers(
    protocol: EvaluationProtocol, random_row: Evaluated, tmp_path: Path
) -> None:
    assert protocol.reference is not None
    named = make_policy("random@4", BACKBONE)
    made = generate_images(BACKBONE, protocol.data, named.policy, named.budgets, balanced_labels(70, 10), seed=0)
    by_class = made.labels.argsort(stable=True)  # the order in which samples are kept and scored
    found = extract_features(protocol.data.images(made.tokens[by_class]), DIGITS)
    expected = fid_infinity(found, protocol.reference, seed=0)
    assert random_row.row["frechet_distance_infinity"] == pytest.approx(expected, rel=1e-6)
    pixels = protocol.data.images(made.tokens[by_class]).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "samples.npz", arr_0=pixels)
    foreign = evaluate_foreign(protocol, "paper", tmp_path / "samples.npz").row
    assert foreign["policy"] == "paper (foreign, 70 images)" and foreign["gain_auc"] is None
    for key in ("frechet_distance", "kid", "precision", "recall", "frechet_distance_infinity"):
        assert foreign[key] == pytest.approx(random_row.row[key], rel=1e-6), key


def test_code_length_in_raster_tokens_is_the_teacher_forced_loss(protocol: EvaluationProtocol) -> None:
    found = evaluate_token_raster(with_settings(protocol, samples=0), "token_raster", BACKBONE)
    expected = mean_loss(BACKBONE, protocol.data, raster_token_orders(BACKBONE.geometry, 16)) * 64
    assert found.row["decode_nll"] == pytest.approx(expected, rel=1e-5)
    assert found.per_image["decode_nll"].shape == (16,)
    assert found.row["decode_nll_ci"][0] < expected < found.row["decode_nll_ci"][1]
    assert found.row["gain_auc"] is None and found.row["steps"] == 64


def test_states_of_an_image_are_resampled_together() -> None:
    """Copies of an image's state leave mean and interval as they are; states without a value are left out."""
    values, image = torch.rand(30, generator=torch.Generator().manual_seed(0)), torch.arange(30)
    once = state_mean("x", values, image, 300, 0)
    thrice = state_mean("x", values.repeat(3), image.repeat(3), 300, 0)
    assert once["x"] == pytest.approx(thrice["x"]) and once["x_ci"] == pytest.approx(thrice["x_ci"])
    gaps = torch.cat([values, torch.full((5,), torch.nan)])
    assert state_mean("x", gaps, torch.cat([image, torch.arange(5)]), 300, 0) == once
    assert image_means({"x": values}, 300, 0)["x"] == pytest.approx(once["x"])
    assert state_mean("x", torch.full((3,), torch.nan), torch.arange(3), 300, 0) == {}


def test_models_of_continuous_tokens_report_a_loss_and_no_bits() -> None:
    class Continuous:
        vocab_size = 0

    row = empty_row() | {"decode_nll": 3.0, "decode_nll_ci": [2.0, 4.0]}
    found = row | code_lengths(row, Continuous())  # type: ignore[arg-type]
    assert found["decode_loss"] == 3 and found["decode_loss_ci"] == [2, 4]
    assert found["decode_nll"] is found["decode_nll_ci"] is found["decode_bits"] is None


def test_scores_that_were_not_measured_have_no_interval(protocol: EvaluationProtocol) -> None:
    assert protocol.real is not None and protocol.reference is not None
    bare = replace(protocol.reference, found=None, spatial=None)
    scores = {"frechet_distance": 1.0, "precision": None, "recall": None}
    found = quality_intervals(scores, protocol.real, bare, 5, 0)
    assert set(found) == {"frechet_distance", "frechet_distance_ci"}


def test_the_protocol_says_how_numbers_were_made(protocol: EvaluationProtocol) -> None:
    said = protocol.described()
    assert "2 draws" in said["lookahead_regret"] and "200 resamples" in said["intervals"]
    assert replace(protocol, lookahead=None).described()["lookahead_regret"] is None
    with pytest.raises(ValueError, match="distance_resamples must be 0 or at least 2, got 1"):
        EvalConfig(distance_resamples=1)
    with pytest.raises(ValueError, match="reference_images must be at least 2, got 1"):
        EvalConfig(reference_images=1)
    with pytest.raises(ValueError, match="reference='x' needs features to compare samples in, but features is null"):
        EvalConfig(reference="x", features=None)
    with pytest.raises(ValueError, match=r"images must be at least 2, the fewest .* got 1"):
        replace(protocol, data=protocol.data.first(1))


def test_only_rows_with_samples_have_seconds_of_drawing(protocol: EvaluationProtocol, random_row: Evaluated) -> None:
    named = make_policy("random@4", BACKBONE)
    unsampled = evaluate_policy(replace(protocol, lookahead=None, recogniser=None), named, sampled=False).row
    assert unsampled["seconds_per_image"] is None and unsampled["rollout_seconds_per_image"] > 0
    assert random_row.row["seconds_per_image"] > 0 and random_row.row["rollout_seconds_per_image"] > 0
