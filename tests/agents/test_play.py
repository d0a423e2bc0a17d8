"""Planning metrics against slow computations from single block losses, and what roll_out refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor

from orderrl.agents.orders import ORDERS
from orderrl.agents.play import Rollout, act, play, roll_out
from orderrl.agents.policies import Oracle, PlannerPolicy, Policy, RankingPolicy, fixed_order, uniform_random
from orderrl.agents.schedules import growing
from orderrl.envs.core import NextBlockCore
from tests.agents.helpers import tiny_core, tiny_planner
from tests.helpers import as_action, block_loss, random_steps, tiny_backbone, tiny_images

BUDGETS = (1, 2, 4)


def scripted(episodes: list[list[list[int]]], budgets: tuple[int, ...] = BUDGETS) -> Policy:
    """A policy that plays given steps, one list of steps for each image; finished images repeat their last action."""
    moment = iter(range(100))

    def policy(observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        now = next(moment)
        return torch.stack([as_action(steps[min(now, len(steps) - 1)], budgets, 9) for steps in episodes])

    return policy


@pytest.fixture(scope="module", params=[(1,), BUDGETS, (4,)], ids=str)
def played(request: pytest.FixtureRequest) -> tuple[Rollout, list[list[list[int]]]]:
    """A rollout of random steps, of different numbers between images where budgets allow, and these steps."""
    budgets: tuple[int, ...] = request.param
    episodes = [random_steps(9, budgets, seed) for seed in range(3)]
    if budgets == BUDGETS:
        assert len({len(steps) for steps in episodes}) > 1
    core = tiny_core(budgets, 3)
    return roll_out(core, scripted(episodes, budgets), torch.Generator(), torch.tensor([4, 0, 7])), episodes


class Slow:
    """One image's metrics from losses that are computed one by one, in Python."""

    def __init__(self, record: Rollout, row: int, steps: list[list[int]]) -> None:
        self.geometry, self.steps = record.geometry, steps
        self.losses: list[dict[int, float]] = []
        shown: list[int] = []
        for step in [*steps, []]:
            hidden = [b for b in range(9) if b not in shown]
            tokens, label = record.tokens[row], record.labels[row]
            self.losses.append({b: block_loss(tiny_backbone(), tokens, label, shown, b) for b in hidden})
            shown += step

    def gain(self, step: int, far: bool = False) -> float:
        """Sum over blocks that stay hidden, nats per image; `far` counts those that touch no revealed block."""
        before, after = self.losses[step], self.losses[step + 1]
        touching = self.geometry.touching
        return sum(before[b] - after[b] for b in after if not (far and any(touching[b, a] for a in self.steps[step])))

    def revealed(self, step: int) -> float:
        """Share of the blocks visible after a step."""
        return sum(len(s) for s in self.steps[: step + 1]) / 9

    @property
    def decode_nll(self) -> float:
        return sum(self.losses[t][b] for t, step in enumerate(self.steps) for b in step)

    @property
    def gain_auc(self) -> float:
        area = sum(self.gain(t) * (1 - self.revealed(t)) for t in range(len(self.steps)))
        return area / sum(self.losses[0].values())

    def gained_at(self, fraction: float) -> float:
        return sum(self.gain(t) for t in range(len(self.steps)) if self.revealed(t) <= fraction + 1e-6) / 36


def close(fast: Tensor, slow: list[float]) -> bool:
    return torch.allclose(fast, torch.tensor(slow), rtol=1e-4, atol=1e-4)


def test_metrics_agree_with_their_definitions(played: tuple[Rollout, list[list[list[int]]]]) -> None:
    record, episodes = played
    slow = [Slow(record, row, steps) for row, steps in enumerate(episodes)]
    assert torch.equal(record.tokens, tiny_images(tiny_backbone()).tokens[[4, 0, 7]])
    assert record.steps.tolist() == [len(steps) for steps in episodes]
    assert close(record.decode_nll, [s.decode_nll for s in slow])
    assert close(record.gain_auc, [s.gain_auc for s in slow])
    assert close(record.start_loss, [sum(s.losses[0].values()) / 36 for s in slow])
    far, near_and_far = (sum(s.gain(t, f) for s in slow for t in range(len(s.steps))) for f in (True, False))
    found = record.far_gain_sums.sum(1)
    assert (found[0] / found[1]).item() == pytest.approx(far / near_and_far, rel=1e-3, abs=1e-3)
    fractions = torch.tensor([0.0, 0.2, 1 / 3, 0.5, 8 / 9, 1.0])
    for at, fraction in enumerate(fractions.tolist()):
        assert close(record.gain_curve(fractions)[at], [s.gained_at(fraction) for s in slow])


def test_gains_telescope_to_the_code_length(played: tuple[Rollout, list[list[list[int]]]]) -> None:
    """Fact 1: N * sum of U = loss given nothing - code length under the parallel block sampler, for any budgets."""
    record, _ = played
    assert torch.allclose(36 * record.likelihood_return, 36 * record.start_loss - record.decode_nll, atol=1e-3)


def test_area_under_the_curve_is_the_auc(played: tuple[Rollout, list[list[list[int]]]]) -> None:
    """Fact 2: the curve is a staircase over the revealed fraction; its area over the loss at the start is the AUC."""
    record, _ = played
    fractions = torch.arange(9) / 9  # right before each further block
    area = record.gain_curve(fractions).mean(0)
    assert torch.allclose(area / record.start_loss, record.gain_auc, atol=1e-5)


def test_record_says_when_and_in_which_rank_blocks_were_revealed(played: tuple[Rollout, list[list[list[int]]]]) -> None:
    record, episodes = played
    for row, steps in enumerate(episodes):
        for moment, step in enumerate(steps):
            assert record.reveal_step[row, step].tolist() == [moment] * len(step)
            assert record.reveal_rank[row, step].tolist() == list(range(len(step)))
            assert record.visible[moment + 1, row, step].all() and not record.visible[moment, row, step].any()
    assert record.losses.shape == record.visible.shape == (max(map(len, episodes)) + 1, 3, 9)
    assert (record.losses[record.visible] == 0).all() and record.seconds > 0


def test_a_rollout_does_not_depend_on_its_batch() -> None:
    """Rows finish at different times; each is as it would be alone."""
    episodes = [random_steps(9, BUDGETS, seed) for seed in range(4)]
    together = roll_out(tiny_core(BUDGETS, 4), scripted(episodes), torch.Generator(), torch.arange(4))
    for row, steps in enumerate(episodes):
        alone = roll_out(tiny_core(BUDGETS, 1), scripted([steps]), torch.Generator(), torch.tensor([row]))
        for metric in ("gain_auc", "decode_nll", "steps", "likelihood_return"):
            assert torch.allclose(getattr(together, metric)[row], getattr(alone, metric)[0], atol=1e-4)


def test_the_same_seed_rolls_out_the_same() -> None:
    policy = RankingPolicy(uniform_random, tiny_backbone().geometry, BUDGETS, growing(BUDGETS, (1, 4, 4)))
    first, second, other = (roll_out(tiny_core(BUDGETS), policy, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first.losses, second.losses) and torch.equal(first.reveal_rank, second.reveal_rank)
    assert not torch.equal(first.reveal_step, other.reveal_step)


def test_oracle_gains_most_at_its_first_step() -> None:
    oracle = roll_out(tiny_core(), Oracle(), torch.Generator(), torch.arange(4))
    for order in ORDERS.values():
        policy = RankingPolicy(fixed_order(order(oracle.geometry)), oracle.geometry)
        record = roll_out(tiny_core(), policy, torch.Generator(), torch.arange(4))
        assert (oracle.gains[0] >= record.gains[0] - 1e-5).all()


def test_generated_images_are_recorded_without_losses() -> None:
    policy = PlannerPolicy(tiny_planner())
    record = roll_out(tiny_core(mode="generate"), policy, torch.Generator())
    assert record.visible[-1].all() and (record.losses == 0).all() and (record.steps == 9).all()


# ---------------------------------------------------------------------- what is refused


def returning(value: Any) -> Policy:
    return lambda observation, generator: value


BAD = [
    ((1,), torch.rand(4), r"action must be int64, got torch.float32: .*; return block indices, not scores"),
    ((1,), torch.full((4,), torch.nan), "action must be int64, got torch.float32"),
    ((1,), torch.ones(4, dtype=torch.bool), "action must be int64, got torch.bool"),
    ((1,), torch.zeros(4, 9, dtype=torch.int64), r"action must have shape \(4,\), got \(4, 9\)"),
    ((1,), torch.zeros((), dtype=torch.int64), r"action must have shape \(4,\), got \(\)"),
    (BUDGETS, torch.zeros(4, dtype=torch.int64), r"action must have shape \(4, 5\), got \(4,\)"),
    ((1,), [0, 0, 0, 0], "policy must return a torch.Tensor of int64 actions, got list"),
    ((1,), None, "policy must return a torch.Tensor of int64 actions, got NoneType"),
    ((1,), torch.tensor([0, 1, 9, 2]), "action 9 of sub-environment 2 is illegal"),
    ((1,), torch.tensor([0, -1, 1, 2]), "action -1 of sub-environment 1 is illegal"),
    ((1,), torch.zeros(4, dtype=torch.int64), "action 0 of sub-environment 0 is illegal"),
    (BUDGETS, torch.tensor([[0, 0, 1, 2, 1]] * 4), r"action \[0, 0, 1, 2, 1\] of sub-environment 0 is illegal"),
    (BUDGETS, torch.tensor([[0, 1, 2, 3, 3]] * 4), r"action \[0, 1, 2, 3, 3\] of sub-environment 0 is illegal"),
]


@pytest.mark.parametrize(("budgets", "value", "message"), BAD, ids=[message[:45] for _, _, message in BAD])
def test_bad_actions_are_refused_in_one_line(budgets: tuple[int, ...], value: Any, message: str) -> None:
    """On a strict core; the block 0 again is illegal at the second step only."""
    with pytest.raises(ValueError, match=message) as error:
        roll_out(tiny_core(budgets), returning(value), torch.Generator())
    assert "\n" not in str(error.value)


def test_a_policy_that_never_finishes_is_refused() -> None:
    """On a lenient core illegal actions are void, so the episode is truncated."""
    with pytest.raises(ValueError, match="policy left blocks hidden after 18 steps"):
        roll_out(tiny_core(strict=False), returning(torch.zeros(4, dtype=torch.int64)), torch.Generator())


def test_act_gives_policies_the_observation_alone() -> None:
    core = tiny_core(BUDGETS)
    core.reset()
    seen: list[TensorDictBase] = []

    def policy(observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        seen.append(observation)
        return torch.zeros(4, 5, dtype=torch.int64)

    act(policy, core, torch.Generator())
    assert set(seen[0].keys()) == {
        "hidden", "entropy", "visible", "label", "fraction", "action_mask", "budget_mask"
    }  # fmt: skip
    seen[0]["visible"].fill_(True)  # a copy: a policy cannot change the episode
    assert not core.visible.any()


# ---------------------------------------------------------------------- the loop


def test_play_goes_on_from_where_the_episodes_stand_and_records_every_step() -> None:
    """Some steps and then the rest are one whole play; what is recorded is what the core was given and gave."""
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    policy = RankingPolicy(fixed_order(order), tiny_core().geometry)
    core, other = tiny_core(num_envs=2), tiny_core(num_envs=2)
    rewards = [other_step(other, block) for block in order]
    seen: list[tuple[Tensor, Tensor]] = []
    core.reset(index=torch.arange(2))
    for steps in (4, None):
        play(core, policy, steps=steps, record=lambda actions, made: seen.append((actions, made.reward)))
        assert int(core.step_count[0]) == len(seen) == (4 if steps else 9)
    assert torch.equal(torch.stack([actions for actions, _ in seen]), order[:, None].expand(-1, 2))
    assert torch.equal(torch.stack([reward for _, reward in seen]), torch.stack(rewards))
    play(core, policy, record=lambda *step: pytest.fail("finished episodes are not played"))


def other_step(core: NextBlockCore, block: Tensor) -> Tensor:
    """The reward of revealing one block in all episodes, which begin with their first step."""
    if (core.episode < 0).all():
        core.reset(index=torch.arange(core.num_envs))
    return core.step(block.expand(core.num_envs)).reward


def test_play_begins_finished_episodes_anew_where_asked() -> None:
    core = tiny_core(num_envs=3)
    core.reset()
    play(core, RankingPolicy(uniform_random, core.geometry), steps=25, restart=True)
    assert core.episode.tolist() == [2, 2, 2] and core.visible.sum(1).tolist() == [5, 5, 5]  # 9 + 1 + 9 + 1 + 5 steps
