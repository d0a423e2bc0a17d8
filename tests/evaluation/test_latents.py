"""What latents do: variants of planners whose answer is known, and probes of planted features."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from orderrl.envs.observation import labelled
from orderrl.evaluation.latents import (
    edited_latents,
    latent_ablation,
    latent_probes,
    probe,
    probe_score,
    probe_targets,
    run_passes,
    variant_scores,
)
from orderrl.evaluation.row_entries import image_average
from orderrl.metrics.calibration import calibrate
from orderrl.oracle import LabelConfig, label_contexts, random_contexts, utilities
from orderrl.planner import OrderHead
from tests.agents.helpers import tiny_planner
from tests.helpers import tiny_backbone, tiny_images

BACKBONE = tiny_backbone()
DATA = tiny_images(BACKBONE)
GRID = BACKBONE.geometry


@pytest.fixture(scope="module")
def states() -> TensorDict:
    """Sixty labelled states of twelve images."""
    config = LabelConfig(contexts=60)
    parts = label_contexts(BACKBONE, DATA.tokens, DATA.labels, config, random_contexts(config, len(DATA), 9))
    return TensorDict.cat([TensorDict(part, batch_size=[len(part["image"])]) for part in parts])


def reasoning(passes: int) -> OrderHead:
    """A planner with large random weights in the core and in the scratchpad, so that latents matter."""
    planner = tiny_planner(reasoning_steps=passes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*planner.core.parameters(), planner.scratchpad):
            if parameter.ndim > 1:
                parameter.normal_(std=0.5, generator=generator)
    return planner


# ---------------------------------------------------------------------- inside the planner


def test_the_last_pass_is_what_scores_are_read_from(states: TensorDict) -> None:
    planner, seen = reasoning(3), labelled(states)
    passes = run_passes(planner, seen)
    assert len(passes) == 4
    assert (passes[0].latents == planner.scratchpad).all()
    assert passes[-1].latents.std(0).max() > 1e-3
    for number, tokens in enumerate(passes):
        torch.testing.assert_close(planner.norm(tokens.blocks), planner.encode(seen, number))


def test_edits_hold_inside_alone(states: TensorDict) -> None:
    planner, seen = reasoning(2), labelled(states)
    before = planner(seen).scores
    with edited_latents(planner, lambda latents: latents):
        torch.testing.assert_close(planner(seen).scores, before)
    with edited_latents(planner, torch.zeros_like):
        assert not torch.allclose(planner(seen).scores, before)
    with pytest.raises(ZeroDivisionError), edited_latents(planner, lambda latents: latents / 0):
        raise ZeroDivisionError
    torch.testing.assert_close(planner(seen).scores, before)


# ---------------------------------------------------------------------- ablation


def test_with_one_pass_nobody_reads_the_latents(states: TensorDict) -> None:
    scores = variant_scores(reasoning(1), labelled(states))
    assert set(scores) == {"trained", "R = 0", "R = 2", "R = 4", "reset", "mean"}
    assert torch.equal(scores["reset"], scores["trained"]) and torch.equal(scores["mean"], scores["trained"])
    assert not torch.allclose(scores["R = 0"], scores["trained"])


def test_with_two_passes_the_second_reads_what_it_is_given(states: TensorDict) -> None:
    planner, seen = reasoning(2), labelled(states)
    scores = variant_scores(planner, seen)
    first = run_passes(planner, seen)[1]
    given = {
        "trained": first.latents,
        "reset": planner.scratchpad.expand_as(first.latents),
        "mean": first.latents.mean(0).expand_as(first.latents),
    }
    for name, latents in given.items():
        tokens = planner.core(torch.cat([first.blocks, latents], dim=1))[:, :9]
        torch.testing.assert_close(scores[name], planner.score_head(planner.norm(tokens))[..., 0])
        assert name == "trained" or not torch.allclose(scores[name], scores["trained"])


class BlindCore(nn.Module):
    """Each block reads itself alone."""

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, :9].sin(), tokens[:, 9:] + tokens.mean(1, keepdim=True)], dim=1)


def test_a_core_that_ignores_the_latents_loses_nothing_without_them(states: TensorDict) -> None:
    planner = reasoning(4)
    planner.core = BlindCore()  # type: ignore[assignment]
    scores = variant_scores(planner, labelled(states))
    assert torch.equal(scores["reset"], scores["trained"]) and torch.equal(scores["mean"], scores["trained"])


def test_variants_are_calibrated_as_policies_are(states: TensorDict) -> None:
    planner = reasoning(2)
    found = latent_ablation(planner, states, GRID)
    hidden = ~states["visible"]
    utility = utilities(states["gains"], GRID, torch.ones(9, 9))
    scores = planner(labelled(states), 4).scores.detach()
    first = scores.masked_fill(~hidden, -torch.inf).argmax(1)
    expected = calibrate(first, scores, utility, hidden)
    assert expected.spearman is not None
    torch.testing.assert_close(found["R = 4"].spearman, image_average(expected.spearman, states["image"]))
    torch.testing.assert_close(found["R = 4"].regret, image_average(expected.regret, states["image"]))


# ---------------------------------------------------------------------- probes

IMAGE = torch.arange(40).repeat_interleave(5)
NOISE = torch.Generator().manual_seed(0)
FEATURES = torch.randn(200, 12, generator=NOISE)


def score(features: Tensor, target: Tensor) -> float:
    return float(probe_score(probe(features, target, IMAGE).sum(1)))


def test_probes_find_what_is_linear_in_the_features_and_nothing_in_noise() -> None:
    directions = torch.randn(12, 2, generator=NOISE)
    target = FEATURES @ directions
    assert score(FEATURES, target) > 0.99
    assert score(FEATURES, (target[:, 0] > 0).long()) > 0.9
    other = torch.randn(200, 12, generator=NOISE)
    assert score(other, target) < 0.1
    assert score(other, (target[:, 0] > 0).long()) < 0.65


def test_probes_are_never_asked_about_images_that_they_learned_from() -> None:
    """Features that name the image, targets that are the image's own: nothing to be learned for other images."""
    named = torch.nn.functional.one_hot(IMAGE).float()[:, :20]
    own = torch.randn(40, 1, generator=NOISE)[IMAGE]
    assert score(named, own) < 0.05


def test_scores_are_those_of_the_definition() -> None:
    target = torch.randn(200, 2, generator=NOISE) + torch.tensor([5.0, -3.0])
    noisy = torch.cat([target + torch.randn(200, 2, generator=NOISE), FEATURES], dim=1)
    sums = probe(noisy, target, IMAGE)
    assert sums.shape == (5, 40)
    error = sums[0].sum() / ((target - target.mean(0)) ** 2).sum().item()
    assert float(probe_score(sums.sum(1))) == pytest.approx(1 - error, rel=1e-6)
    with pytest.raises(ValueError, match="probes need states of at least 2 images, got 1"):
        probe(noisy, target, torch.zeros(200).long())


def test_targets_are_what_their_names_say(states: TensorDict) -> None:
    targets = probe_targets(states, GRID)
    utility = utilities(states["gains"], GRID, torch.ones(9, 9))
    for row, state in enumerate(states):
        hidden = [block for block in range(9) if not state["visible"][block]]
        total = sum(state["loss"][block] for block in hidden)
        assert targets["remaining loss"][row].item() == pytest.approx(float(total), rel=1e-5)
        for axis, place in enumerate((lambda block: block // 3, lambda block: block % 3)):
            centre = sum(float(state["loss"][block]) * place(block) for block in hidden) / float(total)
            assert targets["centre of loss"][row, axis].item() == pytest.approx(centre, abs=1e-4)
            best = max(hidden, key=lambda block: float(utility[row, block]))
            assert targets["best block"][row, axis].item() == place(best)
    assert torch.equal(targets["class"], states["label"])


def test_every_pass_is_probed_and_the_scratchpad_only_after_the_first(states: TensorDict) -> None:
    entries = latent_probes(reasoning(2), states, GRID, resamples=100)
    assert len(entries) == 4 * 3
    for entry in entries:
        assert (entry["latents"] is None) == (entry["difference"] is None) == (entry["pass"] == 0)
        assert entry["measure"] == ("accuracy" if entry["target"] == "class" else "r2")
        if entry["pass"]:
            expected = entry["latents"]["mean"] - entry["blocks"]["mean"]
            assert entry["difference"]["mean"] == pytest.approx(expected)
    alike = states.clone()
    alike["label"] = torch.zeros_like(states["label"])
    assert {entry["target"] for entry in latent_probes(reasoning(1), alike, GRID, 100)} == {
        "remaining loss",
        "centre of loss",
        "best block",
    }
