"""The batched core: what is legal, what ends, what is seen, and that nothing hidden leaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from orderrl.backbones import OrderRobustTransformer, Sampling, load_backbone
from orderrl.backbones.check import naive_block_losses
from orderrl.data import TokenSet, load_split
from orderrl.envs import CoreConfig, NextBlockCore
from orderrl.envs.replay import replay_return
from orderrl.envs.reward import ILLEGAL_REWARD
from tests.envs.helpers import make_core, play
from tests.helpers import as_action, random_steps, tiny_backbone, tiny_images

BUDGETS: list[tuple[int, ...]] = [(1,), (1, 2, 4)]


@pytest.mark.parametrize("shape", [(6, 6, 2), (4, 6, 2), (3, 3, 1)], ids=str)
@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
def test_losses_and_observations_equal_recomputation(shape: tuple[int, int, int], budgets: tuple[int, ...]) -> None:
    """After any steps of any sizes, cached states equal states built from nothing in the order of reveal."""
    backbone = tiny_backbone(*shape)
    core, blocks = make_core(2, budgets, backbone=backbone), backbone.geometry.num_blocks
    steps = [random_steps(blocks, budgets, row) for row in range(2)]
    core.reset()
    for number in range(max(map(len, steps)) - 1):
        chosen = [s[number] if number < len(s) else [0] for s in steps]
        core.step(torch.stack([as_action(c, budgets, blocks) for c in chosen]))
        for row in range(2):
            shown = [b for step in steps[row][: number + 1] for b in step]
            hidden = [b for b in range(blocks) if b not in shown]
            assert core.visible[row].nonzero().flatten().tolist() == sorted(shown)
            assert (core.losses[row, shown] == 0).all() and (core.hidden[row, shown] == 0).all()
            if not hidden:
                continue
            one = (core.tokens[[row]], core.labels[[row]])
            naive = naive_block_losses(backbone, *one, torch.tensor([shown]), torch.tensor([hidden]))
            assert torch.allclose(core.losses[row, hidden], naive[0], atol=1e-5)
            prefix = backbone.start(one[1])
            for b in shown:
                prefix = backbone.extend(prefix, one[0], torch.tensor([[b]]), torch.ones(1, dtype=torch.int64))
            first, entropy = backbone.observe(prefix, torch.tensor([hidden]))
            assert torch.allclose(core.hidden[row, hidden], first[0], atol=1e-5)
            assert torch.allclose(core.entropy[row, hidden], entropy[0], atol=1e-5)


def test_order_and_rank_are_recorded() -> None:
    core = make_core(3, (1, 2, 4))
    played = play(core, 4)
    for row, steps in enumerate(played.steps):
        for number, step in enumerate(steps):
            assert core.reveal_step[row, step].tolist() == [number] * len(step)
            assert core.reveal_rank[row, step].tolist() == list(range(len(step)))


# ---------------------------------------------------------------------- legality


ILLEGAL: dict[str, tuple[list[int], tuple[int, ...]]] = {
    "visible": ([0], (1,)),
    "out of range": ([9], (1,)),
    "negative": ([-1], (1,)),
    "duplicate among the first k": ([3, 3, 4, 5, 1], (1, 2, 4)),
    "visible among the first k": ([3, 0, 4, 5, 1], (1, 2, 4)),
    "out of range among the first k": ([3, 1, 4, 9, 2], (1, 2, 4)),
    "negative among the first k": ([-3, 1, 4, 8, 0], (1, 2, 4)),
    "no such budget": ([3, 4, 5, 6, 3], (1, 2, 4)),
    "negative budget": ([3, 4, 5, 6, -1], (1, 2, 4)),
}


def begun(budgets: tuple[int, ...], strict: bool, mode: str = "teacher") -> NextBlockCore:
    """Two states, block 0 visible."""
    core = make_core(2, budgets, mode, strict=strict)
    core.reset()
    core.step(torch.stack([as_action([0], budgets, 9)] * 2))
    return core


@pytest.mark.parametrize("mode", ["teacher", "generate"])
@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_actions_void_the_step(name: str, mode: str) -> None:
    entries, budgets = ILLEGAL[name]
    wrong = torch.tensor(entries[0] if budgets == (1,) else entries)
    legal = as_action([8], budgets, 9)
    core = begun(budgets, False, mode)
    twin = begun(budgets, False, mode)
    before = core.observation()
    result = core.step(torch.stack([wrong, legal]))
    paid = twin.step(torch.stack([legal, legal])).reward
    assert result.illegal.tolist() == [True, False]
    assert result.reward.tolist() == pytest.approx([ILLEGAL_REWARD, paid[1].item()], abs=1e-5)
    assert not result.terminated.any() and not result.truncated.any()
    after = core.observation()
    for key, value in before.items():
        assert torch.allclose(after[key][0].float(), value[0].float(), atol=1e-6)
    assert core.visible.sum(1).tolist() == [1, 2] and core.step_count.tolist() == [2, 2]
    core.step(torch.stack([legal, as_action([7], budgets, 9)]))  # and the episode goes on as if nothing had been
    assert torch.allclose(core.losses[0], twin.losses[0], atol=1e-5)
    assert torch.allclose(core.hidden[0], twin.hidden[0], atol=1e-5) or mode == "generate"
    strict = begun(budgets, True, mode)
    with pytest.raises(ValueError, match=r"sub-environment 0 is illegal.*hidden now: \[1, 2") as caught:
        strict.step(torch.stack([wrong, legal]))
    assert "\n" not in str(caught.value)
    assert strict.visible.sum(1).tolist() == [1, 1] and strict.step_count.tolist() == [1, 1]


@pytest.mark.parametrize("past", [0, 3, 9, -7, 2**40], ids=str)
def test_entries_past_the_budget_are_ignored(past: int) -> None:
    """They may be visible, repeated or out of range."""
    core, twin = begun((1, 2, 4), True), begun((1, 2, 4), True)
    one = core.step(torch.tensor([[3, 5, past, past, 1]] * 2))
    other = twin.step(torch.tensor([[3, 5, 7, 8, 1]] * 2))
    assert torch.equal(one.reward, other.reward) and torch.equal(core.visible, twin.visible)
    assert torch.equal(core.hidden, twin.hidden)


def test_budgets_are_legal_up_to_what_is_hidden() -> None:
    core = make_core(1, (2, 3, 4), strict=False)
    core.reset()
    core.step(torch.tensor([[0, 1, 2, 3, 2]]))
    core.step(torch.tensor([[4, 5, 0, 0, 0]]))
    assert core.budget_mask().tolist() == [[True, True, False]]
    assert core.step(torch.tensor([[6, 7, 8, 0, 2]])).illegal.all()  # 4 of 3
    core.step(torch.tensor([[6, 7, 0, 0, 0]]))
    assert core.budget_mask().tolist() == [[True, False, False]]  # none is: the smallest, cut short
    result = core.step(torch.tensor([[8, 0, 0, 0, 0]]))
    assert result.terminated.all() and not result.illegal.any()


def test_a_single_large_budget_is_cut_short_at_the_end() -> None:
    core = make_core(2, (4,))
    core.reset()
    for entries in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 8, 0, -1]):
        result = core.step(torch.tensor([[*entries, 0]] * 2))
    assert result.terminated.all() and core.reveal_step.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 2]] * 2


@pytest.mark.parametrize("mode", ["teacher", "generate"])
def test_truncation_after_twice_the_blocks(mode: str) -> None:
    core = make_core(2, mode=mode, strict=False)
    core.reset()
    for number in range(18):
        block = torch.tensor([0, min(number, 8)])
        result = core.step(block)
        assert result.truncated.tolist() == [number == 17, False]
        assert result.terminated.tolist() == [False, number >= 8]
    visible = core.visible.clone()
    result = core.step(torch.tensor([5, 5]))  # a truncated episode is over
    assert torch.equal(core.visible, visible) and result.reward.tolist() == [0, 0]
    assert result.truncated.tolist() == [True, False] and result.terminated.tolist() == [False, True]
    core.reset()
    assert not core.finished.any()


@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
def test_a_last_step_that_completes_is_no_truncation(budgets: tuple[int, ...]) -> None:
    core = make_core(1, budgets, strict=False)
    core.reset()
    for _ in range(9):
        core.step(torch.full_like(as_action([0], budgets, 9)[None], -1))
    for block in range(9):
        result = core.step(as_action([block], budgets, 9)[None])
    assert result.terminated.all() and not result.truncated.any()


@pytest.mark.parametrize("mode", ["teacher", "generate"])
def test_finished_episodes_ignore_actions(mode: str) -> None:
    core = make_core(2, (1, 2, 4), mode)
    play(core)
    before = (core.tokens.clone(), core.step_count.clone(), core.reveal_step.clone(), core.observation())
    for action in ([0, 0, 0, 0, 0], [-1, 99, 0, 0, 7]):
        result = core.step(torch.tensor([action] * 2))
        assert result.reward.tolist() == [0, 0] and result.terminated.all() and not result.illegal.any()
    assert torch.equal(core.tokens, before[0]) and torch.equal(core.step_count, before[1])
    assert torch.equal(core.reveal_step, before[2])
    assert (core.observation() == before[3]).all()


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (torch.zeros(2), "int64, got torch.float32"),
        (torch.zeros(2, dtype=torch.bool), "int64, got torch.bool"),
        (torch.zeros(3, dtype=torch.int64), r"shape \(2,\), got \(3,\)"),
        (torch.zeros(2, 1, dtype=torch.int64), r"shape \(2,\), got \(2, 1\)"),
    ],
)
def test_wrong_actions_are_refused(actions: Tensor, message: str) -> None:
    core = make_core(2, strict=False)
    core.reset()
    with pytest.raises(ValueError, match=message):
        core.step(actions)


def test_stepping_before_reset_is_refused() -> None:
    with pytest.raises(ValueError, match="before reset"):
        make_core(2).step(torch.tensor([0, 1]))


def test_impossible_environments_are_refused() -> None:
    backbone = tiny_backbone()
    data = tiny_images(backbone)
    wrong: list[tuple[Any, str]] = [
        (lambda: make_core(budgets=(1, 10)), r"budgets=\(1, 10\) exceed the 9 blocks.*up to 9"),
        (lambda: make_core(budgets=(2, 1)), "ascending"),
        (lambda: make_core(budgets=()), "budgets"),
        (lambda: make_core(budgets=(0, 1)), "budgets"),
        (lambda: make_core(mode="dream"), "mode='dream'.*teacher, generate"),
        (lambda: make_core(num_envs=0), "num_envs"),
        (lambda: make_core(data=replace(data, vocab_size=6)), "does not fit the backbone"),
        (
            lambda: make_core(data=tiny_images(tiny_backbone(4, 6, 2))),
            r"\(4, 6, 5, 0, 3\) does not .*\(6, 6, 5, 0, 3\)",
        ),
        (lambda: tiny_backbone(6, 6, 4), "block_size=4 must divide the token grid 6x6"),
    ]
    for build, message in wrong:
        with pytest.raises(ValueError, match=message) as caught:
            build()
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- leakage


@pytest.mark.parametrize("shape", [(6, 6, 2), (4, 6, 2), (3, 3, 1)], ids=str)
@pytest.mark.parametrize("form", ["future_loss", "charged"])
@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
def test_hidden_tokens_change_no_observation(shape: tuple[int, int, int], form: str, budgets: tuple[int, ...]) -> None:
    """Images with other tokens in the hidden blocks look the same; with another visible one they do not."""
    backbone = tiny_backbone(*shape)
    data, blocks, owner = tiny_images(backbone, 1), backbone.geometry.num_blocks, backbone.geometry.token_block
    reward: dict[str, Any] = {"objective": "likelihood", "form": form}
    for row in range(2):
        steps = random_steps(blocks, budgets, row)
        order = torch.tensor([b for step in steps for b in step])
        # after so many steps the first image looks like another one, and unlike a third one
        changed = (data.tokens + 1) % backbone.vocab_size
        ends = accumulate(map(len, steps[:-1]), initial=0)
        shown = [torch.isin(owner, order[:end]) for end in ends]
        alike = [torch.where(seen, data.tokens, changed) for seen in shown]
        unlike = [torch.where(seen & (owner != order[0]), data.tokens, changed) for seen in shown]
        tokens = torch.cat([data.tokens, *alike, *unlike])
        labels = data.labels.expand(len(tokens))
        images = replace(data, tokens=tokens, labels=labels)
        core = make_core(len(tokens), budgets, backbone=backbone, data=images, **reward)
        core.reset(index=torch.arange(len(tokens)))
        for count, step in enumerate(steps):
            for key, value in core.observation().items():
                assert torch.allclose(value[0].float(), value[1 + count].float(), atol=1e-5), (key, count)
            if count and not bool(core.visible.all()):
                assert (core.hidden[1 + len(steps) + count] - core.hidden[0]).abs().max() > 1e-4
            action = as_action(step, budgets, blocks)
            core.step(action.expand(len(tokens), *action.shape))


def test_observations_are_copies() -> None:
    core = make_core(2)
    core.reset()
    first = core.observation()
    kept = first.clone()
    core.step(torch.tensor([1, 2]))
    assert (first == kept).all()
    core.observation()["hidden"].zero_()
    assert core.hidden.abs().max() > 0


# ---------------------------------------------------------------------- seeds and batches


@pytest.mark.parametrize("mode", ["teacher", "generate"])
def test_a_state_does_not_depend_on_its_batch(mode: str) -> None:
    """Sub-environment i of seed s is a single environment of seed s + i, over several episodes and partial resets."""
    batch = make_core(3, (1, 2, 4), mode, seed=5)
    alone = [make_core(1, (1, 2, 4), mode, seed=5 + i) for i in range(3)]
    batch.reset()
    for core in alone:
        core.reset()
    steps = [[random_steps(9, (1, 2, 4), 10 * i + e) for e in range(4)] for i in range(3)]
    place, ended = [0, 0, 0], [0, 0, 0]
    for _ in range(12):
        chosen = [steps[i][ended[i]][place[i]] for i in range(3)]
        actions = torch.stack([as_action(c, (1, 2, 4), 9) for c in chosen])
        result = batch.step(actions)
        for i, core in enumerate(alone):
            single = core.step(actions[[i]])
            assert single.reward[0].item() == pytest.approx(result.reward[i].item(), abs=1e-5)
            assert single.terminated[0] == result.terminated[i]
            assert torch.equal(core.tokens[0], batch.tokens[i]) and core.labels[0] == batch.labels[i]
            assert torch.allclose(core.hidden[0], batch.hidden[i], atol=1e-5)
            place[i] += 1
            if single.terminated[0]:
                core.reset()
                ended[i], place[i] = ended[i] + 1, 0
        if result.terminated.any():
            batch.reset(result.terminated.nonzero().flatten())
    assert min(ended) >= 1 and len({int(e) for e in batch.episode}) >= 1


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("mode", ["teacher", "generate"])
def test_episodes_may_begin_one_after_another(mode: str, guidance: float) -> None:
    """A first reset of some sub-environments, then of the others, is a reset of all."""
    together, apart = (make_core(4, (1, 2), mode, sampling=Sampling(guidance=guidance)) for _ in range(2))
    together.reset()
    for rows in ([2], [0, 3], [1]):
        apart.reset(torch.tensor(rows))
    actions = torch.tensor([[3, 1, 1], [0, 2, 0], [8, 4, 1], [5, 6, 0]])
    for core in (together, apart):
        core.step(actions)
    assert torch.equal(together.tokens, apart.tokens) and torch.equal(together.visible, apart.visible)
    assert torch.allclose(together.hidden, apart.hidden, atol=1e-5)


def test_seeds_determine_images_and_episodes_differ() -> None:
    def images(seed: int, episodes: int = 12) -> list[int]:
        core = make_core(1, seed=seed)
        drawn = []
        for _ in range(episodes):
            core.reset()
            drawn.append(int(core.image_index))
        return drawn

    assert images(0) == images(0) and images(0) != images(1)
    assert len(set(images(0))) > 4
    core = make_core(2, seed=0)
    core.seed(7)
    core.reset()
    assert core.image_index.tolist() == [images(7, 1)[0], images(8, 1)[0]]
    core.reset()
    core.seed(torch.tensor([3]), torch.tensor([1]))  # one history begins again, the other goes on
    core.reset()
    assert core.image_index.tolist() == [images(7, 3)[2], images(3, 1)[0]]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda core: NextBlockCore(core.backbone, core.data.first(0), 1, core.config), "has no image to reveal"),
        (lambda core: core.reset(torch.tensor([4])), r"rows must be distinct numbers \(m,\) from 0 to 3, got \[4\]"),
        (lambda core: core.reset(torch.tensor([-1])), "rows must be distinct"),
        (lambda core: core.reset(torch.tensor([0, 0])), "rows must be distinct"),
        (lambda core: core.reset(torch.tensor([True, False, True, True])), "rows must be int64"),
        (lambda core: core.seed(torch.tensor([1, 2])), "seeds must be 4, one for each sub-environment"),
        (lambda core: core.step(torch.arange(4), torch.ones(4)), r"restart must be \(4,\) bool"),
        (lambda core: core.step(torch.arange(4), torch.tensor([True])), r"restart must be \(4,\) bool"),
    ],
)
def test_what_a_core_cannot_play_is_refused(call: Callable[[NextBlockCore], Any], match: str) -> None:
    core = make_core(4)
    core.reset()
    with pytest.raises(ValueError, match=match):
        call(core)


# ---------------------------------------------------------------------- generate


@pytest.mark.parametrize("budgets", [(1,), (1, 2, 4), (4,)], ids=str)
@pytest.mark.parametrize("reward", [{}, {"objective": "likelihood", "form": "charged", "step_cost": 0.3}], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_hindsight_return_is_the_teachers(budgets: tuple[int, ...], reward: dict[str, Any], guidance: float) -> None:
    core = make_core(4, budgets, "generate", sampling=Sampling(guidance=guidance), **reward)
    played = play(core, 6)
    images = TokenSet("drawn", "test", core.tokens.clone(), core.labels.clone(), 6, 6, 5, 3)
    teacher = make_core(4, budgets, data=images, **reward)
    paid = play(teacher, 6, torch.arange(4))
    for row, steps in enumerate(played.steps):
        assert (played.rewards[: len(steps) - 1, row] == 0).all()
        wanted = paid.rewards[:, row].sum().item()
        assert played.rewards[len(steps) - 1, row].item() == pytest.approx(wanted, abs=1e-5)


def test_hindsight_return_skips_void_steps() -> None:
    core = make_core(2, (1, 2, 4), "generate", strict=False, step_cost=0.5)
    core.reset()
    void = torch.tensor([[0, 0, 0, 0, 1]] * 2)
    core.step(void)
    for step in ([0, 1, 2, 3], [4, 5], [6], [7, 8]):
        result = core.step(torch.stack([as_action(step, (1, 2, 4), 9)] * 2))
        core.step(void)
    core.reveal_step = core.reveal_step // 2  # as if no step had been void
    assert torch.allclose(result.reward, replay_return(core, torch.arange(2)), atol=1e-5)


def test_generated_tokens_follow_the_backbone() -> None:
    """The first block of many episodes is distributed as the backbone says."""
    backbone, many = tiny_backbone(2, 2, 1, 3), 6000
    core = make_core(many, mode="generate", backbone=backbone)
    core.reset()
    labels = core.labels.clone()
    core.step(torch.full((many,), 2))
    order = torch.tensor([[2, 0, 1, 3]])
    for label in range(3):
        logits = backbone.teacher_forced(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([label]), order)
        probability = logits[0, 0].softmax(-1)
        drawn = core.tokens[labels == label, 2]
        frequency = drawn.bincount(minlength=3) / len(drawn)
        assert ((frequency - probability).abs() < 4 * (probability * (1 - probability) / len(drawn)).sqrt()).all()
    assert labels.bincount(minlength=3).min() > 1800
    core.reset()
    again = labels == core.labels
    assert 0.2 < again.float().mean() < 0.5  # the next episode's labels are drawn anew


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=1)], ids=str)
def test_every_episode_draws_its_own_tokens(sampling: Sampling) -> None:
    """Under one label and one order, episodes differ by their numbers alone; with top_k = 1 by nothing."""
    core = make_core(2, mode="generate", sampling=sampling)
    drawn = []
    for _ in range(4):
        core.reset(index=0)
        for block in range(9):
            core.step(torch.full((2,), block))
        drawn += [tuple(row) for row in core.tokens.tolist()]
    assert len(set(drawn)) == (1 if sampling.top_k == 1 else 8)


def test_generation_sees_what_it_drew() -> None:
    """Losses of a generated image, replayed, equal those of the cache that generated it."""
    core = make_core(2, mode="generate", sampling=Sampling(guidance=1.7))
    core.reset()
    order = torch.stack([torch.randperm(9) for _ in range(2)])
    for step in range(6):
        core.step(order[:, step])
    teacher = make_core(2, data=TokenSet("drawn", "test", core.tokens, core.labels, 6, 6, 5, 3))
    teacher.reset(index=torch.arange(2))
    for step in range(6):
        teacher.step(order[:, step])
    assert torch.allclose(core.hidden, teacher.hidden, atol=1e-5)
    null = torch.full_like(core.labels, 3)
    prefix = core.backbone.start(null)
    for step in range(6):
        prefix = core.backbone.extend(prefix, core.tokens, order[:, [step]], torch.ones_like(null))
    wanted, _ = core.backbone.observe(prefix, order[:, 6:])
    found, _ = core.backbone.observe(core.unconditional, order[:, 6:])
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize(("mode", "method"), [("teacher", "context_loss"), ("generate", "decode")])
def test_only_revealed_blocks_are_scored_or_drawn(mode: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that reveals one block, or is finished, does not pay for others that reveal four."""
    core = make_core(5, (1, 2, 4), mode, objective="likelihood", form="charged")
    core.config = replace(core.config, hindsight=False)
    original, chains = getattr(core.backbone, method), 0

    def counted(prefix: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal chains
        chains += next(part for part in arguments if part.ndim == 2 and part.shape[1] <= 4).numel()
        return original(prefix, *arguments, **named)

    monkeypatch.setattr(core.backbone, method, counted)
    play(core)
    assert chains == 5 * core.geometry.num_blocks


def test_without_hindsight_nothing_is_paid() -> None:
    backbone = tiny_backbone()
    config = CoreConfig("generate", hindsight=False)
    core = NextBlockCore(backbone, tiny_images(backbone), 2, config)
    assert (play(core).rewards == 0).all()


# ---------------------------------------------------------------------- shipped weights


def test_the_shipped_backbone_rewards_context() -> None:
    """On real digits revealing helps: the likelihood return of any order is positive for nearly every image."""
    backbone = load_backbone("digits")
    assert isinstance(backbone, OrderRobustTransformer)
    core = make_core(24, (4,), backbone=backbone, data=load_split("digits", "test"), objective="likelihood")
    played = play(core)
    assert (played.rewards.sum(0) > 0).float().mean() > 0.8
    assert played.losses[0].sum(1).mean() > (played.losses[0].sum(1) - 64 * played.rewards.sum(0)).mean()
