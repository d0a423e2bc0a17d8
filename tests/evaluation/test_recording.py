"""Recording: a policy that is taken down acts as before, and its scores are those that it acted by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor

from orderrl.agents.play import Rollout, roll_out
from orderrl.agents.policies import PlannerPolicy, ReferencePolicy, planner_scorer
from orderrl.agents.registry import NamedPolicy, make_policy
from orderrl.backbones import OrderRobustTransformer
from orderrl.data import TokenSet
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.evaluation.recording import EXAMPLES, ScoreLog, episodes, example_images, recorded
from tests.agents.helpers import tiny_planner


def last_hidden(observation: TensorDictBase, generator: torch.Generator) -> Tensor:
    """A user's policy: no scores."""
    return observation["action_mask"].shape[1] - 1 - observation["action_mask"].flip(1).long().argmax(1)


class OwnReference(ReferencePolicy):
    """Scores that it does not act by."""

    def scores(self, core: NextBlockCore, rows: Tensor, hidden: Tensor) -> Tensor:
        return torch.zeros_like(core.losses[rows])

    def act(self, core: NextBlockCore) -> Tensor:
        return (~core.visible).long().argmax(-1)


def named_policy(name: str, backbone: OrderRobustTransformer) -> NamedPolicy:
    if name == "planner":
        planner = tiny_planner(backbone, num_budgets=2)
        return NamedPolicy(name, PlannerPolicy(planner, (1, 2)), (1, 2), planner_scorer(planner))
    if name == "own":
        return NamedPolicy(name, last_hidden, (1,))
    if name == "own reference":
        return NamedPolicy(name, OwnReference(), (1,))
    return make_policy(name, backbone)


def play(policy: Any, named: NamedPolicy, backbone: OrderRobustTransformer, data: TokenSet) -> Rollout:
    core = NextBlockCore(backbone, data, len(data), CoreConfig(budgets=named.budgets, strict=True), seed=3)
    return roll_out(core, policy, torch.Generator().manual_seed(4), torch.arange(len(data)))


@pytest.mark.parametrize(
    "name",
    ["raster", "random", "random@4", "random@<1.5", "spaced_random@2", "high_entropy", "planner", "oracle@2",
     "lookahead", "confidence", "own", "own reference"],
)  # fmt: skip
def test_a_recorded_policy_acts_as_before(name: str, backbone: OrderRobustTransformer, data: TokenSet) -> None:
    named, log = named_policy(name, backbone), ScoreLog()
    plain = play(named.policy, named, backbone, data)
    watched = play(recorded(named, log), named, backbone, data)
    assert torch.equal(plain.reveal_step, watched.reveal_step) and torch.equal(plain.reveal_rank, watched.reveal_rank)
    assert torch.equal(plain.losses, watched.losses)
    assert (log.scores is None) == name.startswith("own")
    if log.scores is not None:
        assert log.scores.shape == (len(plain.visible) - 1, EXAMPLES, backbone.geometry.num_blocks)


@pytest.mark.parametrize("name", ["raster", "random", "high_entropy", "random@4", "oracle", "oracle@2", "planner"])
def test_recorded_scores_are_those_that_the_policy_acted_by(
    name: str, backbone: OrderRobustTransformer, data: TokenSet
) -> None:
    named, log = named_policy(name, backbone), ScoreLog()
    rollout = play(recorded(named, log), named, backbone, data)
    for image, found in enumerate(episodes(rollout, log.scores)):
        assert found.scores is not None
        for step, blocks in enumerate(found.steps):
            hidden = ~rollout.visible[step, image]
            scores = found.scores[step].masked_fill(~hidden, -torch.inf)
            assert scores[blocks].tolist() == scores.topk(len(blocks)).values.tolist()


def test_episodes_tell_what_the_rollout_did(backbone: OrderRobustTransformer, data: TokenSet) -> None:
    named = named_policy("random@4", backbone)  # 9 blocks: 4, 4 and 1
    rollout = play(named.policy, named, backbone, data)
    found = episodes(rollout, None)
    assert len(found) == 8
    for image, one in enumerate(found):
        assert [len(step) for step in one.steps] == [4, 4, 1] and one.scores is None
        for step, blocks in enumerate(one.steps):
            assert rollout.reveal_rank[image, blocks].tolist() == list(range(len(blocks)))
            assert (rollout.reveal_step[image, blocks] == step).all()
            left = rollout.losses[step, image].sum().item() / backbone.geometry.num_tokens
            assert one.loss[step] == pytest.approx(left, rel=1e-6)
        assert one.loss[-1] == 0


def test_examples_are_the_first_images(backbone: OrderRobustTransformer, data: TokenSet) -> None:
    found = example_images(data, backbone.geometry)
    assert torch.equal(found.images, data.images(data.tokens[:8]))
    assert (found.labels, found.rows, found.columns) == (data.labels[:8].tolist(), 3, 3)


def test_examples_have_the_names_of_their_classes(backbone: OrderRobustTransformer, data: TokenSet) -> None:
    named = example_images(replace(data, class_names=("cat", "dog", "cow")), backbone.geometry)
    assert named.labels == [("cat", "dog", "cow")[label] for label in data.labels[:8]]
    synsets = example_images(replace(data, class_names=("n02099601", "n01440764", "n99999999")), backbone.geometry)
    assert set(synsets.labels) == {"golden retriever", "tench", "n99999999"}
