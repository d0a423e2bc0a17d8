"""When scores are made: once, at a few steps, or at every step; and MAR's cosine schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from orderrl.agents.play import Rollout, roll_out, scripted
from orderrl.agents.registry import make_policy
from orderrl.agents.schedules import cosine_sizes
from orderrl.backbones.mar import hidden_after
from orderrl.backbones.sampling import Sampling
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.evaluation.drawing import drawn_code_lengths, generate_images
from orderrl.evaluation.recording import ScoreLog, recorded
from tests.backbones.families import images, tiny

BACKBONE = tiny("mar", block_size=1)  # 16 blocks of a token


def played(name: str, count: int = 3) -> tuple[Rollout, list[Tensor]]:
    """A rollout and the visible masks that the scorer was asked in."""
    named = make_policy(name, BACKBONE)
    asked: list[Tensor] = []
    where = "fresh" if hasattr(named.policy, "fresh") else "scorer"
    scorer = getattr(named.policy, where)

    def watched(observation, generator):  # type: ignore[no-untyped-def]
        asked.append(observation["visible"].clone())
        return scorer(observation, generator)

    setattr(named.policy, where, watched)
    core = NextBlockCore(BACKBONE, images(BACKBONE), count, CoreConfig(budgets=named.budgets, strict=True))
    return roll_out(core, named.policy, torch.Generator(), torch.arange(count)), asked


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("high_entropy", list(range(16))),
        ("high_entropy@slow", list(range(16))),
        ("high_entropy@semifast:4", [0, 4, 8, 12]),
        ("high_entropy@semifast:3", [0, 6, 12]),
        ("high_entropy@fast", [0]),
        ("high_entropy@semifast:2@4", [0, 8]),
        ("high_entropy@semifast:2@cosine:4", [0, sum(cosine_sizes(4, 16)[:2])]),
    ],
)
def test_scores_are_made_when_the_mode_says(name: str, at: list[int]) -> None:
    _, asked = played(name)
    assert [int(visible[0].sum()) for visible in asked] == at


def test_slow_is_no_mode_and_fast_follows_the_scores_of_the_empty_image() -> None:
    assert torch.equal(played("high_entropy")[0].order, played("high_entropy@slow")[0].order)
    core = NextBlockCore(BACKBONE, images(BACKBONE), 3, CoreConfig())
    core.reset(index=torch.arange(3))
    expected = core.observation()["entropy"].argsort(-1, descending=True)
    assert torch.equal(played("high_entropy@fast")[0].order, expected)


def test_between_two_scorings_the_order_is_that_of_the_last() -> None:
    slow_first = played("high_entropy@semifast:4")[0].order[:, :4]
    assert torch.equal(slow_first, played("high_entropy@fast")[0].order[:, :4])


def test_episodes_that_begin_later_have_scores_of_their_own() -> None:
    policy: Any = make_policy("high_entropy@fast", BACKBONE).policy
    core = NextBlockCore(BACKBONE, images(BACKBONE), 2, CoreConfig(strict=True))
    core.reset(index=torch.tensor([0, 1]))
    policy.reset(torch.tensor([True, True]))
    generator = torch.Generator()
    core.step(policy(core.observation(), generator))
    core.reset(rows=torch.tensor([1]), index=torch.tensor([2]))
    policy.reset(torch.tensor([False, True]))
    action = policy(core.observation(), generator)
    fresh = NextBlockCore(BACKBONE, images(BACKBONE), 1, CoreConfig())
    fresh.reset(index=torch.tensor([2]))
    assert action[1] == fresh.observation()["entropy"][0].argmax()


@pytest.mark.parametrize(("iterations", "blocks"), [(8, 16), (16, 16), (1, 16), (64, 256), (256, 256)])
def test_the_cosine_schedule_is_that_of_mars_own_sampler(iterations: int, blocks: int) -> None:
    sizes = cosine_sizes(iterations, blocks)
    left, expected = blocks, []
    for iteration in range(iterations):
        after = hidden_after(iteration, iterations, left, blocks)
        expected.append(left - (after if iteration + 1 < iterations else 0))
        left = after
    assert list(sizes) == expected and sum(sizes) == blocks and min(sizes) >= 1


@pytest.mark.parametrize("family", ["mar", "randar"])
def test_of_several_images_the_one_with_the_shortest_code_is_kept(family: str) -> None:
    backbone = tiny(family)
    data, labels = images(backbone), torch.tensor([0, 1, 2, 0])
    named = make_policy("random@best_of:3", backbone)
    assert named.spec is not None and named.spec.candidates == 3
    how = (backbone, data, named.policy, named.budgets, labels, Sampling())
    sets = [generate_images(*how, seed=4 * number) for number in range(3)]
    lengths = torch.stack([drawn_code_lengths(backbone, data, made) for made in sets])
    kept = generate_images(*how, seed=0, candidates=3)
    for image in range(4):
        assert torch.equal(kept.tokens[image], sets[int(lengths[:, image].argmin())].tokens[image])
    assert torch.allclose(drawn_code_lengths(backbone, data, kept), lengths.amin(0), rtol=1e-4)
    # the length is that of revealing the drawn image in the drawn order
    replayed = replace(data, tokens=sets[0].tokens, labels=labels, identity=None)
    core = NextBlockCore(backbone, replayed, 4, CoreConfig())
    policy = scripted(iter(sets[0].reveal_step.argsort(1).T))
    charged = roll_out(core, policy, torch.Generator(), torch.arange(4)).decode_nll
    assert torch.allclose(charged, lengths[0], rtol=1e-3)


def test_what_cannot_be_scheduled_is_refused() -> None:
    with pytest.raises(ValueError, match="cosine:17 must have between 1 and 16 iterations"):
        make_policy("random@cosine:17", BACKBONE)
    with pytest.raises(ValueError, match="a threshold does not say how many steps there are"):
        make_policy("high_entropy@semifast:2@<1.5", BACKBONE)


@pytest.mark.parametrize("mode", ["fast", "semifast:2"])
def test_a_mode_plays_alike_where_its_scores_are_taken_down(mode: str) -> None:
    named = make_policy(f"high_entropy@{mode}", BACKBONE)
    log, orders = ScoreLog(), []
    for policy in (named.policy, recorded(named, log)):
        core = NextBlockCore(BACKBONE, images(BACKBONE), 3, CoreConfig(strict=True))
        orders.append(roll_out(core, policy, torch.Generator(), torch.arange(3)).order)
    assert torch.equal(*orders)
    assert log.scores is not None and len(log.scores) == BACKBONE.geometry.num_blocks
