"""The vectorised environment, against Gymnasium's own vectorisation of the single one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from orderrl.backbones import Sampling
from orderrl.envs import NextBlockEnv, NextBlockVectorEnv
from tests.envs.helpers import Trajectory, arguments, play_single, play_torchrl, play_vector
from tests.helpers import tiny_backbone

MODES = ["NEXT_STEP", "SAME_STEP", "DISABLED"]
CASES: list[dict[str, Any]] = [
    {"budgets": (1,)},
    {"budgets": (1, 2, 4), "objective": "likelihood", "step_cost": 0.5},
    {"budgets": (1, 2), "objective": "likelihood", "step_cost": (0.05, 2.0)},
    {"budgets": (1,), "mode": "generate"},
    {"budgets": (1, 2, 4), "mode": "generate", "sampling": Sampling(guidance=1.5, temperature=0.8)},
]


def assert_same_steps(one: Any, two: Any) -> None:
    """Results of two environments: actions and flags exactly, floats to 1e-5, infos with their masks."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same_steps(one[key], two[key])
    elif isinstance(one, tuple) or (isinstance(one, np.ndarray) and one.dtype == object):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert_same_steps(a, b)
    else:
        assert np.asarray(one).dtype == np.asarray(two).dtype
        assert np.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("budgets", [(1,), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_conventions_are_gymnasiums(mode: str, budgets: tuple[int, ...]) -> None:
    """Everything it returns equals what Gymnasium's `SyncVectorEnv` over single environments returns."""
    settings = arguments(backbone=tiny_backbone(4, 4), budgets=budgets)
    ours = NextBlockVectorEnv(3, mode, **settings)
    theirs: Any = SyncVectorEnv([lambda: NextBlockEnv(**settings)] * 3, autoreset_mode=AutoresetMode[mode])
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.observation_space == theirs.observation_space and ours.action_space == theirs.action_space
    assert ours.metadata["autoreset_mode"] is theirs.metadata["autoreset_mode"] is AutoresetMode[mode]
    assert_same_steps(theirs.reset(seed=11), ours.reset(seed=11))
    source, ends = np.random.default_rng(0), 0
    ours.action_space.seed(0)
    for number in range(24):
        actions = ours.action_space.sample()
        if number % 3:  # else random ones, illegal for the most part
            blocks = [
                source.permutation(np.flatnonzero(m)) if m.any() else [0]
                for m in ours.core.observation()["action_mask"].numpy()
            ]
            if budgets == (1,):
                actions = np.array([b[0] for b in blocks])
            else:
                actions = np.stack(
                    [np.append(np.resize(b, 4), i % 2 if len(b) > 1 else 0) for i, b in enumerate(blocks)]
                )
        one, two = theirs.step(actions), ours.step(actions)
        assert_same_steps(one, two)
        done = one[2] | one[3]
        ends += done.sum()
        if mode == "DISABLED" and done.any():
            with pytest.raises(ValueError, match=r"finished.*reset_mask"):
                ours.step(actions)
            seeds = [None, 5, None] if ends % 2 else None
            assert_same_steps(
                theirs.reset(seed=seeds, options={"reset_mask": done}),
                ours.reset(seed=seeds, options={"reset_mask": done}),
            )
    assert ends > 4


@cache
def singles(case: int) -> list[list[Trajectory]]:
    """What single environments play."""
    return play_single(3, 2, 21, **arguments(backbone=tiny_backbone(4, 6), **CASES[case]))


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda case: str(CASES[case]))
@pytest.mark.parametrize(
    "face",
    [play_torchrl, *[partial(play_vector, autoreset_mode=mode) for mode in MODES]],
    ids=["torchrl", *MODES],
)
def test_trajectories_are_equal_across_faces(case: int, face: Callable[..., list[list[Trajectory]]]) -> None:
    """Sub-environment i of seed s is a single environment of seed s + i, episode by episode, on every face."""
    expected = singles(case)
    found = face(3, 2, 21, **arguments(backbone=tiny_backbone(4, 6), **CASES[case]))
    for single, batched in zip(expected, found, strict=True):
        for one, two in zip(single, batched, strict=True):
            assert len(one) == len(two)
            for (action, step, tokens), (action_2, step_2, tokens_2) in zip(one, two, strict=True):
                assert np.array_equal(action, action_2)  # type: ignore[arg-type]
                assert tokens_2.size == 0 or np.array_equal(tokens, tokens_2)
                assert step.observation.keys() == step_2.observation.keys()
                for key, value in step.observation.items():
                    assert np.allclose(value, step_2.observation[key], atol=1e-5), key
                assert step.reward == pytest.approx(step_2.reward, abs=1e-5)
                assert (step.terminated, step.truncated) == (step_2.terminated, step_2.truncated)
    starts = {episode[0][1].observation["hidden"].tobytes() for played in expected for episode in played}
    assert len(starts) > 1 or "mode" in CASES[case]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_trajectories_do_not_depend_on_the_batch_size(case: dict[str, Any]) -> None:
    settings = arguments(backbone=tiny_backbone(4, 6), **case)
    large, small = play_vector(4, 2, 3, **settings), play_vector(2, 2, 3, **settings)
    for played, other in zip(large, small, strict=False):
        for one, two in zip(played, other, strict=True):
            for (action, step, tokens), (action_2, step_2, tokens_2) in zip(one, two, strict=True):
                assert np.array_equal(action, action_2) and np.array_equal(tokens, tokens_2)  # type: ignore[arg-type]
                assert step.reward == pytest.approx(step_2.reward, abs=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_random_agent_runs_inside_the_spaces(case: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = gym.make_vec("orderrl/NextBlock-v0", num_envs=4, **arguments(backbone=tiny_backbone(4, 6), **case))
        assert isinstance(envs, NextBlockVectorEnv)
        envs.action_space.seed(0)
        observation, _ = envs.reset(seed=0)
        ends = 0
        for _ in range(28):
            assert envs.observation_space.contains(observation)
            observation, reward, terminated, truncated, info = envs.step(envs.action_space.sample())
            assert reward.shape == terminated.shape == truncated.shape == (4,) and reward.dtype == np.float64
            assert set(info) <= {f"{a}{b}" for a in ("", "_") for b in ("action_mask", "budget_mask", "illegal")}
            ends += int((terminated | truncated).sum())
        assert ends >= 4
        assert envs.action_masks().dtype == np.bool_ and len(envs.action_masks()) == 4
        envs.close()


def test_seeding() -> None:
    def images(envs: NextBlockVectorEnv, seed: Any = None) -> list[int]:
        envs.reset(seed=seed)
        return envs.core.image_index.tolist()

    one, two = (NextBlockVectorEnv(4, **arguments()) for _ in range(2))
    assert images(one, 3) == images(two, 3) == images(two, [3, 4, 5, 6])
    assert images(one) == images(two) and images(one, 3)[1:] == images(two, 4)[:3]
    following = images(one)
    images(one, 3)
    assert images(one, [None, 99, None, None])[::3] == following[::3]  # None leaves a history alone
    assert len({tuple(images(NextBlockVectorEnv(4, **arguments()))) for _ in range(8)}) > 4
    assert images(NextBlockVectorEnv(4, **arguments(seed=3))) == images(one, 3)
    with pytest.raises(ValueError, match="seed must be one number or 4, got 2"):
        one.reset(seed=[1, 2])


def test_a_partial_reset_leaves_the_others_alone() -> None:
    """Also with a seed: only the chosen ones are seeded, so running episodes go on with their own numbers."""
    envs, twin = (NextBlockVectorEnv(3, "DISABLED", **arguments(mode="generate")) for _ in range(2))
    envs.reset(seed=1)
    twin.reset(seed=1)
    for block in range(4):
        envs.step(np.full(3, block))
        twin.step(np.full(3, block))
    mask = np.array([False, True, False])
    observation, _ = envs.reset(seed=50, options={"reset_mask": mask, "index": 4})
    assert observation["fraction"][:, 0].tolist() == pytest.approx([4 / 9, 0, 4 / 9])
    assert observation["label"][1] == envs.core.data.labels[4]
    for block in range(4, 9):
        envs.step(np.array([block, block - 4, block]))
        twin.step(np.full(3, block))
    assert torch.equal(envs.core.tokens[[0, 2]], twin.core.tokens[[0, 2]])
    for wrong in (np.zeros(3, dtype=bool), np.ones(2, dtype=bool), np.ones(3)):
        with pytest.raises(ValueError, match="reset_mask"):
            envs.reset(options={"reset_mask": wrong})


def test_same_step_shows_the_end_and_the_new_start() -> None:
    envs = NextBlockVectorEnv(2, "SAME_STEP", **arguments(budgets=(9,), seed=0))
    envs.reset()
    assert set(envs.step(np.array([[*range(9), 0], [0] * 10]))[4]["final_info"]) >= {"illegal", "_illegal"}
    observation, _, terminated, _, info = envs.step(np.array([[*range(9), 0], [0] * 10]))
    assert terminated.tolist() == [True, False] and info["_final_obs"].tolist() == [True, False]
    assert info["final_obs"][0]["fraction"] == 1 and info["final_obs"][1] is None
    assert observation["fraction"][:, 0].tolist() == [0, 0]
    assert info["final_info"]["_illegal"].tolist() == [True, False]
    assert info["illegal"].tolist() == [False, True]


def test_render_and_wrong_arguments() -> None:
    envs = NextBlockVectorEnv(2, render_mode="rgb_array", **arguments())
    envs.reset(seed=0)
    envs.step(np.array([0, 8]))
    frames = envs.render()
    assert frames is not None and len(frames) == 2 and not np.array_equal(*frames)
    single = NextBlockEnv("rgb_array", **arguments())
    single.reset(seed=1)
    single.step(8)
    assert np.array_equal(frames[1], single.render())  # type: ignore[arg-type]
    assert NextBlockVectorEnv(2, **arguments()).render() is None
    with pytest.raises(ValueError, match=r"autoreset_mode='NEVER'.*NEXT_STEP, SAME_STEP, DISABLED"):
        NextBlockVectorEnv(2, "NEVER", **arguments())
    with pytest.raises(ValueError, match="render_mode='human'"):
        NextBlockVectorEnv(2, render_mode="human", **arguments())
    with pytest.raises(ValueError, match="int64"):
        envs.step(np.array([0.0, 1.0]))
