"""A step cost that every episode draws from a range: the draw, what it pays, and what the observation tells of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from orderrl.data import TokenSet
from orderrl.envs import NextBlockEnv, NextBlockTorchRLEnv, NextBlockVectorEnv, RewardConfig
from orderrl.envs.core import NextBlockCore
from orderrl.envs.replay import replay_return
from orderrl.envs.reward import Reward
from orderrl.geometry import BlockGrid
from tests.envs.helpers import arguments, make_core, play
from tests.helpers import as_action, tiny_backbone

RANGE = (0.05, 2.0)


def given_costs(core: NextBlockCore) -> Tensor:
    """(M,) what the observation says that a step costs."""
    cost: Tensor = core.observation()["step_cost"][:, 0]
    return cost


# ---------------------------------------------------------------------- the draw


def test_costs_are_log_uniform_in_the_range() -> None:
    core = make_core(4000, backbone=tiny_backbone(2, 2, 1, 3), step_cost=RANGE)
    core.reset()
    costs = given_costs(core)
    assert costs.dtype == torch.float32 and costs.min() >= np.float32(0.05) and costs.max() <= np.float32(2.0)
    share = (costs.double() / RANGE[0]).log() / math.log(RANGE[1] / RANGE[0])
    counts = torch.histc(share, 20, 0, 1)
    assert ((counts - 200) ** 2 / 200).sum() < 45  # chi-squared, 19 degrees of freedom, p = 0.0007
    assert abs(torch.corrcoef(torch.stack([share, core.image_index.double()]))[0, 1]) < 0.06


def test_a_cost_depends_on_seed_and_episode_alone() -> None:
    def costs(seed: int, episodes: int, num_envs: int = 1) -> Tensor:
        core = make_core(num_envs, seed=seed, step_cost=RANGE)
        drawn = []
        for _ in range(episodes):
            core.reset()
            drawn.append(given_costs(core))
        return torch.stack(drawn)

    together = costs(5, 3, 4)
    assert len(together.unique()) == 12
    for row in range(4):
        assert torch.equal(costs(5 + row, 3)[:, 0], together[:, row])


def test_an_episode_keeps_its_cost_and_a_new_one_draws_another() -> None:
    core = make_core(2, step_cost=RANGE)
    core.reset()
    first = given_costs(core).clone()
    core.step(torch.tensor([0, 3]))
    assert torch.equal(given_costs(core), first)
    core.reset(torch.tensor([1]))
    assert given_costs(core)[0] == first[0] and given_costs(core)[1] != first[1]
    before = given_costs(core).clone()
    core.step(torch.tensor([1, 0]), restart=torch.tensor([True, False]))
    assert given_costs(core)[0] != before[0] and given_costs(core)[1] == before[1]


# ---------------------------------------------------------------------- what it pays and what else changes


@pytest.mark.parametrize("budgets", [(1,), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("mode", ["teacher", "generate"])
@pytest.mark.parametrize("reward", [{}, {"objective": "likelihood", "form": "charged"}], ids=str)
def test_an_episode_at_some_cost_is_one_of_an_environment_of_that_cost(
    budgets: tuple[int, ...], mode: str, reward: dict[str, Any]
) -> None:
    """Everything that is paid and seen but for the key `step_cost`, whatever the other episodes of the batch cost."""
    ranged = make_core(3, budgets, mode, step_cost=RANGE, **reward)
    paid = play(ranged, 4).rewards
    costs = given_costs(ranged)
    assert len(costs.unique()) == 3
    for row, cost in enumerate(costs.tolist()):
        fixed = make_core(3, budgets, mode, step_cost=cost, **reward)
        assert torch.allclose(play(fixed, 4).rewards[:, row], paid[:, row], atol=1e-6)
    one, other = ranged.observation(), fixed.observation()
    assert set(one.keys()) == {*other.keys(), "step_cost"}
    assert all(torch.equal(one[key], other[key]) for key in other.keys())  # noqa: SIM118 - not a mapping


def test_costs_change_nothing_that_policies_choose_from() -> None:
    ranged, fixed = make_core(3, step_cost=RANGE), make_core(3, step_cost=0.3)
    for core in (ranged, fixed):
        core.reset()
        core.step(torch.tensor([0, 4, 8]))
    one, other = ranged.observation(), fixed.observation()
    assert torch.equal(one["hidden"], other["hidden"]) and torch.equal(one["label"], other["label"])
    assert torch.equal(one["entropy"], other["entropy"]) and "step_cost" not in other


def test_an_illegal_step_costs_what_it_always_does() -> None:
    core = make_core(2, strict=False, step_cost=RANGE)
    core.reset()
    core.step(torch.tensor([0, 0]))
    assert torch.allclose(core.step(torch.tensor([0, 0])).reward, torch.tensor(-0.1))


def test_replayed_images_are_charged_their_own_costs() -> None:
    core, free = make_core(2, (1, 2, 4), step_cost=RANGE), make_core(2, (1, 2, 4))
    for each in (core, free):
        each.reset()
        for step in ([0, 1, 2, 3], [4, 5], [6], [7, 8]):
            each.step(torch.stack([as_action(step, (1, 2, 4), 9)] * 2))
    found, without = (replay_return(each, torch.arange(2)) for each in (core, free))
    assert torch.allclose(found, without - 4 * given_costs(core) / 36, atol=1e-6)


def test_a_reward_of_a_range_asks_for_the_cost() -> None:
    reward = Reward(RewardConfig(step_cost=RANGE), BlockGrid(6, 6, 2))
    nothing = torch.zeros(1, 9)
    with pytest.raises(ValueError, match=r"step_cost must be given for every episode.*\(0.05, 2.0\)"):
        reward(nothing, nothing, nothing.bool(), nothing.bool())


def test_the_typical_cost_is_the_geometric_mean() -> None:
    assert RewardConfig(step_cost=0.3).typical_step_cost == 0.3
    assert RewardConfig(step_cost=(0.5, 2.0)).typical_step_cost == pytest.approx(1.0)
    from_config: Any = [0.5, 2]  # a list of YAML
    assert RewardConfig(step_cost=from_config) == RewardConfig(step_cost=(0.5, 2.0))


@pytest.mark.parametrize("limits", [(0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (1.0,), (1.0, math.inf), (math.nan, 1.0), ()])
def test_impossible_ranges_are_refused(limits: tuple[float, ...]) -> None:
    with pytest.raises(
        ValueError,
        match=r"step_cost must be a (number or a range \(low, high\) with|finite number or a list of 2)",
    ):
        RewardConfig(step_cost=limits)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- the faces


def test_every_face_has_a_finite_space_for_it() -> None:
    settings = arguments(step_cost=RANGE)
    single: Any = NextBlockEnv(**settings).observation_space
    vector = NextBlockVectorEnv(3, **settings)
    several: Any = vector.observation_space
    assert single["step_cost"] == spaces.Box(0.05, 2.0, (1,), np.float32) and vector.single_observation_space == single
    assert several["step_cost"] == spaces.Box(0.05, 2.0, (3, 1), np.float32)
    spec = NextBlockTorchRLEnv(3, **settings).observation_spec["step_cost"]
    assert spec.shape == (3, 1) and spec.space.low.unique() == np.float32(0.05) and spec.space.high.unique() == 2
    for plain in (arguments(), arguments(step_cost=0.3)):
        space: Any = NextBlockEnv(**plain).observation_space
        assert "step_cost" not in space.spaces


def test_the_caller_may_choose_a_cost() -> None:
    env = NextBlockEnv(**arguments(step_cost=RANGE))
    for cost in (*RANGE, 0.7):
        observation, _ = env.reset(options={"step_cost": cost, "index": 2})
        assert observation["step_cost"] == np.float32(cost) and env.observation_space.contains(observation)
        assert int(env.core.image_index) == 2
    observation, _ = env.reset(options={"step_cost": observation["step_cost"]})  # as it was observed
    assert observation["step_cost"] == np.float32(0.7)
    assert env.reset()[0]["step_cost"] != np.float32(0.7)
    vector = NextBlockVectorEnv(3, **arguments(step_cost=RANGE))
    assert vector.reset(options={"step_cost": 0.7})[0]["step_cost"].tolist() == [[np.float32(0.7)]] * 3
    some = {"reset_mask": np.array([True, False, True]), "step_cost": np.array([0.1, 1.5])}
    chosen = vector.reset(options=some)[0]["step_cost"][:, 0]
    assert chosen.tolist() == [np.float32(0.1), np.float32(0.7), np.float32(1.5)]
    torchrl = NextBlockTorchRLEnv(2, **arguments(step_cost=RANGE))
    assert torchrl.reset(step_cost=0.7)["step_cost"].tolist() == [[pytest.approx(0.7)]] * 2


@pytest.mark.parametrize("cost", [0.04, 2.1, -1.0, math.nan, [0.5, 0.5, 0.5]])
def test_a_chosen_cost_outside_the_range_is_refused(cost: Any) -> None:
    core = make_core(2, step_cost=RANGE)
    with pytest.raises(ValueError, match=r"step_cost must be one number or 2 in the range \(0.05, 2.0\)"):
        core.reset(step_cost=cost)
    assert (core.episode == -1).all()


def test_there_is_nothing_to_choose_where_the_cost_is_a_number() -> None:
    with pytest.raises(ValueError, match=r"only if the environment's step_cost is a range.*it is 0.3"):
        NextBlockEnv(**arguments(step_cost=0.3)).reset(options={"step_cost": 0.3})


def test_a_hindsight_return_charges_the_episodes_own_cost() -> None:
    """Mode "generate" against mode "teacher" on the images that were drawn, at the costs that were drawn."""
    core = make_core(3, (1, 2), "generate", step_cost=RANGE)
    played = play(core, 2)
    images = TokenSet("drawn", "test", core.tokens.clone(), core.labels.clone(), 6, 6, 5, 3)
    teacher = make_core(3, (1, 2), data=images)
    paid = play(teacher, 2, torch.arange(3)).rewards.sum(0)
    steps = torch.tensor([len(each) for each in played.steps])
    assert torch.allclose(played.rewards.sum(0), paid - steps * given_costs(core) / 36, atol=1e-5)
