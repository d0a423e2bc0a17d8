"""What latents do: variants of planners whose answer is known."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from orderrl.envs.observation import labelled
from orderrl.evaluation.latents import edited_latents, latent_ablation, variant_scores
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


def test_with_one_pass_nobody_reads_the_latents(states: TensorDict) -> None:
    scores = variant_scores(reasoning(1), labelled(states))
    assert set(scores) == {"trained", "R = 0", "R = 2", "R = 4", "reset", "mean"}
    assert torch.equal(scores["reset"], scores["trained"]) and torch.equal(scores["mean"], scores["trained"])
    assert not torch.allclose(scores["R = 0"], scores["trained"])


def test_with_two_passes_the_second_reads_what_it_is_given(states: TensorDict) -> None:
    planner, seen = reasoning(2), labelled(states)
    scores = variant_scores(planner, seen)
    passes: list[Tensor] = []
    with planner.core.register_forward_hook(lambda core, inputs, output: passes.append(output)):
        planner.encode(seen)
    blocks, latents = passes[0][:, :9], passes[0][:, 9:]
    given = {
        "trained": latents,
        "reset": planner.scratchpad.expand_as(latents),
        "mean": latents.mean(0).expand_as(latents),
    }
    for name, read in given.items():
        tokens = planner.core(torch.cat([blocks, read], dim=1))[:, :9]
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
    torch.testing.assert_close(found["R = 4"]["spearman"], image_average(expected.spearman, states["image"]))
    torch.testing.assert_close(found["R = 4"]["regret"], image_average(expected.regret, states["image"]))
