"""The batched core of `orderrl/NextBlock-v0`: M images being revealed at once on the backbone's device.

The Gymnasium `Env`, the Gymnasium `VectorEnv` and the TorchRL `EnvBase` are thin faces of this class.
What is decided by actions and keys (who is visible, which images, who looks together) is decided on the host, so that
a step waits for the device at most once, for actions that were chosen there; the device has copies.
A step appends the chosen blocks to the prefix cache (the first block's entries are those that its
context loss already computed) and makes one packed forward over the chains of the blocks still hidden.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from orderrl.backbones.protocol import Backbone, Drawing, backbone_device, check_fits
from orderrl.data import TokenSet
from orderrl.envs.books import Books, Look, Rows
from orderrl.envs.config import CoreConfig, Transition
from orderrl.envs.observation import legal_budgets, observed
from orderrl.envs.replay import replay_return
from orderrl.envs.reward import ILLEGAL_REWARD, Reward, chosen_step_cost, drawn_step_cost
from orderrl.runtime.devices import moved
from orderrl.runtime.integers import as_choices, as_int64, as_rows, as_seed
from orderrl.runtime.isolation import isolated
from orderrl.runtime.random import Stream, drawn_seed, keyed_index, keyed_uniform

if TYPE_CHECKING:
    from tensordict import TensorDict

__all__ = ["CoreConfig", "NextBlockCore", "Transition"]

BUCKET = 3  # episodes in one packed forward hide numbers of blocks that differ by less than this


class NextBlockCore:
    """M concurrent episodes.

    Args:
        backbone: frozen, order-robust; its device is the core's.
        data: images to reveal (mode "teacher"); labels alone are drawn uniformly in mode "generate". They stay on the
            host; what is shown of them is moved.
        num_envs: M.
        config: mode, budgets, reward, sampling.
        seed: sub-environment i behaves like a single environment of seed + i; None draws one, see `drawn_seed`.
        observe: compute hidden states and entropies; off, they stay zero unless context losses bring them along. For
            policies that do not read them.
        rewards: pay for steps; off, every reward is 0, for those who only want to know the order.

    Raises:
        ValueError: if data and backbone do not fit or a budget exceeds the number of blocks.
    """

    seeds: Tensor
    episode: Tensor
    step_count: Tensor
    image_index: Tensor
    labels: Tensor
    visible: Tensor
    reveal_step: Tensor
    reveal_rank: Tensor

    @isolated
    def __init__(
        self,
        backbone: Backbone,
        data: TokenSet,
        num_envs: int,
        config: CoreConfig,
        seed: int | None = 0,
        observe: bool = True,
        rewards: bool = True,
    ) -> None:
        geometry = backbone.geometry
        if isinstance(num_envs, bool) or not isinstance(num_envs, int | np.integer) or num_envs < 1:
            raise ValueError(f"num_envs must be a whole number, at least 1, got {num_envs!r}")
        config.require_blocks(geometry.num_blocks)
        check_fits(backbone, data)
        if config.mode == "teacher" and not len(data):
            raise ValueError(f"data {data.name!r}, split {data.split!r}, has no image to reveal")
        self.backbone, self.data, self.config, self.geometry = backbone, data, config, geometry
        self.num_envs = num_envs
        self.device = backbone_device(backbone)
        self.reward = Reward(config.reward, geometry)
        paid = rewards and config.mode == "teacher"
        self._charging = paid and config.reward.form == "charged"
        self._context_losses = paid and not self._charging
        self._looking = observe or self._context_losses
        self._rewarded, self._reads_prefix = rewards, self._looking or self._charging or config.mode == "generate"
        self._budgets, self._classes = torch.tensor(config.budgets), data.classes
        m, b = num_envs, geometry.num_blocks
        self.books = Books.new(m, b)
        self._drawn = torch.zeros(m, dtype=torch.bool)  # rows whose seed nobody gave
        self._process = os.getpid()
        self.seed(seed)
        costs = config.reward.step_cost_range
        self.step_cost = None if costs is None else torch.full((m,), costs[0], dtype=torch.float32, device=self.device)
        self.tokens = torch.zeros(m, *data.tokens.shape[1:], dtype=data.tokens.dtype, device=self.device)
        self.losses = torch.zeros(m, b, dtype=torch.float32, device=self.device)
        self.hidden = torch.zeros(m, b, backbone.hidden_size, dtype=torch.float32, device=self.device)
        self.entropy = torch.zeros(m, b, dtype=torch.float32, device=self.device)
        self._guided = config.mode == "generate" and config.sampling.guidance != 1
        self._dropped = self.labels.new_full((m,), backbone.num_classes)
        self.prefix: Any = None  # of all episodes, from the first reset on
        self.unconditional: Any = None  # the same without the label, if guided
        self._looks: list[Look] = []
        # how many episodes can look together with all entries of their chains kept; else these are computed again
        fitting = getattr(backbone, "states_at_once", None) if self._context_losses else None
        self._at_once = m if fitting is None else min(m, fitting(b))

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
        return self._to_device(self.books.finished)

    @property
    def reveal_moment(self) -> Tensor:
        """(M, B) int64: ascending in the order of reveal, inside a step as the action listed it; negative if hidden."""
        return self.reveal_step * self.geometry.num_blocks + self.reveal_rank

    def budget_mask(self) -> Tensor:
        """(M, number of budgets) bool: a budget is legal up to the hidden blocks; the smallest always is."""
        return self._to_device(legal_budgets(self.books.hidden_count, self._budgets))

    def _to_device(self, values: Tensor) -> Tensor:
        return values.to(self.device, non_blocking=True)

    def _publish(self) -> None:
        """Bring the device's copies of the books up to date; on a CPU they are the books."""
        for name, values in vars(self.books).items():
            setattr(self, name, self._to_device(values))

    def _rows(self, rows: Tensor | None) -> Rows:
        """Sub-environments by their numbers; None is all."""
        here = torch.arange(self.num_envs) if rows is None else rows.cpu()
        return Rows(here, self._to_device(here), len(here) == self.num_envs)

    def observation(self) -> TensorDict:
        """What a policy sees, batch (M,); no hidden token has any influence on it.

        Keys: hidden (B, D) float32, entropy (B,) float32 nats, visible (B,) bool, label () int64,
        fraction (1,) float32, action_mask (B,) bool; with several budgets budget_mask (n,) bool; if the cost of a step
        is drawn anew for every episode, step_cost (1,) float32, nats per image.
        """
        mask = self.budget_mask() if self.multi else None
        return observed(self.hidden, self.entropy, self.visible, self.labels, mask, self.step_cost).clone()

    # ------------------------------------------------------------------ episodes

    @isolated
    def seed(self, seeds: Tensor | int | None, rows: Tensor | None = None) -> None:
        """Start histories again: the next reset of a sub-environment is episode 0 of its seed.

        Args:
            seeds: (m,) int64, or s for s + i; None draws s. Drawn seeds are drawn anew in a process forked later, whose
                episodes would else be those of its parent.
            rows: (m,) int64 sub-environments; None is all.

        Raises:
            ValueError: if a seed is no whole number, or there are not as many as rows.
        """
        rows, books = self._rows(None if rows is None else as_rows(rows, self.num_envs)).here, self.books
        books.seeds, books.episode, self._drawn = books.seeds.clone(), books.episode.clone(), self._drawn.clone()
        if isinstance(seeds, Tensor) and seeds.ndim:
            given = as_int64("seeds", seeds).cpu()
            if given.shape != rows.shape:
                raise ValueError(f"seeds must be {len(rows)}, one for each sub-environment, got {tuple(given.shape)}")
            books.seeds[rows] = given
        else:
            books.seeds[rows] = rows + (drawn_seed() if seeds is None else as_seed(seeds))
        books.episode[rows] = -1
        self._drawn[rows] = seeds is None
        self._publish()

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
        chosen = self._rows(None if rows is None else as_rows(rows, self.num_envs))
        self._begin(chosen, index, labels, step_cost)
        self._looks = [] if chosen.whole else self._looks
        self._look(chosen.here)

    def _begin(
        self,
        rows: Rows,
        index: Tensor | int | None = None,
        labels: Tensor | None = None,
        step_cost: Tensor | float | None = None,
    ) -> None:
        here, there, _ = rows
        if not len(here):
            return
        books = self.books
        if self._process != os.getpid():  # forked: the parent goes on with the drawn seeds
            self._process = os.getpid()
            books.seeds = torch.where(self._drawn, drawn_seed() + torch.arange(self.num_envs), books.seeds)
        given_cost = None if step_cost is None else chosen_step_cost(self.config.reward, step_cost, len(here))
        books.episode[here] += 1
        seeds, episode = books.seeds[here], books.episode[here]
        if self.step_cost is not None:
            drawn = drawn_step_cost(self.config.reward, seeds, episode) if given_cost is None else given_cost
            self.step_cost[there] = self._to_device(drawn)
        key = (Stream.IMAGE, seeds, episode)
        if self.config.mode == "generate":
            books.labels[here] = self._classes[keyed_index(key, len(self._classes))]
            books.image_index[here] = -1
            self.tokens[there] = 0
            if index is not None:
                books.labels[here] = self.data.labels[self._chosen_images(index, here)]
        else:
            chosen = keyed_index(key, len(self.data)) if index is None else self._chosen_images(index, here)
            books.image_index[here], books.labels[here] = chosen, self.data.labels[chosen]
            self.tokens[there] = moved(self.data.tokens[chosen], self.device)
        if labels is not None:
            classes = self.backbone.num_classes + 1
            given = as_choices("labels", labels, len(here), classes, "labels, the last for no class")
            books.labels[here] = given.cpu()
        books.visible[here] = False
        books.step_count[here] = 0
        books.reveal_step[here] = -1
        books.reveal_rank[here] = -1
        self._publish()
        self._start(rows)

    def _start(self, rows: Rows) -> None:
        """Empty the prefix of some episodes and condition it on their labels."""
        self.prefix = self._started(self.prefix, self.labels, rows)
        if self._guided:
            self.unconditional = self._started(self.unconditional, self._dropped, rows)

    def _started(self, prefix: Any, labels: Tensor, rows: Rows) -> Any:
        started = self.backbone.start(labels[rows.there])
        if rows.whole:
            return started
        return (self.backbone.start(labels) if prefix is None else prefix).put(rows.here, started)

    @isolated
    @torch.no_grad()
    def show(self, order: Tensor, length: Tensor) -> None:
        """Put all episodes, fresh from `reset`, into given contexts without playing them.

        Of each reveal order (M, B) the first `length` (M,) blocks are visible.
        """
        order, length = order.cpu(), length.cpu()
        self._append(order, length)
        self.books.record(order, length)
        self._publish()
        self._looks = []
        self._look(self.books.hidden_count.nonzero().flatten())

    def _chosen_images(self, index: Tensor | int, rows: Tensor) -> Tensor:
        of = f"images of {self.data.name}/{self.data.split}"
        return as_choices("index", index, len(rows), len(self.data), of).cpu()

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
        books = self.books
        if (books.episode < 0).any():
            raise ValueError("step was called before reset; begin the episodes first")
        restart = torch.zeros_like(books.visible[:, 0]) if restart is None else restart.cpu()
        if restart.shape != (self.num_envs,) or restart.dtype != torch.bool:
            raise ValueError(f"restart must be ({self.num_envs},) bool, got {tuple(restart.shape)} {restart.dtype}")
        blocks, count, legal = books.read(actions, self._budgets)
        idle = restart | books.finished
        illegal = ~legal & ~idle
        if self.config.strict and illegal.any():
            row = int(illegal.nonzero()[0, 0])
            raise ValueError(
                f"action {actions[row].tolist()} of sub-environment {row} is illegal: blocks must be hidden, "
                f"distinct and in 0..{self.geometry.num_blocks - 1}, the budget legal; hidden now: "
                f"{(~books.visible[row]).nonzero().flatten().tolist()}"
            )
        count = torch.where(idle | illegal, 0, count)
        blocks = torch.where(torch.arange(blocks.shape[1]) < count[:, None], blocks, 0)
        before, seen = self._charged(blocks, count) if self._charging else self.losses, books.visible.clone()
        drawn = self._draw(blocks, count) if self.config.mode == "generate" else None
        self._append(blocks, count, drawn)
        books.record(blocks, count)
        revealed = self._to_device(books.visible & ~seen)
        books.step_count += (~idle).long()
        self._publish()
        self._looks = []
        self._begin(self._rows(restart.nonzero().flatten()))
        self._look(books.hidden_count.nonzero().flatten())
        terminated = books.visible.all(-1)
        truncated = books.finished & ~terminated
        if not self._rewarded:
            reward = torch.zeros_like(self.losses[:, 0])
        elif self.config.mode == "teacher":
            reward = self.reward(before, self.losses, revealed, self.visible, self.step_cost)
        else:
            reward = self._hindsight_return((terminated & (count > 0)).nonzero().flatten())
        for who, paid in ((illegal, ILLEGAL_REWARD), (idle, 0.0)):
            if who.any():
                reward = torch.where(self._to_device(who), paid, reward)
        return Transition(reward, *map(self._to_device, (terminated, truncated, illegal)))

    # ------------------------------------------------------------------ parts of a step

    def _together(self, blocks: Tensor, count: Tensor) -> Iterator[tuple[Rows, Tensor]]:
        """Episodes that reveal equally many blocks, and these, (m, k) on the device; nothing is padded."""
        for value in count.unique().tolist():
            if value:
                rows = self._rows((count == value).nonzero().flatten())
                yield rows, self._to_device(blocks[rows.here, :value])

    def _some(self, states: Any, rows: Tensor) -> Any:
        """Some rows of a prefix or of chain entries, which may be None."""
        return states if states is None or len(rows) == self.num_envs else states.select(rows)

    def _spread(self, chains: Any, rows: Rows, others: Any) -> Any:
        """Chain entries of some rows among those of the others, which may be None."""
        return chains if rows.whole else chains.spread(rows.there, self.num_envs, others)

    def _charged(self, blocks: Tensor, count: Tensor) -> Tensor:
        """(M, B): losses of the blocks that are revealed now, given what is visible before; zero elsewhere."""
        charged = torch.zeros_like(self.losses)
        for (here, there, _), chosen in self._together(blocks, count):
            losses, _ = self.backbone.context_loss(self._some(self.prefix, here), self.tokens[there], chosen)
            charged[there[:, None], chosen] = losses.loss.float()
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
            here, there, _ = rows
            blocks_here = blocks[here, : chosen.shape[1]]
            drawing = self._drawing(here, blocks_here, chosen)
            positions = self._to_device(self.geometry.block_tokens[blocks_here])  # (m, k, p*p)
            tokens[there[:, None, None], positions] = drawing.tokens
            for place, entries in enumerate((drawing.entries, drawing.unconditional)):
                if entries is not None:
                    first[place] = self._spread(entries.chain(torch.zeros_like(there)), rows, first[place])
        self.tokens = tokens
        return first[0], first[1]

    def _drawing(self, here: Tensor, blocks_here: Tensor, blocks: Tensor) -> Drawing:
        """Some blocks (m, k) of some episodes, drawn with numbers keyed by (seed, episode, step, token).

        The blocks come on the host too, where the keys are: a hundred small operations.
        """
        key = (part[here, None, None] for part in (self.books.seeds, self.books.episode, self.books.step_count))
        uniforms = self._to_device(keyed_uniform((Stream.TOKEN, *key, self.geometry.block_tokens[blocks_here])))
        prefix, unconditional = self._some(self.prefix, here), self._some(self.unconditional, here)
        return self.backbone.decode(prefix, blocks, uniforms, self.config.sampling, unconditional)

    def propose(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """What the next step would draw for blocks (m, k) of some episodes: (m, k, p*p), in mode "generate"."""
        return self._drawing(rows.cpu(), blocks.cpu(), blocks).tokens

    def _append(self, blocks: Tensor, count: Tensor, drawn: tuple[Any, Any] | None = None) -> None:
        """Append the revealed blocks to the prefix, reusing the first block's chain entries.

        An image that becomes complete needs no prefix any more; nobody does who asks for nothing that depends on it.
        """
        if not self._reads_prefix:
            return
        count = torch.where(count < self.books.hidden_count, count, 0)
        together = list(self._together(blocks, count))
        if not together:
            return
        first, first_unconditional = (self._first_entries(blocks[:, 0]), None) if drawn is None else drawn
        for rows, chosen in together:
            self.prefix = self._extend(self.prefix, rows, chosen, first)
            if self.unconditional is not None:
                self.unconditional = self._extend(self.unconditional, rows, chosen, first_unconditional)

    def _extend(self, prefix: Any, rows: Rows, blocks: Tensor, first: Any) -> Any:
        """Extend the prefix of some episodes, each by as many blocks."""
        here, there, whole = rows
        count = torch.full_like(here, blocks.shape[1])
        known = self._some(first, there)
        part = self.backbone.extend(self._some(prefix, here), self._rows_of(self.tokens, rows), blocks, count, known)
        return part if whole else prefix.put(here, part)

    def _first_entries(self, block: Tensor) -> Any:
        """Chain entries of one block per row, on the host, gathered from the looks that computed them."""
        chosen = None
        for rows, place, entries in self._looks:  # in order: a later look at the same row is the valid one
            chain = place.gather(1, block[rows.here][:, None])[:, 0]
            chosen = self._spread(entries.chain(self._to_device(chain)), rows, chosen)
        return chosen

    def _look(self, rows: Tensor) -> None:
        """Refresh what is known of hidden blocks: observation parts, and in mode "teacher" their losses."""
        looking = torch.zeros(self.num_envs, dtype=torch.bool)
        looking[rows] = True
        finished = self.books.visible.all(-1) & ~looking
        if finished.any():
            there = self._to_device(finished)
            self.hidden = self.hidden.masked_fill(there[:, None, None], 0.0)
            self.entropy, self.losses = (part.masked_fill(there[:, None], 0.0) for part in (self.entropy, self.losses))
        if not self._looking:
            return
        hidden_count = self.books.hidden_count[rows]
        crowd = (hidden_count - 1) // BUCKET  # episodes that hide about equally many blocks look together
        for value in crowd.unique().tolist():
            widest = int(hidden_count[crowd == value].max())
            for part in rows[crowd == value].split(self._at_once):
                self._look_together(self._rows(part), widest)

    def _look_together(self, together: Rows, widest: int) -> None:
        """Refresh some episodes in one packed forward, padded to the one that hides most, `widest` blocks."""
        here = together.here
        visible = self.books.visible[here]
        blocks = visible.long().argsort(dim=1, stable=True)[:, :widest]  # hidden blocks first
        chains = torch.zeros_like(visible, dtype=torch.int64)  # of every hidden block: its place among them
        chains = chains.scatter(1, blocks, torch.arange(widest).expand_as(blocks))
        blocks, place, visible = map(self._to_device, (blocks, chains, visible))
        prefix = self._some(self.prefix, here)
        if self._context_losses:
            now, entries = self.backbone.context_loss(prefix, self._rows_of(self.tokens, together), blocks)
            if self._at_once == self.num_envs:
                self._looks.append(Look(together, chains, entries))
            hidden, entropy = now.hidden, now.entropy
            self.losses = self._shown(self.losses, together, now.loss, place, visible)
        else:
            hidden, entropy = self.backbone.observe(prefix, blocks)
        self.hidden = self._shown(self.hidden, together, hidden, place, visible)
        self.entropy = self._shown(self.entropy, together, entropy, place, visible)

    def _rows_of(self, whole: Tensor, rows: Rows) -> Tensor:
        """Some rows of what lies on the device; all of them are not copied."""
        return whole if rows.whole else whole[rows.there]

    def _shown(self, whole: Tensor, rows: Rows, found: Tensor, place: Tensor, visible: Tensor) -> Tensor:
        """What was found of hidden blocks (m, C, ...) at their places among all blocks (M, B, ...), 0 where visible."""
        aligned = (..., *[None] * (found.ndim - 2))
        index = place[aligned].expand(*place.shape, *found.shape[2:])
        new = found.float().gather(1, index).masked_fill_(visible[aligned], 0.0)
        return new if rows.whole else whole.index_put((rows.there,), new)

    def _hindsight_return(self, finished: Tensor) -> Tensor:
        """Whole return of images that were just finished, by replaying them: their rows (m,) on the host."""
        reward = torch.zeros(self.num_envs, dtype=torch.float32, device=self.device)
        if not self.config.hindsight or not len(finished):
            return reward
        rows = self._to_device(finished)
        reward[rows] = replay_return(self, rows)
        return reward
