"""Policies: legal everywhere, blind to what is hidden, and each what its name says."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch

from orderrl.agents.confidence import Confidence, HindsightConfidence
from orderrl.agents.orders import ORDERS
from orderrl.agents.play import act, roll_out
from orderrl.agents.policies import (
    SCORERS,
    Lookahead,
    Oracle,
    PairedPolicy,
    PlannerPolicy,
    Policy,
    RankingPolicy,
    ReferencePolicy,
    all_scores,
    fixed_order,
    planner_scorer,
    uniform_random,
)
from orderrl.agents.registry import make_policy
from orderrl.agents.schedules import entropy_threshold, fixed, growing
from orderrl.data import TokenSet
from orderrl.envs.core import NextBlockCore
from orderrl.planner import OrderHead, save_planner
from tests.agents.helpers import mid_episode, tiny_core, tiny_planner
from tests.helpers import block_loss, tiny_backbone, tiny_images

GEOMETRY = tiny_backbone().geometry
BUDGETS = [(1,), (1, 2, 4)]
Maker = Callable[[tuple[int, ...]], Policy | ReferencePolicy]


def ranking(scorer_name: str, spacing: float = 0.0) -> Maker:
    scorer = fixed_order(ORDERS[scorer_name](GEOMETRY)) if scorer_name in ORDERS else SCORERS[scorer_name]
    return lambda budgets: RankingPolicy(scorer, GEOMETRY, budgets, fixed(len(budgets) - 1), spacing)


POLICIES: dict[str, Maker] = {
    "multiscale": ranking("multiscale"),
    "random": ranking("random"),
    "spaced_random": ranking("random", spacing=2.0),
    "low_entropy": ranking("low_entropy"),
    "high_entropy": ranking("high_entropy"),
    "planner": lambda budgets: PlannerPolicy(tiny_planner(num_budgets=len(budgets)), budgets),
    "sampled_planner": lambda budgets: PlannerPolicy(
        tiny_planner(reasoning_steps=2, num_budgets=len(budgets)), budgets, False
    ),
    "planner_scores": lambda budgets: RankingPolicy(planner_scorer(tiny_planner()), GEOMETRY, budgets),
    "paired": lambda budgets: PairedPolicy(
        tiny_planner(pairs=True, reasoning_steps=2), budgets, fixed(len(budgets) - 1)
    ),
    "threshold": lambda budgets: RankingPolicy(
        SCORERS["low_entropy"], GEOMETRY, budgets, entropy_threshold(budgets, 1.4)
    ),
    "oracle": lambda budgets: Oracle(budgets, fixed(len(budgets) - 1)),
    "lookahead": lambda budgets: Lookahead(1, budgets, fixed(len(budgets) - 1)),
    "confidence": lambda budgets: Confidence(budgets, fixed(len(budgets) - 1)),
    "hindsight_confidence": lambda budgets: HindsightConfidence(budgets, fixed(len(budgets) - 1), 0.1),
}
OBSERVING = [name for name in POLICIES if name not in ("oracle", "lookahead", "hindsight_confidence")]


def with_other_hidden_tokens(core: NextBlockCore) -> TokenSet:
    """The images of a core's episodes with every hidden token changed."""
    hidden = ~core.visible[:, core.geometry.token_block]
    tokens = torch.where(hidden, (core.tokens + 1) % core.backbone.vocab_size, core.tokens)
    images = core.data
    return TokenSet(
        "changed", "test", tokens, core.labels, images.height, images.width, images.vocab_size, images.num_classes
    )


@pytest.mark.parametrize("mode", ["teacher", "generate"])
@pytest.mark.parametrize("budgets", BUDGETS)
@pytest.mark.parametrize("name", POLICIES)
def test_every_action_is_legal(name: str, budgets: tuple[int, ...], mode: str) -> None:
    """The core is strict, and nine blocks are no multiple of four: the last steps must take smaller budgets."""
    if (name, mode) == ("oracle", "generate"):
        pytest.skip("refused, see below")
    core = tiny_core(budgets, mode=mode)
    record = roll_out(core, POLICIES[name](budgets), torch.Generator().manual_seed(0))
    assert record.visible[-1].all()
    if budgets == (1,):
        assert (record.steps == 9).all()


@pytest.mark.parametrize("budgets", BUDGETS)
@pytest.mark.parametrize("name", OBSERVING)
def test_actions_do_not_depend_on_hidden_tokens(name: str, budgets: tuple[int, ...]) -> None:
    policy = POLICIES[name](budgets)
    core = mid_episode(tiny_core(budgets), steps=3)
    twin = tiny_core(budgets, data=with_other_hidden_tokens(core))
    twin.reset(index=torch.arange(4))
    for step in range(3):  # the same reveals again
        block = (core.reveal_step == step).long().argmax(1)
        twin.step(block if budgets == (1,) else torch.stack([block, *[block * 0] * 4], 1))
    assert torch.equal(core.visible, twin.visible) and not torch.equal(core.losses, twin.losses)
    first, second = (act(policy, c, torch.Generator().manual_seed(0)) for c in (core, twin))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ORDERS)
def test_a_fixed_order_is_followed(name: str) -> None:
    order = ORDERS[name](GEOMETRY)
    policy = RankingPolicy(fixed_order(order), GEOMETRY)
    record = roll_out(tiny_core(), policy, torch.Generator())
    assert torch.equal(record.reveal_step.argsort(1), order.expand(4, -1))


@pytest.mark.parametrize(("name", "sign"), [("low_entropy", 1), ("high_entropy", -1)])
def test_entropy_orders_take_the_extreme_hidden_block(name: str, sign: int) -> None:
    core = mid_episode(tiny_core())
    block = act(ranking(name)((1,)), core, torch.Generator())
    best = (sign * core.entropy).masked_fill(core.visible, torch.inf).argmin(1)
    assert torch.equal(block, best)


def test_a_growing_schedule_and_a_list_of_budgets() -> None:
    policy = RankingPolicy(uniform_random, GEOMETRY, (1, 2, 4), growing((1, 2, 4), (1, 2, 4, 2)))
    record = roll_out(tiny_core((1, 2, 4)), policy, torch.Generator().manual_seed(0))
    assert [(record.reveal_step == step).sum(1).tolist() for step in range(4)] == [[n] * 4 for n in (1, 2, 4, 2)]
    single = RankingPolicy(uniform_random, GEOMETRY, [1])  # type: ignore[arg-type]
    assert act(single, mid_episode(tiny_core()), torch.Generator()).shape == (4,)


def test_spacing_keeps_blocks_of_one_step_apart() -> None:
    """The stronger the penalty, the fewer steps of random blocks hold two that touch."""
    backbone = tiny_backbone(4, 4, 1)

    def touching(spacing: float) -> int:
        core = tiny_core((4,), 64, backbone=backbone)
        core.reset()
        policy = RankingPolicy(uniform_random, backbone.geometry, (4,), spacing=spacing)
        blocks = act(policy, core, torch.Generator().manual_seed(0))[:, :4]
        pairs = backbone.geometry.touching[blocks[:, :, None], blocks[:, None, :]]
        return int((pairs.sum((1, 2)) > 4).sum())

    assert touching(4.0) < touching(1.0) < touching(0.0)
    assert touching(4.0) < 0.2 * touching(0.0)
    # raster apart: the first block is kept, the next ones keep their distance to it and to each other
    core = tiny_core((4,), 1, backbone=backbone)
    core.reset()
    policy = RankingPolicy(fixed_order(ORDERS["raster"](backbone.geometry)), backbone.geometry, (4,), spacing=50.0)
    blocks = act(policy, core, torch.Generator())[0, :4]
    assert blocks[0] == 0
    assert backbone.geometry.touching[blocks][:, blocks].sum() == 4


# ---------------------------------------------------------------------- planners


@pytest.mark.parametrize("budgets", [(1, 2), (1, 2, 4, 8)])
def test_a_planner_with_another_number_of_budgets_is_refused(budgets: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"need a planner with {len(budgets)} budgets, not 3"):
        PlannerPolicy(tiny_planner(num_budgets=3), budgets)


def test_planner_ranks_by_score_and_takes_its_likeliest_legal_budget() -> None:
    planner = tiny_planner(num_budgets=3)
    core = mid_episode(tiny_core((1, 2, 4), 8), steps=7)  # two blocks left: budget 4 is illegal
    output = planner(core.observation())
    scores, budget_logits = output.scores, output.budget_logits
    action = act(PlannerPolicy(planner, (1, 2, 4)), core, torch.Generator())
    assert torch.equal(action[:, :2], scores.masked_fill(core.visible, -torch.inf).topk(2).indices)
    assert torch.equal(action[:, -1], budget_logits[:, :2].argmax(1))
    single = act(RankingPolicy(planner_scorer(planner), GEOMETRY, (1, 2, 4)), core, torch.Generator())
    assert torch.equal(action[:, :2], single[:, :2])


def test_sampling_planner_follows_its_generator() -> None:
    core = mid_episode(tiny_core((1, 2, 4), 16), 1)
    policy = PlannerPolicy(tiny_planner(num_budgets=3), (1, 2, 4), deterministic=False)
    torch.manual_seed(0)
    first, second, other = (act(policy, core, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)


def paired_planner() -> OrderHead:
    """Its dependence matters as much as its scores."""
    planner = tiny_planner(pairs=True)
    planner.set_pair_strength(3.0)
    return planner


def test_paired_policy_builds_the_best_set_block_by_block() -> None:
    """Against the value of every larger set, computed as a whole: scores minus the dependence of all its pairs."""
    planner, core = paired_planner(), mid_episode(tiny_core((4,), 8), steps=1)
    output = planner(core.observation())
    blocks = act(PairedPolicy(planner, (4,)), core, torch.Generator())[:, :4]

    def value(row: int, chosen: list[int]) -> float:
        pairs = sum(output.dependence[row, a, b].item() for a, b in combinations(chosen, 2))
        return output.scores[row, chosen].sum().item() - 3.0 * pairs

    for row, chosen in enumerate(blocks.tolist()):
        for place, block in enumerate(chosen):
            left = [b for b in range(9) if not core.visible[row, b] and b not in chosen[:place]]
            assert block == max(left, key=lambda b: value(row, [*chosen[:place], b]))
    by_scores = act(RankingPolicy(planner_scorer(planner), GEOMETRY, (4,)), core, torch.Generator())[:, :4]
    assert torch.equal(blocks[:, 0], by_scores[:, 0]) and not torch.equal(blocks, by_scores)


def saved(path: Path, planner: OrderHead) -> Path:
    save_planner(path, planner, {
        "agent": {"name": "bc", "target": "pairs"}, "objective": "context", "budgets": [1], "seed": 0,
    })  # fmt: skip
    return path


def test_a_paired_policy_by_name(tmp_path: Path) -> None:
    planner, core = paired_planner(), mid_episode(tiny_core((4,), 8), steps=1)
    path = saved(tmp_path / "planner.safetensors", planner)
    named = make_policy(f"paired_{path}@4", tiny_backbone())
    assert named.name == "paired_bc_pairs_r0@4" and named.budgets == (4,)
    expected = act(PairedPolicy(planner, (4,)), core, torch.Generator())
    assert torch.equal(act(named.policy, core, torch.Generator()), expected)
    spaced = make_policy(f"spaced_{path}@4", tiny_backbone())
    assert not torch.equal(act(spaced.policy, core, torch.Generator()), expected)


def test_a_paired_policy_needs_pairs(tmp_path: Path) -> None:
    path = saved(tmp_path / "planner.safetensors", tiny_planner())
    with pytest.raises(ValueError, match=r"policy 'paired_.*planner.safetensors@4' needs a planner with pairs=True"):
        make_policy(f"paired_{path}@4", tiny_backbone())
    with pytest.raises(ValueError, match="a paired policy needs a planner with pairs=True"):
        PairedPolicy(tiny_planner())


# ---------------------------------------------------------------------- references


@pytest.mark.parametrize("weight", ["uniform", "far"])
def test_oracle_takes_the_argmax_of_naive_utilities(weight: str) -> None:
    """U of every candidate from losses that are computed one by one with no cache."""
    core = mid_episode(tiny_core(num_envs=2, weight=weight), steps=5)
    utility = torch.full((2, 9), -torch.inf)
    for row in range(2):
        shown = core.reveal_step[row].masked_fill(~core.visible[row], 99).argsort()[:5].tolist()
        hidden = [block for block in range(9) if block not in shown]

        def loss(visible: list[int], block: int, row: int = row) -> float:
            return block_loss(tiny_backbone(), core.tokens[row], core.labels[row], visible, block)

        for candidate in hidden:
            utility[row, candidate] = sum(
                core.reward.pair_weights[candidate, b].item() * (loss(shown, b) - loss([*shown, candidate], b)) / 36
                for b in hidden
                if b != candidate
            )
    scores = all_scores(Oracle(), core)
    assert torch.allclose(scores[~core.visible], utility[~core.visible], atol=1e-5)
    assert torch.equal(Oracle().act(core), utility.argmax(1))


def test_oracle_refuses_to_generate() -> None:
    core = tiny_core(mode="generate")
    core.reset()
    with pytest.raises(ValueError, match="oracle policy needs the true tokens: use mode='teacher'"):
        Oracle().act(core)


def test_lookahead_is_keyed() -> None:
    """The same choices whatever the batch and the true hidden tokens; others for another seed, episode or step."""
    policy, core = Lookahead(2), mid_episode(tiny_core(num_envs=6, seed=5), steps=2)
    scores = all_scores(policy, core)
    assert torch.equal(scores, all_scores(policy, core))
    for row in (0, 3):
        alone = tiny_core(num_envs=1, seed=5 + row)
        alone.reset()
        for step in range(2):
            alone.step((core.reveal_step[row] == step).long().argmax()[None])
        assert torch.equal(alone.tokens[0], core.tokens[row])
        assert torch.allclose(all_scores(policy, alone)[0], scores[row], atol=1e-5)
    changed = tiny_core(num_envs=6, seed=5, data=with_other_hidden_tokens(core))
    changed.reset(index=torch.arange(6))
    for step in range(2):
        changed.step((core.reveal_step == step).long().argmax(1))
    assert torch.allclose(all_scores(policy, changed), scores, atol=1e-5)
    for part in (core.seeds, core.episode, core.step_count):
        part += 1
        assert not torch.allclose(all_scores(policy, core), scores, atol=1e-3)
        part -= 1


def test_references_handle_rows_at_different_lengths() -> None:
    """Finished rows and rows with different numbers of hidden blocks in one batch."""
    core = tiny_core((1, 2, 4), 3)
    core.reset()
    for action in (
        [[0, 1, 2, 3, 2], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]],
        [[4, 5, 6, 7, 2], [1, 0, 0, 0, 0], [2, 3, 0, 0, 1]],
    ):
        core.step(torch.tensor(action))
    core.step(torch.tensor([[8, 0, 0, 0, 0], [2, 0, 0, 0, 0], [4, 0, 0, 0, 0]]))
    assert core.hidden_count.tolist() == [0, 6, 4]
    for reference in (Oracle, Lookahead, Confidence):
        policy = reference(budgets=(1, 2, 4), schedule=fixed(2))
        assert (all_scores(policy, core)[0] == 0).all()
        core.books.read(policy.act(core), core._budgets)
        _, count, legal = core.books.read(policy.act(core), core._budgets)
        assert legal[1:].all() and count.tolist() == [0, 4, 4]


def test_a_reference_without_scores_says_so() -> None:
    core = tiny_core()
    core.reset()
    with pytest.raises(TypeError, match="ReferencePolicy must implement scores"):
        ReferencePolicy().act(core)


def test_images_are_read_only() -> None:
    """Rolling a policy out changes neither images nor backbone."""
    data = tiny_images(tiny_backbone())
    before = data.tokens.clone()
    weights = {k: v.clone() for k, v in tiny_backbone().state_dict().items()}
    roll_out(tiny_core(data=data), Lookahead(), torch.Generator())
    assert torch.equal(data.tokens, before)
    assert all(torch.equal(v, weights[k]) for k, v in tiny_backbone().state_dict().items())
