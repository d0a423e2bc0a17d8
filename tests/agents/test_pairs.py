"""Pairs from cloning to PPO: what the start keeps of the dependence, and what PPO does with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orderrl.agents.distribution import planner_actions
from orderrl.agents.ppo import PPO
from orderrl.agents.ppo import Config as PPOConfig
from orderrl.planner import OrderHead
from tests.agents.helpers import tiny_env, tiny_planner

BUDGETS = (1, 2, 4)


def make_ppo(planner: OrderHead, **config: Any) -> PPO:
    settings = {"num_envs": 8, "frames_per_batch": 144, "minibatch_size": 48, "iterations": 1, "group_size": 1}
    env = tiny_env(privileged=True, budgets=BUDGETS, num_envs=8, objective="likelihood", step_cost=1.0)
    return PPO(planner, env, PPOConfig(**(settings | config)))


def cloned() -> OrderHead:
    planner = tiny_planner(pairs=True)
    planner.set_pair_strength(0.3)
    return planner


@pytest.mark.parametrize(("given", "kept"), [(None, 0.3), (0.0, 0.0), (1.5, 1.5)])
def test_the_start_takes_distance_and_the_planners_own_dependence(given: float | None, kept: float) -> None:
    planner = cloned()
    ppo = make_ppo(planner, spacing=2.0, sharpness=5.0, pair_strength=given)
    core = ppo.env.core
    core.reset()
    start, before = ppo.planner(core.observation()), planner(core.observation())
    distances = core.geometry.distances
    expected = 2.0 * torch.exp(-(distances**2) / 2) + 5.0 * kept * before.dependence
    assert torch.equal(start.dependence, before.dependence)
    assert torch.allclose(start.repulsion, expected, atol=1e-5)


def test_planners_without_pairs_start_as_they_did() -> None:
    ppo = make_ppo(tiny_planner(), spacing=2.0)
    ppo.env.core.reset()
    repulsion = ppo.planner(ppo.env.core.observation()).repulsion
    assert torch.equal(repulsion, (2.0 * torch.exp(-(ppo.env.core.geometry.distances**2) / 2)).expand(8, -1, -1))
    assert not any("pair" in name for name in ppo.planner.state_dict())
    with pytest.raises(ValueError, match=r"pair_strength=0\.5 needs a planner with pairs=True"):
        make_ppo(tiny_planner(), pair_strength=0.5)
    with pytest.raises(ValueError, match="pair_strength must be at least 0, got -1"):
        PPOConfig(pair_strength=-1)


def test_ppo_plays_the_planners_distribution_and_learns_its_pairs() -> None:
    """The critic has none: it ranks nothing."""
    planner = cloned()
    ppo = make_ppo(planner)
    assert ppo.critic.pair_head is None
    data = ppo._collect()
    frames = data.reshape(-1)
    expected = planner_actions(ppo.planner(frames), frames, BUDGETS).log_prob(frames["action"])
    assert torch.allclose(frames["action_log_prob"], expected, atol=1e-5)
    ppo.train()
    assert ppo.planner.pair_head is not None and planner.pair_head is not None
    for ours, theirs in zip(ppo.planner.pair_head.parameters(), planner.pair_head.parameters(), strict=True):
        assert not torch.equal(ours, theirs)
