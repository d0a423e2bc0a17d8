"""What OrderRL asks of a backbone."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from orderrl.backbones.sampling import Sampling
from orderrl.data import TokenSet
from orderrl.geometry import BlockGrid
from orderrl.runtime.finite import OVERFLOW, require_finite
from orderrl.runtime.isolation import isolated_methods


class BlockLosses(NamedTuple):
    """What one packed forward says about C hidden blocks of M states."""

    loss: Tensor  # (M, C) float32, block loss -log q(x_b | x_S, c), nats
    hidden: Tensor  # (M, C, D), final-norm hidden state of the first query of each block's chain
    entropy: Tensor  # (M, C) float32, entropy of that query's prediction, nats


class Drawing(NamedTuple):
    """Blocks drawn in parallel."""

    tokens: Tensor  # (M, K, p*p) int64
    entries: Any = None  # the chains' entries for reuse in `extend`; None if nothing can be reused
    unconditional: Any = None  # the same under the dropped label


@runtime_checkable
class Backbone(Protocol):
    """An order-robust generator whose prefix can be cached.

    `prefix` is the backbone's own cache of M states; the environment only passes it on, and calls
    `select(rows)` and `put(rows, other)` of it to work on some of the states. The entries of chains are
    the backbone's own too; the environment and the oracle call their `chain`, `chains`, `select` and
    `spread`, which are documented at `orderrl.backbones.cache.ChainEntries`.

    Attributes:
        geometry: the block grid.
        vocab_size: token values; 0 if tokens are continuous, (M, N, C) float32 wherever (M, N) int64 stands below.
        num_classes: class labels; label `num_classes` is the dropped one.
        hidden_size: D, width of hidden states.
        draws_per_block: sequential draws that a block takes: p*p token by token, 1 if its tokens are drawn together.
        order_robust: whether blocks can be drawn in any order; if not, there is nothing to label or to learn.
    """

    geometry: BlockGrid
    vocab_size: int
    num_classes: int
    hidden_size: int
    order_robust: bool

    @property
    def draws_per_block(self) -> int:
        """Sequential draws that a block takes."""

    def start(self, labels: Tensor) -> Any:
        """Cache of the empty state: labels (M,) int64 -> prefix of M states."""

    def context_loss(
        self, prefix: Any, tokens: Tensor, blocks: Tensor, past: Any = None, whole: bool = False
    ) -> tuple[BlockLosses, Any]:
        """Losses of hidden blocks given only the visible context (design, section 2).

        Args:
            prefix: cache of M states.
            tokens: (M, N) int64, the true image in raster order.
            blocks: (M, C) int64, blocks whose chains are scored; a block may be named twice.
            past: entries that chains see before their own, as `context_loss` of other blocks returned them with
                `whole`: the loss is then the one given the prefix and that block, and the loss alone is read (hidden
                state and entropy may be anything). Each of the P chains of `past` is seen by C / P consecutive ones.
            whole: also encode each block's last content token, so that the entries can be a `past`.

        Returns:
            The losses, and the chains' entries for reuse in `extend` or as `past`; with a `past` nobody reads them.
        """

    def expected_gain(self, prefix: Any, blocks: Tensor, past: Any, uniforms: Tensor) -> Tensor:
        """Expected gain of revealing a block, over the backbone's own hidden tokens (design, section 3, fact 6).

        Args:
            prefix: cache of M states.
            blocks: (M, C) int64, the blocks whose loss is lowered.
            past: entries of the revealed blocks, from `context_loss` with `whole`, shared as there.
            uniforms: (M, C, p*p) in [0, 1): the chain's earlier tokens are drawn from q(. | S + a) with them.

        Returns:
            (M, C) float32, nats: sum along the chain of KL(q(. | S + a, earlier) || q(. | S, earlier)).
        """

    def observe(self, prefix: Any, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """First queries only, no token needed: blocks (M, C) -> hidden (M, C, D), entropy (M, C) in nats."""

    def extend(self, prefix: Any, tokens: Tensor, blocks: Tensor, count: Tensor, first: Any = None) -> Any:
        """Append revealed blocks, each seeing those before it (RandAR's rule).

        Args:
            prefix: cache of M states; it may be changed in place.
            tokens: (M, N) int64; only the revealed blocks are read.
            blocks: (M, K) int64, in the order of the action.
            count: (M,) int64 in [0, K], how many of them are revealed; on the CPU, where it is known, or on the device.
            first: entries of the first block's chain from `context_loss`, to be kept, not computed again.

        Returns:
            The cache of the new states.
        """

    def decode(
        self, prefix: Any, blocks: Tensor, uniforms: Tensor, sampling: Sampling, unconditional: Any = None
    ) -> Drawing:
        """Draw blocks in parallel: token by token inside, independent of each other given the prefix.

        Args:
            prefix: cache of M states.
            blocks: (M, K) int64.
            uniforms: (M, K, p*p) in [0, 1), one for each token.
            sampling: temperature, top-k, top-p, guidance.
            unconditional: cache of the same states under the dropped label, for guidance.
        """


answers_alike = isolated_methods("start", "context_loss", "expected_gain", "observe", "extend", "decode")
"""Class decorator of a backbone: what it is asked directly, too, is answered alike under every mode of PyTorch."""


def backbone_device(backbone: Backbone) -> torch.device:
    """Device of a backbone's parameters; the CPU for one without any."""
    if isinstance(backbone, torch.nn.Module):
        for parameter in backbone.parameters():
            return parameter.device
    return torch.device("cpu")


@torch.no_grad()
def require_finite_outputs(backbone: Backbone, where: object) -> None:
    """Refuse a backbone that overflows in its dtype already where nothing is visible, by name (`NotFiniteError`)."""
    device = backbone_device(backbone)
    blocks = torch.arange(backbone.geometry.num_blocks, device=device).expand(2, -1)  # two: one compiles specially
    hidden, entropy = backbone.observe(backbone.start(torch.zeros(2, dtype=torch.int64, device=device)), blocks)
    require_finite(where, {"hidden state": hidden, "entropy": entropy}, OVERFLOW)


def check_fits(backbone: Backbone, data: TokenSet) -> None:
    """Raise ValueError if the token set is not what the backbone was made for."""
    geometry = backbone.geometry
    have = (data.height, data.width, data.vocab_size, data.token_dim, data.num_classes)
    channels = getattr(backbone, "token_dim", 0)
    want = (geometry.height, geometry.width, backbone.vocab_size, channels, backbone.num_classes)
    if have != want:
        raise ValueError(
            f"data {data.name!r} (height, width, vocab_size, token_dim, num_classes) = {have} does not fit the "
            f"backbone's {want}; "
            "choose the data set that the backbone was trained on"
        )
