"""Agreement of scores with utilities, against SciPy and loops over states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from tensordict import TensorDict
from torch import Tensor

from orderrl.metrics.calibration import calibrate, lookahead_utility, regret, reliability
from orderrl.oracle import LabelConfig, block_gains, gain_uniforms, label_contexts, random_contexts, utilities
from tests.helpers import tiny_backbone, tiny_images


def drawn(states: int = 40, blocks: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, utilities that depend on them, and which blocks are hidden."""
    generator = torch.Generator().manual_seed(seed)
    utility = torch.rand(states, blocks, generator=generator)
    scores = 5 * utility - 3 + torch.randn(states, blocks, generator=generator)
    scores[::5] = scores[::5].round()  # ties
    hidden = torch.rand(states, blocks, generator=generator) < 0.6
    hidden[:, :2] = True
    return scores, utility, hidden


def test_every_number_agrees_with_a_loop_over_states() -> None:
    scores, utility, hidden = drawn()
    first = scores.masked_fill(~hidden, -torch.inf).argmax(1)
    found = calibrate(first, scores, utility, hidden)
    assert found.spearman is not None and found.kendall is not None and found.score_std is not None
    for row in range(len(scores)):
        s, u = scores[row][hidden[row]].tolist(), utility[row][hidden[row]].tolist()
        chosen = utility[row, first[row]].item()
        assert found.top1[row] == (chosen == max(u))
        assert found.regret[row].item() == pytest.approx(max(u) - chosen)
        assert found.score_std[row].item() == pytest.approx(np.std(s), rel=1e-5)
        if len(set(s)) > 1:
            assert found.spearman[row].item() == pytest.approx(stats.spearmanr(s, u).statistic)
            assert found.kendall[row].item() == pytest.approx(stats.kendalltau(s, u).statistic)
    assert calibrate(first, None, utility, hidden)[2:] == (None, None, None, None)


def test_visible_blocks_have_no_influence() -> None:
    scores, utility, hidden = drawn()
    first = scores.masked_fill(~hidden, -torch.inf).argmax(1)
    one = calibrate(first, scores, utility, hidden)
    other = calibrate(first, scores.masked_fill(~hidden, 1e3), utility.masked_fill(~hidden, 1e3), hidden)
    for a, b in zip(one[:5], other[:5], strict=True):
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        assert torch.equal(a.double().nan_to_num(9), b.double().nan_to_num(9))
    assert one.reliability == other.reliability


def test_the_utilities_themselves_are_calibrated_and_their_negatives_are_the_worst() -> None:
    _, utility, hidden = drawn()
    best, worst = (u.masked_fill(~hidden, -torch.inf).argmax(1) for u in (utility, -utility))
    right, wrong = calibrate(best, utility, utility, hidden), calibrate(worst, -utility, utility, hidden)
    assert right.top1.all() and (right.regret == 0).all()
    for found, sign in ((right, 1), (wrong, -1)):
        assert found.spearman is not None and found.kendall is not None and found.reliability is not None
        torch.testing.assert_close(found.spearman, torch.full((40,), sign).double())
        torch.testing.assert_close(found.kendall, torch.full((40,), sign).double())
        assert found.reliability.error == pytest.approx(0, abs=1e-7) and found.reliability.r2 == pytest.approx(1)
        assert found.reliability.slope == pytest.approx(sign, rel=1e-5)
    assert wrong.regret.mean() > right.regret.mean()


def test_constant_scores_have_no_rank_correlation() -> None:
    scores, utility, hidden = drawn()
    scores[3] = 0.5
    first = torch.zeros(40, dtype=torch.int64)
    found = calibrate(first, scores, utility, hidden)
    assert found.spearman is not None and found.spearman.isnan().nonzero().flatten().tolist() == [3]
    assert calibrate(first, torch.zeros_like(scores), utility, hidden).reliability is None


def test_reliability_agrees_with_a_loop_over_bins() -> None:
    """A curved dependence: the line that fits best over- and underestimates in turn."""
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 1, 1000)
    utility = 0.1 * np.exp(scores) + rng.normal(0, 0.05, 1000)
    found = reliability(scores, utility, bins=10)
    assert found is not None
    slope, intercept = np.polyfit(scores, utility, 1)
    order = np.argsort(scores)
    error = 0.0
    for number, rows in enumerate(np.array_split(order, 10)):
        predicted, actual = (slope * scores[rows] + intercept).mean(), utility[rows].mean()
        assert found.predicted[number] == pytest.approx(predicted)
        assert found.actual[number] == pytest.approx(actual)
        assert found.count[number] == 100
        error += abs(predicted - actual) / 10
    assert found.error == pytest.approx(error) and found.error > 0.03
    assert found.r2 == pytest.approx(np.corrcoef(scores, utility)[0, 1] ** 2)


def test_equal_scores_share_a_bin() -> None:
    """The three values of a fixed score are three bins at most, each with the mean of its utilities."""
    scores = np.repeat([0.0, 1.0, 3.0], [50, 30, 20])
    utility = np.random.default_rng(1).random(100)
    found = reliability(scores, utility, bins=10)
    assert found is not None and sum(found.count) == 100
    values = [utility[:50].mean(), utility[50:80].mean(), utility[80:].mean()]
    weighted = np.dot(found.actual, found.count)
    assert weighted == pytest.approx(np.dot(values, [50, 30, 20]))
    assert set(found.count) <= {50, 30, 20, 80, 100}


def test_a_score_that_knows_nothing_is_calibrated_but_explains_nothing() -> None:
    rng = np.random.default_rng(2)
    found = reliability(rng.random(20000), rng.random(20000))
    assert found is not None and found.error < 0.02 and found.r2 < 0.001


# ---------------------------------------------------------------------- lookahead


@pytest.fixture(scope="module")
def states() -> TensorDict:
    backbone, config = tiny_backbone(), LabelConfig(contexts=10)
    data = tiny_images(backbone)
    contexts = random_contexts(config, len(data), 9)
    parts = list(label_contexts(backbone, data.tokens, data.labels, config, contexts))
    return TensorDict.cat([TensorDict(part, batch_size=[len(part["label"])]) for part in parts])


def test_lookahead_is_the_expected_gain_of_each_state(states: TensorDict) -> None:
    backbone = tiny_backbone()
    data = tiny_images(backbone)
    found = lookahead_utility(backbone, data, states, count=4, draws=3, seed=5)
    assert found.rows.tolist() == [0, 3, 6, 9] and found.draws == 3
    for place, row in enumerate(found.rows.tolist()):
        state = states[row]
        length, order = int(state["length"]), state["order"][None]
        label, tokens = data.labels[state["image"]].view(1), data.tokens[state["image"]][None]
        prefix = backbone.start(label)
        if length:
            prefix = backbone.extend(prefix, tokens, order[:, :length], torch.tensor([length]))
        uniforms = gain_uniforms(backbone.geometry, (torch.tensor([5 + place]), 0, 0), 3, torch.device("cpu"))
        hidden = order[:, length:].sort(1).values
        gains = block_gains(backbone, prefix, tokens, hidden, "expected", uniforms, 3)
        expected = utilities(gains, backbone.geometry, torch.ones(9, 9))[0]
        torch.testing.assert_close(found.utility[place], expected, atol=1e-5, rtol=1e-4)


def test_lookahead_does_not_read_hidden_tokens(states: TensorDict) -> None:
    backbone = tiny_backbone()
    data = tiny_images(backbone)
    one = lookahead_utility(backbone, data, states, count=10, draws=1)
    hidden = ~states["visible"][:, backbone.geometry.token_block]  # (10, 36)
    other = tiny_images(backbone)
    changed = torch.where(hidden, (other.tokens[states["image"]] + 1) % 5, other.tokens[states["image"]])
    other.tokens[states["image"]] = changed
    assert len(states["image"].unique()) == 10
    torch.testing.assert_close(lookahead_utility(backbone, other, states, count=10, draws=1).utility, one.utility)


def test_regret_against_lookahead_is_zero_for_its_own_choice(states: TensorDict) -> None:
    backbone = tiny_backbone()
    found = lookahead_utility(backbone, tiny_images(backbone), states, count=20, draws=2)
    hidden = ~states["visible"][found.rows]
    best = found.utility.masked_fill(~hidden, -torch.inf).argmax(1)
    assert len(found.rows) == 10  # no more than there are
    assert (regret(best, found.utility, hidden) == 0).all()
    worst = found.utility.masked_fill(~hidden, torch.inf).argmin(1)
    assert (regret(worst, found.utility, hidden) > 0).any()
