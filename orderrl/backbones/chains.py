"""Context losses, lookahead, appending and parallel decoding as one computation over short chains.

Every hidden block is a chain that reads the prefix cache and itself. A backbone says how a chain is taught
(all its tokens known) and how it is continued (one token at a time); what the environment, the oracle and
the sampler ask for is the same for all of them and stands here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from orderrl.backbones.cache import ChainEntries, PrefixCache
from orderrl.backbones.protocol import BlockLosses
from orderrl.backbones.sampling import Sampling, guide, sample_tokens
from orderrl.geometry import BlockGrid


class Drawn(NamedTuple):
    """A token that a chain has just drawn: raster position and value, each (M, C) int64."""

    position: Tensor
    token: Tensor


class ChainBackbone:
    """The methods of `orderrl.backbones.Backbone` for a causal model with a prefix cache.

    Attributes:
        geometry: the block grid.
        block_tokens: (B, p*p) int64, raster positions of each block, on the model's device.
        entries_per_token: cache entries that a visible token takes.
    """

    geometry: BlockGrid
    block_tokens: Tensor
    entries_per_token: int

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
            prefix: cache of M states.
            positions, tokens: (M, C, n) int64, raster positions and values.
            past: entries that each chain sees before its own.
            whole: also encode the last token.

        Returns:
            (M, C, n, D) after the final norm, and the chains' new entries.
        """

    @abstractmethod
    def _continue(
        self, prefix: PrefixCache, position: Tensor, drawn: Drawn | None, past: ChainEntries | None
    ) -> tuple[Tensor, ChainEntries]:
        """Take in the token just drawn and predict the next one, at `position` (M, C).

        Returns:
            (M, C, D) after the final norm, and the new entries.
        """

    @abstractmethod
    def _contents(self, prefix: PrefixCache, positions: Tensor, tokens: Tensor, skip: int) -> ChainEntries:
        """Entries of one sequence of visible tokens (M, L) per state, without its first `skip` entries."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) after the final norm -> (..., vocab)."""

    # ------------------------------------------------------------------ the protocol

    @property
    def draws_per_block(self) -> int:
        """Sequential draws that a block takes: token by token."""
        return self.geometry.tokens_per_block

    def context_loss(
        self,
        prefix: PrefixCache,
        tokens: Tensor,
        blocks: Tensor,
        past: ChainEntries | None = None,
        whole: bool = False,
    ) -> tuple[BlockLosses, ChainEntries]:
        positions = self.block_tokens[blocks]  # (M, C, p*p)
        targets = tokens[:, None].expand(-1, blocks.shape[1], -1).gather(2, positions)
        queries, entries = self._teach(prefix, positions, targets, past, whole)
        log_probs = self.logits(queries).float().log_softmax(-1)
        loss = -log_probs.gather(-1, targets[..., None]).sum((-2, -1))
        return BlockLosses(loss, queries[:, :, 0].float(), entropy(log_probs[:, :, 0])), entries

    def expected_gain(self, prefix: PrefixCache, blocks: Tensor, past: ChainEntries, uniforms: Tensor) -> Tensor:
        positions = self.block_tokens[blocks]
        pasts: list[ChainEntries | None] = [past, None]
        gain = torch.zeros(blocks.shape, device=blocks.device)
        drawn = None
        for i in range(positions.shape[2]):
            log_probs = []
            for side, earlier in enumerate(pasts):
                hidden, entries = self._continue(prefix, positions[:, :, i], drawn, earlier)
                pasts[side] = entries if earlier is None else earlier.then(entries)
                log_probs.append(self.logits(hidden).float().log_softmax(-1))
            informed, uninformed = log_probs
            gain += (informed.exp() * (informed - uninformed)).sum(-1)
            drawn = Drawn(positions[:, :, i], sample_tokens(informed, uniforms[:, :, i], Sampling()))
        return gain

    def observe(self, prefix: PrefixCache, blocks: Tensor) -> tuple[Tensor, Tensor]:
        hidden, _ = self._continue(prefix, self.block_tokens[blocks][:, :, 0], None, None)
        return hidden.float(), entropy(self.logits(hidden).float().log_softmax(-1))

    def extend(
        self,
        prefix: PrefixCache,
        tokens: Tensor,
        blocks: Tensor,
        count: Tensor,
        first: ChainEntries | None = None,
    ) -> PrefixCache:
        positions = self.block_tokens[blocks].flatten(1)  # (M, K*p*p)
        remaining = self.entries_per_token * self.geometry.tokens_per_block * count
        done = 0
        if first is not None:  # the first block's entries are known up to its last token
            done = first.keys.shape[4]
            prefix = prefix.append(first, done * (count > 0))
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
    ) -> Tensor:
        steps = self.decode_steps(prefix, blocks, uniforms, sampling, unconditional)
        return torch.stack([token for token, _ in steps], dim=-1)

    def decode_steps(
        self,
        prefix: PrefixCache,
        blocks: Tensor,
        uniforms: Tensor,
        sampling: Sampling,
        unconditional: PrefixCache | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`decode` one token of every block at a time.

        Yields:
            The tokens (M, K) int64 and the guided logits (M, K, vocab) that they were drawn from.
        """
        positions = self.block_tokens[blocks]  # (M, K, p*p)
        prefixes = [prefix] if unconditional is None else [prefix, unconditional]
        pasts: list[ChainEntries | None] = [None for _ in prefixes]
        visible = (prefix.length - 1) // self.entries_per_token
        drawn = None
        for i in range(positions.shape[-1]):
            sides = []
            for side, cache in enumerate(prefixes):
                past = pasts[side]
                hidden, entries = self._continue(cache, positions[:, :, i], drawn, past)
                pasts[side] = entries if past is None else past.then(entries)
                sides.append(self.logits(hidden).float())
            scale = sampling.scale(visible + i, self.geometry.num_tokens)[:, None]
            logits = guide(sides[0], sides[1] if len(sides) > 1 else None, scale, sampling)
            drawn = Drawn(positions[:, :, i], sample_tokens(logits, uniforms[:, :, i], sampling))
            yield drawn.token, logits


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy over the last dimension, nats."""
    return -(log_probs.exp() * log_probs).sum(-1)
