"""Environments on tiny backbones, and one recorder of trajectories for every face."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from orderrl.backbones import OrderRobustTransformer, Sampling
from orderrl.data import TokenSet
from orderrl.envs import CoreConfig, NextBlockCore, NextBlockEnv, NextBlockTorchRLEnv, NextBlockVectorEnv, RewardConfig
from tests.helpers import as_action, random_steps, tiny_backbone, tiny_images


def make_core(
    num_envs: int = 3,
    budgets: tuple[int, ...] = (1,),
    mode: str = "teacher",
    backbone: OrderRobustTransformer | None = None,
    data: TokenSet | None = None,
    seed: int = 0,
    strict: bool = True,
    sampling: Sampling | None = None,
    **reward: Any,
) -> NextBlockCore:
    """A core on a tiny backbone; `reward` are values of `RewardConfig`."""
    backbone = backbone or tiny_backbone()
    config = CoreConfig(mode, budgets, RewardConfig(**reward), sampling or Sampling(), strict)
    return NextBlockCore(backbone, data or tiny_images(backbone), num_envs, config, seed)


def arguments(**changes: Any) -> dict[str, Any]:
    """Keyword arguments of the faces for the tiny backbone and its images."""
    backbone = changes.pop("backbone", None) or tiny_backbone()
    return {"backbone": backbone, "data": tiny_images(backbone), **changes}


class Played(NamedTuple):
    """Episodes of several states played by given steps.

    Attributes:
        rewards: (T, M), zero after the end.
        losses: (T + 1, M, B), before every step and at the end.
        visible: (T + 1, M, B).
        steps: for every state the blocks of each of its steps.
    """

    rewards: Tensor
    losses: Tensor
    visible: Tensor
    steps: list[list[list[int]]]


def play(core: NextBlockCore, seed: int = 0, index: Tensor | None = None) -> Played:
    """Play one episode of every state in random orders of random budgets."""
    blocks, budgets = core.geometry.num_blocks, core.config.budgets
    steps = [random_steps(blocks, budgets, 100 * seed + row) for row in range(core.num_envs)]
    core.reset(index=index)
    rewards, losses, visible = [], [core.losses.clone()], [core.visible.clone()]
    for number in range(max(map(len, steps))):
        # a finished state is given any action
        chosen = [s[number] if number < len(s) else [0] * budgets[0] for s in steps]
        actions = torch.stack([as_action(step, budgets, blocks) for step in chosen])
        rewards.append(core.step(actions).reward)
        losses.append(core.losses.clone())
        visible.append(core.visible.clone())
    assert bool(core.visible.all())
    return Played(torch.stack(rewards), torch.stack(losses), torch.stack(visible), steps)


class Step(NamedTuple):
    """What a face returned for one sub-environment: at a reset, reward and flags are zero."""

    observation: dict[str, np.ndarray]
    reward: float
    terminated: bool
    truncated: bool


Trajectory = list[tuple[np.ndarray | None, Step, np.ndarray]]  # action, result, tokens that are visible
Face = Callable[..., list[list[Trajectory]]]  # arguments -> [sub-environment][episode]


def choose(observation: dict[str, np.ndarray], budgets: tuple[int, ...], source: np.random.Generator) -> np.ndarray:
    """A random legal action for one observation, drawn from one generator of the episode."""
    hidden = np.flatnonzero(observation["action_mask"])
    ranking = source.permutation(hidden)
    if budgets == (1,):
        return np.asarray(ranking[0])
    budget = source.choice(np.flatnonzero(observation["budget_mask"]))
    return np.append(np.resize(ranking, budgets[-1]), budget)


def shown_tokens(core: NextBlockCore, row: int) -> np.ndarray:
    """Tokens of a state, -1 where hidden."""
    visible = core.visible[row][core.geometry.token_block]
    return torch.where(visible, core.tokens[row], -1).numpy()


def play_single(num_envs: int, episodes: int, seed: int, **settings: Any) -> list[list[Trajectory]]:
    """Single environments of seeds s + i."""
    result = []
    for number in range(num_envs):
        env = NextBlockEnv(**settings)
        played = []
        for episode in range(episodes):
            source = np.random.default_rng([seed + number, episode])
            observation, _ = env.reset(seed=seed + number if episode == 0 else None)
            trajectory: Trajectory = [(None, Step(observation, 0.0, False, False), shown_tokens(env.core, 0))]
            while not (trajectory[-1][1].terminated or trajectory[-1][1].truncated):
                action = choose(trajectory[-1][1].observation, env.core.config.budgets, source)
                step = Step(*env.step(action)[:4])
                trajectory.append((action, step, shown_tokens(env.core, 0)))
            played.append(trajectory)
        result.append(played)
    return result


def play_vector(
    num_envs: int, episodes: int, seed: int, autoreset_mode: str = "NEXT_STEP", **settings: Any
) -> list[list[Trajectory]]:
    """One vectorised environment; tokens of an ending that is reset in the same step are not seen."""
    env = NextBlockVectorEnv(num_envs, autoreset_mode, **settings)
    budgets = env.core.config.budgets
    batch, _ = env.reset(seed=seed)
    result: list[list[Trajectory]] = [[[_first(batch, env.core, i)]] for i in range(num_envs)]
    sources = [np.random.default_rng([seed + i, 0]) for i in range(num_envs)]
    ended = np.zeros(num_envs, dtype=bool)
    for _ in range(40 * episodes):
        observations = [_row(batch, i) for i in range(num_envs)]
        actions = [
            np.zeros(env.single_action_space.shape or (), dtype=np.int64)
            if ended[i]
            else choose(o, budgets, sources[i])
            for i, o in enumerate(observations)
        ]
        batch, rewards, terminated, truncated, info = env.step(np.stack(actions))
        for i in range(num_envs):
            if ended[i]:  # the step that begins anew
                assert rewards[i] == 0 and not terminated[i] and not truncated[i]
                _begin(result[i], batch, env.core, i, sources, seed)
                continue
            done = bool(terminated[i] or truncated[i])
            same_step = autoreset_mode == "SAME_STEP" and done
            observation = info["final_obs"][i] if same_step else _row(batch, i)
            step = Step(observation, float(rewards[i]), bool(terminated[i]), bool(truncated[i]))
            tokens = np.empty(0) if same_step else shown_tokens(env.core, i)
            result[i][-1].append((actions[i], step, tokens))
            if same_step:
                _begin(result[i], batch, env.core, i, sources, seed)
        done_now = terminated | truncated
        if autoreset_mode == "DISABLED" and done_now.any():
            batch, _ = env.reset(options={"reset_mask": done_now})
            for i in np.flatnonzero(done_now).tolist():
                _begin(result[i], batch, env.core, i, sources, seed)
        ended = done_now & (autoreset_mode == "NEXT_STEP")
        if all(len(played) > episodes for played in result):
            break
    return [played[:episodes] for played in result]


def _first(batch: dict[str, np.ndarray], core: NextBlockCore, i: int) -> tuple[None, Step, np.ndarray]:
    return None, Step(_row(batch, i), 0.0, False, False), shown_tokens(core, i)


def _begin(
    played: list[Trajectory],
    batch: dict[str, np.ndarray],
    core: NextBlockCore,
    i: int,
    sources: list[np.random.Generator],
    seed: int,
) -> None:
    sources[i] = np.random.default_rng([seed + i, len(played)])
    played.append([_first(batch, core, i)])


def _row(batch: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    return {key: value[i] for key, value in batch.items()}


def play_torchrl(num_envs: int, episodes: int, seed: int, **settings: Any) -> list[list[Trajectory]]:
    """The TorchRL environment with partial resets."""
    env = NextBlockTorchRLEnv(num_envs, **settings)
    env.set_seed(seed)
    keys = [key for key in env.observation_spec.keys() if key != "illegal"]  # noqa: SIM118 - not a mapping
    state = env.reset()

    def observe(td: Any, i: int) -> dict[str, np.ndarray]:
        return {key: td[key][i].numpy().copy() for key in keys}

    result: list[list[Trajectory]] = [
        [[(None, Step(observe(state, i), 0.0, False, False), shown_tokens(env.core, i))]] for i in range(num_envs)
    ]
    sources = [np.random.default_rng([seed + i, 0]) for i in range(num_envs)]
    for _ in range(40 * episodes):
        actions = [choose(observe(state, i), env.core.config.budgets, sources[i]) for i in range(num_envs)]
        state["action"] = torch.from_numpy(np.stack(actions))
        following = env.step(state)["next"]
        for i in range(num_envs):
            step = Step(
                observe(following, i),
                float(following["reward"][i]),
                bool(following["terminated"][i]),
                bool(following["truncated"][i]),
            )
            result[i][-1].append((actions[i], step, shown_tokens(env.core, i)))
        done = following["done"]
        state = following.exclude("reward")
        if done.any():
            state["_reset"] = done
            state = env.reset(state)
            for i in done.flatten().nonzero().flatten().tolist():
                sources[i] = np.random.default_rng([seed + i, len(result[i])])
                start = Step(observe(state, i), 0.0, False, False)
                result[i].append([(None, start, shown_tokens(env.core, i))])
        if all(len(played) > episodes for played in result):
            break
    return [played[:episodes] for played in result]
