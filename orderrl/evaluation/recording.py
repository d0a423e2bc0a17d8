"""What a policy scored at every step, taken down while it acts: the report shows it beside what the policy did."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orderrl.agents.play import Rollout
from orderrl.agents.policies import Policy, RankingPolicy, ReferencePolicy, Scorer, take_attributes
from orderrl.agents.registry import NamedPolicy
from orderrl.agents.schedules import reads_content
from orderrl.data import TokenSet
from orderrl.data.classes import class_words
from orderrl.envs.core import NextBlockCore
from orderrl.evaluation.detail import Episode, Examples
from orderrl.geometry import BlockGrid

if TYPE_CHECKING:
    from tensordict import TensorDictBase

EXAMPLES = 8
"""The first test images, which the report's viewer shows."""


class ScoreLog:
    """Scores of the first `EXAMPLES` images, step by step."""

    def __init__(self) -> None:
        self._steps: list[Tensor] = []

    def add(self, scores: Tensor) -> None:
        """Take down a step: scores (M, B) of all images, in their order."""
        self._steps.append(scores[:EXAMPLES].float())

    def fill(self, step: int, rows: Tensor, scores: Tensor) -> None:
        """Take down a part of a step: scores (m, B) of the images rows (m,); a step's parts follow each other."""
        while len(self._steps) <= step:
            self._steps.append(scores.new_zeros(EXAMPLES, scores.shape[1], dtype=torch.float32))
        shown = rows < EXAMPLES
        self._steps[step][rows[shown]] = scores[shown].float()

    @property
    def scores(self) -> Tensor | None:
        """(T, up to `EXAMPLES`, B) float32 on the CPU; None if the policy has none. Visible blocks' mean nothing."""
        return torch.stack(self._steps).cpu() if self._steps else None


def recorded(named: NamedPolicy, log: ScoreLog) -> Policy | ReferencePolicy:
    """The same policy, which also writes its block scores to a log. It acts as before, draws and all.

    Policies without scores of their own, such as functions of a user, are returned as they are.
    """
    policy = named.policy
    if isinstance(policy, ReferencePolicy):
        # A reference that acts in a way of its own need not act by its scores.
        return _RecordedReference(policy, log) if type(policy).act is ReferencePolicy.act else policy
    if isinstance(policy, RankingPolicy):
        ranking = copy.copy(policy)
        ranking.scored = _recorded_scorer(ranking.scored, log)  # type: ignore[method-assign, assignment]
        return ranking
    if named.scorer is None:
        return policy
    return _recorded_planner(policy, named.scorer, log)


def _recorded_scorer(scorer: Scorer, log: ScoreLog) -> Scorer:
    def score(observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        scores = scorer(observation, generator)
        log.add(scores)
        return scores

    return score


def _recorded_planner(policy: Policy, scorer: Scorer, log: ScoreLog) -> Policy:
    """A planner computes scores and budget in one; its scorer is asked again, for the few images of the log."""

    def act(observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        log.add(scorer(observation[:EXAMPLES], generator.clone_state()))
        return policy(observation, generator)

    take_attributes(act, policy, reads_content(policy))
    return act


class _RecordedReference(ReferencePolicy):
    def __init__(self, policy: ReferencePolicy, log: ScoreLog) -> None:
        super().__init__(policy.budgets, policy.schedule)
        self.policy, self.log = policy, log

    def scores(self, core: NextBlockCore, rows: Tensor, hidden: Tensor) -> Tensor:
        scores = self.policy.scores(core, rows, hidden)
        self.log.fill(int(core.step_count[rows[0]]), rows, scores)  # images in `rows` are at the same step
        return scores


def example_images(data: TokenSet, geometry: BlockGrid) -> Examples:
    """The images whose episodes the report shows."""
    images = data.images(data.tokens[:EXAMPLES])
    labels: list[int] = data.labels[:EXAMPLES].tolist()
    named = labels if data.class_names is None else class_words([data.class_names[label] for label in labels])
    return Examples(images.cpu(), named, geometry.rows, geometry.columns)


def episodes(rollout: Rollout, scores: Tensor | None) -> list[Episode]:
    """The first images of a policy's rollout of the test images, step by step; scores as a `ScoreLog` has them."""
    left = (rollout.losses.sum(-1) / rollout.geometry.num_tokens).cpu()  # (T + 1, n)
    order, reveal_step = rollout.order.cpu(), rollout.reveal_step.cpu()
    found = []
    for image in range(min(EXAMPLES, len(order))):
        steps = int(reveal_step[image].max()) + 1
        blocks: list[list[int]] = [[] for _ in range(steps)]
        for block in order[image].tolist():
            blocks[int(reveal_step[image, block])].append(block)
        mine = None if scores is None else scores[:steps, image]
        found.append(Episode(blocks, left[: steps + 1, image].tolist(), mine))
    return found
