"""Episodes of a policy as transitions for offline reinforcement learning.

They are written as a table on disk in the layout of TorchRL's offline data sets, which
`orderrl.runtime.tables.open_table` reads, and as Minari data sets.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import torch
from torch import Tensor

from orderrl.agents.play import play
from orderrl.agents.policies import Policy, ReferencePolicy
from orderrl.backbones import Backbone
from orderrl.data import TokenSet
from orderrl.envs.core import CoreConfig, NextBlockCore, Transition
from orderrl.envs.observation import MASKS, SEEN
from orderrl.envs.spaces import action_space, observation_space, to_numpy
from orderrl.runtime.progress import progress
from orderrl.runtime.storage import filled_aside
from orderrl.runtime.tables import TableWriter, open_table, write_checksums

if TYPE_CHECKING:
    from tensordict import TensorDict

ENVIRONMENT = "orderrl/NextBlock-v0"


def record(
    core: NextBlockCore, policy: Policy | ReferencePolicy, generator: torch.Generator, index: Tensor
) -> TensorDict:
    """Play one episode in every sub-environment of a core, to its end.

    Args:
        core: in mode "teacher".
        policy: chooses the actions; an illegal one is recorded, unless the core is strict.
        index: (M,) int64 images.

    Returns:
        The transitions of all episodes one after the other, batch (T,), on the CPU: the observation's keys, `action`,
        `episode`, `step` and `image` (T,) int64, and under `next` the observation after it, `reward` (T, 1) float32,
        `terminated`, `truncated`, `done` and `illegal` (T, 1) bool.
    """
    core.reset(index=index)
    now, playing = core.observation(), ~core.finished
    steps: list[TensorDict] = []

    def look(action: Tensor, transition: Transition) -> None:
        nonlocal now, playing
        after = core.observation()
        outcome = {
            "reward": transition.reward,
            "terminated": transition.terminated,
            "truncated": transition.truncated,
            "done": transition.terminated | transition.truncated,
            "illegal": transition.illegal,
        }
        rows = playing.nonzero().flatten()
        found = now[rows]
        found["action"] = action.to(core.device)[rows]
        found["episode"], found["image"] = rows, core.image_index[rows]
        found["step"] = torch.full_like(rows, len(steps))
        found["next"] = after[rows].update({key: value[rows, None] for key, value in outcome.items()})
        steps.append(found.cpu())
        now, playing = after, ~core.finished

    play(core, policy, generator, record=look)
    episode = torch.cat([step["episode"] for step in steps])
    return torch.cat(steps)[episode.argsort(stable=True)]


def record_dataset(
    backbone: Backbone,
    data: TokenSet,
    policy: Policy | ReferencePolicy,
    config: CoreConfig,
    count: int,
    folder: Path,
    batch_size: int = 64,
    seed: int = 0,
) -> TensorDict:
    """Record episodes into a folder, however many: no more than one batch of them is held in memory.

    Args:
        backbone: frozen.
        data: its images are revealed in turn, from the first.
        policy, config: who acts, and in which environment.
        folder: a new or empty one; afterwards `orderrl.runtime.tables.open_table(folder)` reads it.
        seed: of environment and policy.

    Returns:
        The transitions, as `record` gives them, read from the disk as they are used.

    Raises:
        ValueError: if the folder holds something.
        OSError: if the disk is full.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder={str(folder)!r} must be new or empty")
    generator = torch.Generator().manual_seed(seed)
    with filled_aside(folder) as aside:
        with progress(count, "recording", "episodes") as advance, TableWriter(aside) as table:
            for episodes in torch.arange(count).split(batch_size):
                core = NextBlockCore(backbone, data, len(episodes), config, seed + int(episodes[0]))
                found = record(core, policy, generator, episodes % len(data))
                found["episode"] += episodes[0]
                table.append(found)
                advance(len(episodes))
        write_checksums(aside)
    return open_table(folder)


def write_minari(
    dataset_id: str,
    transitions: TensorDict,
    backbone: Backbone,
    budgets: tuple[int, ...],
    environment: dict[str, Any],
    policy: str,
    seed: int,
    step_cost_range: tuple[float, float] | None = None,
) -> Any:
    """Write recorded episodes as a Minari data set (HDF5), where Minari keeps them (MINARI_DATASETS_PATH).

    Observations, actions and infos are in the dtypes of the Gymnasium environment, which the data set can recover;
    an episode's options hold the index of its image, and what a step cost it if that was drawn.

    Args:
        dataset_id: NAME-vN or NAMESPACE/NAME-vN.
        transitions: from `record_dataset`.
        backbone, budgets: of the environment that they are from.
        environment: its keyword arguments, plain values.
        policy: its name.
        step_cost_range: of the environment, if its step cost is a range.

    Raises:
        ValueError: if Minari is not installed, or there is such a data set already.
    """
    require_minari(dataset_id)
    import minari

    spec = deepcopy(gymnasium.spec(ENVIRONMENT))  # the registry's own otherwise
    spec.kwargs = environment
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of an author and a link, which are the user's to add
        return minari.create_dataset_from_buffers(
            dataset_id,
            _episodes(transitions, seed),
            env=spec,
            observation_space=observation_space(backbone, budgets, step_cost_range),
            action_space=action_space(backbone, budgets),
            algorithm_name=policy,
            description=f"Episodes of {policy} in {ENVIRONMENT}, mode teacher.",
            requirements=["orderrl"],
            data_format="hdf5",
            jpeg_encoding=False,
        )


def require_minari(dataset_id: str) -> None:
    """Refuse what Minari could not write: it is not installed, the id cannot be one, or there is such a data set."""
    try:
        import h5py  # noqa: F401  # Minari's format
        import minari
        from minari.dataset.minari_dataset import parse_dataset_id
    except ImportError as error:
        raise ValueError(f"minari={dataset_id!r} needs Minari: pip install 'orderrl[minari]' ({error})") from error
    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:  # an id without a version is a TypeError of Minari's
        raise ValueError(f"minari={dataset_id!r} is no id; write NAME-v0 or NAMESPACE/NAME-v0") from error
    if dataset_id in minari.list_local_datasets():
        raise ValueError(f"minari={dataset_id!r} exists already; delete it or choose another version")


def _episodes(transitions: TensorDict, seed: int) -> Iterator[Any]:
    """Every episode as Minari's buffer, read when it is asked for."""
    from minari.data_collector import EpisodeBuffer

    lengths = torch.unique_consecutive(transitions["episode"], return_counts=True)[1].tolist()
    for number, episode in enumerate(transitions.split(lengths)):
        keys = [key for key in (*SEEN, *MASKS, "step_cost") if key in episode]
        before, last = episode.select(*keys), episode["next"].select(*keys)[-1:]
        observations = to_numpy(torch.cat([before, last]))
        illegal = torch.cat([torch.zeros(1, dtype=torch.bool), episode["next", "illegal"][:, 0]])
        outcome = {key: episode["next", key][:, 0].numpy() for key in ("reward", "terminated", "truncated")}
        yield EpisodeBuffer(
            id=number,
            seed=seed,
            options={"index": int(episode["image"][0])}
            | ({"step_cost": float(episode["step_cost"][0])} if "step_cost" in episode else {}),
            observations=observations,
            actions=episode["action"].numpy(),
            rewards=outcome["reward"],
            terminations=outcome["terminated"],
            truncations=outcome["truncated"],
            infos={key: observations[key] for key in ("action_mask", "budget_mask") if key in observations}
            | {"illegal": illegal.numpy()},
        )
