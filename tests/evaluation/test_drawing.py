"""Images of the published samplers: keyed by seed, complete, and refused where there is no such sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orderrl.backbones import Sampling
from orderrl.evaluation.drawing import balanced_labels, generate_published
from tests.backbones.families import FAMILIES, tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_published_samples_depend_on_the_seed_alone(family: str) -> None:
    """A large batch draws what batches of two draw; ARPG's images share the order of the seed either way."""
    backbone = tiny(family, 4, 4, 1)
    labels = balanced_labels(4, backbone.num_classes)
    whole = generate_published(backbone, labels, steps=5, seed=3)
    parts = generate_published(backbone, labels, steps=5, seed=3, batch_size=2)
    largest = float(whole.tokens.abs().max())  # a random masked model draws numbers of any size
    assert torch.allclose(whole.tokens.float(), parts.tokens.float(), atol=1e-4 * largest)
    assert torch.equal(whole.reveal_step, parts.reveal_step)
    other = generate_published(backbone, labels, steps=5, seed=30)
    assert not torch.allclose(whole.tokens.float(), other.tokens.float(), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_samplers_take_the_steps_asked_for(family: str) -> None:
    backbone = tiny(family, 4, 4, 1)
    made = generate_published(backbone, balanced_labels(2, 3), steps=5)
    steps = 16 if family == "llamagen" else 5
    assert sorted(made.reveal_step[0].unique().tolist()) == list(range(steps))
    assert made.tokens.shape[:2] == made.reveal_step.shape == (2, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_reaches_the_published_samplers(family: str) -> None:
    backbone = tiny(family, 4, 4, 1)
    labels = balanced_labels(6, 3)
    plain = generate_published(backbone, labels, steps=4)
    for schedule in ("constant", "linear"):
        guided = generate_published(backbone, labels, 4, Sampling(guidance=6.0, guidance_schedule=schedule))
        assert not torch.allclose(plain.tokens.float(), guided.tokens.float(), atol=1e-3)


def test_a_backbone_without_a_published_sampler_is_refused() -> None:
    class Own(torch.nn.Module):
        geometry = tiny("randar").geometry

    own: Any = Own()
    with pytest.raises(ValueError, match="type Own has no published sampler"):
        generate_published(own, torch.tensor([0]))
