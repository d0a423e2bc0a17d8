"""The single Gymnasium environment, against Gymnasium's own conventions and other libraries."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from orderrl.backbones import Sampling
from orderrl.data.pictures import HIDDEN_GREY
from orderrl.envs import NextBlockEnv
from tests.envs.helpers import arguments, make_core, play_single
from tests.helpers import as_action, random_steps, tiny_backbone

CASES = [
    {"budgets": (1,)},
    {"budgets": (1, 2, 4)},
    {"budgets": (4,), "objective": "likelihood", "form": "charged"},
    {"mode": "generate", "budgets": (1, 2), "sampling": Sampling(guidance=2.0)},
    {"backbone": tiny_backbone(4, 6, 2), "weight": "far"},
    {"budgets": (1, 2), "step_cost": (0.05, 0.7)},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("render_mode", [None, "rgb_array"])
def test_gymnasiums_checker_has_nothing_to_say(case: dict[str, Any], render_mode: str | None) -> None:
    env = gym.make("orderrl/NextBlock-v0", render_mode=render_mode, **arguments(**case))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    assert env.spec is not None and env.spec.id == "orderrl/NextBlock-v0"


def test_made_without_an_import() -> None:
    """In a fresh interpreter, single and vectorised, with the weights that ship with the package."""
    code = """
import gymnasium as gym
name = "orderrl:orderrl/NextBlock-v0"
env = gym.make(name, split="test", budgets=(1, 2, 4))
observation, info = env.reset(seed=0)
assert env.observation_space.contains(observation)
envs = gym.make_vec(name, num_envs=3)
observations, infos = envs.reset(seed=0)
assert observations["hidden"].shape[:2] == (3, 16), observations["hidden"].shape
envs.step(envs.action_space.sample())
assert type(envs).__name__ == "NextBlockVectorEnv", type(envs)
print("made")
"""
    root = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stdout == "made\n", run.stderr


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_random_agent_runs_inside_the_spaces(case: dict[str, Any]) -> None:
    """Illegal actions among them; every observation lies in its space, hidden states included."""
    env = gym.make("orderrl/NextBlock-v0", **arguments(**case))
    env.action_space.seed(0)
    illegal = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            observation, info = env.reset(seed=seed)
            done, steps = False, 0
            while not done:
                assert env.observation_space.contains(observation)
                assert set(info) <= {"action_mask", "budget_mask", "illegal"}
                assert info["action_mask"].dtype == np.int8
                assert np.array_equal(info["action_mask"], observation["action_mask"])
                assert np.array_equal(observation["visible"], 1 - observation["action_mask"])
                observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
                assert type(reward) is float and type(terminated) is bool and type(truncated) is bool
                assert type(info["illegal"]) is bool and (not info["illegal"] or reward == pytest.approx(-0.1))
                illegal += info["illegal"]
                done, steps = terminated or truncated, steps + 1
            assert env.observation_space.contains(observation)
            assert steps <= 2 * len(observation["visible"])
    assert illegal > 0


@pytest.mark.parametrize("budgets", [(1,), (1, 2, 4)], ids=str)
def test_masked_samples_are_legal_blocks(budgets: tuple[int, ...]) -> None:
    """The masks under the names that libraries look for."""
    env = NextBlockEnv(**arguments(budgets=budgets))
    observation, info = env.reset(seed=0)
    blocks, largest = 9, budgets[-1]
    for step in random_steps(blocks, budgets, 1):
        mask = env.action_masks()
        assert mask.dtype == np.bool_
        hidden = observation["action_mask"].astype(bool)
        if budgets == (1,):
            assert np.array_equal(mask, hidden)
            assert hidden[env.action_space.sample(mask=info["action_mask"])]
        else:
            assert mask.shape == (blocks * largest + len(budgets),)
            assert np.array_equal(mask[: blocks * largest].reshape(largest, blocks), np.tile(hidden, (largest, 1)))
            assert np.array_equal(mask[blocks * largest :], info["budget_mask"].astype(bool))
            assert info["budget_mask"].tolist() == [k <= hidden.sum() for k in budgets]
        observation, _, terminated, _, info = env.step(as_action(step, budgets, blocks).numpy())
    assert terminated and not env.action_masks()[:blocks].any()


def test_seeding() -> None:
    def first(env: NextBlockEnv, seed: int | None) -> tuple[list[int], np.ndarray]:
        observation, _ = env.reset(seed=seed)
        return [int(env.core.image_index), int(observation["label"])], observation["hidden"]

    one, two = (NextBlockEnv(**arguments()) for _ in range(2))
    for seed in (0, 3, 2**31 + 5):
        (image, hidden), (image_2, hidden_2) = first(one, seed), first(two, seed)
        assert image == image_2 and np.array_equal(hidden, hidden_2)
        (image, _), (image_2, _) = first(one, None), first(two, None)  # and so does what follows
        assert image == image_2
    unseeded = {first(NextBlockEnv(**arguments()), None)[0][0] for _ in range(20)}
    assert len(unseeded) > 3
    env = NextBlockEnv(**arguments())
    assert len({first(env, None)[0][0] for _ in range(20)}) > 3
    by_argument = [first(NextBlockEnv(**arguments(seed=4)), None)[0] for _ in range(2)]
    assert by_argument[0] == by_argument[1] == first(one, 4)[0]


def test_options_choose_the_image() -> None:
    env = NextBlockEnv(**arguments())
    for index in (0, 7, 11):
        observation, _ = env.reset(seed=0, options={"index": index})
        assert observation["label"] == env.core.data.labels[index]
        assert torch.equal(env.core.tokens[0], env.core.data.tokens[index])
    with pytest.raises(ValueError, match="index=12 lies outside the 12 images of tiny/test; use 0 to 11"):
        env.reset(options={"index": 12})


@pytest.mark.parametrize("budgets", [(1,), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("mode", ["teacher", "generate"])
def test_no_hidden_token_in_observation_info_or_picture(budgets: tuple[int, ...], mode: str) -> None:
    """At every step all hidden tokens are replaced: what the face shows stays, and a visible one changes it."""
    backbone = tiny_backbone(4, 6)
    settings = arguments(backbone=backbone, budgets=budgets, mode=mode)
    owner = backbone.geometry.token_block
    steps = random_steps(6, budgets, 2)

    def show(shown: int, changed: torch.Tensor) -> tuple[dict[str, Any], dict[str, Any], np.ndarray]:
        tokens = torch.where(changed, (settings["data"].tokens + 1) % 5, settings["data"].tokens)
        env = NextBlockEnv("rgb_array", **settings | {"data": replace(settings["data"], tokens=tokens)})
        observation, info = env.reset(seed=1, options={"index": 2})
        for step in steps[:shown]:
            observation, _, _, _, info = env.step(as_action(step, budgets, 6).numpy())
        picture = env.render()
        assert picture is not None
        return observation, info, picture

    for shown in range(len(steps)):
        seen = torch.tensor([b for step in steps[:shown] for b in step], dtype=torch.int64)
        hidden = ~torch.isin(owner, seen)
        plain, other = show(shown, torch.zeros_like(hidden)), show(shown, hidden)
        for one, two in zip(plain[:2], other[:2], strict=True):
            assert one.keys() == two.keys()
            for key, value in one.items():
                assert np.allclose(value, two[key], atol=1e-6), key
        assert np.array_equal(plain[2], other[2])
        if shown and mode == "teacher":
            visible = show(shown, owner == seen[0])
            assert not np.allclose(plain[0]["hidden"], visible[0]["hidden"], atol=1e-4)
            assert not np.array_equal(plain[2], visible[2])


def test_render() -> None:
    env = NextBlockEnv("rgb_array", **arguments(backbone=tiny_backbone(4, 6, 2)))
    env.reset(seed=0)
    order = [4, 0, 5]
    for block in order:
        env.step(block)
    picture = env.render()
    assert isinstance(picture, np.ndarray) and picture.dtype == np.uint8
    scale = picture.shape[0] // 4
    assert picture.shape == (4 * scale, 2 * 6 * scale + scale // 2, 3)
    image, heat = picture[:, : 6 * scale], picture[:, -6 * scale :]
    grey = env.core.data.images(env.core.tokens[0])[0].numpy()
    for position, block in enumerate(env.core.geometry.token_block.tolist()):
        row, column = position // 6 * scale, position % 6 * scale
        cell = image[row : row + scale, column : column + scale]
        if block in order:
            assert (cell == grey[position // 6, position % 6]).all()
        else:
            assert (cell == HIDDEN_GREY).all()
            assert (heat[row : row + scale, column : column + scale] == HIDDEN_GREY).all()
    colours = {tuple(heat[int(r) * 2 * scale, int(c) * 2 * scale]) for r, c in env.core.geometry.centres[order]}
    assert len(colours) == 3  # one for each step
    assert NextBlockEnv(**arguments()).render() is None
    with pytest.raises(ValueError, match=r"render_mode='human'.*rgb_array"):
        NextBlockEnv("human", **arguments())


@pytest.mark.parametrize(
    ("action", "message"),
    [(0.5, "int64"), (np.array([1.0]), "int64"), (np.array([1]), "shape"), (np.array([[1]]), "shape"), (True, "int64")],
)
def test_wrong_actions_are_refused(action: Any, message: str) -> None:
    env = NextBlockEnv(**arguments())
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)


@pytest.mark.parametrize("kind", [int, np.int8, np.int32, np.int64, np.uint8, torch.tensor])
def test_integer_actions_of_any_width_are_taken(kind: Any) -> None:
    env = NextBlockEnv(**arguments())
    env.reset(seed=0)
    observation, _, _, _, info = env.step(kind(3))
    assert observation["visible"].nonzero()[0].tolist() == [3] and not info["illegal"]


def test_strict_raises() -> None:
    env = NextBlockEnv(**arguments(strict=True))
    env.reset(seed=0)
    env.step(3)
    with pytest.raises(ValueError, match=r"action 3 .*is illegal"):
        env.step(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": (1, 16)}, "budgets"),
        ({"objective": "speed"}, "objective='speed'"),
        ({"backbone": "nobody"}, "backbone='nobody'"),
        ({"data": "nothing"}, "nothing"),
        ({"mode": "dream"}, "mode='dream'"),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NextBlockEnv(**arguments() | change)
    with pytest.raises(TypeError, match="colour"):
        NextBlockEnv(**arguments(), colour="red")


def test_the_return_of_an_episode_is_the_cores() -> None:
    """The single face adds nothing: its rewards are those of the core of the same seed."""
    [[trajectory]] = play_single(1, 1, seed=9, **arguments(budgets=(1, 2, 4)))
    core = make_core(1, (1, 2, 4), seed=9)
    core.reset()
    for action, step, _ in trajectory[1:]:
        assert step.reward == core.step(torch.from_numpy(np.asarray(action))[None]).reward.item()


def test_maskable_ppo_of_another_library_trains() -> None:
    """Unmodified: it finds the masks and reads the observations."""
    from sb3_contrib import MaskablePPO
    from sb3_contrib.common.maskable.utils import get_action_masks

    env = gym.make("orderrl/NextBlock-v0", **arguments(budgets=(1,)))
    model = MaskablePPO("MultiInputPolicy", env, n_steps=32, batch_size=32, n_epochs=1, seed=0, device="cpu")
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(64)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    lengths = {episode["l"] for episode in model.ep_info_buffer or []}
    assert lengths == {9}  # no illegal action was ever taken
    observation, _ = env.reset(seed=1)
    for _ in range(9):
        action, _ = model.predict(observation, action_masks=get_action_masks(env))
        observation, _, terminated, _, info = env.step(action)
        assert not info["illegal"]
    assert terminated
