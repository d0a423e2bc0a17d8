"""Imitation: a planner takes over another policy's blocks and budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orderrl.agents.imitation import ImitationConfig, imitate
from orderrl.agents.play import roll_out
from orderrl.agents.policies import AmongBudgets, PlannerPolicy, RankingPolicy, fixed_order
from orderrl.agents.schedules import growing
from tests.agents.helpers import tiny_core, tiny_planner
from tests.jobs import logged

ORDER, SIZES, BUDGETS = torch.tensor([3, 8, 1, 0, 6, 5, 2, 7, 4]), (2, 1, 4, 2), (1, 2, 4)


def teacher(core: Any) -> RankingPolicy:
    return RankingPolicy(fixed_order(ORDER), core.geometry, BUDGETS, growing(BUDGETS, SIZES))


def imitated(steps: int = 100, seed: int = 0, **config: Any) -> Any:
    core = tiny_core(budgets=BUDGETS, num_envs=16)
    planner = tiny_planner(noisy=False, num_budgets=3)
    settings = ImitationConfig(steps=steps, num_envs=16, learning_rate=1e-2, **config)
    return planner, logged(imitate, planner, core, teacher(core), settings, seed)


@pytest.fixture(scope="module")
def learnt() -> Any:
    """A planner that has learnt the policy, and the rows of its log."""
    return imitated()


def test_the_most_likely_actions_become_the_policys(learnt: Any) -> None:
    planner, rows = learnt
    assert rows[-1]["loss"] < rows[0]["loss"]
    core = tiny_core(budgets=BUDGETS, num_envs=5)
    ours = roll_out(core, PlannerPolicy(planner, BUDGETS), torch.Generator(), torch.arange(5))
    theirs = roll_out(core, teacher(core), torch.Generator(), torch.arange(5))
    assert torch.equal(ours.reveal_step, theirs.reveal_step)


def test_the_entropy_bonus_keeps_actions_apart_from_certainty(learnt: Any) -> None:
    _, rows = imitated(entropy_coeff=0.5)
    assert rows[-1]["entropy"] > 2 * learnt[1][-1]["entropy"]


def test_episodes_may_all_end_at_once() -> None:
    """One block a step, so that every tenth state of the nine blocks has nothing to learn."""
    core, planner = tiny_core(num_envs=16), tiny_planner(noisy=False)
    policy = RankingPolicy(fixed_order(ORDER), core.geometry)
    rows = logged(imitate, planner, core, policy, ImitationConfig(steps=60, num_envs=16, learning_rate=1e-2))
    assert len(rows) == 54 and rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["agreement"] > 0.8


def test_it_is_determined_by_its_seed() -> None:
    first, second = imitated(steps=5)[1], imitated(steps=5)[1]
    assert first == second
    assert imitated(steps=5, seed=1)[1] != first


@pytest.mark.parametrize(
    ("values", "match"),
    [({"steps": 0}, "steps"), ({"learning_rate": 0.0}, "learning_rate"), ({"own_share": 1.0}, "own_share")],
)
def test_wrong_values_are_named(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ImitationConfig(**values)


def test_a_planner_with_other_budgets_is_refused() -> None:
    core = tiny_core(budgets=BUDGETS, num_envs=2)
    with pytest.raises(ValueError, match="budgets"):
        imitate(tiny_planner(), core, teacher(core), ImitationConfig(steps=1))


@pytest.mark.parametrize("offered", [(1, 2, 4), (1, 2, 3, 4, 8)])
def test_a_policy_among_more_budgets_reveals_the_same_blocks(offered: tuple[int, ...]) -> None:
    core, wide = tiny_core(budgets=BUDGETS, num_envs=5), tiny_core(budgets=offered, num_envs=5)
    policy = teacher(core)
    ours = roll_out(wide, AmongBudgets(policy, BUDGETS, offered), torch.Generator(), torch.arange(5))
    theirs = roll_out(core, policy, torch.Generator(), torch.arange(5))
    assert torch.equal(ours.reveal_step, theirs.reveal_step)


def test_a_planner_among_more_budgets_reveals_the_same_blocks() -> None:
    core, wide = tiny_core(budgets=BUDGETS, num_envs=5), tiny_core(budgets=(1, 2, 3, 4, 8), num_envs=5)
    policy = PlannerPolicy(tiny_planner(num_budgets=3), BUDGETS)
    ours = roll_out(wide, AmongBudgets(policy, BUDGETS, (1, 2, 3, 4, 8)), torch.Generator(), torch.arange(5))
    theirs = roll_out(core, policy, torch.Generator(), torch.arange(5))
    assert torch.equal(ours.reveal_step, theirs.reveal_step)


def test_a_budget_too_large_at_the_end_is_lowered_as_in_the_policys_own_environment() -> None:
    """Of three hidden blocks it reveals one, although the environment offers to reveal two."""
    core, wide = tiny_core(budgets=(1, 4), num_envs=5), tiny_core(budgets=(1, 2, 4), num_envs=5)
    policy = RankingPolicy(fixed_order(ORDER), core.geometry, (1, 4), lambda seen, _: torch.ones_like(seen["label"]))
    wide.reset(index=torch.arange(5))
    seen = wide.observation()
    seen["visible"][:, :6], seen["action_mask"][:, :6] = True, False
    seen["budget_mask"] = torch.tensor([[True, True, False]]).expand(5, -1)  # three are hidden
    action = AmongBudgets(policy, (1, 4), (1, 2, 4))(seen, torch.Generator())
    assert (action[:, -1] == 0).all() and not seen["visible"].gather(1, action[:, :1]).any()


def test_single_blocks_among_more_budgets() -> None:
    core, wide = tiny_core(num_envs=5), tiny_core(budgets=BUDGETS, num_envs=5)
    policy = RankingPolicy(fixed_order(ORDER), core.geometry)
    ours = roll_out(wide, AmongBudgets(policy, (1,), BUDGETS), torch.Generator(), torch.arange(5))
    theirs = roll_out(core, policy, torch.Generator(), torch.arange(5))
    assert torch.equal(ours.reveal_step, theirs.reveal_step) and int(ours.reveal_step.max()) == 8


def test_a_policy_whose_budgets_are_not_offered_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lack \[2, 4\]"):
        AmongBudgets(teacher(tiny_core(budgets=BUDGETS, num_envs=2)), BUDGETS, (1, 8))
