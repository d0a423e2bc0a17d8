"""Numbers that a caller gives: whole ones are taken in any width, others are refused by all three faces."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from orderrl.backbones import load_backbone
from orderrl.envs import NextBlockEnv, NextBlockTorchRLEnv, NextBlockVectorEnv
from orderrl.envs.reward import RewardConfig
from orderrl.runtime.integers import LARGEST_SEED, as_int64, as_seed
from tests.envs.helpers import make_core

NOT_WHOLE = [
    1.0, 1.5, 1 + 0j, True, "1", None, float("nan"), float("inf"), np.float64(1), np.bool_(True), np.complex64(1),
    Fraction(3, 2), Decimal(1), torch.tensor(1.0), torch.tensor(True), torch.tensor(1 + 0j), {}, [1.0], [True],
]  # fmt: skip
WHOLE = [1, np.int8(1), np.uint16(1), np.int64(1), np.array(1), torch.tensor(1), torch.tensor(1, dtype=torch.int16)]


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_whole_number_is_no_action_seed_label_or_index(value: Any) -> None:
    with pytest.raises(ValueError, match="action must be int64"):
        as_int64("action", value)
    with pytest.raises(ValueError, match="seed must be a whole number"):
        as_seed(value)


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_whole_numbers_of_any_width_are_taken(value: Any) -> None:
    found = as_int64("action", value)
    assert found.dtype == torch.int64 and found.item() == 1 and as_seed(value) == 1


@pytest.mark.parametrize("value", [-1, LARGEST_SEED + 1, 10**30])
def test_seeds_out_of_range_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match="seed must be a whole number from 0 to"):
        as_seed(value)


def faces() -> list[Any]:
    backbone = load_backbone("digits")
    return [make(backbone=backbone) for make in (NextBlockEnv, NextBlockVectorEnv, NextBlockTorchRLEnv)]


def act(env: Any, value: Any) -> Any:
    if isinstance(env, NextBlockTorchRLEnv):
        action = torch.as_tensor([value])
        return env._step(TensorDict({"action": action}, [1]))
    return env.step(value if isinstance(env, NextBlockEnv) else [value])


def test_every_face_refuses_them() -> None:
    for env in faces():
        env.reset()
        for value in (1.0, 1.5, True, 1j):
            with pytest.raises(ValueError, match="action must be int64"):
                act(env, value)
            with pytest.raises(ValueError, match="seed must be a whole number"):
                env.set_seed(value) if isinstance(env, NextBlockTorchRLEnv) else env.reset(seed=value)
            with pytest.raises(ValueError, match="index must be int64"):
                if isinstance(env, NextBlockTorchRLEnv):
                    env.reset(index=value)
                else:
                    env.reset(options={"index": value})
            with pytest.raises(ValueError, match="seed must be a whole number"):
                type(env)(backbone=env.core.backbone, seed=value)
        env.reset()
        act(env, 1)  # and nothing is broken by it


def test_vectors_of_seeds_are_read_one_by_one() -> None:
    env = NextBlockVectorEnv(num_envs=2)
    env.reset(seed=np.array([3, 4]))  # type: ignore[arg-type]
    assert env.core.seeds.tolist() == [3, 4]
    env.reset(seed=np.int64(8))  # type: ignore[arg-type]
    assert env.core.seeds.tolist() == [8, 9]
    for wrong in ([1, 2.5], [True, 1], np.array([1.0, 2.0]), "12"):
        with pytest.raises(ValueError, match="seed must be"):
            env.reset(seed=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [[0.0, 1.0], [True, False], [0, 4], [-1, 0], [0], [0j, 1j]], ids=repr)
def test_labels_are_classes(backbone: Any, labels: list[Any]) -> None:
    core = make_core(backbone=backbone, num_envs=2)
    with pytest.raises(ValueError, match="labels"):
        core.reset(labels=torch.tensor(labels))
    core.reset(labels=torch.tensor([0, 3]))  # 3 classes, and the label of none
    assert core.labels.tolist() == [0, 3]


@pytest.mark.parametrize("num_envs", [0, -1, 1.5, 2.0, True, "2"], ids=repr)
def test_numbers_of_environments_are_whole(num_envs: Any) -> None:
    for make in (NextBlockVectorEnv, NextBlockTorchRLEnv):
        with pytest.raises(ValueError, match="num_envs must be"):
            make(num_envs=num_envs, backbone=load_backbone("digits"))


@pytest.mark.parametrize("cost", [True, 0.5j, float("nan"), float("inf"), -1.0], ids=repr)
def test_chosen_step_costs_are_numbers_in_the_range(cost: Any) -> None:
    env = NextBlockEnv(step_cost=(0.1, 1.0))
    with pytest.raises(ValueError, match="step_cost must be"):
        env.reset(options={"step_cost": cost})


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("inf"), float("nan")])
def test_a_reach_is_finite(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must be"):
        RewardConfig(weight="far", sigma=sigma)


def test_a_device_beside_a_backbone_that_lies_elsewhere_is_refused() -> None:
    backbone = load_backbone("digits")
    for make in (NextBlockEnv, NextBlockVectorEnv, NextBlockTorchRLEnv):
        assert make(backbone=backbone, device="cpu").core.device.type == "cpu"
        with pytest.raises(ValueError, match="device='meta' contradicts the backbone, which lies on 'cpu'"):
            make(backbone=backbone, device="meta")


def test_index_chooses_the_image() -> None:
    core = make_core(3)
    core.reset(index=torch.tensor([4, 0, 11]))
    assert torch.equal(core.tokens, core.data.tokens[[4, 0, 11]]) and core.image_index.tolist() == [4, 0, 11]
    core.reset(torch.tensor([1]), 7)
    assert core.image_index.tolist() == [4, 7, 11]


@pytest.mark.parametrize(
    "index", [12, -1, torch.tensor([0, 12]), torch.tensor([0, 1, 2]), 1.5, torch.tensor([0.0, 1.0])]
)
def test_impossible_images_are_refused(index: Any) -> None:
    core = make_core(2)
    with pytest.raises(ValueError, match="index"):
        core.reset(index=index)


def test_generated_index_takes_the_label() -> None:
    core = make_core(2, mode="generate")
    core.reset(index=torch.tensor([3, 5]))
    assert torch.equal(core.labels, core.data.labels[[3, 5]])
