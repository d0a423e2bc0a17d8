"""The labels that cloning learns from: random contexts, and with DAgger the states that the planner reaches itself.

A clone of random prefixes is asked, when it plays, about prefixes of its own making. DAgger (Ross et al., 2011) lets it
play, labels the states it gets into with the same oracle, adds them to the labels and trains on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orderrl.agents.play import play
from orderrl.agents.policies import PlannerPolicy, Policy, take_attributes
from orderrl.agents.schedules import reads_content
from orderrl.data import load_split
from orderrl.data.token_set import random_window
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.reward import CHEAPEST
from orderrl.factory import Setup
from orderrl.labels import find_or_label, find_or_make_labels, label_description, open_labels
from orderrl.oracle import Contexts
from orderrl.planner import load_planner
from orderrl.runtime import distributed
from orderrl.runtime.distributed import print_main
from orderrl.runtime.random import Stream, keyed_uniform
from orderrl.runtime.weights import weights_fingerprint

if TYPE_CHECKING:
    from tensordict import TensorDictBase


def label_sets(setup: Setup, config: Any, train: Callable[[Setup, Any], Path]) -> tuple[Path, ...]:
    """Labels of random contexts, and of states that the planner of each round reaches.

    Each round trains a planner on all labels so far; labels and planners of earlier rounds are found again. All play
    images that the first labels came from, so every round keeps back the same ones, with the states that were reached
    on them.

    Args:
        config: settings of cloning, with `dagger_rounds`.
        train: gives the checkpoint of the planner that a setup and a config train.
    """
    sets = [find_or_make_labels(setup)]
    images = open_labels(sets[0], setup.backbone)["image"].unique()
    for number in range(config.dagger_rounds):
        before = replace(setup, label_sets=tuple(sets), name=None)
        planner = train(before, replace(config, dagger_rounds=number))
        print_main(f"dagger: round {number + 1} of {config.dagger_rounds}")
        sets.append(_own_labels(setup, config, planner, images, number + 1))
    return tuple(sets)


def _own_labels(setup: Setup, config: Any, start: Path, images: Tensor, number: int) -> Path:
    """Folder of the labels of states that a planner reaches itself.

    Args:
        start: the planner's checkpoint.
        images: (n,) int64, planner images that it plays: those that its labels came from.
        number: of the round, from 1.
    """
    count, share = config.dagger_contexts, config.dagger_own_share
    planner, _ = load_planner(start, setup.backbone)
    data = load_split(setup.data, "planner")
    settings = replace(setup.labels, contexts=count)
    own = {"planner": weights_fingerprint(planner), "contexts": count, "own_share": share, "round": number}
    description = label_description(setup, data, setup.labels) | {"own": own | {"seed": setup.seed}}

    def contexts() -> Contexts:
        core = NextBlockCore(setup.backbone, data, min(settings.batch_size, count), CoreConfig(reward=CHEAPEST))
        seed, first = setup.seed * 1_000_003 + number, setup.labels.contexts + (number - 1) * count
        return own_contexts(PlannerPolicy(planner), core, images, count, share, seed, first)

    # one process plays for all: another one's rounding might choose another block
    return find_or_label(setup, data, settings, lambda: distributed.on_main(contexts), description)


@torch.no_grad()
def own_contexts(
    policy: Policy, core: NextBlockCore, images: Tensor, count: int, own_share: float, seed: int, first: int
) -> Contexts:
    """Prefixes of a policy's own trajectories, sorted by length.

    The number of visible blocks is uniform on 0 .. B - 2, as in `orderrl.oracle.random_contexts`.

    Args:
        policy: reveals one block a step.
        core: in mode "teacher", with budgets (1,); as many episodes as it has are played at once.
        images: (n,) int64, indices in the core's data; they take turns, from a place that the seed draws.
        count: contexts.
        own_share: share of actions that are the policy's own; the others are uniform over the hidden blocks.
        seed: of lengths, turns and random actions.
        first: number of the first context.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = core.geometry.num_blocks
    image = images[random_window(len(images), count, generator)]
    length = torch.randint(max(blocks - 1, 1), (count,), generator=generator)
    by_length = length.argsort(stable=True)  # episodes of a batch end together
    image, length = image[by_length], length[by_length]
    order = torch.empty(count, blocks, dtype=torch.int64)
    for rows in torch.arange(count).split(core.num_envs):
        played = torch.cat([rows, rows[-1:].expand(core.num_envs - len(rows))])  # the last ones idle
        core.reset(index=image[played])
        acts = _mixed(policy, own_share, seed, played)
        play(core, acts, generator, steps=int(length[rows[-1]]))
        revealed = torch.where(core.visible, core.reveal_step, blocks)
        order[rows] = revealed.argsort(dim=1, stable=True)[: len(rows)].cpu()
    return Contexts(first + torch.arange(count), image, order, length)


def _mixed(policy: Policy, own_share: float, seed: int, number: Tensor) -> Policy:
    """The policy's blocks, and random ones in their place; `number` (M,) of the contexts keys the random numbers."""

    def mixed(observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        visible = observation["visible"]
        # one number for each block, and one for whose action it is; keyed, so that batches do not matter
        step = visible.sum(-1, keepdim=True).cpu()
        keys = (Stream.POLICY, seed, number[:, None], step, torch.arange(visible.shape[1] + 1))
        uniforms = keyed_uniform(keys).to(visible.device)
        anything = uniforms[:, :-1].masked_fill(visible, -1.0).argmax(-1)
        return torch.where(uniforms[:, -1] < own_share, policy(observation, generator), anything)

    take_attributes(mixed, policy, reads_content(policy))
    return mixed
