"""Processes that are forked from one play images of their own, unless a seed says which."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv
from torchrl.envs import ParallelEnv

from orderrl.envs import NextBlockEnv, NextBlockTorchRLEnv, NextBlockVectorEnv
from tests.helpers import tiny_backbone, tiny_images

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs os.fork")
BACKBONE = tiny_backbone(4, 4)
TINY: dict[str, Any] = {"backbone": BACKBONE, "data": tiny_images(BACKBONE, 2000)}
MAKE: dict[str, Callable[..., Any]] = {
    "single": partial(NextBlockEnv, **TINY),
    "vector": partial(NextBlockVectorEnv, num_envs=4, **TINY),
    "torchrl": partial(NextBlockTorchRLEnv, num_envs=4, **TINY),
    "by name": partial(gym.make, "orderrl:orderrl/NextBlock-v0", **TINY),
}
every_face = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def forked(work: Callable[[int], Any], count: int = 3) -> list[Any]:
    """What some processes, forked one after the other, give: each is given its number."""
    context = multiprocessing.get_context("fork")
    found = []
    for number in range(count):
        receiver, sender = context.Pipe(duplex=False)

        def run(number: int = number, sender: Any = sender) -> None:
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            sender.send(work(number))

        process = context.Process(target=run)
        process.start()
        assert receiver.poll(120)
        found.append(receiver.recv())
        process.join(60)
    return found


def images(env: Any, episodes: int = 4) -> tuple[int, ...]:
    """Indices of the images of some episodes."""
    core = getattr(env, "core", None) or env.unwrapped.core
    seen: list[int] = []
    for _ in range(episodes):
        env.reset()
        seen += core.image_index.tolist()
    return tuple(seen)


@every_face
def test_environments_made_in_forked_processes_differ(make: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    torch.rand(3)
    assert len({images(make()), *forked(lambda number: images(make()))}) == 4


@every_face
def test_an_environment_made_before_the_fork_goes_its_own_way_in_each(make: Callable[..., Any]) -> None:
    env = make()
    env.reset()
    assert len({*forked(lambda number: images(env)), images(env)}) == 4


def test_an_episode_that_was_begun_before_the_fork_is_played_to_its_end() -> None:
    env = NextBlockVectorEnv(num_envs=2, **TINY)
    env.reset()

    def play(number: int) -> tuple[Any, ...]:
        before = env.core.image_index.tolist()
        for step in range(4):
            *_, terminated, _, info = env.step([step, step])
            assert not info["illegal"].any()
        assert terminated.all() and env.core.image_index.tolist() == before
        env.step([0, 0])  # begins anew
        return tuple(env.core.image_index.tolist()), tuple(env.core.seeds.tolist())

    assert len(set(forked(play))) == 3


@every_face
def test_a_given_seed_is_kept_in_every_process(make: Callable[..., Any]) -> None:
    env = make(seed=5)
    expected = images(make(seed=5))
    assert forked(lambda number: images(make(seed=5)), 2) == [expected] * 2
    assert forked(lambda number: images(env), 2) == [expected] * 2


@every_face
def test_a_process_that_seeds_pytorch_itself_gets_what_its_seed_says(make: Callable[..., Any]) -> None:
    """In whatever process that is: a task of a pool does not depend on the worker that takes it."""

    def seeded(number: int) -> tuple[int, ...]:
        torch.manual_seed(7 + number // 2)
        return images(make())

    torch.manual_seed(0)
    first, again, other = forked(seeded)
    assert first == again == seeded(0) and first != other


def test_grandchildren_differ_too() -> None:
    def child(number: int) -> Any:
        torch.manual_seed(3)
        return forked(lambda number: images(MAKE["single"]()), 2)

    (found,) = forked(child, 1)
    assert len(set(found)) == 2


@pytest.mark.slow
def test_workers_of_the_libraries_differ() -> None:
    """TorchRL's ParallelEnv, Gymnasium's AsyncVectorEnv and a pool, all of them forking."""
    env = ParallelEnv(2, MAKE["torchrl"], mp_start_method="fork")
    try:
        first, second = env.reset()["entropy"]
        assert not torch.equal(first, second)
    finally:
        env.close()
    several = AsyncVectorEnv([MAKE["by name"]] * 2, context="fork")
    try:
        assert any(len(set(several.reset()[0]["label"].tolist())) == 2 for _ in range(8))
    finally:
        several.close()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(pooled, range(4), chunksize=1)
    assert len(set(found)) == 4


def pooled(number: int) -> tuple[int, ...]:
    return images(MAKE["single"]())
