"""The LlamaGen family (Sun et al., 2024): a causal transformer over discrete tokens, and its raster-order model.

Notable:
- Parameter names are the published ones, so published checkpoints load as they are.
- The raster model is a backbone of a single block, the whole image, inside which the order is raster: it is the
  baseline that every order is compared with, and the start for order-robust fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from orderrl.backbones.cache import ChainEntries, PrefixCache
from orderrl.backbones.chains import entropy
from orderrl.backbones.cpu_linear import EVERY, Linear
from orderrl.backbones.layers import Level, TransformerBlock, rope_table, unseen_later
from orderrl.backbones.origin import Origin
from orderrl.backbones.protocol import BlockLosses, Drawing, answers_alike
from orderrl.backbones.sampling import Sampling, guide, sample_tokens
from orderrl.geometry import BlockGrid
from orderrl.runtime.values import added_setting, at_least, between, check_fields, one_of, setting

ABSOLUTE, RELATIVE = "absolute", "relative"


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a transformer of the LlamaGen family.

    Attributes:
        height, width: token grid.
        vocab_size: token values.
        num_classes: class labels; one more row is the dropped label.
    """

    height: int
    width: int
    block_size: int = setting(MISSING, "Tokens along a side of a block", between("[1, 256]"))
    vocab_size: int  # type: ignore[misc]  # block_size has no default either
    num_classes: int  # type: ignore[misc]
    dim: int = setting(128, "Width", at_least(1))
    layers: int = setting(4, "Transformer blocks", between("[1, 1000]"))
    heads: int = setting(4, "Attention heads", at_least(1))
    multiple_of: int = setting(32, "Divisor of the feed-forward width, which is rounded up", at_least(1))
    dropout: float = setting(0.0, "Dropout rate in training", between("[0, 1)"))
    next_position: str = added_setting(
        ABSOLUTE,
        "What an instruction token says: absolute (where the next token lies), or relative (how far from the last one, "
        "as in OAR)",
        one_of((ABSOLUTE, RELATIVE)),
    )
    position_head: bool = added_setting(
        False, "Whether the model also says which block comes next, for policy=native; learnt on extracted orders"
    )

    def __post_init__(self) -> None:
        check_fields(self, at_least(1, "vocab_size", "num_classes"))
        BlockGrid(self.height, self.width, self.block_size)
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} must divide dim={self.dim}")

    def require_plain(self, family: str) -> None:
        """Refuse, by setting and family, what models with instruction tokens alone have."""
        for name, plain in (("next_position", ABSOLUTE), ("position_head", False)):
            if getattr(self, name) != plain:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for models with instruction tokens (family randar), not for "
                    f"family {family}; use {plain!r}"
                )

    def to_dict(self) -> dict[str, int | float]:
        """Plain values, as stored in checkpoints."""
        return asdict(self)


class ClassEmbedding(nn.Module):
    """Label table; the last row is the dropped label used for classifier-free guidance."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class FamilyModule(nn.Module):
    """Shape, block grid and rotary table of a model of the family; `OUTPUT` names its output matrix."""

    OUTPUT = "output"
    origin: Origin | None = None  # of a specialist: the orders that it was made for
    trained_on: str | None = None  # the data set, where a checkpoint says it
    rope: Tensor
    block_tokens: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.geometry = BlockGrid(config.height, config.width, config.block_size)
        self.vocab_size, self.num_classes, self.hidden_size = config.vocab_size, config.num_classes, config.dim
        rope = rope_table(config.height, config.width, config.dim // config.heads)
        self.register_buffer("rope", rope, persistent=False)
        self.register_buffer("block_tokens", self.geometry.block_tokens.to(rope.device), persistent=False)

    def reset_parameters(self) -> None:
        """Normal(0, 0.02) for every matrix, as in LlamaGen, and a zero output matrix."""
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(getattr(self, self.OUTPUT).weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) after the final norm -> (..., vocab)."""
        return getattr(self, self.OUTPUT)(hidden)


class CausalTransformer(FamilyModule):
    """Embeddings, layers and output of the family; subclasses say what the sequence is."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.cls_embedding = ClassEmbedding(config.num_classes, config.dim)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            TransformerBlock(config.dim, config.heads, config.multiple_of, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.output = Linear(config.dim, config.vocab_size, bias=False)

    def _blocks(self) -> Iterator[TransformerBlock]:
        return (cast(TransformerBlock, layer) for layer in self.layers)

    def _forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Teacher-forced causal pass over whole sequences (M, S, dim), final norm included."""
        for layer in self._blocks():
            x = layer(x, rope)
        return self.norm(x)

    def encode(
        self,
        x: Tensor,
        rope: Tensor,
        prefix: PrefixCache,
        past: ChainEntries | None = None,
        own: ChainEntries | None = None,
        outputs: slice | None = EVERY,
    ) -> tuple[Tensor, ChainEntries]:
        """Encode new entries of chains.

        Args:
            x: (M, C, T, dim) embeddings.
            rope: (M, C, T, head_dim / 2, 2) rotations.
            past: entries that come before the chains; each of its P chains is seen by C / P consecutive ones.
            own: room for the chains' entries, earlier ones first; the last T places are filled.
            outputs: the places whose hidden states are needed; what only they need of the last layer is left out.
                None is no place.

        Returns:
            Hidden states (M, C, outputs, dim) before the final norm, and the new entries.
        """
        shared, keys, values = prefix.levels, [], []
        unseen = unseen_later(x.shape[2], x.shape[2] if own is None else own.length, x.device)
        for number, layer in enumerate(self._blocks()):
            levels = [shared[number]]
            if past is not None:
                levels.append(Level(past.keys[number], past.values[number]))
            room = None if own is None else (own.keys[number], own.values[number])
            last = number + 1 == self.config.layers
            x, key, value = layer.chain(x, rope, levels, room, outputs if last else EVERY, unseen)
            keys.append(key)
            values.append(value)
        return x, ChainEntries(tuple(keys), tuple(values))

    def empty(self, states: int, slots: int) -> PrefixCache:
        """A cache without entries."""
        c = self.config
        keys = self.tok_embeddings.weight.new_zeros(c.layers, states, c.heads, slots + 1, c.dim // c.heads)
        return PrefixCache(keys, torch.zeros_like(keys), torch.zeros(states, dtype=torch.int64))


@dataclass(frozen=True)
class RasterState:
    """Prefix of M images that are drawn as one block: nothing, or everything."""

    labels: Tensor  # (M,) int64

    def select(self, rows: Tensor) -> RasterState:
        """A copy of some states."""
        return RasterState(self.labels[rows])

    def put(self, rows: Tensor, other: RasterState) -> RasterState:
        """Overwrite some states: the inverse of `select`."""
        labels = self.labels.clone()
        labels[rows] = other.labels
        return RasterState(labels)


@answers_alike
class RasterTransformer(CausalTransformer):
    """LlamaGen: the sequence [class, x1, x2, ...] in raster order; entry i predicts token i + 1.

    It satisfies `orderrl.backbones.Backbone` on a grid of one block, so `decode` is the published sampler with its
    key-value cache. It is not order-robust: there is no order to choose.
    """

    order_robust = False

    def __init__(self, config: TransformerConfig) -> None:
        config.require_plain("llamagen")
        super().__init__(config)
        if not config.block_size == config.height == config.width:
            raise ValueError(
                f"block_size={config.block_size} must be the side of the square token grid "
                f"{config.height}x{config.width}: a raster model draws the image as one block"
            )
        self.reset_parameters()

    def teacher_forced(self, tokens: Tensor, labels: Tensor, token_order: Tensor | None = None) -> Tensor:
        """Logits of every token given its predecessors: tokens (M, N), labels (M,) -> (M, N, vocab), raster order."""
        if token_order is not None and bool((token_order != torch.arange(tokens.shape[1]).to(tokens)).any()):
            raise ValueError("token_order must be raster: a raster model knows no other")
        return self.logits(self._forward(self._sequence(tokens[:, :-1], labels), self._sequence_rope(len(tokens))))

    def _sequence(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([self.cls_embedding(labels)[:, None], self.tok_embeddings(tokens)], dim=1)

    def _sequence_rope(self, states: int) -> Tensor:
        return self.rope[:-1].expand(states, -1, -1, -1)

    @property
    def draws_per_block(self) -> int:
        """Sequential draws that the one block takes: token by token."""
        return self.geometry.num_tokens

    def start(self, labels: Tensor) -> RasterState:
        return RasterState(labels)

    def context_loss(
        self, prefix: RasterState, tokens: Tensor, blocks: Tensor, past: Any = None, whole: bool = False
    ) -> tuple[BlockLosses, ChainEntries]:
        chains = blocks.shape[1]
        labels = prefix.labels.repeat_interleave(chains)
        tokens = tokens.repeat_interleave(chains, 0)
        x = self._sequence(tokens[:, :-1], labels)
        queries = self._forward(x, self._sequence_rope(len(x))).unflatten(0, (-1, chains))  # (M, C, N, dim)
        log_probs = self.logits(queries).float().log_softmax(-1)
        loss = -log_probs.gather(-1, tokens.unflatten(0, (-1, chains))[..., None]).sum((-2, -1))
        return BlockLosses(loss, queries[:, :, 0].float(), entropy(log_probs[:, :, 0])), ChainEntries((), ())

    def expected_gain(self, prefix: RasterState, blocks: Tensor, past: Any, uniforms: Tensor) -> Tensor:
        raise ValueError("a raster model draws the image as one block, so no block can inform another")

    def observe(self, prefix: RasterState, blocks: Tensor) -> tuple[Tensor, Tensor]:
        hidden, _ = self.encode(
            self.cls_embedding(prefix.labels)[:, None, None],
            self.rope[:1].expand(len(blocks), 1, -1, -1, -1),
            self.empty(len(blocks), 0),
        )
        hidden = self.norm(hidden[:, 0]).expand(-1, blocks.shape[1], -1)
        return hidden.float(), entropy(self.logits(hidden).float().log_softmax(-1))

    def extend(self, prefix: RasterState, tokens: Tensor, blocks: Tensor, count: Tensor, first: Any = None) -> Any:
        return prefix  # a complete image needs no prefix

    def decode(
        self,
        prefix: RasterState,
        blocks: Tensor,
        uniforms: Tensor,
        sampling: Sampling,
        unconditional: RasterState | None = None,
    ) -> Drawing:
        steps = self.decode_steps(prefix.labels, uniforms[:, 0], sampling, unconditional is not None)
        return Drawing(torch.stack([token for token, _ in steps], dim=-1)[:, None])

    def decode_steps(
        self, labels: Tensor, uniforms: Tensor, sampling: Sampling, guided: bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw images token by token with a key-value cache.

        Args:
            labels: (M,) int64.
            uniforms: (M, N) in [0, 1), one for each token.
            sampling: temperature, top-k, top-p, guidance.
            guided: also run every image under the dropped label; needed for guidance.

        Yields:
            The tokens (M,) int64 and the guided logits (M, vocab) that they were drawn from.
        """
        sides = [labels, torch.full_like(labels, self.num_classes)] if guided else [labels]
        both = torch.cat(sides)
        cache = self.empty(len(both), self.geometry.num_tokens)
        x = self.cls_embedding(both)
        for i in range(self.geometry.num_tokens):
            rope = self.rope[i].expand(len(both), 1, 1, -1, -1)
            hidden, entries = self.encode(x[:, None, None], rope, cache)
            cache = cache.append(entries, torch.ones(len(both), dtype=torch.int64))
            parts = self.logits(self.norm(hidden[:, 0, 0])).float().chunk(len(sides))
            scale = sampling.scale(torch.full_like(labels, i), self.geometry.num_tokens)
            logits = guide(parts[0], parts[1] if guided else None, scale, sampling)
            token = sample_tokens(logits, uniforms[:, i], sampling)
            yield token, logits
            x = self.tok_embeddings(token).repeat(len(sides), 1)
