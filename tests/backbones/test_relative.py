"""Relative next positions: the same identities as with absolute ones, and what an instruction token then says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from orderrl.backbones import OrderRobustTransformer, check_backbone
from orderrl.backbones.llamagen import TransformerConfig
from orderrl.backbones.pretraining import random_blocks
from orderrl.backbones.randar import cross_entropy
from orderrl.backbones.registry import new_backbone
from orderrl.backbones.sampling import Sampling
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.oracle import block_gains
from tests.backbones.families import CAUSAL, images


def relative(height: int = 4, width: int = 4, block_size: int = 2) -> OrderRobustTransformer:
    """A frozen model with large random weights."""
    shape = {"height": height, "width": width, "block_size": block_size, "next_position": "relative"}
    backbone = new_backbone("randar", CAUSAL | shape)
    assert isinstance(backbone, OrderRobustTransformer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3, generator=generator)
    return backbone.requires_grad_(False).eval()


SHAPES = [(4, 4, 2), (2, 4, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_backbone_passes_the_check(shape: tuple[int, int, int]) -> None:
    check_backbone(relative(*shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_offsets_and_not_places_are_said(shape: tuple[int, int, int]) -> None:
    backbone = relative(*shape)
    positions, before = torch.tensor([3, 3, 6, 2]), torch.tensor([1, -1, 4, 0])
    said, rope = backbone.instructions(positions, before)
    assert torch.equal(said[0], said[2]) and torch.equal(said[0], said[3])  # two to the right, each of them
    assert torch.equal(rope[0], backbone.rope[2]) and torch.equal(rope[1], backbone.rope[4])
    plain = OrderRobustTransformer(replace(backbone.config, next_position="absolute"))
    plain.load_state_dict(backbone.state_dict(), strict=False)
    assert torch.equal(said[1], plain.instructions(positions)[0][1])  # the first token has its place
    rows = backbone.offset_embeddings.num_embeddings
    assert rows == (2 * shape[0] - 1) * (2 * shape[1] - 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_samplers_sequence_gives_the_context_losses(shape: tuple[int, int, int]) -> None:
    """Also where a step reveals several blocks: each chain then begins behind the last block of the step before."""
    backbone = relative(*shape)
    data, geometry = images(backbone, 3), backbone.geometry
    blocks = geometry.num_blocks
    order = random_blocks(geometry, 3, torch.Generator().manual_seed(2))
    steps = [0, 0, 2, 3] if blocks == 4 else [0, 0, 0, 3, 4, 4, 6, 7]
    for seen in (torch.tensor(steps).expand(3, -1), torch.arange(blocks).expand(3, -1)):
        token_order = geometry.token_order(order)
        logits, _ = backbone.sampler_forced(data.tokens, data.labels, token_order, seen)
        losses = cross_entropy(logits, data.tokens, token_order).unflatten(1, (blocks, -1)).sum(2)
        for place in range(blocks):
            count = seen[:, place]
            prefix = backbone.start(data.labels)
            if count[0]:
                prefix = backbone.extend(prefix, data.tokens, order[:, : int(count[0])], count)
            charged, _ = backbone.context_loss(prefix, data.tokens, order[:, place : place + 1])
            torch.testing.assert_close(losses[:, place], charged.loss[:, 0], atol=1e-4, rtol=1e-4)
    plain = backbone.teacher_forced(data.tokens, data.labels, token_order)
    torch.testing.assert_close(logits, plain)  # the last of them is one block a step


def test_gains_are_differences_of_losses() -> None:
    """The past of a gain's chain ends with another block than the prefix."""
    backbone = relative()
    data = images(backbone, 3)
    hidden = torch.tensor([[1, 2, 3]]).expand(3, -1)
    first = torch.zeros(3, 1, dtype=torch.int64)
    prefix = backbone.extend(backbone.start(data.labels), data.tokens, first, torch.ones(3, dtype=torch.int64))
    gains = block_gains(backbone, prefix, data.tokens, hidden)
    for a, b in ((1, 3), (3, 2)):
        before, _ = backbone.context_loss(prefix, data.tokens, torch.full((3, 1), b))
        longer = backbone.extend(
            backbone.start(data.labels), data.tokens, torch.tensor([[0, a]]).expand(3, -1), torch.full((3,), 2)
        )
        after, _ = backbone.context_loss(longer, data.tokens, torch.full((3, 1), b))
        torch.testing.assert_close(gains[:, a, b], (before.loss - after.loss)[:, 0], atol=1e-4, rtol=1e-4)


def test_contexts_with_gradients_are_those_of_the_cache() -> None:
    backbone = relative()
    data = images(backbone, 3)
    blocks, count = torch.tensor([[2, 0], [1, 3], [3, 1]]), torch.tensor([2, 1, 0])
    hidden, _ = backbone.observe_contexts(data.tokens, data.labels, blocks, count)
    for row in range(3):
        one = slice(row, row + 1)
        prefix = backbone.start(data.labels[one])
        if count[row]:
            prefix = backbone.extend(prefix, data.tokens[one], blocks[one, : int(count[row])], count[one])
        seen, _ = backbone.observe(prefix, torch.arange(4)[None])
        rest = [b for b in range(4) if b not in blocks[row, : int(count[row])].tolist()]
        torch.testing.assert_close(hidden[row, rest], seen[0, rest], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_the_environment_charges_what_the_sequence_costs(size: int) -> None:
    """Step by step, with entries that are reused, against one pass over the sampler's sequence."""
    backbone = relative()
    data, geometry = images(backbone, 4), backbone.geometry
    order = random_blocks(geometry, 4, torch.Generator().manual_seed(3))
    core = NextBlockCore(backbone, data, 4, CoreConfig(budgets=(size,), strict=True))
    core.reset(index=torch.arange(4))
    charged = torch.zeros(4)
    for start in range(0, 4, size):
        chosen = order[:, start : start + size]
        charged += core.losses.gather(1, chosen).sum(1)
        core.step(chosen[:, 0] if size == 1 else torch.cat([chosen, torch.zeros(4, 1, dtype=torch.int64)], 1))
    token_order, seen = geometry.token_order(order), (torch.arange(4) // size * size).expand(4, -1)
    logits, _ = backbone.sampler_forced(data.tokens, data.labels, token_order, seen)
    torch.testing.assert_close(charged, cross_entropy(logits, data.tokens, token_order).sum(1), atol=1e-3, rtol=1e-4)


def test_drawn_tokens_are_scored_as_they_were_drawn() -> None:
    """Greedy draws of two blocks a step are the most likely tokens of the sampler's sequence."""
    backbone = relative()
    data, geometry = images(backbone, 4), backbone.geometry
    core = NextBlockCore(
        backbone, data, 4, CoreConfig("generate", (2,), sampling=Sampling(temperature=0), hindsight=False)
    )
    core.reset(labels=data.labels)
    order = torch.tensor([[2, 1, 0, 3]]).expand(4, -1)
    for start in (0, 2):
        core.step(torch.cat([order[:, start : start + 2], torch.zeros(4, 1, dtype=torch.int64)], 1))
    token_order, seen = geometry.token_order(order), torch.tensor([0, 0, 2, 2]).expand(4, -1)
    logits, _ = backbone.sampler_forced(core.tokens, data.labels, token_order, seen)
    assert torch.equal(logits.argmax(-1), core.tokens.gather(1, token_order))


@pytest.mark.parametrize("family", ["llamagen", "arpg"])
def test_other_families_have_no_instruction_tokens(family: str) -> None:
    grid = {"height": 4, "width": 4, "block_size": 4 if family == "llamagen" else 2}
    for change in ({"next_position": "relative"}, {"position_head": True}):
        with pytest.raises(ValueError, match=rf"is for models with instruction tokens .* not for family {family}"):
            new_backbone(family, grid | CAUSAL | change)
    with pytest.raises(ValueError, match="next_position='polar' is unknown; choose one of absolute, relative"):
        TransformerConfig(4, 4, 2, 3, 2, next_position="polar")


def test_fingerprints_of_before_stay() -> None:
    """Configurations with the defaults of later settings read as they did, so planners and labels stay valid."""
    assert "next_position" not in repr(TransformerConfig(4, 4, 2, 3, 2))
    assert "position_head" not in repr(TransformerConfig(4, 4, 2, 3, 2))
