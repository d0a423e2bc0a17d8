"""Token sets: images as integer tokens with class labels, whatever they came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSet:
    """Images of one split as tokens.

    Attributes:
        name: the data set, for example "digits".
        split: which part of it.
        tokens: (n, N) int64 in [0, vocab_size), raster order.
        labels: (n,) int64 in [0, num_classes).
        height, width: the token grid.
        vocab_size: number of token values.
        num_classes: number of class labels.
    """

    name: str
    split: str
    tokens: Tensor
    labels: Tensor
    height: int
    width: int
    vocab_size: int
    num_classes: int

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content: changes when any token or label changes."""
        digest = hashlib.sha256(f"{self.height}x{self.width}:{self.vocab_size}:{self.num_classes}".encode())
        digest.update(self.tokens.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:16]

    def images(self, tokens: Tensor) -> Tensor:
        """Decode tokens to pixels: (..., N) int64 -> (..., 3, H, W) uint8, grey levels as they are."""
        grey = tokens.unflatten(-1, (self.height, self.width)).float() * (255 / (self.vocab_size - 1))
        return grey.round().to(torch.uint8).unsqueeze(-3).expand(*tokens.shape[:-1], 3, -1, -1)
