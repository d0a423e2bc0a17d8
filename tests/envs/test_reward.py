"""The identities of section 3 of the design, on random images, orders and budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from orderrl.agents.play import Rollout, roll_out
from orderrl.agents.policies import ReferencePolicy
from orderrl.envs import NextBlockCore, RewardConfig
from orderrl.envs.reward import Reward, set_weights
from orderrl.geometry import BlockGrid
from orderrl.oracle import block_gains, distance_weights, utilities
from tests.envs.helpers import make_core, play
from tests.helpers import as_action, block_loss, random_steps, tiny_backbone

BUDGETS: list[tuple[int, ...]] = [(1,), (1, 2, 4), (2, 5), (4,), (9,)]


def code_length(core: NextBlockCore, row: int, steps: list[list[int]]) -> float:
    """Code length of an image under the parallel block sampler, with no environment: blocks of a step do not meet."""
    shown: list[int] = []
    total = 0.0
    for step in steps:
        total += sum(block_loss(tiny_backbone(), core.tokens[row], core.labels[row], shown, b) for b in step)
        shown += step
    return total


@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
def test_telescoping(budgets: tuple[int, ...]) -> None:
    """N * sum U = sum_b l_b(empty) - decode_nll, and decode_nll is the code length."""
    core = make_core(4, budgets, objective="likelihood")
    played = play(core, seed=len(budgets))
    n = core.geometry.num_tokens
    for row, steps in enumerate(played.steps):
        decode_nll = code_length(core, row, steps)
        expected = played.losses[0, row].sum().item() - decode_nll
        assert n * played.rewards[:, row].sum().item() == pytest.approx(expected, abs=2e-4)
        charged = sum(played.losses[number, row, step].sum().item() for number, step in enumerate(steps))
        assert charged == pytest.approx(decode_nll, abs=2e-4)


def test_one_block_a_step_is_the_teacher_forced_code_length() -> None:
    """Nothing is lost to parallelism: decode_nll is the loss of the whole sequence."""
    core = make_core(3)
    played = play(core)
    order = core.geometry.token_order(torch.tensor([[b for step in steps for b in step] for steps in played.steps]))
    logits = core.backbone.teacher_forced(core.tokens, core.labels, order)  # type: ignore[attr-defined]
    nll = -logits.log_softmax(-1).gather(-1, core.tokens.gather(1, order)[..., None]).sum((1, 2))
    charged = [
        sum(played.losses[t, row, step].sum() for t, step in enumerate(steps)) for row, steps in enumerate(played.steps)
    ]
    assert torch.allclose(torch.stack([torch.as_tensor(c) for c in charged]), nll, atol=1e-4)


@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
def test_area_under_the_gain_curve(budgets: tuple[int, ...]) -> None:
    """The return of `context` is the area under the step curve G(f) of summed gain over revealed fraction."""
    area_core, gain_core = make_core(4, budgets, objective="context"), make_core(4, budgets, objective="likelihood")
    area, gain = play(area_core, 3), play(gain_core, 3)
    b = area_core.geometry.num_blocks
    for row in range(4):
        fraction = gain.visible[:, row].sum(-1)  # of B, before each step and at the end
        grid, total = torch.arange(b) + 0.5, 0.0  # midpoints: the curve steps only at multiples of 1/B
        for f in grid:
            reached = fraction[1:] <= f
            total += gain.rewards[reached, row].sum().item() / b
        assert area.rewards[:, row].sum().item() == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
def test_cheap_twin(budgets: tuple[int, ...]) -> None:
    """`charged` differs from `future_loss` by a potential: step by step, and by the starting one in the return."""
    full = play(make_core(4, budgets, objective="likelihood", form="future_loss"), 5)
    cheap = play(make_core(4, budgets, objective="likelihood", form="charged"), 5)
    potential = full.losses.sum(-1) / 36  # (T + 1, M), zero at the end
    assert torch.allclose(full.rewards, cheap.rewards + potential[:-1] - potential[1:], atol=1e-5)
    assert torch.allclose(full.rewards.sum(0), cheap.rewards.sum(0) + potential[0], atol=1e-5)
    assert (potential[-1] == 0).all()


@pytest.mark.parametrize("weight", ["uniform", "far"])
def test_single_block_rewards_are_the_oracles_utilities(weight: str) -> None:
    core = make_core(4, objective="likelihood", weight=weight, sigma=1.2)
    weights = distance_weights(core.geometry, weight, 1.2)
    core.reset()
    order = torch.rand(4, 9).argsort(1)
    for step in range(9):
        gains = block_gains(core.backbone, core.prefix, core.tokens, order[:, step:].sort(1).values)
        values = utilities(gains, core.geometry, weights).gather(1, order[:, step : step + 1])[:, 0]
        assert torch.allclose(core.step(order[:, step]).reward, values, atol=1e-5)


@pytest.mark.parametrize("objective", ["context", "likelihood"])
def test_far_rewards_of_sets_use_the_nearest_member(objective: str) -> None:
    core = make_core(4, (1, 2, 4), objective=objective, weight="far", sigma=1.5)
    played = play(core, 2)
    grid = core.geometry
    for row, steps in enumerate(played.steps):
        for t, step in enumerate(steps):
            total = 0.0
            for block in (~played.visible[t + 1, row]).nonzero().flatten().tolist():
                near = min(float(grid.distances[block, member]) for member in step)
                drop = float(played.losses[t, row, block] - played.losses[t + 1, row, block])
                total += (1 - torch.exp(torch.tensor(-((near / 1.5) ** 2))).item()) * drop
            if objective == "context":
                total *= 1 - played.visible[t + 1, row].sum().item() / grid.num_blocks
            assert played.rewards[t, row].item() == pytest.approx(total / grid.num_tokens, abs=1e-5)


def test_set_weights_of_nothing_and_of_one() -> None:
    weights = distance_weights(BlockGrid(6, 6, 2), "far", 1.5)
    revealed = torch.zeros(2, 9, dtype=torch.bool)
    revealed[1, 4] = True
    assert torch.equal(set_weights(weights, revealed), torch.stack([torch.ones(9), weights[4]]))


@pytest.mark.parametrize("budgets", [(1,), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("form", ["future_loss", "charged"])
def test_steps_cost_what_they_cost(budgets: tuple[int, ...], form: str) -> None:
    free = play(make_core(3, budgets, objective="likelihood", form=form), 1)
    paid = play(make_core(3, budgets, objective="likelihood", form=form, step_cost=0.7), 1)
    for row, steps in enumerate(free.steps):
        difference = free.rewards[:, row] - paid.rewards[:, row]
        assert torch.allclose(difference[: len(steps)], torch.full((len(steps),), 0.7 / 36), atol=1e-6)
        assert (difference[len(steps) :] == 0).all()


class Scripted(ReferencePolicy):
    """Plays given steps."""

    def __init__(self, steps: list[list[list[int]]], budgets: tuple[int, ...]) -> None:
        self.steps, self.budgets = steps, budgets

    def act(self, core: NextBlockCore) -> Tensor:
        number = int(core.step_count.max())
        chosen = [s[number] if number < len(s) else [0] * self.budgets[0] for s in self.steps]
        return torch.stack([as_action(step, self.budgets, core.geometry.num_blocks) for step in chosen])


@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
def test_planning_metrics_are_the_returns(budgets: tuple[int, ...]) -> None:
    """What `evaluate` reports is what the environment pays, and what an independent computation gives."""
    steps = [random_steps(9, budgets, 7 + row) for row in range(4)]
    index = torch.arange(4)

    def rollout(**reward: Any) -> tuple[Rollout, Tensor]:
        core = make_core(4, budgets, **reward)
        record = roll_out(core, Scripted(steps, budgets), torch.Generator(), index)
        replayed = make_core(4, budgets, **reward)
        replayed.reset(index=index)
        total = torch.zeros(4)
        for _ in range(max(map(len, steps))):
            total += replayed.step(Scripted(steps, budgets).act(replayed)).reward
        return record, total

    record, area = rollout(objective="context")
    assert torch.allclose(record.gain_auc * record.start_loss, area, atol=1e-5)
    record, likelihood = rollout(objective="likelihood")
    assert torch.allclose(record.likelihood_return, likelihood, atol=1e-5)
    core = make_core(4)
    core.reset(index=index)
    for row in range(4):
        assert record.decode_nll[row].item() == pytest.approx(code_length(core, row, steps[row]), abs=2e-4)
        assert record.steps[row] == len(steps[row])
    n = record.geometry.num_tokens
    assert torch.allclose(n * likelihood, n * record.start_loss - record.decode_nll, atol=2e-4)
    curve = record.gain_curve(torch.tensor([0.0, 1.0]))
    assert (curve[0] == 0).all() and torch.allclose(curve[1], likelihood, atol=1e-5)


def test_rewards_are_per_image_token() -> None:
    """On a grid that is not square, with N = 24 and not B: U is a mean over tokens."""
    backbone = tiny_backbone(4, 6, 2)
    core = make_core(2, backbone=backbone, objective="likelihood")
    core.reset()
    before = core.losses.clone()
    reward = core.step(torch.tensor([1, 4])).reward
    for row, block in enumerate((1, 4)):
        rest = [b for b in range(6) if b != block]
        after = [block_loss(backbone, core.tokens[row], core.labels[row], [block], b) for b in rest]
        assert reward[row].item() == pytest.approx((before[row, rest].sum().item() - sum(after)) / 24, abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"objective": "speed"}, "objective='speed'.*context, likelihood"),
        ({"form": "half"}, "form='half'"),
        ({"weight": "near"}, "weight='near'"),
        ({"sigma": 0.0}, "sigma"),
        ({"step_cost": -1.0}, "step_cost"),
        ({"form": "charged"}, "objective='likelihood'"),
        ({"form": "charged", "objective": "likelihood", "weight": "far"}, "weight='far'"),
    ],
)
def test_impossible_rewards_are_refused(wrong: dict[str, str | float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(**wrong)  # type: ignore[arg-type]


def test_reward_reads_only_what_it_says() -> None:
    """`charged` needs the losses of the revealed blocks alone."""
    reward = Reward(RewardConfig("likelihood", "charged"), BlockGrid(6, 6, 2))
    revealed = torch.zeros(1, 9, dtype=torch.bool)
    revealed[0, [2, 5]] = True
    before = torch.rand(1, 9)
    only = torch.where(revealed, before, torch.nan)
    assert torch.equal(reward(only, None, revealed, revealed), reward(before, None, revealed, revealed))
