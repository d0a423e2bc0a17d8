"""The TorchRL environment, against TorchRL's own conventions."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torchrl.envs import TransformedEnv
from torchrl.envs.transforms import ActionMask, RewardSum
from torchrl.envs.utils import check_env_specs

from orderrl.backbones import Sampling
from orderrl.envs import NextBlockTorchRLEnv
from tests.envs.helpers import arguments, make_core
from tests.helpers import as_action, random_steps, tiny_backbone

CASES = [
    {"budgets": (1,)},
    {"budgets": (1,), "privileged": True},
    {"budgets": (1, 2, 4), "objective": "likelihood", "form": "charged"},
    {"budgets": (1, 2, 4), "mode": "generate", "sampling": Sampling(guidance=2.0)},
    {"backbone": tiny_backbone(4, 6, 2), "budgets": (4,)},
    {"budgets": (1, 2), "step_cost": (0.05, 0.7)},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("num_envs", [1, 3])
def test_torchrls_checker_has_nothing_to_say(case: dict[str, Any], num_envs: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env_specs(NextBlockTorchRLEnv(num_envs, **arguments(**case)), return_contiguous=True, seed=0)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("break_when_any_done", [True, False])
def test_random_rollouts_stay_inside_the_specs(case: dict[str, Any], break_when_any_done: bool) -> None:
    """Random entries, illegal ones among them, over several episodes."""
    env = NextBlockTorchRLEnv(3, **arguments(**case))
    env.set_seed(0)
    torch.manual_seed(0)
    rollout = env.rollout(24, break_when_any_done=break_when_any_done)
    blocks = env.core.geometry.num_blocks
    assert rollout.shape[0] == 3 and rollout.shape[1] <= (2 * blocks if break_when_any_done else 24)
    for step in range(rollout.shape[1]):
        assert env.observation_spec.is_in(rollout["next"][:, step].select(*env.observation_spec.keys()))
        assert env.action_spec.is_in(rollout["action"][:, step])
    assert rollout["next", "illegal"].any() and rollout["next", "done"].any()
    illegal = rollout["next", "illegal"]
    assert torch.allclose(rollout["next", "reward"][illegal], torch.tensor(-0.1))
    assert not (rollout["next", "terminated"] & rollout["next", "truncated"]).any()


def test_torchrls_action_mask_makes_every_action_legal() -> None:
    env = TransformedEnv(NextBlockTorchRLEnv(4, **arguments(budgets=(1,), strict=True)), ActionMask())
    env.append_transform(RewardSum())
    check_env_specs(env)
    rollout = env.rollout(36, break_when_any_done=False)
    assert not rollout["next", "illegal"].any()
    assert rollout["next", "terminated"].sum().item() == 16
    assert rollout["next", "terminated"][:, 8::9].all()


def masked_random(td: TensorDictBase) -> TensorDictBase:
    td["action"] = torch.multinomial(td["action_mask"].float().clamp_min(1e-9), 1)[..., 0]
    return td


def test_partial_resets_leave_the_others_alone() -> None:
    env = NextBlockTorchRLEnv(3, **arguments())
    env.set_seed(5)
    state = env.reset()
    for block in range(3):
        state["action"] = torch.full((3,), block)
        state = env.step(state)["next"]
    kept = state["hidden"][[0, 2]].clone()
    state["_reset"] = torch.tensor([[False], [True], [False]])
    again = env.reset(state)
    assert torch.equal(again["hidden"][[0, 2]], kept)
    assert again["fraction"][:, 0].tolist() == pytest.approx([1 / 3, 0, 1 / 3])
    assert env.core.episode.tolist() == [0, 1, 0]


def test_seeding() -> None:
    def images(seed: int | None) -> list[int]:
        env = NextBlockTorchRLEnv(4, **arguments())
        if seed is not None:
            env.set_seed(seed)
        env.reset()
        return env.core.image_index.tolist()

    assert images(3) == images(3) and images(3)[1:] == images(4)[:3]
    assert len({tuple(images(None)) for _ in range(8)}) > 4  # without a seed they differ
    torch.manual_seed(0)
    first = images(None)
    torch.manual_seed(0)
    assert images(None) == first  # and follow the global seed, as is TorchRL's custom
    rollouts = []
    for _ in range(2):
        env = NextBlockTorchRLEnv(2, **arguments(mode="generate"))
        env.set_seed(1)
        torch.manual_seed(1)
        rollouts.append(env.rollout(9, masked_random))
    assert (rollouts[0] == rollouts[1]).all()


def test_reset_takes_an_image() -> None:
    env = NextBlockTorchRLEnv(2, **arguments())
    state = env.reset(index=torch.tensor([3, 8]))
    assert torch.equal(state["label"], env.core.data.labels[[3, 8]])


@pytest.mark.parametrize("privileged", [False, True])
@pytest.mark.parametrize("budgets", [(1,), (1, 2, 4)], ids=str)
def test_hidden_tokens_show_only_to_a_privileged_critic(budgets: tuple[int, ...], privileged: bool) -> None:
    """After so many steps the first image looks like another one, whose tokens are others where blocks are hidden."""
    settings, owner = arguments(budgets=budgets), tiny_backbone().geometry.token_block
    steps, data = random_steps(9, budgets, 3), settings["data"]
    order, ends = torch.tensor([b for step in steps for b in step]), accumulate(map(len, steps[:-1]), initial=0)
    image, changed = data.tokens[2], (data.tokens[2] + 1) % 5
    tokens = torch.stack([image, *(torch.where(torch.isin(owner, order[:end]), image, changed) for end in ends)])
    data = replace(data, tokens=tokens, labels=data.labels[2].expand(len(tokens)))
    env = NextBlockTorchRLEnv(len(tokens), privileged, **settings | {"data": data})
    state = env.reset(index=torch.arange(len(tokens)))
    assert ("context_loss" in state) == privileged
    for count, step in enumerate(steps):
        for key, value in state.exclude("reward").items():
            same = torch.allclose(value[0].float(), value[1 + count].float(), atol=1e-5)
            assert same == (key != "context_loss"), (key, count)
        action = as_action(step, budgets, 9)
        state["action"] = action.expand(len(tokens), *action.shape)
        state = env.step(state)["next"]


def test_privileged_needs_losses() -> None:
    for case in ({"mode": "generate"}, {"objective": "likelihood", "form": "charged"}):
        with pytest.raises(ValueError, match="privileged=True needs context losses"):
            NextBlockTorchRLEnv(2, privileged=True, **arguments(**case))


def test_an_existing_core_is_wrapped() -> None:
    core = make_core(3, (1, 2), seed=8)
    env = NextBlockTorchRLEnv(core=core)
    env.reset()
    twin = make_core(3, (1, 2), seed=8)
    twin.reset()
    assert env.core is core and torch.equal(core.image_index, twin.image_index) and env.batch_size == (3,)
