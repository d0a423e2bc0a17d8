"""GRPO: advantages by hand, whole episodes of one image, learning, the penalty, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orderrl.agents.grpo import GRPO, group_advantages
from orderrl.agents.grpo import Config as GRPOConfig
from orderrl.agents.play import roll_out
from orderrl.agents.policies import PlannerPolicy
from orderrl.envs.replay import replay_return
from orderrl.planner import OrderHead
from orderrl.runtime import distributed
from orderrl.runtime.job import Job
from tests.agents.helpers import tiny_core, tiny_env, tiny_planner
from tests.jobs import Enough, Seen, logged
from tests.processes import run_processes

SMALL: dict[str, Any] = {"num_envs": 8, "group_size": 4, "episodes": 16, "minibatch_size": 8, "iterations": 4}


def make_grpo(
    planner: OrderHead | None = None,
    budgets: tuple[int, ...] = (1, 2),
    step_cost: float = 1.0,
    seed: int = 0,
    **config: Any,
) -> GRPO:
    """GRPO on a tiny environment with objective "likelihood": two groups of four images in parallel, twice a round."""
    settings = GRPOConfig(**(SMALL | config))
    count = settings.num_envs // distributed.size()
    env = tiny_env(budgets=budgets, num_envs=count, objective="likelihood", step_cost=step_cost)
    return GRPO(planner or tiny_planner(noisy=False), env, settings, seed)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


def collect(grpo: GRPO) -> Any:
    """The first round's episodes."""
    grpo.env.core.seed(grpo._round_seeds())
    return grpo._collect()


def random_episodes(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rewards (12, 5) and which steps are played."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 6, (12, 1), generator=generator)
    return torch.randn(12, 5, generator=generator), torch.arange(5) < length


# ---------------------------------------------------------------------- advantages

REWARD = torch.tensor([[1.0, 2, 9], [4, 9, 9], [0, 0, 1], [1, 1, 1]])
PLAYED = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]).bool()


def test_advantages_by_hand() -> None:
    """Returns 3 and 4, 1 and 3; what stands behind the end of an episode does not count."""
    expected = torch.tensor([[-0.5, -0.5, 0], [0.5, 0, 0], [-1, -1, -1], [1, 1, 1]])
    assert torch.allclose(group_advantages(REWARD, PLAYED, 2, normalize_by_std=False), expected)
    std = torch.tensor([0.5**0.5, 0.5**0.5, 2**0.5, 2**0.5])[:, None]
    assert torch.allclose(group_advantages(REWARD, PLAYED, 2), expected / (std + 1e-3))


def test_rewards_to_go_are_compared_with_those_that_got_as_far() -> None:
    expected = torch.tensor([[-0.5, 0, 0], [0.5, 0, 0], [-1, -0.5, 0], [1, 0.5, 0]])
    found = group_advantages(REWARD, PLAYED, 2, normalize_by_std=False, reward_to_go=True)
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("to_go", [False, True])
@pytest.mark.parametrize("by_std", [False, True])
def test_a_constant_of_the_image_cancels_and_groups_have_mean_zero(by_std: bool, to_go: bool) -> None:
    reward, played = random_episodes()
    found = group_advantages(reward, played, 4, by_std, to_go)
    image = torch.tensor([3.0, -7.0, 100.0]).repeat_interleave(4)
    shifted = reward.clone()
    shifted[:, 0] += image  # every episode has a first step
    assert torch.allclose(group_advantages(shifted, played, 4, by_std, to_go), found, atol=1e-4)
    assert torch.allclose(found[:, 0].view(3, 4).mean(1), torch.zeros(3), atol=1e-6)
    if to_go:
        assert torch.allclose(found.view(3, 4, 5).sum(1), torch.zeros(3, 5), atol=1e-5)
    else:
        assert torch.equal(found, found[:, :1] * played)  # one advantage for all steps
    assert (found[~played] == 0).all() and (found != 0).any()


def test_the_standard_deviation_takes_the_scale_out() -> None:
    reward, played = random_episodes()
    scaled, plain = (group_advantages(100 * reward, played, 4, by_std) for by_std in (True, False))
    assert torch.allclose(scaled, group_advantages(10 * reward, played, 4), atol=1e-3)
    assert torch.allclose(plain, 100 * group_advantages(reward, played, 4, False), atol=1e-4)
    first = scaled[:, 0].view(3, 4)
    assert torch.allclose(first.std(1), torch.ones(3), atol=1e-3)


def test_equal_episodes_have_no_advantage() -> None:
    reward = torch.full((4, 3), 80 / 3) + 1e-6 * torch.randn(4, 3)
    assert group_advantages(reward, torch.ones(4, 3).bool(), 4).abs().max() < 0.1  # rounding is not blown up


# ---------------------------------------------------------------------- a round


@pytest.mark.parametrize("budgets", [(1,), (1, 2, 4)])
def test_a_round_holds_whole_episodes_of_one_image_a_group(budgets: tuple[int, ...]) -> None:
    grpo = make_grpo(budgets=budgets)
    data = collect(grpo)
    played, done = data["played"], data["next", "done"][..., 0]
    length = played.sum(1)
    assert len(data) == 16 and (done & played).sum(1).eq(1).all()
    assert done[torch.arange(16), length - 1].all(), "an episode ends with its last step"
    steps = torch.arange(played.shape[1])
    assert torch.equal(played, steps < length[:, None])
    if budgets != (1,):
        assert length.unique().numel() > 1
        shown = torch.tensor(budgets)[data["action"][..., -1]]
        assert ((shown * played).sum(1) >= 9).all()
    else:
        assert all(sorted(row.tolist()) == list(range(9)) for row in data["action"])
    start = data["hidden"][:, 0].flatten(1)
    for first in range(0, 16, 4):
        assert torch.allclose(start[first : first + 4], start[first].expand(4, -1), atol=1e-5)


def test_returns_are_those_of_the_replayed_episodes() -> None:
    grpo = make_grpo(budgets=(1, 2, 4), episodes=8)
    data, core = collect(grpo), grpo.env.core
    row = grpo._summary(data)
    replayed = replay_return(core, torch.arange(core.num_envs))
    found = (data["next", "reward"][..., 0] * data["played"]).sum(1)
    assert torch.allclose(found, replayed * core.geometry.num_tokens, atol=1e-3)
    assert row["return"] == pytest.approx(found.mean().item(), abs=1e-4) and row["illegal"] == 0
    assert row["planner_steps"] == pytest.approx((core.reveal_step.amax(1) + 1).float().mean().item())
    assert row["group_std"] == pytest.approx(found.view(2, 4).std(1).mean().item(), abs=1e-3)


def test_the_loss_is_minus_the_mean_advantage_of_played_steps_at_the_start() -> None:
    """The ratio is 1 there, so nothing is clipped and no step of a finished episode weighs in."""
    grpo = make_grpo(budgets=(1, 2, 4), reward_to_go=True)
    data = collect(grpo)
    grpo._estimate(data)
    total, parts = grpo._loss(data)
    advantage = data["advantage"][..., 0][data["played"]]
    assert parts["clip_fraction"] == 0
    assert total.item() == pytest.approx(-advantage.mean().item(), abs=1e-5)
    total.backward()
    assert any((p.grad is not None and (p.grad != 0).any()) for p in grpo.planner.parameters())


# ---------------------------------------------------------------------- learning


def test_a_high_step_cost_teaches_the_large_budget() -> None:
    """At 20 nats a step nothing pays but few steps: nine blocks take five."""
    grpo = make_grpo(step_cost=20.0, iterations=8, learning_rate=3e-3)
    rows = logged(grpo.train)
    assert rows[0]["planner_steps"] > 5.7 and rows[-1]["planner_steps"] < 5.3
    assert rows[-1]["return"] > rows[0]["return"] + 8
    record = roll_out(tiny_core((1, 2)), PlannerPolicy(grpo.planner.eval(), (1, 2)), torch.Generator())
    assert (record.steps == 5).all()
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["frames"] == pytest.approx(sum(16 * row["planner_steps"] for row in rows))


def test_paid_steps_teach_the_small_budget() -> None:
    """The lesson turned around, with the other advantages: it is the reward that teaches and no drift."""
    grpo = make_grpo(iterations=6, learning_rate=3e-3, normalize_by_std=False, reward_to_go=True)
    object.__setattr__(grpo.env.core.reward.config, "step_cost", -20.0)
    rows = logged(grpo.train)
    assert rows[-1]["planner_steps"] > rows[0]["planner_steps"] + 1


def test_the_penalty_keeps_the_planner_near_its_start() -> None:
    found = {}
    for coefficient in (1e-9, 30.0):
        grpo = make_grpo(step_cost=20.0, iterations=3, learning_rate=3e-3, kl_coeff=coefficient)
        found[coefficient] = logged(grpo.train)[-1]["kl"]
    assert 0 <= found[30.0] < 0.2 * found[1e-9]


def test_the_penalty_is_zero_at_the_start_and_the_start_is_not_trained() -> None:
    grpo = make_grpo(tiny_planner(), kl_coeff=1.0)
    assert grpo.start is not None
    before = {key: value.clone() for key, value in grpo.start.state_dict().items()}
    data = collect(grpo)
    grpo._estimate(data)
    assert grpo._kl(data[data["played"]]).item() == pytest.approx(0, abs=1e-5)
    logged(grpo.train, until=1)
    assert same(grpo.start.state_dict(), before)
    assert grpo._kl(data[data["played"]]).item() > 0


# ---------------------------------------------------------------------- resuming and sharing


def test_resuming_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    """Bit for bit, through a file, in a fresh environment, whatever random numbers were drawn in between."""
    short: dict[str, Any] = {"iterations": 3, "epochs": 1, "kl_coeff": 0.1}
    whole = make_grpo(tiny_planner(), (1, 2, 4), **short)
    rows = logged(whole.train)
    with pytest.raises(Enough), Seen(print, 2, tmp_path, "job", 0) as job:
        make_grpo(tiny_planner(), (1, 2, 4), **short).train(job)
    torch.rand(1000)
    second = make_grpo(tiny_planner(), (1, 2, 4), **short)
    with Job(tmp_path, "job", 0) as again:
        second.train(again)
    assert again.history == rows
    assert same(second.planner.state_dict(), whole.planner.state_dict())


def play() -> tuple[list[int], list[Tensor]]:
    """Seeds of the first round and the weights after two, of this process."""
    grpo = make_grpo(budgets=(1, 2, 4), iterations=2, epochs=1)
    seeds = grpo._round_seeds().tolist()
    grpo.train()
    return seeds, [parameter.detach() for parameter in grpo.planner.parameters()]


def test_processes_play_different_groups_and_keep_weights_alike(tmp_path: Path) -> None:
    """Episodes differ in length between processes; the number of gradient steps does not."""
    (first, weights), (second, others) = run_processes(2, tmp_path, play)
    assert first + second == make_grpo()._round_seeds().tolist()
    assert all(torch.equal(mine, other) for mine, other in zip(weights, others, strict=True))


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"group_size": 3}, "group_size=3 must divide num_envs=8"),
        ({"episodes": 12}, "num_envs=8 must divide episodes=12"),
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"kl_coeff": -1.0}, r"kl_coeff must be at least 0, got -1\.0"),
        ({"clip_epsilon": 0.0}, r"clip_epsilon must be positive, got 0\.0"),
    ],
)
def test_bad_configs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**(SMALL | change))
