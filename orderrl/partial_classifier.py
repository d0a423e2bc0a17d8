"""The research notes' oracle: a classifier of partly seen token images, and the importance of blocks by it.

Notable:
- A vision transformer of timm on the tokens themselves, trained with PatchDrop: every batch keeps a random share of the
  tokens, so that it knows images of which it sees little.
- The blocks of an image fall into disjoint clusters of equal size. The classifier sees one cluster alone; its
  probability of the true class is the importance of all blocks of that cluster. Grouping "cumulative" shows the first
  clusters of an order together; a block's importance is then what its cluster adds.
- It is trained on the backbone split alone, once for its settings, then it is frozen and kept in the cache.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderrl.data import AUGMENTATIONS, TokenSet, augmented, load_split
from orderrl.geometry import BlockGrid
from orderrl.runtime import distributed
from orderrl.runtime.cache import Cache, fingerprint
from orderrl.runtime.checkpoint import load_checkpoint, load_state, save_checkpoint
from orderrl.runtime.isolation import isolated, isolated_float32
from orderrl.runtime.job import Job, finish
from orderrl.runtime.learning_rate import one_cycle
from orderrl.runtime.optimisation import descend
from orderrl.runtime.random import Stream, keyed_uniform
from orderrl.runtime.values import Settings, at_least, between, positive, setting

CLASSIFIERS = "classifiers"  # in the cache
GROUPINGS = ("random", "tiles", "ranks", "cumulative")
VIEWS_AT_ONCE = 2**12  # of images, in one forward
_FORMAT = 1
_FILE = "classifier.safetensors"


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(Settings):
    """A classifier of partly seen token images and its training."""

    dim: int = setting(96, "Width", at_least(1))
    depth: int = setting(3, "Transformer blocks", at_least(1))
    heads: int = setting(4, "Attention heads", at_least(1))
    embedding: int = setting(8, "Values that stand for a discrete token", at_least(1))
    steps: int = setting(1500, "Optimiser steps", at_least(1))
    batch_size: int = setting(128, "Images per step", at_least(1))
    learning_rate: float = setting(1e-3, "Peak learning rate", positive())
    weight_decay: float = setting(0.05, "Weight decay of AdamW", at_least(0))
    least_kept: float = setting(0.1, "Smallest share of the tokens that a batch keeps", between("(0, 1]"))
    augmentation: float = setting(1.0, "Strength of the data set's augmentation; 0 is none", at_least(0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} must divide dim={self.dim}")


class PartialClassifier(nn.Module):
    """Class logits of token images of which some tokens are seen."""

    @isolated_float32
    def __init__(self, config: ClassifierConfig, data: TokenSet) -> None:
        from timm.models.vision_transformer import VisionTransformer  # takes long to import

        super().__init__()
        self.grid = (data.height, data.width)
        channels = data.token_dim or config.embedding
        self.embedding = None if data.token_dim else nn.Embedding(data.vocab_size, channels)
        self.vit = VisionTransformer(
            img_size=self.grid, patch_size=1, in_chans=channels, num_classes=data.num_classes, embed_dim=config.dim,
            depth=config.depth, num_heads=config.heads,
        )  # fmt: skip

    def forward(self, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """Logits (M, classes) of tokens (M, N) or (M, N, C).

        With `kept` (M, ..., K) logits (M, ..., classes) of views of each image in which only those tokens are seen.
        """
        values = tokens if self.embedding is None else self.embedding(tokens)
        x = self.vit._pos_embed(self.vit.patch_embed(values.mT.unflatten(-1, self.grid)))  # (M, 1 + N, dim)
        if kept is None:
            return self._classify(x)
        seen = F.pad(1 + kept, (1, 0))  # the class token first
        views = x.gather(1, seen.flatten(1)[..., None].expand(-1, -1, x.shape[-1])).view(*seen.shape, -1)
        return self._classify(views.flatten(0, -3)).unflatten(0, kept.shape[:-1])

    def _classify(self, x: Tensor) -> Tensor:
        return self.vit.forward_head(self.vit.norm(self.vit.blocks(self.vit.norm_pre(x))))


def find_or_train_classifier(
    data: str, config: ClassifierConfig, seed: int, cache_dir: Path, checkpoint_seconds: float = 60.0
) -> PartialClassifier:
    """The frozen classifier of a data set's tokens, found in the cache or trained on the backbone split."""
    train, test = load_split(data, "backbone"), load_split(data, "test")
    settings = asdict(config)
    if data not in AUGMENTATIONS:  # the same images under another name are not augmented
        settings["augmentation"] = 0.0
    description = {"format": _FORMAT, "images": train.fingerprint, "classifier": settings, "seed": seed}
    cache, key = Cache(cache_dir), fingerprint(description)
    torch.manual_seed(seed)
    classifier = PartialClassifier(config, train)

    def make() -> None:
        with Job(cache_dir, f"{CLASSIFIERS}-{key}", checkpoint_seconds) as job:
            train_classifier(classifier, train, config, seed, job)
            with cache.store(CLASSIFIERS, key, description) as folder:
                save_checkpoint(folder / _FILE, classifier.state_dict(), {"kind": "partial_classifier", **description})
        for share in (1.0, 0.25):
            found = partial_accuracy(classifier, test, share)
            print(f"classifier: {found:.1%} of {len(test)} test images recognised from {share:.0%} of their tokens")

    if distributed.on_main(lambda: cache.find(CLASSIFIERS, key)) is None:
        distributed.on_main(make)
    finish(cache_dir, f"{CLASSIFIERS}-{key}")
    path = cache.folder(CLASSIFIERS, key) / _FILE
    load_state(classifier, load_checkpoint(path, "partial_classifier")[0], path)
    return classifier.eval().requires_grad_(False)


def random_kept(count: int, tokens: int, least: float, generator: torch.Generator) -> Tensor:
    """PatchDrop: which tokens a batch keeps, (count, K) int64; K is uniform between a share of them and all."""
    number = int(torch.randint(max(1, math.ceil(least * tokens)), tokens + 1, (), generator=generator))
    return torch.rand(count, tokens, generator=generator).argsort(1)[:, :number]


@isolated_float32
def train_classifier(
    classifier: PartialClassifier, data: TokenSet, config: ClassifierConfig, seed: int, job: Job
) -> None:
    """Train in place. Metrics: loss, nats."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=config.weight_decay)
    schedule = one_cycle(optimizer, config.steps, config.learning_rate)
    classifier.train()
    for _ in job.steps(
        config.steps, "training the classifier", "steps", "loss {loss:.3f}",
        classifier=classifier, optimizer=optimizer, schedule=schedule, generator=generator,
    ):  # fmt: skip
        rows = torch.randint(len(data), (config.batch_size,), generator=generator)
        tokens = augmented(data.name, data.tokens[rows], generator, config.augmentation)
        kept = random_kept(len(rows), tokens.shape[1], config.least_kept, generator)
        loss = F.cross_entropy(classifier(tokens, kept), data.labels[rows])
        mean = descend(optimizer, loss, classifier)
        schedule.step()
        job.log(loss=mean)
    classifier.eval()


@isolated
@torch.no_grad()
def partial_accuracy(classifier: PartialClassifier, data: TokenSet, share: float) -> float:
    """Share of images that are recognised from a random share of their tokens."""
    images = data.first(2000)
    tokens = images.tokens[:]
    kept = torch.rand(len(tokens), tokens.shape[1], generator=torch.Generator().manual_seed(0)).argsort(1)
    kept = kept[:, : max(1, round(share * tokens.shape[1]))]
    return (classifier(tokens, kept).argmax(-1) == images.labels).float().mean().item()


# ---------------------------------------------------------------------- importance


@isolated
def cluster_orders(
    grouping: str,
    geometry: BlockGrid,
    clusters: int,
    draws: int,
    keys: tuple[Tensor, ...],
    scores: Tensor | None = None,
) -> Tensor:
    """Orders (M, R, B) int64 of the blocks, which `importance` cuts into clusters.

    Args:
        grouping: "random" partitions, spatial "tiles", or "ranks" of the scores; "cumulative" orders by the scores if
            there are any, else at random.
        clusters: C; of "tiles" a product of rows and columns of tiles that divide the grid.
        draws: R of random ones; others have one.
        keys: what the M images are, each (M,) int64: random numbers do not depend on the batch.
        scores: (M, B).

    Raises:
        ValueError: if the clusters do not divide the grid, or scores are missing.
    """
    require_clusters(grouping, geometry, clusters, scores is not None)
    count, blocks = len(keys[0]), geometry.num_blocks
    if grouping == "tiles":
        return _tiles(geometry, clusters).expand(count, 1, -1)
    if grouping != "random" and scores is not None:
        return scores.argsort(-1, descending=True)[:, None]
    draw, block = torch.arange(draws)[:, None], torch.arange(blocks)
    shaped = [key.cpu()[:, None, None] for key in keys]
    return keyed_uniform([Stream.CLUSTER, *shaped, draw, block]).argsort(-1).to(keys[0].device)


def require_clusters(grouping: str, geometry: BlockGrid, clusters: int, scored: bool) -> None:
    """Refuse clusters that do not divide the grid, and ranks without scores."""
    if geometry.num_blocks % clusters:
        raise ValueError(f"clusters={clusters} must divide the {geometry.num_blocks} blocks")
    if grouping == "tiles":
        _tiles(geometry, clusters)
    if grouping == "ranks" and not scored:
        raise ValueError("grouping=ranks needs the scores of a head that is being trained; use it with agent=ste")


def _tiles(geometry: BlockGrid, clusters: int) -> Tensor:
    """Blocks tile by tile, (B,): as square tiles as divide the grid."""
    fitting = [
        (r, clusters // r)
        for r in range(1, clusters + 1)
        if not clusters % r and not geometry.rows % r and not geometry.columns % (clusters // r)
    ]
    if not fitting:
        raise ValueError(f"clusters={clusters} can't be tiles of {geometry.rows}x{geometry.columns} blocks")
    rows, columns = min(fitting, key=lambda tiles: abs(geometry.rows / tiles[0] - geometry.columns / tiles[1]))
    row, column = geometry.centres.long().unbind(-1)
    return (row * rows // geometry.rows * columns + column * columns // geometry.columns).argsort(stable=True)


@isolated
@torch.no_grad()
def importance(
    classifier: PartialClassifier,
    geometry: BlockGrid,
    tokens: Tensor,
    labels: Tensor,
    orders: Tensor,
    clusters: int,
    cumulative: bool = False,
) -> Tensor:
    """Importance of every block by the classifier, the mean over orders.

    Args:
        tokens: (M, N) or (M, N, C), the true images.
        labels: (M,), the true classes.
        orders: (M, R, B) of `cluster_orders`.
        clusters: into how many parts each order is cut.
        cumulative: show the first parts together; the importance is the rise of the probability, in [-1, 1].

    Returns:
        (M, B) float32; the probability of the true class in [0, 1] unless cumulative.
    """
    device = next(classifier.parameters()).device
    tokens, labels, orders = tokens.to(device), labels.to(device), orders.to(device)
    parts = orders.unflatten(2, (clusters, -1))  # (M, R, C, size)
    # what the classifier sees: one part alone, or the first parts together
    if cumulative:
        size = parts.shape[3]
        worth = torch.stack([_seen(classifier, geometry, tokens, labels, orders[:, :, : size * count])
                             for count in range(clusters + 1)], -1).diff()  # fmt: skip
    else:
        worth = _seen(classifier, geometry, tokens, labels, parts.flatten(1, 2)).view(parts.shape[:3])
    found = torch.zeros(orders.shape, device=device, dtype=torch.float32)
    return found.scatter(2, orders, worth.repeat_interleave(parts.shape[3], 2)).mean(1)


def _seen(classifier: PartialClassifier, geometry: BlockGrid, tokens: Tensor, labels: Tensor, blocks: Tensor) -> Tensor:
    """Probability of the true class (M, S) where of each image only these blocks (M, S, K) are seen."""
    kept = geometry.block_tokens.to(blocks.device)[blocks].flatten(2)
    parts = kept.split(max(1, VIEWS_AT_ONCE // len(tokens)), 1)
    probabilities = torch.cat([classifier(tokens, views).softmax(-1) for views in parts], 1)
    return probabilities.gather(2, labels[:, None, None].expand(-1, kept.shape[1], 1))[..., 0]
