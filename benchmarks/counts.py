"""Operations that the shapes need: the sums of docs/performance.md.

A multiplication with an addition counts as two operations. Counted are matrix products and attention; norms,
rotations, softmax and the like are the overhead that fractions of the limit show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orderrl.backbones import ARPG, Backbone


@dataclass(frozen=True)
class Pass:
    """One forward over chains.

    Attributes:
        chains: over all states.
        entries: of a chain.
        queries: of a chain, places whose prediction is read.
        seen: entries that a place of a chain sees besides its chain: prefix and past.
    """

    chains: int
    entries: int
    queries: int
    seen: int


class Counter:
    """Operations and bytes of a backbone's forwards.

    Args:
        backbone: RandAR's form (instruction and content tokens) or ARPG's (queries leave no entries).
    """

    def __init__(self, backbone: Backbone) -> None:
        b: Any = backbone
        self.config, self.two_pass = b.config, isinstance(backbone, ARPG)
        self.tokens, self.blocks = b.geometry.tokens_per_block, b.geometry.num_blocks
        self.per_token = b.entries_per_token
        c = self.config
        width = int(8 * c.dim / 3)
        width = -(-width // c.multiple_of) * c.multiple_of
        self.feed_forward = 2 * 3 * c.dim * width
        self.square = 2 * c.dim**2  # one projection
        self.vocabulary = 2 * c.dim * c.vocab_size
        self.weight_bytes = sum(p.numel() * p.element_size() for p in b.parameters())

    def operations(self, p: Pass) -> float:
        """Operations of a pass."""
        own = (p.entries + 1) / 2  # a place sees half of its own chain on average
        attention = 4 * self.config.dim * (p.seen + own)
        layers = self.config.layers
        if self.two_pass:
            # contents: half of the layers and the shared pair; queries: the other half, with no keys of their own
            content = (layers // 2) * (4 * self.square + self.feed_forward + attention) + 2 * self.square
            query = (layers // 2) * (2 * self.square + self.feed_forward + attention) + self.vocabulary
            return p.chains * (p.entries * content + p.queries * query)
        layer = 4 * self.square + self.feed_forward + attention
        last = p.entries * 2 * self.square + p.queries * (2 * self.square + self.feed_forward + attention)
        return p.chains * (p.entries * (layers - 1) * layer + last + p.queries * self.vocabulary)

    def prefix(self, visible: int) -> int:
        """Entries of a prefix: the class and the visible blocks."""
        return 1 + self.per_token * self.tokens * visible

    def chain(self, count: int, visible: int, whole: bool = False, past: bool = False) -> float:
        """Operations of the chains of `count` blocks over a prefix; `whole` encodes the last token too."""
        seen = self.prefix(visible) + (self.per_token * self.tokens if past else 0)
        entries = self.per_token * self.tokens - (0 if whole else 1)
        return self.operations(Pass(count, entries, self.tokens, seen))

    def append(self, count: int, visible: int) -> float:
        """Operations of encoding `count` blocks as one sequence behind a prefix; nothing is predicted."""
        entries = self.per_token * self.tokens * count
        return self.operations(Pass(1, entries, 0, self.prefix(visible)))

    def label(self, visible: int, targets: int | None = None) -> float:
        """Operations of one context's gains: every candidate once, and its targets behind it."""
        hidden = self.blocks - visible
        targets = hidden - 1 if targets is None else targets
        return self.chain(hidden, visible, whole=True) + self.chain(hidden * targets, visible, past=True)

    def episode(self) -> float:
        """Operations of one image's episode, one block a step, with context losses."""
        steps = range(self.blocks)
        last = self.operations(Pass(1, 1, 0, self.prefix(self.blocks // 2)))  # each block's last token
        return sum(self.chain(self.blocks - t, t) for t in steps) + (self.blocks - 1) * last

    def naive_label(self, visible: int) -> float:
        """The same gains when every candidate's prefix is encoded again; its losses before are computed once."""
        hidden = self.blocks - visible
        each = self.append(visible + 1, 0) + self.chain(hidden - 1, visible + 1)
        return hidden * each + self.append(visible, 0) + self.chain(hidden, visible)

    def naive_episode(self) -> float:
        """The same episode when every step encodes its prefix again."""
        return sum(self.append(t, 0) + self.chain(self.blocks - t, t) for t in range(self.blocks))
