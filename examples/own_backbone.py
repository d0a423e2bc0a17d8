"""Your own backbone in about 60 lines: any network that predicts masked tokens (MaskGIT, a BERT for images).

    python -m orderrl.evaluate ...   needs a registered name: see `main` below

The network sees the visible tokens, a mask token elsewhere and the class, and predicts every hidden token. There is no
prefix cache, so a state is just its visible tokens; the tokens of a block are predicted independently of each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orderrl.backbones import BlockLosses, Drawing, Sampling, check_backbone
from orderrl.backbones.mar_backbone import MaskedChains  # chains that are nothing but their block
from orderrl.backbones.sampling import guide, sample_tokens
from orderrl.geometry import BlockGrid


@dataclass
class Visible:
    """M states: tokens (M, N) int64, the mask token where hidden, and labels (M,)."""

    tokens: Tensor
    labels: Tensor

    def select(self, rows: Tensor) -> Visible:
        """Some of the states."""
        return Visible(self.tokens[rows], self.labels[rows])

    def put(self, rows: Tensor, other: Visible) -> Visible:
        """Overwrite some of the states."""
        self.tokens[rows], self.labels[rows] = other.tokens, other.labels
        return self


class MaskedTokens(nn.Module):
    """A backbone around `network(tokens (M, N), labels (M,)) -> hidden (M, N, D)` and a linear head."""

    order_robust, draws_per_block = True, 1

    def __init__(
        self, network: nn.Module, geometry: BlockGrid, vocab_size: int, num_classes: int, hidden_size: int
    ) -> None:
        super().__init__()
        self.network, self.head, self.geometry = network, nn.Linear(hidden_size, vocab_size), geometry
        self.vocab_size, self.num_classes, self.hidden_size = vocab_size, num_classes, hidden_size
        self.hidden_bound = torch.full((hidden_size,), 100.0)  # what the network guarantees, for the spaces

    def start(self, labels: Tensor) -> Visible:
        """Nothing is visible yet."""
        return Visible(torch.full((len(labels), self.geometry.num_tokens), self.vocab_size), labels.clone())

    def extend(self, prefix: Visible, tokens: Tensor, blocks: Tensor, count: Tensor, first: object = None) -> Visible:
        """Reveal the first `count` of the listed blocks."""
        state = Visible(prefix.tokens.clone(), prefix.labels)
        for k in range(blocks.shape[1]):
            rows = (count > k).nonzero().flatten()
            at = self.geometry.block_tokens[blocks[rows, k]]  # (rows, p*p)
            state.tokens[rows[:, None], at] = tokens[rows[:, None], at]
        return state

    def _predict(self, state: Visible, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Positions (M, C, p*p), their hidden states and log-probabilities."""
        at = self.geometry.block_tokens[blocks]
        rows = torch.arange(len(blocks))[:, None, None]
        hidden = self.network(state.tokens, state.labels)[rows, at]  # (M, C, p*p, D)
        return at, hidden, self.head(hidden).log_softmax(-1)

    def context_loss(
        self, prefix: Visible, tokens: Tensor, blocks: Tensor, past: MaskedChains | None = None, whole: bool = False
    ) -> tuple[BlockLosses, MaskedChains]:
        """Losses of hidden blocks; chains with a `past` also see that block, each in a pass of its own."""
        if past is not None:
            seen_by = blocks.shape[1] // past.blocks.shape[1]
            revealed = past.blocks.repeat_interleave(seen_by, 1)
            each = [
                self.context_loss(
                    self.extend(prefix, tokens, revealed[:, c : c + 1], torch.ones_like(prefix.labels)),
                    tokens,
                    blocks[:, c : c + 1],
                )[0]
                for c in range(blocks.shape[1])
            ]
            return BlockLosses(*(torch.cat(parts, 1) for parts in zip(*each, strict=True))), MaskedChains(blocks)
        at, hidden, log_probs = self._predict(prefix, blocks)
        targets = tokens[torch.arange(len(tokens))[:, None, None], at]
        loss = -log_probs.gather(-1, targets[..., None]).sum((-2, -1))
        return BlockLosses(loss, hidden[:, :, 0], _entropy(log_probs[:, :, 0])), MaskedChains(blocks)

    def observe(self, prefix: Visible, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """What a policy may see of hidden blocks."""
        _, hidden, log_probs = self._predict(prefix, blocks)
        return hidden[:, :, 0], _entropy(log_probs[:, :, 0])

    def expected_gain(self, prefix: Visible, blocks: Tensor, past: MaskedChains, uniforms: Tensor) -> Tensor:
        """Not needed for labels of kind pointwise, nor for any policy but lookahead."""
        raise ValueError("this backbone has no expected gains; use labels=pointwise")

    def decode(
        self,
        prefix: Visible,
        blocks: Tensor,
        uniforms: Tensor,
        sampling: Sampling,
        unconditional: Visible | None = None,
    ) -> Drawing:
        """Draw blocks in parallel."""
        _, _, logits = self._predict(prefix, blocks)
        null = None if unconditional is None else self._predict(unconditional, blocks)[2]
        visible = (prefix.tokens < self.vocab_size).sum(1)
        scale = sampling.scale(visible, self.geometry.num_tokens)[:, None, None]
        return Drawing(sample_tokens(guide(logits, null, scale, sampling), uniforms, sampling))


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(-1)


class Network(nn.Module):
    """A stand-in for yours: every position sees the mean of all token embeddings, and where it is."""

    def __init__(self, num_tokens: int, vocab_size: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size + 1, width)
        self.place = nn.Embedding(num_tokens, width)
        self.label = nn.Embedding(num_classes + 1, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """(M, N), (M,) -> (M, N, D)."""
        mean = self.token(tokens).mean(1) + self.label(labels)
        return self.norm(mean[:, None] + self.place.weight)


def main() -> MaskedTokens:
    """Check it, and give it a name that `backbone.name` and `gym.make(..., backbone=...)` know."""
    from orderrl.backbones import register_backbone

    torch.manual_seed(0)
    geometry = BlockGrid(8, 8, 2)
    backbone = MaskedTokens(Network(64, 17, 10, 32), geometry, vocab_size=17, num_classes=10, hidden_size=32).eval()
    check_backbone(backbone.requires_grad_(False))
    register_backbone("masked_tokens", lambda: backbone)
    return backbone


if __name__ == "__main__":
    main()
    print("the backbone keeps every promise of the protocol")
