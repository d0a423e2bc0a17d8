"""The batched core of `orderrl/NextBlock-v0`: M images being revealed at once on the backbone's device.

The Gymnasium `Env`, the Gymnasium `VectorEnv` and the TorchRL `EnvBase` are thin faces of this class.
A step appends the chosen blocks to the prefix cache (the first block's entries are those that its
context loss already computed) and makes one packed forward over the chains of the blocks still hidden.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from orderrl.backbones.protocol import Backbone, backbone_device, check_fits
from orderrl.data import TokenSet
from orderrl.envs.config import CoreConfig, Transition
from orderrl.envs.reward import ILLEGAL_REWARD, Reward, RewardConfig, chosen_step_cost, drawn_step_cost
from orderrl.runtime.integers import as_choices, as_int64, as_seed
from orderrl.runtime.isolation import isolated
from orderrl.runtime.random import Stream, drawn_seed, keyed_index, keyed_uniform

if TYPE_CHECKING:
    from tensordict import TensorDict

__all__ = ["CoreConfig", "NextBlockCore", "Transition", "replay_return"]

BUCKET = 3  # episodes in one packed forward hide numbers of blocks that differ by less than this


class _Look(NamedTuple):
    """Reusable entries of one packed forward: which rows it covered, where each block's chain is."""

    rows: Tensor  # (m,) int64
    place: Tensor  # (m, B) int64
    entries: Any


class NextBlockCore:
    """M concurrent episodes.

    Args:
        backbone: frozen, order-robust; its device is the core's.
        data: images to reveal (mode "teacher"); labels alone are drawn uniformly in mode "generate".
        num_envs: M.
        config: mode, budgets, reward, sampling.
        seed: sub-environment i behaves like a single environment of seed + i; None draws one, see `drawn_seed`.
        track_losses: compute context losses even if the reward does not need them.
        observe: compute hidden states and entropies; off, they stay zero unless context losses bring them along. For
            policies that do not read them.

    Raises:
        ValueError: if data and backbone do not fit or a budget exceeds the number of blocks.
    """

    @isolated
    def __init__(
        self,
        backbone: Backbone,
        data: TokenSet,
        num_envs: int,
        config: CoreConfig,
        seed: int | None = 0,
        track_losses: bool = False,
        observe: bool = True,
    ) -> None:
        geometry = backbone.geometry
        if isinstance(num_envs, bool) or not isinstance(num_envs, int | np.integer) or num_envs < 1:
            raise ValueError(f"num_envs must be a whole number, at least 1, got {num_envs!r}")
        config.require_blocks(geometry.num_blocks)
        check_fits(backbone, data)
        self.backbone, self.data, self.config, self.geometry = backbone, data, config, geometry
        self.num_envs = num_envs
        self.device = backbone_device(backbone)
        self.reward = Reward(config.reward, geometry)
        self._context_losses = config.mode == "teacher" and (track_losses or config.reward.form == "future_loss")
        self._looking = observe or self._context_losses
        self._budgets = torch.tensor(config.budgets, device=self.device)
        self._data_tokens, self._data_labels = data.tokens.to(self.device), data.labels.to(self.device)
        self._classes = data.classes.to(self.device)
        self._block_tokens = geometry.block_tokens.to(self.device)
        m, b = num_envs, geometry.num_blocks
        zeros = torch.zeros(m, dtype=torch.int64, device=self.device)
        self.seeds, self.episode = zeros.clone(), zeros - 1
        self._drawn = torch.zeros_like(zeros, dtype=torch.bool)  # rows whose seed nobody gave
        self._process = os.getpid()
        self.seed(seed)
        self.step_count = zeros.clone()
        self.image_index = zeros.clone()
        self.labels = zeros.clone()
        costs = config.reward.step_cost_range
        self.step_cost = None if costs is None else torch.full((m,), costs[0], dtype=torch.float32, device=self.device)
        self.tokens = self._data_tokens.new_zeros(m, *self._data_tokens.shape[1:])
        self.visible = torch.zeros(m, b, dtype=torch.bool, device=self.device)
        self.reveal_step = torch.full((m, b), -1, dtype=torch.int64, device=self.device)
        self.reveal_rank = torch.full((m, b), -1, dtype=torch.int64, device=self.device)
        self.losses = torch.zeros(m, b, dtype=torch.float32, device=self.device)
        self.hidden = torch.zeros(m, b, backbone.hidden_size, dtype=torch.float32, device=self.device)
        self.entropy = torch.zeros(m, b, dtype=torch.float32, device=self.device)
        self._guided = config.mode == "generate" and config.sampling.guidance != 1
        self._dropped = torch.full_like(zeros, backbone.num_classes)
        self.prefix: Any = None  # of all episodes, from the first reset on
        self.unconditional: Any = None  # the same without the label, if guided
        self._looks: list[_Look] = []

    # ------------------------------------------------------------------ what a policy may see

    @property
    def multi(self) -> bool:
        """Whether actions are ranked lists with a budget index instead of single blocks."""
        return self.config.budgets != (1,)

    @property
    def largest_budget(self) -> int:
        """K, the length of the ranked list of an action."""
        return self.config.budgets[-1]

    @property
    def hidden_count(self) -> Tensor:
        """(M,) int64: hidden blocks."""
        return (~self.visible).sum(-1)

    @property
    def finished(self) -> Tensor:
        """(M,) bool: episodes whose image is complete or whose 2 * B steps are used up."""
        return self.visible.all(-1) | (self.step_count >= 2 * self.geometry.num_blocks)

    def budget_mask(self) -> Tensor:
        """(M, number of budgets) bool: a budget is legal up to the hidden blocks; the smallest always is."""
        mask = self._budgets <= self.hidden_count[:, None]
        mask[:, 0] = True
        return mask

    def observation(self) -> TensorDict:
        """What a policy sees, batch (M,); no hidden token has any influence on it.

        Keys: hidden (B, D) float32, entropy (B,) float32 nats, visible (B,) bool, label () int64,
        fraction (1,) float32, action_mask (B,) bool; with several budgets budget_mask (n,) bool; if the cost of a step
        is drawn anew for every episode, step_cost (1,) float32, nats per image.
        """
        from tensordict import TensorDict  # takes long to import

        parts = {
            "hidden": self.hidden,
            "entropy": self.entropy,
            "visible": self.visible,
            "label": self.labels,
            "fraction": self.visible.float().mean(-1, keepdim=True),
            "action_mask": ~self.visible,
        }
        if self.multi:
            parts["budget_mask"] = self.budget_mask()
        if self.step_cost is not None:
            parts["step_cost"] = self.step_cost[:, None]
        return TensorDict({k: v.clone() for k, v in parts.items()}, batch_size=[self.num_envs])

    # ------------------------------------------------------------------ episodes

    @isolated
    def seed(self, seeds: Tensor | int | None, rows: Tensor | None = None) -> None:
        """Start histories again: the next reset of a sub-environment is episode 0 of its seed.

        Args:
            seeds: (m,) int64, or s for s + i; None draws s. Drawn seeds are drawn anew in a process forked later, whose
                episodes would else be those of its parent.
            rows: (m,) int64 sub-environments; None is all.

        Raises:
            ValueError: if a seed is no whole number.
        """
        rows = torch.arange(self.num_envs, device=self.device) if rows is None else rows.to(self.device)
        self.seeds, self.episode, self._drawn = self.seeds.clone(), self.episode.clone(), self._drawn.clone()
        if isinstance(seeds, Tensor) and seeds.ndim:
            self.seeds[rows] = as_int64("seeds", seeds).to(self.device)
        else:
            self.seeds[rows] = rows + (drawn_seed() if seeds is None else as_seed(seeds))
        self.episode[rows] = -1
        self._drawn[rows] = seeds is None

    @isolated
    @torch.no_grad()
    def reset(
        self,
        rows: Tensor | None = None,
        index: Tensor | int | None = None,
        labels: Tensor | None = None,
        step_cost: Tensor | float | None = None,
    ) -> None:
        """Begin new episodes.

        Args:
            rows: (m,) int64 sub-environments; None is all.
            index: () or (m,) images of the data set; None draws them from (seed, episode).
            labels: (m,) int64 classes to condition on; None takes the image's, or in mode "generate" draws them.
            step_cost: () or (m,) nats per image, if the config's is a range; None draws it from (seed, episode).

        Raises:
            ValueError: if an index lies outside the data set, a label outside the classes, a cost outside the config's
                range, or one of them is no whole number.
        """
        rows = torch.arange(self.num_envs, device=self.device) if rows is None else rows.to(self.device)
        self._begin(rows, index, labels, step_cost)
        self._looks = [] if len(rows) == self.num_envs else self._looks
        self._look(rows)

    def _begin(
        self,
        rows: Tensor,
        index: Tensor | int | None = None,
        labels: Tensor | None = None,
        step_cost: Tensor | float | None = None,
    ) -> None:
        if not len(rows):
            return
        if self._process != os.getpid():  # forked: the parent goes on with the drawn seeds
            self._process = os.getpid()
            self.seeds = torch.where(self._drawn, drawn_seed() + torch.arange(self.num_envs).to(self.seeds), self.seeds)
        told = None if step_cost is None else chosen_step_cost(self.config.reward, step_cost, len(rows))
        self.episode[rows] += 1
        if self.step_cost is not None:
            drawn = drawn_step_cost(self.config.reward, self.seeds[rows], self.episode[rows])
            self.step_cost[rows] = drawn if told is None else told.to(self.device)
        key = (Stream.IMAGE, self.seeds[rows], self.episode[rows])
        if self.config.mode == "generate":
            self.labels[rows] = self._classes[keyed_index(key, len(self._classes), self.device)]
            self.image_index[rows] = -1
            self.tokens[rows] = 0
            if index is not None:
                self.labels[rows] = self._data_labels[self._chosen_images(index, rows)]
        else:
            chosen = keyed_index(key, len(self.data), self.device)
            if index is not None:
                chosen = self._chosen_images(index, rows)
            self.image_index[rows] = chosen
            self.tokens[rows], self.labels[rows] = self._data_tokens[chosen], self._data_labels[chosen]
        if labels is not None:
            classes = self.backbone.num_classes + 1
            chosen = as_choices("labels", labels, len(rows), classes, "labels, the last for no class")
            self.labels[rows] = chosen.to(self.device)
        self._start(rows)
        self.visible[rows] = False
        self.step_count[rows] = 0
        self.reveal_step[rows] = -1
        self.reveal_rank[rows] = -1

    def _start(self, rows: Tensor) -> None:
        """Empty the prefix of some episodes and condition it on their labels."""
        self.prefix = self._started(self.prefix, self.labels, rows)
        if self._guided:
            self.unconditional = self._started(self.unconditional, self._dropped, rows)

    def _started(self, prefix: Any, labels: Tensor, rows: Tensor) -> Any:
        started = self.backbone.start(labels[rows])
        if len(rows) == self.num_envs:
            return started
        return (self.backbone.start(labels) if prefix is None else prefix).put(rows, started)

    @isolated
    @torch.no_grad()
    def show(self, order: Tensor, length: Tensor) -> None:
        """Put all episodes, fresh from `reset`, into given contexts without playing them.

        Args:
            order: (M, B) int64, reveal order.
            length: (M,) int64, how many of its blocks are visible.
        """
        order, length = order.to(self.device), length.to(self.device)
        self._append(order, length)
        self._record(order, length)
        self._looks = []
        self._look((~self.visible.all(-1)).nonzero().flatten())

    def _chosen_images(self, index: Tensor | int, rows: Tensor) -> Tensor:
        of = f"images of {self.data.name}/{self.data.split}"
        return as_choices("index", index, len(rows), len(self.data), of).to(self.device)

    @isolated
    @torch.no_grad()
    def step(self, actions: Tensor, restart: Tensor | None = None) -> Transition:
        """Reveal blocks. Finished episodes (complete or truncated) ignore their action and are paid nothing.

        Args:
            actions: (M,) int64 block, or (M, K + 1) int64: a ranked list and the index of the budget.
            restart: (M,) bool, episodes that begin anew instead; their action is ignored (NEXT_STEP).

        Raises:
            ValueError: if the shape or dtype is wrong, if an episode was never begun, or with `strict` if an action
                is illegal.
        """
        if (self.episode < 0).any():
            raise ValueError("step was called before reset; begin the episodes first")
        restart = torch.zeros_like(self.visible[:, 0]) if restart is None else restart.to(self.device)
        blocks, count, legal = self.read_actions(actions)
        idle = restart | self.finished
        illegal = ~legal & ~idle
        if self.config.strict and illegal.any():
            row = int(illegal.nonzero()[0, 0])
            raise ValueError(
                f"action {actions[row].tolist()} of sub-environment {row} is illegal: blocks must be hidden, "
                f"distinct and in 0..{self.geometry.num_blocks - 1}, the budget legal; hidden now: "
                f"{(~self.visible[row]).nonzero().flatten().tolist()}"
            )
        count = torch.where(idle | illegal, 0, count)
        blocks = torch.where(torch.arange(blocks.shape[1], device=self.device) < count[:, None], blocks, 0)
        before, revealed = self.losses.clone(), self._mark(blocks, count)
        if self.config.mode == "teacher" and self.config.reward.form == "charged" and not self._context_losses:
            before = self._charged(blocks, count)
        drawn = self._draw(blocks, count) if self.config.mode == "generate" else None
        self._append(blocks, count, drawn)
        self._record(blocks, count)
        self.step_count += (~idle).long()
        self._looks = []
        self._begin(restart.nonzero().flatten())
        self._look((~self.visible.all(-1)).nonzero().flatten())
        terminated = self.visible.all(-1)
        truncated = self.finished & ~terminated
        if self.config.mode == "teacher":
            reward = self.reward(before, self.losses, revealed, self.visible, self.step_cost)
        else:
            reward = self._hindsight_return(terminated & (count > 0))
        reward = torch.where(illegal, ILLEGAL_REWARD, reward)
        return Transition(torch.where(idle, 0.0, reward), terminated, truncated, illegal)

    # ------------------------------------------------------------------ parts of a step

    def read_actions(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Ranked blocks (M, K), how many of them count (M,), and whether the action is legal (M,) bool."""
        expected = (self.num_envs, self.largest_budget + 1) if self.multi else (self.num_envs,)
        actions = as_int64("action", actions, "return block indices, not scores")
        if tuple(actions.shape) != expected:
            raise ValueError(f"action must have shape {expected}, got {tuple(actions.shape)}")
        actions = actions.to(self.device)
        if not self.multi:
            blocks, count = actions[:, None], torch.ones_like(actions)
            legal = torch.ones_like(actions, dtype=torch.bool)
        else:
            blocks, chosen = actions[:, :-1], actions[:, -1]
            inside = (chosen >= 0) & (chosen < len(self._budgets))
            safe = chosen.clamp(0, len(self._budgets) - 1)
            legal = inside & self.budget_mask().gather(1, safe[:, None])[:, 0]
            count = torch.minimum(self._budgets[safe], self.hidden_count)
        counted = torch.arange(blocks.shape[1], device=self.device) < count[:, None]
        in_range = (blocks >= 0) & (blocks < self.geometry.num_blocks)
        safe_blocks = torch.where(in_range, blocks, 0)
        named = torch.zeros_like(self.losses).scatter_add(1, safe_blocks, (counted & in_range).float())
        legal &= (in_range | ~counted).all(-1) & (named <= (~self.visible).float()).all(-1)
        return safe_blocks, count, legal

    def _mark(self, blocks: Tensor, count: Tensor) -> Tensor:
        """(M, B) bool: the first `count` of the listed blocks."""
        counted = torch.arange(blocks.shape[1], device=self.device) < count[:, None]
        marks = torch.zeros_like(self.losses).scatter_add(1, blocks, counted.float())
        return marks > 0

    def _together(self, blocks: Tensor, count: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Episodes that reveal equally many blocks, and these: rows (m,), blocks (m, k); nothing is padded."""
        for value in count.unique().tolist():
            if value:
                rows = (count == value).nonzero().flatten()
                yield rows, blocks[rows, :value]

    def _some(self, states: Any, rows: Tensor) -> Any:
        """Some rows of a prefix or of chain entries, which may be None."""
        return states if states is None or len(rows) == self.num_envs else states.select(rows)

    def _charged(self, blocks: Tensor, count: Tensor) -> Tensor:
        """(M, B): losses of the blocks that are revealed now, given what is visible before; zero elsewhere."""
        charged = torch.zeros_like(self.losses)
        for rows, chosen in self._together(blocks, count):
            losses, _ = self.backbone.context_loss(self._some(self.prefix, rows), self.tokens[rows], chosen)
            charged[rows[:, None], chosen] = losses.loss.float()
        return charged

    def _draw(self, blocks: Tensor, count: Tensor) -> tuple[Any, Any]:
        """Sample the tokens of the chosen blocks with numbers keyed by (seed, episode, step, token).

        Returns:
            Chain entries of every episode's first block, and the same under the dropped label; None if nothing can be
            reused.
        """
        first: list[Any] = [None, None]
        tokens = self.tokens.clone()
        for rows, chosen in self._together(blocks, count):
            positions = self._block_tokens[chosen]  # (m, k, p*p)
            key = (self.seeds[rows], self.episode[rows], self.step_count[rows])
            uniforms = keyed_uniform((Stream.TOKEN, *(k[:, None, None] for k in key), positions), self.device)
            prefix, unconditional = self._some(self.prefix, rows), self._some(self.unconditional, rows)
            drawing = self.backbone.decode(prefix, chosen, uniforms, self.config.sampling, unconditional)
            tokens[rows[:, None, None], positions] = drawing.tokens
            for place, entries in enumerate((drawing.entries, drawing.unconditional)):
                if entries is not None:
                    part = entries.chain(torch.zeros_like(rows))
                    whole = len(rows) == self.num_envs
                    first[place] = part if whole else part.spread(rows, self.num_envs, first[place])
        self.tokens = tokens
        return first[0], first[1]

    def _append(self, blocks: Tensor, count: Tensor, drawn: tuple[Any, Any] | None = None) -> None:
        """Append the revealed blocks to the prefix, reusing the first block's chain entries.

        An image that becomes complete needs no prefix any more.
        """
        count = torch.where(count < self.hidden_count, count, 0)
        together = list(self._together(blocks, count))
        if not together:
            return
        first, first_unconditional = (self._first_entries(blocks[:, 0]), None) if drawn is None else drawn
        for rows, chosen in together:
            self.prefix = self._extend(self.prefix, rows, chosen, first)
            if self.unconditional is not None:
                self.unconditional = self._extend(self.unconditional, rows, chosen, first_unconditional)

    def _extend(self, prefix: Any, rows: Tensor, blocks: Tensor, first: Any) -> Any:
        """Extend the prefix of some episodes, each by as many blocks."""
        count = torch.full_like(rows, blocks.shape[1])
        part = self.backbone.extend(self._some(prefix, rows), self.tokens[rows], blocks, count, self._some(first, rows))
        return part if len(rows) == self.num_envs else prefix.put(rows, part)

    def _first_entries(self, block: Tensor) -> Any:
        """Chain entries of one block per row, gathered from the looks that computed them."""
        if not self._looks:
            return None
        if len(self._looks) == 1 and len(self._looks[0].rows) == self.num_envs:
            look = self._looks[0]
            return look.entries.chain(look.place.gather(1, block[:, None])[:, 0])
        chosen = None
        for look in self._looks:  # in order: a later look at the same row is the valid one
            part = look.entries.chain(look.place.gather(1, block[look.rows][:, None])[:, 0])
            chosen = part.spread(look.rows, self.num_envs, chosen)
        return chosen

    def _record(self, blocks: Tensor, count: Tensor) -> None:
        """Mark blocks as visible and remember when and in which rank they were revealed."""
        counted = torch.arange(blocks.shape[1], device=self.device) < count[:, None]
        rows, ranks = counted.nonzero(as_tuple=True)
        chosen = blocks[rows, ranks]
        self.visible[rows, chosen] = True
        self.reveal_step[rows, chosen] = self.step_count[rows]
        self.reveal_rank[rows, chosen] = ranks

    def _look(self, rows: Tensor) -> None:
        """Refresh what is known of hidden blocks: observation parts, and in mode "teacher" their losses."""
        finished = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)
        finished[rows] = False
        finished &= self.visible.all(-1)
        self.hidden[finished], self.entropy[finished], self.losses[finished] = 0.0, 0.0, 0.0
        if not self._looking:
            return
        crowd = (self.hidden_count[rows] - 1) // BUCKET  # episodes that hide about equally many blocks look together
        for value in crowd.unique().tolist():
            self._look_together(rows[crowd == value])

    def _look_together(self, rows: Tensor) -> None:
        """Refresh some episodes in one packed forward, padded to the one that hides most."""
        widest = int(self.hidden_count[rows].max())
        blocks = self.visible[rows].long().argsort(dim=1, stable=True)[:, :widest]  # hidden blocks first
        is_hidden = ~self.visible[rows].gather(1, blocks)
        prefix = self.prefix if len(rows) == self.num_envs else self.prefix.select(rows)
        if self._context_losses:
            now, entries = self.backbone.context_loss(prefix, self.tokens[rows], blocks)
            place = torch.zeros_like(self.visible[rows], dtype=torch.int64)
            place = place.scatter(1, blocks, torch.arange(widest, device=self.device).expand_as(blocks))
            self._looks.append(_Look(rows, place, entries))
            hidden, entropy = now.hidden, now.entropy
            blank = torch.zeros_like(self.losses[rows])
            self.losses[rows] = blank.scatter(1, blocks, torch.where(is_hidden, now.loss.float(), 0.0))
        else:
            hidden, entropy = self.backbone.observe(prefix, blocks)
        shown = torch.zeros_like(self.hidden[rows])
        index = blocks[..., None].expand_as(hidden)
        self.hidden[rows] = shown.scatter(1, index, torch.where(is_hidden[..., None], hidden.float(), 0.0))
        blank = torch.zeros_like(self.entropy[rows])
        self.entropy[rows] = blank.scatter(1, blocks, torch.where(is_hidden, entropy.float(), 0.0))

    def _hindsight_return(self, finished: Tensor) -> Tensor:
        """Whole return of images that were just finished, by replaying them with their tokens known."""
        reward = torch.zeros(self.num_envs, dtype=torch.float32, device=self.device)
        rows = finished.nonzero().flatten()
        if not self.config.hindsight or not len(rows):
            return reward
        reward[rows] = replay_return(
            self.backbone,
            self.data,
            self.tokens[rows],
            self.labels[rows],
            self.reveal_step[rows],
            self.reveal_rank[rows],
            self.config.reward,
            None if self.step_cost is None else self.step_cost[rows],
        )
        return reward


@isolated
def replay_return(
    backbone: Backbone,
    data: TokenSet,
    tokens: Tensor,
    labels: Tensor,
    reveal_step: Tensor,
    reveal_rank: Tensor,
    reward: RewardConfig,
    step_cost: Tensor | None = None,
) -> Tensor:
    """Return of finished images under the order in which they were revealed.

    Args:
        backbone: scores the blocks.
        data: any token set of the same shape.
        tokens: (m, N) int64, finished images.
        labels: (m,) int64.
        reveal_step: (m, B) int64, the step that revealed each block; void steps are skipped numbers.
        reveal_rank: (m, B) int64, its place in the action of that step.
        reward: what is paid for.
        step_cost: (m,) float32, what a step cost each image, nats per image; given where the reward's is a range.

    Returns:
        (m,) float32, nats per image token; every planner step that revealed something is charged.

    Raises:
        ValueError: if the reward's step_cost is a range and what the images had of it is not given.
    """
    if reward.step_cost_range is not None and step_cost is None:
        raise ValueError(f"step_cost must be given for every image: the reward's is the range {reward.step_cost}")
    images = replace(data, split="replay", tokens=tokens.cpu(), labels=labels.cpu(), identity=None)
    sizes = torch.nn.functional.one_hot(reveal_step).sum(1)  # (m, steps)
    largest = int(sizes.max())
    config = CoreConfig(budgets=tuple(range(1, largest + 1)), reward=reward)
    core = NextBlockCore(backbone, images, len(tokens), config)
    core.reset(index=torch.arange(len(tokens)), step_cost=step_cost)
    total = torch.zeros(len(tokens), dtype=torch.float32, device=core.device)
    places = torch.arange(largest, device=core.device)
    for step in range(sizes.shape[1]):
        count = sizes[:, step]
        acting = (count > 0) & ~core.visible.all(-1)
        rank = torch.where(reveal_step == step, reveal_rank, largest)
        blocks = rank.argsort(dim=1, stable=True)[:, :largest]
        # a row without a step here is given a void action: its reward is dropped below
        blocks = torch.where((places < count[:, None]), blocks, 0)
        actions = torch.cat([blocks, (count - 1).clamp_min(0)[:, None]], 1) if core.multi else blocks[:, 0]
        if core.multi:
            actions = torch.where(acting[:, None], actions, -1)
        else:
            actions = torch.where(acting, actions, -1)
        total += torch.where(acting, core.step(actions).reward, 0.0)
    return total
