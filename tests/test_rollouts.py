"""Recorded episodes: those of the environment, to the bit, as a TensorDict and as a Minari data set."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict

from orderrl import compose
from orderrl.agents.registry import make_policy
from orderrl.backbones import OrderRobustTransformer, save_backbone
from orderrl.data import TokenSet
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.gymnasium import NextBlockEnv
from orderrl.envs.reward import RewardConfig
from orderrl.envs.spaces import observation_space
from orderrl.evaluation.transitions import record, record_dataset, write_minari
from orderrl.rollouts import rollouts
from tests.helpers import tiny_backbone

REWARD = RewardConfig("likelihood", step_cost=0.3)


def sometimes_illegal(observation: TensorDict, generator: torch.Generator) -> torch.Tensor:
    """Any block, hidden or not."""
    batch, blocks = observation["visible"].shape
    return torch.randint(blocks, (batch,), generator=generator)


def one_to_four(observation: TensorDict, generator: torch.Generator) -> torch.Tensor:
    """Random hidden blocks with a random legal budget of 1, 2 or 4."""
    ranked = torch.rand(observation["visible"].shape, generator=generator)
    ranked = ranked.masked_fill(observation["visible"], -1).argsort(-1, descending=True)[:, :4]
    budget = torch.rand(observation["budget_mask"].shape, generator=generator)
    return torch.cat([ranked, budget.masked_fill(~observation["budget_mask"], -1).argmax(-1, keepdim=True)], 1)


CASES: dict[str, tuple[Any, tuple[int, ...]]] = {"illegal": (sometimes_illegal, (1,)), "sets": (one_to_four, (1, 2, 4))}


def episodes_of(transitions: TensorDict) -> list[TensorDict]:
    lengths = torch.unique_consecutive(transitions["episode"], return_counts=True)[1].tolist()
    return list(transitions.split(lengths))


@pytest.mark.parametrize("case", CASES)
def test_transitions_are_those_of_the_environment(
    backbone: OrderRobustTransformer, data: TokenSet, tmp_path: Path, case: str
) -> None:
    policy, budgets = CASES[case]
    made = record_dataset(backbone, data, policy, CoreConfig(budgets=budgets, reward=REWARD), 13, tmp_path / "t", 5)
    found = TensorDict.load_memmap(tmp_path / "t")
    assert (found == made).all() and not (tmp_path / ".t.parts").exists()
    env = NextBlockEnv(backbone=backbone, data=data, budgets=budgets, objective="likelihood", step_cost=0.3)
    episodes = episodes_of(found)
    assert len(episodes) == 13 and [int(e["image"][0]) for e in episodes] == [i % 12 for i in range(13)]
    for number, episode in enumerate(episodes):
        assert set(episode["episode"].tolist()) == {number} and episode["step"].tolist() == list(range(len(episode)))
        observation, _ = env.reset(options={"index": int(episode["image"][0])})
        for step in episode:
            for key, value in observation.items():
                np.testing.assert_allclose(step[key].numpy(), value, atol=1e-5, err_msg=key)
            observation, reward, terminated, truncated, info = env.step(step["action"].numpy())
            after = step["next"]
            for key, value in observation.items():
                np.testing.assert_allclose(after[key].numpy(), value, atol=1e-5, err_msg=key)
            assert after["reward"].item() == pytest.approx(reward, abs=1e-5)
            assert (after["terminated"].item(), after["truncated"].item()) == (terminated, truncated)
            assert after["illegal"].item() == info["illegal"] and after["done"].item() == (terminated or truncated)
        assert terminated or truncated  # the whole episode, and no more
    assert bool(found["next", "illegal"].any()) == (case == "illegal")


def test_steps_of_an_episode_join(backbone: OrderRobustTransformer, data: TokenSet) -> None:
    core = NextBlockCore(backbone, data, 4, CoreConfig(budgets=(1, 2, 4)))
    found = record(core, one_to_four, torch.Generator().manual_seed(0), torch.arange(4))
    for episode in episodes_of(found):
        for key in observation_space(backbone, (1, 2, 4)):
            assert torch.equal(episode["next", key][:-1], episode[key][1:]), key


def test_batches_do_not_change_episodes(backbone: OrderRobustTransformer, data: TokenSet, tmp_path: Path) -> None:
    policy = make_policy("multiscale@2", backbone)
    config = CoreConfig(budgets=policy.budgets)
    one, other = (record_dataset(backbone, data, policy.policy, config, 7, tmp_path / f"{b}", b) for b in (2, 7))
    assert torch.equal(one["action"], other["action"]) and torch.equal(one["episode"], other["episode"])
    torch.testing.assert_close(one["next", "reward"], other["next", "reward"])


def test_a_folder_that_holds_something_is_left_alone(
    backbone: OrderRobustTransformer, data: TokenSet, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="must be new or empty"):
        record_dataset(backbone, data, sometimes_illegal, CoreConfig(), 1, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def recorded(tmp_path: Path, *overrides: str) -> TensorDict:
    save_backbone(tmp_path / "tiny.safetensors", tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    where = ["backbone=digits", f"backbone.name={tmp_path / 'tiny.safetensors'}", f"output_dir={tmp_path / 'runs'}"]
    return TensorDict.load_memmap(rollouts(compose("rollouts", [*where, "n=3", *overrides])))


@pytest.mark.parametrize("policy", ["random@4", "raster", "oracle@2", "multiscale@1+1+2+4+4+4"])
def test_the_action_space_that_is_asked_for_is_recorded(policy: str, tmp_path: Path) -> None:
    """The same blocks at the same steps as in an environment of the policy's own, as actions of the one asked for."""
    asked = recorded(tmp_path, f"policy='{policy}'", "env.budgets=[1,2,4]")
    own = recorded(tmp_path, f"policy='{policy}'")
    assert asked["action"].shape[1:] == (5,) and asked["budget_mask"].shape[1:] == (3,)
    assert torch.equal(asked["visible"], own["visible"]) and torch.equal(
        asked["next", "visible"], own["next", "visible"]
    )
    assert not asked["next", "illegal"].any()


def test_an_action_space_that_lacks_the_policys_budgets_is_refused(tmp_path: Path) -> None:
    for policy in ("random@4", "oracle@4"):
        with pytest.raises(ValueError, match=r"budgets=\(1, 2\) of the environment lack \[4\]"):
            recorded(tmp_path, f"policy={policy}", "env.budgets=[1,2]")


@pytest.fixture
def minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = pytest.importorskip("minari", reason="Minari is not installed (pip install -e '.[minari]')")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return found


@pytest.mark.parametrize("case", CASES)
def test_minari_reads_back_the_very_episodes(
    backbone: OrderRobustTransformer, data: TokenSet, tmp_path: Path, minari: Any, case: str
) -> None:
    policy, budgets = CASES[case]
    made = record_dataset(backbone, data, policy, CoreConfig(budgets=budgets), 6, tmp_path / "t", 4)
    write_minari("tiny/blocks-v0", made, backbone, budgets, {"backbone": "digits", "budgets": list(budgets)}, case, 3)
    dataset = minari.load_dataset("tiny/blocks-v0")
    assert dataset.total_episodes == 6 and dataset.total_steps == len(made)
    assert dataset.observation_space == observation_space(backbone, budgets)
    for episode, expected in zip(dataset.iterate_episodes(), episodes_of(made), strict=True):
        for key, values in episode.observations.items():
            both = torch.cat([expected[key], expected["next", key][-1:]]).numpy()
            np.testing.assert_array_equal(values, both, err_msg=key)
        np.testing.assert_array_equal(episode.actions, expected["action"].numpy())
        np.testing.assert_array_equal(episode.rewards, expected["next", "reward"][:, 0].numpy())
        np.testing.assert_array_equal(episode.terminations, expected["next", "terminated"][:, 0].numpy())
        np.testing.assert_array_equal(episode.truncations, expected["next", "truncated"][:, 0].numpy())
        np.testing.assert_array_equal(episode.infos["illegal"][1:], expected["next", "illegal"][:, 0].numpy())
        np.testing.assert_array_equal(episode.infos["action_mask"], episode.observations["action_mask"])
        for place in range(len(episode.rewards)):
            one = {key: values[place] for key, values in episode.observations.items()}
            assert dataset.observation_space.contains(one | {"label": np.int64(one["label"])})
            assert dataset.action_space.contains(episode.actions[place])
    assert dataset.recover_environment().unwrapped.action_space.shape == ((5,) if case == "sets" else ())


def test_the_command_writes_both_and_the_environment_comes_back(
    tmp_path: Path, minari: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    save_backbone(tmp_path / "tiny.safetensors", tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    arguments = [
        "backbone=digits",
        f"backbone.name={tmp_path / 'tiny.safetensors'}",
        "policy=multiscale@4",
        "n=5",
        "batch_size=3",
    ]
    folders = [f"output_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}", f"output={tmp_path / 'out'}"]
    config = compose("rollouts", [*arguments, *folders, "env=likelihood", "minari=tiny/command-v1"])
    assert rollouts(config) == tmp_path / "out"
    assert "5 episodes of multiscale@4, 20 transitions" in capsys.readouterr().out
    found = TensorDict.load_memmap(tmp_path / "out")
    dataset = minari.load_dataset("tiny/command-v1")
    env = dataset.recover_environment()
    assert isinstance(env, gymnasium.Env)
    for number, episode in enumerate(dataset.iterate_episodes()):
        env.reset(options={"index": number})
        rewards = [float(env.step(action)[1]) for action in episode.actions]
        np.testing.assert_allclose(episode.rewards, rewards, atol=1e-5)
        np.testing.assert_allclose(found[found["episode"] == number]["next", "reward"][:, 0], rewards, atol=1e-5)
    with pytest.raises(ValueError, match="exists already"):
        rollouts(config)


def test_without_minari_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minari", None)
    config = compose("rollouts", [f"output_dir={tmp_path}", "policy=raster", "minari=a/b-v0"])
    with pytest.raises(ValueError, match=r"needs Minari: pip install 'orderrl\[minari\]'"):
        rollouts(config)
    assert not any(tmp_path.iterdir())


def test_a_wrong_id_is_refused_before_any_work(tmp_path: Path, minari: Any) -> None:
    config = compose("rollouts", [f"output_dir={tmp_path / 'runs'}", "policy=raster", "minari=nothing"])
    with pytest.raises(ValueError, match="minari='nothing' is no id"):
        rollouts(config)
    assert not (tmp_path / "runs").exists()
