"""Token sets: images as tokens with class labels, whatever they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSet:
    """Images of one split as tokens, discrete or continuous.

    Attributes:
        name: the data set, for example "digits".
        split: which part of it.
        tokens: (n, N) int64 in [0, vocab_size), raster order; continuous ones (n, N, token_dim) float32. A large set
            on disk stands here as `orderrl.data.mapped.MappedTokens`, which reads rows as they are asked for.
        labels: (n,) int64 in [0, num_classes).
        height, width: the token grid.
        vocab_size: number of token values; 0 if tokens are continuous.
        num_classes: number of class labels.
        token_dim: channels of a continuous token; 0 if tokens are discrete.
        decoder: tokens (m, N) or (m, N, token_dim) to pixels (m, 3, H, W) uint8; None where tokens are grey levels.
        identity: what stands for the content in `fingerprint` where hashing it would take long; None hashes it.
        class_names: of the labels, in words that a caption can hold; None where they have none.
    """

    name: str
    split: str
    tokens: Tensor
    labels: Tensor
    height: int
    width: int
    vocab_size: int
    num_classes: int
    token_dim: int = 0
    decoder: Callable[[Tensor], Tensor] | None = None
    identity: str | None = None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content: changes when any token or label changes."""
        if self.identity is not None:
            return self.identity
        kind = f"{self.vocab_size}" if self.token_dim == 0 else f"continuous-{self.token_dim}"
        digest = hashlib.sha256(f"{self.height}x{self.width}:{kind}:{self.num_classes}".encode())
        digest.update(self.tokens.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:16]

    def images(self, tokens: Tensor) -> Tensor:
        """Decode tokens to pixels: (..., N), or (..., N, token_dim) -> (..., 3, H, W) uint8.

        Raises:
            ValueError: if tokens are continuous and the set has no decoder.
        """
        if self.decoder is not None:
            inner = 1 if self.token_dim == 0 else 2  # dimensions of one image's tokens
            lead = tokens.shape[: tokens.ndim - inner]
            pixels = self.decoder(tokens.reshape(-1, *tokens.shape[tokens.ndim - inner :]))
            return pixels.view(*lead, *pixels.shape[1:])
        if self.token_dim:
            raise ValueError(f"data {self.name!r} has continuous tokens and no decoder; give TokenSet a decoder")
        grey = tokens.unflatten(-1, (self.height, self.width)).float() * (255 / (self.vocab_size - 1))
        return grey.round().to(torch.uint8).unsqueeze(-3).expand(*tokens.shape[:-1], 3, -1, -1)
