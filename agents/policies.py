"""Policies: `policy(observation: TensorDict[batch], generator) -> int64 (batch,) or (batch, K + 1)`.

The observation lies on the backbone's device. The generator is one of the CPU, so that what is drawn does not depend
on the device; actions may lie on either.

Baselines rank the hidden blocks by an order or by a score and let a schedule choose the budget; planners choose
both. Only references (oracle, lookahead, confidence) look at the state behind the observation.

A policy may have three attributes. `reset(starting)` is called before it acts in states of which some begin an episode,
those of starting (batch,) bool: one that remembers something forgets it there. `reads_tokens = True` adds the key
`tokens` to its observation: (batch, N) int64 in raster order, -1 where hidden; continuous ones (batch, N, C) are 0.
`reads_visible_states = True` fills `hidden` where blocks are visible, too, with the state that a query there has.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orderrl.agents.distribution import planner_actions
from orderrl.agents.orders import ORDERS, OTHER_POLICIES
from orderrl.agents.schedules import Schedule, fixed, legal_place, places_only, reads_content
from orderrl.envs.core import NextBlockCore
from orderrl.geometry import BlockGrid
from orderrl.oracle import block_gains, gain_uniforms, utilities
from orderrl.planner import OrderHead
from orderrl.runtime.isolation import isolated
from orderrl.runtime.random import drawn_uniform
from orderrl.runtime.registry import Registry

if TYPE_CHECKING:
    from tensordict import TensorDictBase

Policy = Callable[["TensorDictBase", torch.Generator], Tensor]
Scorer = Policy
"""Scores blocks, (M, B); higher is revealed earlier."""
ASKING = ("reset", "reads_tokens", "reads_visible_states")  # attributes by which policies ask for more
_LOWEST = -1e9


class RankingPolicy:
    """Reveal the best-scored hidden blocks, as many as the schedule says.

    Args:
        schedule: chooses the budget, lowered where fewer blocks are left; None is the first budget always.
        spacing: strength of the penalty for blocks close to those chosen in the same step, in units of the
            scorer; 0 is none.
    """

    def __init__(
        self,
        scorer: Scorer,
        geometry: BlockGrid,
        budgets: tuple[int, ...] = (1,),
        schedule: Schedule | None = None,
        spacing: float = 0.0,
    ) -> None:
        self.scorer, self.budgets, self.schedule = scorer, tuple(budgets), schedule or fixed(0)
        self.closeness = spacing * torch.exp(-(geometry.distances**2) / 2)
        self.reads_content = reads_content(scorer) or reads_content(self.schedule)
        self.reads_visible_states = getattr(scorer, "reads_visible_states", False)

    def __call__(self, observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        scores = self.scored(observation, generator).float()
        return scheduled_action(
            scores, self.closeness.to(scores, non_blocking=True), observation, self.budgets, self.schedule
        )

    def scored(self, observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        """The scores (M, B) by which blocks are ranked at this step."""
        return self.scorer(observation, generator)


class RescoringPolicy(RankingPolicy):
    """A ranking policy whose scores are made at some steps only; between them the last ones stand.

    Args:
        scorer, geometry, budgets, schedule, spacing: as in `RankingPolicy`.
        period: steps from one scoring to the next; None scores the empty image and never again.
    """

    def __init__(
        self,
        scorer: Scorer,
        geometry: BlockGrid,
        budgets: tuple[int, ...] = (1,),
        schedule: Schedule | None = None,
        spacing: float = 0.0,
        period: int | None = None,
    ) -> None:
        super().__init__(scorer, geometry, budgets, schedule, spacing)
        self.period = period
        self.reads_visible_states = period is not None and getattr(scorer, "reads_visible_states", False)

    def reset(self, starting: Tensor) -> None:
        """Forget the scores of episodes that begin, (M,) bool."""
        if bool(starting.all()):
            self.step = torch.zeros_like(starting, dtype=torch.int64)
            self.scores: Tensor | None = None
        self.step = self.step.masked_fill(starting, 0)

    def scored(self, observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        due = self.step == 0 if self.period is None else self.step % self.period == 0
        if bool(due.any()):
            made = super().scored(observation, generator).float()
            old = made if self.scores is None else self.scores
            self.scores = torch.where(due.to(made.device)[:, None], made, old)
        self.step = self.step + 1
        assert self.scores is not None
        return self.scores


class PairedPolicy:
    """Reveal the set that a planner itself values most, chosen greedily, as many blocks as the schedule says.

    Every chosen block takes the planner's repulsion from the others' logits. After cloning target "pairs" that is the
    predicted value of the set (`orderrl.agents.bc`): the blocks' utilities without what they tell about each other.

    Args:
        planner: in eval mode, with `pairs`.
        schedule: as in `RankingPolicy`.

    Raises:
        ValueError: if the planner has no `pairs`.
    """

    def __init__(self, planner: OrderHead, budgets: tuple[int, ...] = (1,), schedule: Schedule | None = None) -> None:
        planner.config.require_pairs("a paired policy")
        self.planner, self.budgets, self.schedule = planner, tuple(budgets), schedule or fixed(0)

    @torch.no_grad()
    def __call__(self, observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        output = self.planner(observation)
        return scheduled_action(output.logits, output.repulsion, observation, self.budgets, self.schedule)


def scheduled_action(
    scores: Tensor, closeness: Tensor, observation: TensorDictBase, budgets: tuple[int, ...], schedule: Schedule
) -> Tensor:
    """The best-scored (M, B) legal blocks, each with regard to those before it, and the schedule's budget.

    What a chosen block takes from each other's score is (B, B) or (M, B, B). The action is int64 (M,) for budgets ==
    (1,), else (M, K + 1).
    """
    scores = scores.masked_fill(~observation["action_mask"].bool(), _LOWEST)
    if budgets == (1,):
        return scores.argmax(-1)
    ranked = spaced_ranking(scores, closeness, budgets[-1])
    return torch.cat([ranked, legal_place(schedule, observation, ranked)[:, None]], dim=-1)


def spaced_ranking(scores: Tensor, closeness: Tensor, places: int) -> Tensor:
    """Greedy ranking (M, K) int64 in which every chosen block lowers the scores (M, B) of those that are close to it.

    Closeness as in `scheduled_action`; scores are very low where a block may not be chosen.
    """
    ranked = []
    closeness, rows = closeness.expand(len(scores), -1, -1), torch.arange(len(scores), device=scores.device)
    for _ in range(places):
        block = scores.argmax(-1, keepdim=True)
        ranked.append(block)
        scores = (scores - closeness[rows, block[:, 0]]).scatter(-1, block, 2 * _LOWEST)
    return torch.cat(ranked, dim=-1)


# ---------------------------------------------------------------------- scorers


def fixed_order(order: Tensor) -> Scorer:
    """A fixed order (B,) of blocks as a scorer."""
    rank = torch.empty(len(order), dtype=torch.float32)
    rank[order] = torch.arange(len(order)).float()

    @places_only
    def score(observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        visible = observation["visible"]
        return -rank.to(visible.device, non_blocking=True).expand(visible.shape)

    return score


@places_only
def uniform_random(observation: TensorDictBase, generator: torch.Generator) -> Tensor:
    """A random order for each image."""
    return drawn_uniform(observation["visible"].shape, generator, observation["visible"].device)


def low_entropy(observation: TensorDictBase, generator: torch.Generator) -> Tensor:
    """The block whose first token is most certain first."""
    return -observation["entropy"]


def high_entropy(observation: TensorDictBase, generator: torch.Generator) -> Tensor:
    """The block whose first token is least certain first."""
    return observation["entropy"]


SCORERS: dict[str, Scorer] = {
    "random": uniform_random,
    "low_entropy": low_entropy,
    "high_entropy": high_entropy,
}


def planner_scorer(planner: OrderHead) -> Scorer:
    """A planner's block scores, for use with a schedule."""

    @torch.no_grad()
    def score(observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        return planner(observation).scores

    score.reads_visible_states = planner.config.visible_states  # type: ignore[attr-defined]
    score.planner = planner  # type: ignore[attr-defined]
    return score


# ---------------------------------------------------------------------- planners


class PlannerPolicy:
    """A planner in eval mode as a policy: its own blocks and its own budget, their mode or samples."""

    def __init__(self, planner: OrderHead, budgets: tuple[int, ...] = (1,), deterministic: bool = True) -> None:
        planner.config.require_budgets(budgets)
        self.planner, self.budgets, self.deterministic = planner, tuple(budgets), deterministic
        self.reads_visible_states = planner.config.visible_states

    @torch.no_grad()
    def __call__(self, observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        output = self.planner(observation)
        distribution = planner_actions(output, observation, self.budgets)
        return distribution.mode if self.deterministic else distribution.sample(generator=generator)


class AmongBudgets:
    """A policy in an environment that offers more budgets than its own: the same blocks, the same number of them."""

    def __init__(self, policy: Policy, own: tuple[int, ...], offered: tuple[int, ...]) -> None:
        self.policy, self.own, self.offered = policy, tuple(own), tuple(offered)
        self.place = _places(self.own, self.offered)
        take_attributes(self, policy, reads_content(policy))

    def __call__(self, observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        offered, place = observation["budget_mask"], self.place.to(observation["budget_mask"].device)
        action = self.policy(observation.copy().set("budget_mask", _own_mask(offered, place)), generator)
        action = action.to(offered.device)
        if self.own == (1,):
            action = torch.stack([action, torch.zeros_like(action)], -1)
        blocks, chosen = action[:, :-1], action[:, -1]
        # places beyond the policy's own list are ignored by the environment, but it asks for a list of full length
        ranked = torch.nn.functional.pad(blocks, (0, self.offered[-1] - blocks.shape[1]))
        # with few blocks left its own smallest budget may be too large
        return torch.cat([ranked, torch.minimum(place[chosen], offered.sum(-1) - 1)[:, None]], -1)


def with_schedule(
    policy: Policy | ReferencePolicy, budgets: tuple[int, ...], schedule: Schedule, name: str = "the policy"
) -> Policy | ReferencePolicy:
    """A policy of a user whose first choices are revealed, as many as a schedule says.

    Args:
        policy: ranks blocks for these budgets: its actions begin with a list (M, K) of blocks, K the largest budget;
            what stands behind it is left out. For budgets == (1,) it may also be one block, (M,).

    Raises:
        ValueError: if a reference acts in a way of its own; while acting, if the policy gives fewer blocks.
    """
    if isinstance(policy, RankingPolicy | ReferencePolicy):
        if isinstance(policy, ReferencePolicy) and type(policy).act is not ReferencePolicy.act:
            raise ValueError(f"{name} takes no schedule: {type(policy).__name__} has an `act` of its own")
        scheduled = copy.copy(policy)
        scheduled.budgets, scheduled.schedule = tuple(budgets), schedule
        return scheduled
    return _Scheduled(policy, tuple(budgets), schedule, name)


class _Scheduled:
    """A user's policy, a function, under a schedule."""

    def __init__(self, policy: Policy, budgets: tuple[int, ...], schedule: Schedule, name: str) -> None:
        self.policy, self.budgets, self.schedule, self.name = policy, budgets, schedule, name
        take_attributes(self, policy, reads_content(policy) or reads_content(schedule))

    def __call__(self, observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        action, most = self.policy(observation, generator), self.budgets[-1]
        if not isinstance(action, Tensor):
            return action  # refused by whoever acts, as without a schedule
        ranked = (action[:, None] if action.ndim == 1 else action).to(observation["label"].device)
        if ranked.ndim != 2 or ranked.shape[1] < most:
            raise ValueError(
                f"{self.name} is to reveal up to {most} blocks a step, but gives actions of shape "
                f"{tuple(action.shape)}; return a ranked list of blocks, (batch, {most}), or leave out the schedule"
            )
        ranked = ranked[:, :most]
        if self.budgets == (1,):
            return ranked[:, 0]
        return torch.cat([ranked, legal_place(self.schedule, observation, ranked)[:, None]], dim=-1)


def take_attributes(wrapper: Any, policy: Policy, content: bool) -> None:
    """Give a policy that asks another one the attributes of that."""
    wrapper.reads_content = content
    for name in ASKING:
        if hasattr(policy, name):
            setattr(wrapper, name, getattr(policy, name))


def among_budgets(
    policy: Policy | ReferencePolicy, own: tuple[int, ...], offered: tuple[int, ...]
) -> Policy | ReferencePolicy:
    """The same policy or reference in an environment that offers more budgets, see `AmongBudgets`.

    ValueError if one of its budgets is not offered, or a reference acts in a way of its own.
    """
    if tuple(own) == tuple(offered):
        return policy
    if not isinstance(policy, ReferencePolicy):
        return AmongBudgets(policy, own, offered)
    place, schedule = _places(own, offered), policy.schedule

    def among(observation: TensorDictBase, ranked: Tensor) -> Tensor:
        mine = observation.copy().set("budget_mask", _own_mask(observation["budget_mask"], place))
        return place.to(ranked.device)[legal_place(schedule, mine, ranked[:, : own[-1]])]

    return with_schedule(policy, offered, among)


def _places(own: tuple[int, ...], offered: tuple[int, ...]) -> Tensor:
    """Where a policy's own budgets stand in the environment's list, int64."""
    if missing := sorted(set(own) - set(offered)):
        raise ValueError(f"budgets={offered} of the environment lack {missing}, which the policy chooses")
    return torch.tensor([offered.index(budget) for budget in own])


def _own_mask(budget_mask: Tensor, place: Tensor) -> Tensor:
    """Which of its own budgets are legal, (M, number of them) bool, as in an environment of the policy's own."""
    legal = budget_mask[:, place.to(budget_mask.device)].clone()
    legal[:, 0] = True  # that environment cuts the smallest short
    return legal


# ---------------------------------------------------------------------- references


class ReferencePolicy:
    """A policy that asks for the state behind the observation; it cannot be trained against or deployed.

    Subclasses implement `scores`, (M, B) for all M episodes of the core.
    """

    def __init__(self, budgets: tuple[int, ...] = (1,), schedule: Schedule | None = None) -> None:
        self.budgets, self.schedule = tuple(budgets), schedule or fixed(0)

    def scores(self, core: NextBlockCore, rows: Tensor, hidden: Tensor) -> Tensor:
        """Scores (m, B) of some episodes that hide equally many blocks: rows (m,), hidden (m, C), both int64."""
        raise TypeError(f"{type(self).__name__} must implement scores")

    @isolated
    def act(self, core: NextBlockCore) -> Tensor:
        """Actions for the core's current states."""
        scores = all_scores(self, core)
        scores = scores.masked_fill(core.visible, _LOWEST)
        if self.budgets == (1,):
            return scores.argmax(-1)
        ranked = scores.topk(self.budgets[-1], dim=-1).indices
        return torch.cat([ranked, legal_place(self.schedule, core.observation(), ranked)[:, None]], dim=-1)


@torch.no_grad()
def all_scores(policy: ReferencePolicy, core: NextBlockCore) -> Tensor:
    """Scores of a reference for every episode, grouped by the number of hidden blocks, (M, B)."""
    scores = torch.zeros_like(core.losses)
    count = core.hidden_count
    for value in count.unique().tolist():
        if not value:
            continue
        rows = (count == value).nonzero().flatten()
        hidden = core.visible[rows].long().argsort(dim=1, stable=True)[:, :value]
        scores[rows] = policy.scores(core, rows, hidden)
    return scores


class Oracle(ReferencePolicy):
    """Hindsight: the utility of every block computed with the true hidden tokens (mode "teacher" only)."""

    def scores(self, core: NextBlockCore, rows: Tensor, hidden: Tensor) -> Tensor:
        if core.config.mode != "teacher":
            raise ValueError("the oracle policy needs the true tokens: use mode='teacher'")
        gains = block_gains(core.backbone, core.prefix.select(rows), core.tokens[rows], hidden)
        return utilities(gains, core.geometry, core.reward.pair_weights)


class Lookahead(ReferencePolicy):
    """No hindsight: expected utility over `samples` draws of each block by the backbone (label kind "expected")."""

    def __init__(self, samples: int = 1, budgets: tuple[int, ...] = (1,), schedule: Schedule | None = None) -> None:
        super().__init__(budgets, schedule)
        self.samples = samples

    def scores(self, core: NextBlockCore, rows: Tensor, hidden: Tensor) -> Tensor:
        keys = (core.seeds[rows], core.episode[rows], core.step_count[rows])
        uniforms = gain_uniforms(core.geometry, keys, self.samples, core.device)
        prefix = core.prefix.select(rows)
        gains = block_gains(core.backbone, prefix, core.tokens[rows], hidden, "expected", uniforms, self.samples)
        return utilities(gains, core.geometry, core.reward.pair_weights)


# ---------------------------------------------------------------------- policies of users


def check_policy(name: str, policy: Any) -> None:
    """Refuse what is no policy.

    Raises:
        ValueError: in one line that says what a policy is.
    """
    if isinstance(policy, ReferencePolicy):
        return
    got = f"the class {policy.__name__}: give an instance" if isinstance(policy, type) else type(policy).__name__
    fits = callable(policy) and not isinstance(policy, type)
    if fits:
        try:
            inspect.signature(policy).bind(None, None)
        except TypeError:
            fits, got = False, f"{getattr(policy, '__name__', got)}{inspect.signature(policy)}"
        except ValueError:  # a built-in function does not say what it takes
            pass
    if not fits:
        raise ValueError(
            f"policy '{name}' must be callable as policy(observation, generator), which gives int64 actions (batch,) "
            f"or (batch, K + 1); got {got}"
        )


POLICIES: Registry[Policy | ReferencePolicy] = Registry(
    "policy", "orderrl.policies", check=check_policy, taken=(*ORDERS.shipped, *OTHER_POLICIES)
)
register_policy = POLICIES.register
