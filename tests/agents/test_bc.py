"""Behaviour cloning: losses, curriculum, split, and that every target learns."""

from __future__ import annotations

from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from orderrl.agents import bc
from orderrl.agents.bc import REGRESSED, TARGETS, bc_loss, clone, held_out_metrics, pair_loss, reasoning_steps_at
from orderrl.agents.bc import Config as BCConfig
from orderrl.oracle import LabelConfig, label_contexts, random_contexts
from orderrl.planner import OrderHead
from tests.agents.helpers import tiny_labels, tiny_planner
from tests.helpers import tiny_backbone, tiny_images
from tests.jobs import logged
from tests.processes import run_processes

GEOMETRY = tiny_backbone().geometry


def train(planner: OrderHead, labels: TensorDict, seed: int = 0, **config: Any) -> list[dict[str, float]]:
    settings = {"steps": 150, "batch_size": 64, "learning_rate": 1e-2, "evaluate_every": 25} | config
    return logged(clone, planner, labels, GEOMETRY, BCConfig(**settings), seed)


def regret(planner: OrderHead, labels: TensorDict, target: str = "utility") -> float:
    """Mean regret on given contexts, in standard deviations of what the target is about: U or minus the loss."""
    observation = labels.exclude("gains")
    observation["fraction"] = labels["visible"].float().mean(-1, keepdim=True)
    utility = -labels["loss"] if target == "charged" else labels["gains"].sum(-1) / 36
    return held_out_metrics(planner, observation, utility / utility[~labels["visible"]].std())["regret"]


# ---------------------------------------------------------------------- losses


@pytest.fixture
def states() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores, utility = torch.randn(2, 6, 5, generator=generator)
    hidden = torch.rand(6, 5, generator=generator) < 0.6
    hidden[:, 0] = True
    return scores.requires_grad_(), utility, hidden


@pytest.mark.parametrize("target", TARGETS)
def test_losses_agree_with_their_formulas(target: str, states: tuple[Tensor, Tensor, Tensor]) -> None:
    scores, utility, hidden = states
    expected, candidates = 0.0, int(hidden.sum())
    for score, value, mask in zip(scores.detach(), utility, hidden, strict=True):
        score, value = score[mask], value[mask]
        log_probs = score - score.exp().sum().log()
        if target in REGRESSED:
            expected += ((score - value) ** 2).sum().item() / candidates
        elif target == "label":
            expected -= log_probs[value.argmax()].item() / 6
        else:
            weights = (value / 0.5).exp()
            expected -= (weights / weights.sum() * log_probs).sum().item() / 6
    assert bc_loss(scores, utility, hidden, target, 0.5).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_losses_ignore_visible_blocks(target: str, states: tuple[Tensor, Tensor, Tensor]) -> None:
    scores, utility, hidden = states
    loss = bc_loss(scores, utility, hidden, target, 0.5)
    loss.backward()
    assert scores.grad is not None
    assert (scores.grad[~hidden] == 0).all() and torch.isfinite(scores.grad).all()
    changed = bc_loss(scores + 3.0 * ~hidden, utility - 7.0 * ~hidden, hidden, target, 0.5)
    assert torch.allclose(changed, loss)


def test_soft_target_approaches_the_argmax_label(states: tuple[Tensor, Tensor, Tensor]) -> None:
    cold, label = (bc_loss(*states, target, 1e-3) for target in ("soft", "label"))
    assert torch.allclose(cold, label, atol=1e-4)


def test_the_pair_loss_is_a_mean_over_pairs_of_hidden_blocks(states: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden = states[2]
    dependence, gains = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1))
    dependence.requires_grad_()
    errors = []
    for row in range(6):
        for a, b in permutations(hidden[row].nonzero().flatten().tolist(), 2):
            errors.append((dependence[row, a, b] - gains[row, a, b]).item() ** 2)
    loss = pair_loss(dependence, gains, hidden)
    assert loss.item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    loss.backward()
    assert dependence.grad is not None and (dependence.grad != 0).sum() == len(errors)
    lonely = torch.eye(5, dtype=torch.bool)[:3]  # one hidden block each: there is no pair
    assert pair_loss(dependence[:3], gains[:3], lonely).item() == 0


# ---------------------------------------------------------------------- curriculum and split


@pytest.mark.parametrize(
    ("final", "stages"), [(0, [0]), (1, [0, 1]), (2, [0, 1, 2]), (3, [0, 1, 2, 3]), (4, [0, 1, 2, 4])]
)
def test_curriculum_doubles_in_equal_phases_of_the_first_half(final: int, stages: list[int]) -> None:
    steps = [reasoning_steps_at(step, 600, final) for step in range(600)]
    assert sorted(set(steps)) == stages and steps == sorted(steps)
    assert set(steps[300:]) == {final}
    assert all(steps.count(stage) == 300 // len(stages) for stage in stages[:-1])
    assert {reasoning_steps_at(step, 5, final) for step in range(5)} <= set(stages)


def test_training_follows_the_curriculum() -> None:
    rows = train(tiny_planner(reasoning_steps=2, noisy=False), tiny_labels(), steps=12)
    assert [row["reasoning_steps"] for row in rows] == [0.0] * 2 + [1.0] * 2 + [2.0] * 8
    assert [row["step"] for row in rows] == list(range(1, 13))


@pytest.mark.parametrize(("share", "expected"), [(0.1, 6), (0.5, 30), (0.001, 1), (0.999, 59)])
def test_images_are_kept_back_whole(share: float, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No context of a kept-back image is trained on, and all of them are evaluated on."""
    shown: list[Tensor] = []
    original = bc.labelled

    def spy(states: TensorDict, rows: Tensor) -> TensorDict:
        shown.append(rows)
        return original(states, rows)

    monkeypatch.setattr(bc, "labelled", spy)
    labels = tiny_labels()
    train(tiny_planner(noisy=False), labels, steps=20, held_out=share, evaluate_every=20)
    kept, *trained = (labels["image"][rows] for rows in shown[:21])  # what is kept back, and the batches of 20 steps
    images = set(kept.tolist())
    assert len(images) == expected and len(kept) == 8 * expected
    assert not images & set(torch.cat(trained).tolist())


def test_labels_of_one_image_are_refused() -> None:
    with pytest.raises(ValueError, match="there must be at least 2 images to learn from, one is kept back; got 1"):
        train(tiny_planner(), tiny_labels(images=1))


# ---------------------------------------------------------------------- learning


@pytest.mark.parametrize("reasoning_steps", [0, 2])
@pytest.mark.parametrize("target", [target for target in TARGETS if target != "ranks"])  # of a teacher
def test_every_target_learns(target: str, reasoning_steps: int) -> None:
    """On images never seen the regret falls far below that of an arbitrary block."""
    planner = tiny_planner(reasoning_steps=reasoning_steps, noisy=False, pairs=target == "pairs")
    unseen = tiny_labels(seed=1)
    chance = regret(tiny_planner(), unseen, target)
    rows = train(planner, tiny_labels(), target=target, steps=90, evaluate_every=45)
    assert chance > 0.5
    assert regret(planner, unseen, target) < 0.2 * chance
    assert rows[-1]["loss"] < rows[0]["loss"] and not planner.training


def planted_labels(seed: int = 0) -> TensorDict:
    """Contexts in which blocks of one kind tell a lot about each other; the kind of a block is seen in its content."""
    labels = tiny_labels(seed=seed)
    generator, hidden = torch.Generator().manual_seed(seed + 1), ~labels["visible"]
    kind = torch.randint(2, hidden.shape, generator=generator).float() * 2 - 1
    labels["hidden"][..., :8] += (0.3 * kind * hidden)[..., None]
    both = (hidden[:, :, None] & hidden[:, None]).float() * (1 - torch.eye(9))
    noise = 0.2 * torch.randn(both.shape, generator=generator)  # not symmetric
    labels["gains"] = both * (1 + kind[:, :, None] * kind[:, None] + noise)
    return labels


def test_pairs_learn_a_dependence_that_varies_with_content() -> None:
    """On images never seen, far better than the best constant matrix, which is even fitted on those very images."""
    planner, unseen = tiny_planner(noisy=False, pairs=True), planted_labels(seed=5)
    rows = train(planner, planted_labels(), target="pairs")
    observation, hidden = unseen.exclude("gains"), ~unseen["visible"]
    observation["fraction"] = unseen["visible"].float().mean(-1, keepdim=True)
    pairs = hidden[:, :, None] & hidden[:, None] & ~torch.eye(9, dtype=torch.bool)
    goal = (unseen["gains"] + unseen["gains"].mT) / 2
    goal = goal / goal[pairs].std()
    constant = (goal * pairs).sum(0) / pairs.sum(0).clamp_min(1)
    ours, fixed = (((guess - goal)[pairs] ** 2).mean() for guess in (planner(observation).dependence, constant))
    assert fixed > 0.9 and ours < 0.3 * fixed
    assert rows[-1]["held_out_pairs"] < 0.3 < rows[0]["loss_pairs"]
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss_scores"] + row["loss_pairs"], rel=1e-5)


def test_pair_strength_makes_scores_and_dependence_the_value_of_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a set gains is what its blocks tell about the others; the same from targets in standard deviations."""
    monkeypatch.setattr(bc, "_CHUNK", 50)
    labels, planner = planted_labels(), tiny_planner(noisy=False, pairs=True)
    train(planner, labels, target="pairs", steps=1)
    assert planner.pair_head is not None
    strength, hidden = planner.pair_head.strength.item(), ~labels["visible"]
    pairs = hidden[:, :, None] & hidden[:, None] & ~torch.eye(9, dtype=torch.bool)
    utility, mean_gain = labels["gains"].sum(-1) / 36, (labels["gains"] + labels["gains"].mT) / 2
    scale, pair_scale = utility[hidden].std(), mean_gain[pairs].std()
    for row in range(20):
        chosen = hidden[row].nonzero().flatten()[:3].tolist()
        others = [b for b in range(9) if b not in chosen]
        expected = labels["gains"][row][chosen][:, others].sum() / 36
        dependence = sum(mean_gain[row, a, b] / pair_scale for a, b in combinations(chosen, 2))
        value = (utility[row, chosen] / scale).sum() - strength * dependence
        assert value.item() * scale.item() == pytest.approx(expected.item(), abs=1e-5)


def test_pairs_need_a_planner_with_pairs() -> None:
    with pytest.raises(ValueError, match="target='pairs' needs a planner with pairs=True, this one has pairs=False"):
        train(tiny_planner(), tiny_labels(), target="pairs")


def first_step() -> tuple[list[dict[str, float]], list[Tensor]]:
    """Metrics and gradients of one step on a batch that processes share unevenly, in blocks and in pairs."""
    planner = tiny_planner(pairs=True)
    rows = train(planner, planted_labels(), target="pairs", steps=1, batch_size=13)
    return rows, [parameter.grad for parameter in planner.parameters() if parameter.grad is not None]


def test_pairs_in_two_processes_have_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    (row,), gradients = first_step()
    assert max(gradient.abs().max() for gradient in gradients) > 0.01
    for (other,), others in run_processes(2, tmp_path, first_step):
        assert {key: other[key] for key in row} == pytest.approx(row, rel=1e-5)
        for mine, theirs in zip(gradients, others, strict=True):
            torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-6)


def test_utility_is_regressed_in_its_standard_deviations() -> None:
    """The scores are calibrated, whatever the unit of the labels."""
    labels = tiny_labels()
    scaled = labels.clone()
    scaled["gains"] = 1000 * labels["gains"]
    scores = []
    for data in (labels, scaled):
        planner = tiny_planner(noisy=False)
        train(planner, data, steps=60)
        observation = data.exclude("gains")
        observation["fraction"] = data["visible"].float().mean(-1, keepdim=True)
        scores.append(planner(observation).scores.detach())
    assert torch.allclose(scores[0], scores[1], atol=1e-2)
    hidden = ~labels["visible"]
    utility = (labels["gains"].sum(-1) / 36)[hidden]
    assert ((scores[0][hidden] - utility / utility.std()) ** 2).mean() < 0.3


def test_the_best_weights_on_kept_back_images_are_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation that likes the second best makes clone return the weights of that moment."""
    seen: list[dict[str, Tensor]] = []

    def fake(planner: OrderHead, data: TensorDict, utility: Tensor) -> dict[str, float]:
        seen.append({k: v.clone() for k, v in planner.state_dict().items()})
        return {"chosen": [0.0, 2.0, 1.0][len(seen) - 1], "regret": 0.0}

    monkeypatch.setattr(bc, "held_out_metrics", fake)
    planner = tiny_planner(noisy=False)
    train(planner, tiny_labels(), steps=30, evaluate_every=10)
    assert all(torch.equal(v, seen[1][k]) for k, v in planner.state_dict().items())
    assert not torch.equal(seen[2]["score_head.weight"], seen[1]["score_head.weight"])


def test_the_seed_decides_everything_and_labels_stay_as_they_are(tmp_path: Path) -> None:
    labels = tiny_labels()
    stored = labels.clone().memmap_(str(tmp_path / "labels"))
    weights = []
    for data, seed in ((labels, 0), (stored, 0), (labels, 1)):
        planner = tiny_planner(noisy=False)
        train(planner, data, steps=10, seed=seed)
        weights.append(planner.score_head.weight.detach())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert (labels == tiny_labels()).all() and (TensorDict.load_memmap(str(tmp_path / "labels")) == labels).all()


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 11, 20])
@pytest.mark.parametrize("reasoning_steps", [0, 2])
def test_any_number_of_steps_trains(steps: int, reasoning_steps: int) -> None:
    planner = tiny_planner(noisy=False, reasoning_steps=reasoning_steps)
    rows = train(planner, tiny_labels(), steps=steps, evaluate_every=1000)
    assert len(rows) == steps and "regret" in rows[-1]
    assert not (planner.score_head.weight == 0).all()  # trained weights, not the first ones


def test_labels_of_a_backbone_train_and_leave_it_alone() -> None:
    backbone = tiny_backbone()
    weights = {k: v.clone() for k, v in backbone.state_dict().items()}
    data, config = tiny_images(backbone), LabelConfig(contexts=48)
    contexts = random_contexts(config, len(data), 9)
    parts = list(label_contexts(backbone, data.tokens, data.labels, config, contexts))
    labels = torch.cat([TensorDict(part, batch_size=[len(part["label"])]) for part in parts])
    rows = train(tiny_planner(noisy=False), labels, steps=30)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(torch.equal(v, weights[k]) for k, v in backbone.state_dict().items())


@pytest.mark.parametrize(("passes", "steps"), [(None, 150), (1000, 150), (2, 3), (0.5, 1)])
def test_few_labels_take_no_more_steps_than_their_passes(passes: float | None, steps: int) -> None:
    """96 contexts, 64 of them in a step."""
    rows = train(tiny_planner(noisy=False), tiny_labels()[:96], passes=passes, evaluate_every=1000)
    assert len(rows) == steps == rows[-1]["step"] and "chosen" in rows[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "argmax"}, "target='argmax' is unknown; choose one of label, soft, utility, charged, pairs"),
        ({"weight": "near"}, "weight='near' is unknown; choose one of uniform, far"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1, got 0"),
        ({"passes": 0}, r"passes must lie in \(0, 1000000\], got 0"),
        ({"held_out": 1.0}, r"held_out must lie in \(0, 1\), got 1.0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ],
)
def test_bad_configs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BCConfig(**change)
