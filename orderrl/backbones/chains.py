"""Context losses, lookahead, appending and parallel decoding as one computation over short chains.

Every hidden block is a chain that reads the prefix cache and itself. A backbone says how a chain is taught
(all its tokens known) and how it is continued (one token at a time); what the environment, the oracle and
the sampler ask for is the same for all of them and stands here, packed into forwards of bounded size
(`orderrl.backbones.memory`).
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orderrl.backbones.cache import ChainEntries, ChainParts, PrefixCache
from orderrl.backbones.graphs import BlockGraphs
from orderrl.backbones.memory import Packing, plan, values_at_once
from orderrl.backbones.protocol import BlockLosses, Drawing
from orderrl.backbones.sampling import Sampling, guide, sample_tokens
from orderrl.geometry import BlockGrid

LOGITS_AT_ONCE = 2**22  # on a CPU: a few megabytes, so that they stay in its cache between the passes over them


class Drawn(NamedTuple):
    """A token that a chain has just drawn: raster position and value, each (M, C) int64."""

    position: Tensor
    token: Tensor


class Growing:
    """Entries of chains that grow token by token, in room for all that they will ever have."""

    def __init__(self, room: Tensor) -> None:
        self.room, self.length = room, 0  # keys of all layers, then values: (2 * layers, M, heads, C, T, head_dim)

    def grown(self, count: int) -> ChainEntries:
        """The entries so far with places for `count` more behind them."""
        self.length += count
        return self.entries

    @property
    def entries(self) -> ChainEntries:
        """The entries so far."""
        return ChainEntries.of(self.room[..., : self.length, :])


class ChainBackbone:
    """The methods of `orderrl.backbones.Backbone` for a causal model with a prefix cache."""

    geometry: BlockGrid
    block_tokens: Tensor  # (B, p*p) int64, raster positions of each block, on the model's device
    vocab_size: int  # token values
    entries_per_token: int  # cache entries that a visible token takes
    packing: Packing = Packing()  # how much one forward may take; results do not depend on it

    # ------------------------------------------------------------------ what a model defines

    @abstractmethod
    def start(self, labels: Tensor) -> PrefixCache:
        """Cache of the class token alone: labels (M,) int64."""

    @abstractmethod
    def _teach(
        self, prefix: PrefixCache, positions: Tensor, tokens: Tensor, past: ChainEntries | None, whole: bool
    ) -> tuple[Tensor, ChainEntries]:
        """Hidden states that predict known chains.

        Args:
            positions, tokens: (M, C, n) int64, raster positions and values.
            past: entries that come before the chains; each of its P chains is seen by C / P consecutive ones.
            whole: also encode the last token.

        Returns:
            (M, C, n, D) after the final norm, and the chains' new entries.
        """

    @abstractmethod
    def _continue(
        self,
        prefix: PrefixCache,
        position: Tensor,
        drawn: Drawn | None,
        own: Growing | None,
        past: ChainEntries | None = None,
    ) -> Tensor:
        """Take in the token just drawn and predict the next one.

        Args:
            position: (M, C) int64, raster position of the next token.
            drawn: the token before it in the chain; None at the chain's beginning.
            own: the chains' entries so far, to which this step's are added; None for a chain that won't go on.
            past: entries that come before the chains.

        Returns:
            (M, C, D) after the final norm.
        """

    @abstractmethod
    def _contents(self, prefix: PrefixCache, positions: Tensor, tokens: Tensor, skip: int) -> ChainEntries:
        """Entries of one sequence of visible tokens (M, L) per state, without its first `skip` entries."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) after the final norm -> (..., vocab)."""

    # ------------------------------------------------------------------ the protocol

    @cached_property
    def graphs(self) -> BlockGraphs:
        """Blocks drawn as CUDA graphs."""
        return BlockGraphs()

    @property
    def draws_per_block(self) -> int:
        """Sequential draws that a block takes: token by token."""
        return self.geometry.tokens_per_block

    def states_at_once(self, chains: int) -> int:
        """How many states with that many chains fit into memory with their prefix and all entries kept."""
        entries = self.entries_per_token * self.geometry.tokens_per_block * (self.geometry.num_blocks + chains)
        empty = self.start(torch.zeros(1, dtype=torch.int64, device=self.block_tokens.device)).keys
        per_entry = 2 * empty.element_size() * empty[..., 0, :].numel()
        return max(1, int(self.packing.budget(empty.device) / (per_entry * entries)))

    def context_loss(
        self, prefix: PrefixCache, tokens: Tensor, blocks: Tensor, past: ChainEntries | None = None, whole: bool = False
    ) -> tuple[BlockLosses, Any]:
        groups = blocks.shape[1] if past is None else past.count
        rows = []
        for states, parts in self._plan(prefix, blocks, groups, past):
            part_prefix, part_tokens = prefix.select(states), tokens[states]
            row = []
            for chosen, chains in parts:
                part_past = None if past is None else past.select(states).narrow(chosen)
                row.append(self._score(part_prefix, part_tokens, blocks[states, chains], part_past, whole))
            rows.append(row)
        losses = BlockLosses(
            *(joined([joined([part[0][field] for part in row], 1) for row in rows]) for field in range(3))
        )
        if past is not None:
            return losses, None
        entries = ChainParts([[part[1] for part in row] for row in rows])
        return losses, entries.whole() if whole else entries

    def _plan(
        self, prefix: PrefixCache, blocks: Tensor, groups: int, past: ChainEntries | None
    ) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
        """Forwards of bounded size: states, and for each of them (groups, chains)."""
        per_chain = self.entries_per_token * self.geometry.tokens_per_block
        chains = blocks.shape[1] // max(groups, 1)
        seen = prefix.slots // 2 + per_chain + (0 if past is None else past.length)
        most = self.packing.entries(prefix.keys, seen)
        for states, parts in plan(len(blocks), groups, chains * per_chain, most):
            yield states, [(part, slice(part.start * chains, part.stop * chains)) for part in parts]

    def _score(
        self, prefix: PrefixCache, tokens: Tensor, blocks: Tensor, past: ChainEntries | None, whole: bool
    ) -> tuple[BlockLosses, ChainEntries]:
        """`context_loss` of one forward."""
        positions = self.block_tokens[blocks]  # (M, C, p*p)
        targets = tokens[:, None].expand(-1, blocks.shape[1], -1).gather(2, positions)
        queries, entries = self._teach(prefix, positions, targets, past, whole)
        loss, spread = self._losses(queries.flatten(0, 1), targets.flatten(0, 1))
        return BlockLosses(loss.view(blocks.shape), queries[:, :, 0].float(), spread.view(blocks.shape)), entries

    def _losses(self, queries: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of chains and entropy of their first query, each (n,) nats: queries (n, p*p, D), targets (n, p*p)."""
        losses, spreads = [], []
        at_once = max(1, values_at_once(LOGITS_AT_ONCE, targets.device) // (targets.shape[1] * self.vocab_size))
        for query, target in zip(queries.split(at_once), targets.split(at_once), strict=True):
            log_probs = self.logits(query).float().log_softmax(-1)
            losses.append(-log_probs.gather(-1, target[..., None]).sum((-2, -1)))
            spreads.append(entropy(log_probs[:, 0]))
        return joined(losses), joined(spreads)

    def expected_gain(self, prefix: PrefixCache, blocks: Tensor, past: ChainEntries, uniforms: Tensor) -> Tensor:
        gains = []
        for states, parts in self._plan(prefix, blocks, past.count, past):
            part_prefix, part_past = prefix.select(states), past.select(states)
            row = []
            for chosen, chains in parts:
                seen, noise = part_past.narrow(chosen), uniforms[states, chains]
                row.append(self._expected_gain(part_prefix, blocks[states, chains], seen, noise))
            gains.append(joined(row, 1))
        return joined(gains)

    def _expected_gain(self, prefix: PrefixCache, blocks: Tensor, past: ChainEntries, uniforms: Tensor) -> Tensor:
        """`expected_gain` of one forward."""
        positions = self.block_tokens[blocks]
        sides = [(earlier, Growing(self._room(prefix, blocks.shape[1]))) for earlier in (past, None)]
        gain = torch.zeros(blocks.shape, dtype=torch.float32, device=blocks.device)
        drawn = None
        for i in range(positions.shape[2]):
            informed, uninformed = (
                self.logits(self._continue(prefix, positions[:, :, i], drawn, own, earlier)).float().log_softmax(-1)
                for earlier, own in sides
            )
            gain += (informed.exp() * (informed - uninformed)).sum(-1)
            drawn = Drawn(positions[:, :, i], sample_tokens(informed, uniforms[:, :, i], Sampling()))
        return gain

    def certainty(self, prefix: PrefixCache, blocks: Tensor, first: bool = False) -> tuple[Tensor, Tensor]:
        """How sure the model is of hidden blocks, whatever they hold: a function of the prefix alone.

        Means over a block's tokens, each given those before it in the block's most likely chain.

        Args:
            blocks: (M, C) int64, hidden blocks.
            first: look at the first token alone.

        Returns:
            Expected log-probability and log-probability of the most likely token, each (M, C), nats per token.
        """
        rows = []
        for states, parts in self._plan(prefix, blocks, blocks.shape[1], None):
            seen = prefix.select(states)
            row = [self._certainty(seen, self.block_tokens[blocks[states, part]], first) for part, _ in parts]
            rows.append([torch.cat(columns, 1) for columns in zip(*row, strict=True)])
        expected, highest = (torch.cat(columns) for columns in zip(*rows, strict=True))
        return expected, highest

    def _certainty(self, prefix: PrefixCache, positions: Tensor, first: bool) -> tuple[Tensor, Tensor]:
        """`certainty` of one forward: positions (M, C, p*p)."""
        count = 1 if first else positions.shape[2]
        own = None if first else Growing(self._room(prefix, positions.shape[1]))
        expected = torch.zeros(positions.shape[:2], dtype=torch.float32, device=positions.device)
        highest, drawn = torch.zeros_like(expected), None
        for i in range(count):
            log_probs = self.logits(self._continue(prefix, positions[:, :, i], drawn, own)).float().log_softmax(-1)
            best = log_probs.max(-1)
            expected, highest = expected - entropy(log_probs), highest + best.values
            drawn = Drawn(positions[:, :, i], best.indices)
        return expected / count, highest / count

    def _room(self, prefix: PrefixCache, chains: int) -> Tensor:
        """Room for the entries of chains, without their last token's."""
        layers, states, heads, _, width = prefix.keys.shape
        length = self.entries_per_token * self.geometry.tokens_per_block - 1
        return prefix.keys.new_empty(2 * layers, states, heads, chains, length, width)

    def observe(self, prefix: PrefixCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        rows = []
        most = self.packing.entries(prefix.keys, prefix.slots // 2)
        for states, parts in plan(len(blocks), blocks.shape[1], 1, most):
            seen = prefix.select(states)
            row = [self._continue(seen, self.block_tokens[blocks[states, part]][:, :, 0], None, None) for part in parts]
            rows.append(joined(row, 1))
        hidden = joined(rows)
        spread = self._losses(hidden.flatten(0, 1)[:, None], torch.zeros_like(blocks).flatten()[:, None])[1]
        return hidden.float(), spread.view(blocks.shape)

    def extend(
        self, prefix: PrefixCache, tokens: Tensor, blocks: Tensor, count: Tensor, first: ChainEntries | None = None
    ) -> PrefixCache:
        cost = self.entries_per_token * self.geometry.tokens_per_block * blocks.shape[1]
        lengths = []
        for states, _ in plan(len(blocks), 1, cost, self.packing.entries(prefix.keys, prefix.slots // 2)):
            known = None if first is None else first.select(states)
            part = self._extend(prefix.select(states), tokens[states], blocks[states], count[states], known)
            lengths.append(part.length)  # its entries are written into the prefix's own
        last = prefix.last
        if last is not None:
            count = count.to(last.device)
            ends = self.block_tokens[blocks.gather(1, (count - 1).clamp_min(0)[:, None])[:, 0], -1]
            last = torch.where(count > 0, ends, last)
        return PrefixCache(prefix.keys, prefix.values, torch.cat(lengths), last=last)

    def _extend(
        self, prefix: PrefixCache, tokens: Tensor, blocks: Tensor, count: Tensor, first: ChainEntries | None
    ) -> PrefixCache:
        """`extend` of one forward, in place."""
        positions = self.block_tokens[blocks].flatten(1)  # (M, K*p*p)
        remaining = self.entries_per_token * self.geometry.tokens_per_block * count.cpu()
        done = 0
        if first is not None:  # the first block's entries are known up to its last token
            done = first.length
            prefix = prefix.append(first, done * (count.cpu() > 0))
            remaining = (remaining - done).clamp_min(0)
        entries = self._contents(prefix, positions, tokens.gather(1, positions), done)
        return prefix.append(entries, remaining)

    def decode(
        self,
        prefix: PrefixCache,
        blocks: Tensor,
        uniforms: Tensor,
        sampling: Sampling,
        unconditional: PrefixCache | None = None,
    ) -> Drawing:
        positions = self.block_tokens[blocks]  # (M, K, p*p)
        sides = [prefix] if unconditional is None else [prefix, unconditional]
        visible = (prefix.length - 1) // self.entries_per_token
        found = None
        if prefix.last is None:  # a graph reads nothing else of a prefix
            found = self.graphs.draw(self, sides, positions, uniforms, visible, sampling)
        if found is not None:
            tokens, room = found
            rooms = list(room.split(len(blocks), 1))
        else:
            if positions.device.type != "cpu":  # both sides in one batch; on a CPU that saves nothing
                sides = [PrefixCache.cat(sides)]
            rooms = [self._room(side, blocks.shape[1]) for side in sides]
            visible = visible.to(positions.device, non_blocking=True)
            tokens = self._draw(sides, positions, uniforms, visible, sampling, rooms)
            rooms = [part for room in rooms for part in room.split(len(blocks), 1)] if len(blocks) else rooms
        return Drawing(tokens, *(ChainEntries.of(room) for room in rooms))

    def _draw(
        self,
        sides: Sequence[PrefixCache],
        positions: Tensor,
        uniforms: Tensor,
        visible: Tensor,
        sampling: Sampling,
        rooms: Sequence[Tensor],
    ) -> Tensor:
        """Tokens (M, K, p*p) of `decode`, on the device alone: this is what is recorded as a CUDA graph.

        Args:
            sides: prefixes with the label and, where guidance needs it, without, or one that holds both in this order.
            positions: (M, K, p*p) int64.
            visible: (M,) int64, visible tokens.
            rooms: of every side, filled with the chains' entries.
        """
        drawn: Drawn | None = None
        tokens: list[Tensor] = []
        chains = [Growing(room) for room in rooms]
        for i in range(positions.shape[-1]):
            logits: list[Tensor] = []
            for side, own in zip(sides, chains, strict=True):
                both = len(side.length) // max(len(positions), 1)  # sides in one batch
                known, asked = drawn, positions[:, :, i]
                if both > 1:
                    known = None if drawn is None else Drawn(*(part.repeat(both, 1) for part in drawn))
                    asked = asked.repeat(both, 1)
                logits += self.logits(self._continue(side, asked, known, own)).float().chunk(both)
            scale = sampling.scale(visible + i, self.geometry.num_tokens)[:, None]
            guided = guide(logits[0], logits[1] if len(logits) > 1 else None, scale, sampling)
            drawn = Drawn(positions[:, :, i], sample_tokens(guided, uniforms[:, :, i], sampling))
            tokens.append(drawn.token)
        return torch.stack(tokens, dim=-1)


def joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat` that does not copy a single part."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy over the last dimension, nats."""
    return -(log_probs.exp() * log_probs).sum(-1)
