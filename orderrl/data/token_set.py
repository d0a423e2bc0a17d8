"""Token sets: images as tokens with class labels, whatever they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

ORDER_SEED = 0  # of the order of every split


def stratified_order(labels: Tensor, seed: int = ORDER_SEED) -> Tensor:
    """A seeded shuffle in which every first part holds all classes in proportion.

    Image i of the m images of a class, themselves shuffled, goes to the share (i + 1/2) / m of the way; classes of
    equal size take turns, in an order drawn anew each time. So the first n of N images hold n / N of each class but for
    rounding.

    Args:
        labels: (N,) int64 classes.

    Returns:
        (N,) int64, a permutation of the rows.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes, counts = labels[shuffled].unique(return_inverse=True, return_counts=True)[1:]
    # the place of every image among those of its class
    by_class = classes.argsort(stable=True)
    place = torch.empty_like(by_class)
    place[by_class] = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    share = (place.double() + 0.5) / counts[classes]
    return shuffled[share.argsort(stable=True)]  # stable: classes of equal size stay shuffled


def random_window(total: int, count: int, generator: torch.Generator) -> Tensor:
    """A run of `count` of `total` images that begins anywhere and goes on at the start: (count,) int64 places.

    In stratified order every run is a stratified sample, so this draws another one without looking at classes.
    """
    start = int(torch.randint(total, (), generator=generator))
    return (start + torch.arange(count)) % total


@dataclass(frozen=True)
class TokenSet:
    """Images of one split as tokens, discrete or continuous.

    The order of a split that a loader of `orderrl.data` gives is `stratified_order` of its labels, so that the first n
    images are a fair sample of it, for every n.

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
        decoder: tokens (m, N) or (m, N, token_dim) to pixels (m, 3, H, W) uint8, computed where the tokens lie; None
            where tokens are grey levels.
        identity: what stands for the content in `fingerprint` where hashing it would take long; None hashes it.
        class_names: of the labels, in words that a caption can hold; None where they have none.
        present: labels that have images, of a data set that holds some of the classes of a model; None is all.

    Raises:
        ValueError: if tokens or labels have another shape, dtype or range, or are not finite.
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
    present: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        grid = self.height * self.width
        shape = (len(self.labels), grid, self.token_dim) if self.token_dim else (len(self.labels), grid)
        if tuple(self.tokens.shape) != shape:
            self._refuse(f"tokens must have the shape {shape} of labels and grid, got {tuple(self.tokens.shape)}")
        self._require_numbers("labels", self.labels, self.num_classes)
        if isinstance(self.tokens, Tensor):  # what lies on disk was checked when it was written
            if not self.token_dim:
                self._require_numbers("tokens", self.tokens, self.vocab_size)
            elif not (self.tokens.is_floating_point() and bool(self.tokens.isfinite().all())):
                self._refuse("continuous tokens must be finite floating-point numbers")

    def _require_numbers(self, name: str, values: Tensor, limit: int) -> None:
        if values.dtype != torch.int64:
            self._refuse(f"{name} must be int64, got {values.dtype}")
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < limit:
            self._refuse(f"{name} must lie in 0..{limit - 1}, they lie in {int(values.min())}..{int(values.max())}")

    def _refuse(self, message: str) -> None:
        raise ValueError(f"data {self.name!r}, split {self.split!r}: {message}")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def classes(self) -> Tensor:
        """Labels that the data set has images of, (c,) int64."""
        return torch.arange(self.num_classes) if self.present is None else torch.tensor(self.present)

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

    def shuffled(self) -> TokenSet:
        """The same images in `stratified_order`, which becomes part of the identity."""
        identity = None if self.identity is None else hashlib.sha256(f"{self.identity}:order {ORDER_SEED}".encode())
        return replace(
            self.at(stratified_order(self.labels)),
            identity=None if identity is None else identity.hexdigest()[:16],
        )

    def at(self, rows: Tensor) -> TokenSet:
        """Some of the images in a given order: rows (m,) int64."""
        tokens = self.tokens[rows] if isinstance(self.tokens, Tensor) else self.tokens.at(rows)
        return self.holding(tokens, self.labels[rows])

    def holding(self, tokens: Tensor, labels: Tensor) -> TokenSet:
        """A set of the same kind that holds other images."""
        return replace(self, tokens=tokens, labels=labels, identity=None)

    def first(self, count: int) -> TokenSet:
        """The first `count` images, at most all: a stratified sample of a split."""
        if count >= len(self):
            return self
        identity = None if self.identity is None else f"{self.identity}:{count}"
        return replace(self, tokens=self.tokens[:count], labels=self.labels[:count], identity=identity)

    def images(self, tokens: Tensor, device: torch.device | None = None) -> Tensor:
        """Decode tokens to pixels: (..., N), or (..., N, token_dim) -> (..., 3, H, W) uint8 on the CPU.

        Args:
            tokens: images of this set's shape.
            device: where they are decoded; None is where they lie.

        Raises:
            ValueError: if tokens are continuous and the set has no decoder.
        """
        if self.decoder is not None:
            inner = 1 if self.token_dim == 0 else 2  # dimensions of one image's tokens
            lead = tokens.shape[: tokens.ndim - inner]
            tokens = tokens if device is None else tokens.to(device)
            pixels = self.decoder(tokens.reshape(-1, *tokens.shape[tokens.ndim - inner :])).cpu()
            return pixels.view(*lead, *pixels.shape[1:])
        if self.token_dim:
            raise ValueError(f"data {self.name!r} has continuous tokens and no decoder; give TokenSet a decoder")
        grey = tokens.cpu().unflatten(-1, (self.height, self.width)).float() * (255 / (self.vocab_size - 1))
        return grey.round().to(torch.uint8).unsqueeze(-3).expand(*tokens.shape[:-1], 3, -1, -1)
