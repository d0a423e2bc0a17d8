"""MAR as a backbone: block losses, observations and block sampling of a masked model of continuous tokens.

Notable:
- There is no prefix cache: a state is its visible tokens, and one pass over it scores all hidden blocks at once. The
  tokens of a block are predicted together, not one after another.
- There are no nats. A block's loss is the sum of its tokens' diffusion losses (Li et al., 2024) at fixed times,
  averaged over `loss_draws` noises, which are keyed by (image, position, draw) and never depend on call or batch.
- The entropy channel is the log-variance of a few tokens drawn from the model with few steps. What needs probabilities
  (label kinds kl and expected, lookahead, top-k, top-p) is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orderrl.backbones.diffloss import TRAINING_STEPS, GaussianDiffusion
from orderrl.backbones.mar import MAR, MARConfig
from orderrl.backbones.memory import Packing, plan
from orderrl.backbones.origin import Origin
from orderrl.backbones.protocol import BlockLosses, Drawing, answers_alike
from orderrl.backbones.sampling import Sampling
from orderrl.geometry import BlockGrid
from orderrl.runtime.random import Stream, keyed_normal, mix_content
from orderrl.runtime.values import between, check_fields, setting

TRAINING_DRAWS = 4  # times and noises of a token in a training step, the published diffusion_batch_mul
LOWEST_LOG_VARIANCE, HIGHEST_LOG_VARIANCE = -14.0, 14.0


@dataclass(frozen=True)
class MaskedConfig(MARConfig):
    """Shape of a `MaskedTransformer`: the published model's, and how it serves as a backbone."""

    block_size: int = setting(1, "Tokens along a side of a block", between("[1, 256]"))
    loss_draws: int = setting(
        8,
        "Noises that a token's loss is averaged over; its times are the middles of as many equal intervals",
        between("[1, 1000]"),
    )
    entropy_samples: int = 4  # tokens drawn for the entropy channel
    entropy_steps: int = 8  # reverse steps of those draws

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, between("[1, 1000]", "entropy_samples", "entropy_steps"))
        BlockGrid(self.height, self.width, self.block_size)


@dataclass(frozen=True)
class MaskedState:
    """What M states have revealed."""

    tokens: Tensor  # (M, N, C); zero where hidden
    visible: Tensor  # (M, N) bool
    labels: Tensor  # (M,) int64

    def select(self, rows: Tensor | slice) -> MaskedState:
        """Some states: rows is a (K,) int64 index or an (M,) bool mask, for a copy, or a slice, for a view."""
        rows = rows if isinstance(rows, slice) else rows.to(self.labels.device, non_blocking=True)
        return MaskedState(self.tokens[rows], self.visible[rows], self.labels[rows])

    def put(self, rows: Tensor, other: MaskedState) -> MaskedState:
        """Overwrite some states in place: the inverse of `select`."""
        rows = rows.to(self.labels.device, non_blocking=True)
        self.tokens[rows], self.visible[rows], self.labels[rows] = other.tokens, other.visible, other.labels
        return self

    def reveal(self, tokens: Tensor, shown: Tensor) -> MaskedState:
        """New states that also see the tokens (M, N, C) where shown (M, N)."""
        return MaskedState(torch.where(shown[..., None], tokens, self.tokens), self.visible | shown, self.labels)


@dataclass(frozen=True)
class MaskedChains:
    """The blocks of C chains per state; a masked model has nothing else to keep of them."""

    blocks: Tensor  # (M, C) int64

    def chain(self, index: Tensor) -> MaskedChains:
        """One chain per state: index (M,) int64 -> C = 1."""
        return MaskedChains(self.blocks.gather(1, index[:, None]))

    def select(self, rows: Tensor) -> MaskedChains:
        """A copy of some states."""
        return MaskedChains(self.blocks[rows])

    def spread(self, rows: Tensor, states: int, onto: MaskedChains | None = None) -> MaskedChains:
        """Place these chains at some rows among `states` states, over `onto` or over zeros."""
        if onto is None:
            onto = MaskedChains(self.blocks.new_zeros(states, self.blocks.shape[1]))
        onto.blocks[rows] = self.blocks
        return onto


@answers_alike
class MaskedTransformer(MAR):
    """MAR on a grid of blocks; it satisfies `orderrl.backbones.Backbone`, whose methods are documented there.

    Tokens are (M, N, C) float32. `vocab_size` is 0 and `token_dim` is C.
    """

    order_robust = True
    vocab_size = 0
    packing: Packing = Packing()
    origin: Origin | None = None  # of a specialist: the orders that it was made for
    trained_on: str | None = None  # the data set, where a checkpoint says it
    config: MaskedConfig

    def __init__(self, config: MaskedConfig) -> None:
        super().__init__(config)
        self.geometry = BlockGrid(config.height, config.width, config.block_size)
        self.num_classes, self.token_dim = config.class_num, config.token_dim
        self.entropy_process = GaussianDiffusion(config.entropy_steps)
        times = (2 * torch.arange(config.loss_draws) + 1) * TRAINING_STEPS // (2 * config.loss_draws)
        self.register_buffer("loss_times", times, persistent=False)
        self.register_buffer("block_tokens", self.geometry.block_tokens.to(times.device), persistent=False)
        self.register_buffer("token_block", self.geometry.token_block.to(times.device), persistent=False)
        self.loss_times: Tensor
        self.block_tokens: Tensor
        self.token_block: Tensor

    @property
    def draws_per_block(self) -> int:
        """Sequential draws that a block takes: its tokens are drawn together."""
        return 1

    @property
    def entropy_bounds(self) -> tuple[float, float]:
        """Range of the entropy channel: log-variances."""
        return LOWEST_LOG_VARIANCE, HIGHEST_LOG_VARIANCE

    @property
    def hidden_bound(self) -> Tensor:
        """(D,), largest absolute value of each channel of a condition: a layer norm's output plus an embedding."""
        norm: Any = self.decoder_norm
        return (
            self.hidden_size**0.5 * norm.weight.abs()
            + norm.bias.abs()
            + self.diffusion_pos_embed_learned.abs().amax((0, 1))
        ).detach()

    # ------------------------------------------------------------------ states

    def start(self, labels: Tensor) -> MaskedState:
        c = self.config
        tokens = self.fake_latent.new_zeros(len(labels), c.num_tokens, c.token_dim, dtype=torch.float32)
        return MaskedState(tokens, torch.zeros_like(tokens[..., 0], dtype=torch.bool), labels.clone())

    def extend(
        self, prefix: MaskedState, tokens: Tensor, blocks: Tensor, count: Tensor, first: Any = None
    ) -> MaskedState:
        count = count.to(blocks.device, non_blocking=True)
        counted = torch.arange(blocks.shape[1], device=blocks.device) < count[:, None]
        return prefix.reveal(tokens, self._token_mask(blocks, counted))

    def _token_mask(self, blocks: Tensor, counted: Tensor) -> Tensor:
        """(M, N) bool: tokens of the blocks (M, K) that count."""
        shown = torch.zeros(len(blocks), self.geometry.num_blocks, dtype=torch.float32, device=blocks.device)
        return (shown.scatter_add(1, blocks, counted.float()) > 0)[:, self.token_block]

    def _state_conditions(self, state: MaskedState, positions: Tensor) -> Tensor:
        """Conditions at raster positions (M, ...) -> (M, ..., D)."""
        z = self.conditions(state.tokens.to(self.fake_latent.dtype), state.visible, state.labels)  # (M, N, D)
        index = positions.flatten(1)[..., None].expand(-1, -1, z.shape[-1])
        return z.gather(1, index).unflatten(1, positions.shape[1:])

    # ------------------------------------------------------------------ the protocol

    def context_loss(
        self, prefix: MaskedState, tokens: Tensor, blocks: Tensor, past: MaskedChains | None = None, whole: bool = False
    ) -> tuple[BlockLosses, MaskedChains]:
        groups = 1 if past is None else past.blocks.shape[1]
        width = blocks.shape[1] // groups
        most = self.packing.entries(self.mask_token.view(1, 1, 1, 1, -1), self.geometry.num_tokens)
        rows = []
        for states, parts in plan(len(blocks), groups, self.geometry.num_tokens, most):
            row = []
            for part in parts:
                chains = blocks[states, part.start * width : part.stop * width]
                revealed = None if past is None else past.blocks[states, part].repeat_interleave(width, 1)
                row.append(self._score(prefix.select(states), tokens[states], chains, revealed))
            rows.append(BlockLosses(*(torch.cat(fields, 1) for fields in zip(*row, strict=True))))
        return BlockLosses(*(torch.cat(fields) for fields in zip(*rows, strict=True))), MaskedChains(blocks)

    def _score(self, prefix: MaskedState, tokens: Tensor, blocks: Tensor, revealed: Tensor | None) -> BlockLosses:
        """`context_loss` of one forward; each chain also sees a block of its own if `revealed` (M, C) is given."""
        positions = self.block_tokens[blocks]  # (M, C, p*p)
        if revealed is None:
            z = self._state_conditions(prefix, positions)
        else:
            z = self._conditions_after(prefix, tokens, positions, revealed)
        loss = self._loss_draws(z, tokens, positions).mean(-1).sum(-1).float()
        if revealed is not None:  # read for the loss alone; drawing tokens for the entropy would cost more than it
            return BlockLosses(loss, z.float().mean(2), torch.zeros_like(loss))
        return BlockLosses(loss, *self._observed(z, positions))

    def _conditions_after(self, prefix: MaskedState, tokens: Tensor, positions: Tensor, revealed: Tensor) -> Tensor:
        """Conditions (M, C, p*p, D) of chains that also see a revealed block (M, C); equal states are encoded once."""
        rows = torch.arange(len(revealed), device=revealed.device)[:, None].expand_as(revealed)
        pairs, place = torch.unique(rows * self.geometry.num_blocks + revealed, return_inverse=True)
        row, block = pairs // self.geometry.num_blocks, pairs % self.geometry.num_blocks
        shown = self._token_mask(block[:, None], torch.ones_like(block[:, None], dtype=torch.bool))
        state = prefix.select(row).reveal(tokens[row], shown)
        z = self.conditions(state.tokens.to(self.fake_latent.dtype), state.visible, state.labels)  # (U, N, D)
        return z[place[..., None], positions]

    def _loss_draws(self, z: Tensor, tokens: Tensor, positions: Tensor, noise_seed: int = 0) -> Tensor:
        """Diffusion losses (M, C, p*p, draws) of the tokens at positions (M, C, p*p)."""
        targets = tokens[torch.arange(len(tokens), device=tokens.device)[:, None, None], positions]  # (M, C, p*p, C)
        draws = torch.arange(len(self.loss_times), device=tokens.device)
        channels = torch.arange(self.token_dim, device=tokens.device)
        image = mix_content(tokens)[:, None, None, None, None]
        key = (Stream.NOISE, noise_seed, image, positions[..., None, None], draws[:, None], channels)
        noise = keyed_normal(key, tokens.device).float()  # (M, C, p*p, draws, channels)
        return self.token_losses(z[..., None, :], targets[..., None, :], self.loss_times, noise)

    def _observed(self, z: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden state (M, C, D), the mean over the block, and entropy channel (M, C) of its first token."""
        samples = torch.arange(self.config.entropy_samples, device=z.device)
        channels = torch.arange(self.token_dim, device=z.device)
        process, net = self.entropy_process, self.diffloss.net
        at = positions[:, :, :1, None]  # (M, C, 1, 1)

        def noise(step: int) -> Tensor:
            key = (Stream.NOISE, -1 - step, at, samples[:, None], channels)
            return keyed_normal(key, z.device).float()  # (M, C, samples, channels)

        condition = z[:, :, :1]
        x = noise(0)
        for step in range(process.num_timesteps - 1, -1, -1):
            t = torch.full(x.shape[:-1], step, device=z.device)
            output = net(x, process.timestep_map[t], condition.expand(-1, -1, x.shape[2], -1))
            x = process.step(output, x, t, noise(step + 1))
        variance = (x - x.mean(2, keepdim=True)).float().square().mean(2)  # (M, C, channels)
        spread = variance.clamp_min(1e-6).log().mean(-1)
        return z.float().mean(2), spread.clamp(LOWEST_LOG_VARIANCE, HIGHEST_LOG_VARIANCE)

    def observe(self, prefix: MaskedState, blocks: Tensor) -> tuple[Tensor, Tensor]:
        positions = self.block_tokens[blocks]
        return self._observed(self._state_conditions(prefix, positions), positions)

    def expected_gain(self, prefix: MaskedState, blocks: Tensor, past: Any, uniforms: Tensor) -> Tensor:
        raise ValueError("a masked model of continuous tokens has no token probabilities; use label kind 'pointwise'")

    def decode(
        self,
        prefix: MaskedState,
        blocks: Tensor,
        uniforms: Tensor,
        sampling: Sampling,
        unconditional: MaskedState | None = None,
    ) -> Drawing:
        if sampling.top_k or sampling.top_p < 1:
            raise ValueError(
                f"top_k={sampling.top_k}, top_p={sampling.top_p}: continuous tokens have no probabilities to cut; "
                "use top_k=0 and top_p=1"
            )
        if unconditional is None and sampling.guidance != 1:
            raise ValueError(f"guidance={sampling.guidance} needs the unconditional state too; or use guidance=1")
        positions = self.block_tokens[blocks]
        z = self._state_conditions(prefix, positions)
        null = None if unconditional is None else self._state_conditions(unconditional, positions)
        seeds = (uniforms.double() * 2.0**53).long()[..., None]
        channels = torch.arange(self.token_dim, device=z.device)
        start = keyed_normal((Stream.NOISE, seeds, 0, channels), z.device).float()
        steps = torch.arange(1, self.diffloss.num_sampling_steps + 1, device=z.device).view(-1, 1, 1, 1, 1)
        noise = keyed_normal((Stream.NOISE, seeds, steps, channels), z.device).float()
        scale = sampling.scale(prefix.visible.sum(1), self.geometry.num_tokens).view(-1, 1, 1, 1)
        guidance = 1.0 if null is None else scale
        return Drawing(self.diffloss.sample(z, start, noise, sampling.temperature, guidance, null))

    # ------------------------------------------------------------------ training and scoring

    def training_loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        token_order: Tensor,
        generator: torch.Generator,
        seen: Tensor | None = None,
    ) -> Tensor:
        """Mean diffusion loss of hidden tokens; the number of visible blocks is uniform in 0..B-1.

        Args:
            tokens: (M, N, C).
            labels: (M,) int64; num_classes drops the label.
            token_order: (M, N) int64, a block order; its beginning is visible.
            generator: on the CPU, source of the number of visible blocks, times and noises.
            seen: (M, B) int64, how many blocks are visible when each of the order is drawn; visible are as many as
                before the step that would draw the next block. None is one block a step.

        Returns:
            Scalar, DiffLoss units.
        """
        m, n = token_order.shape
        shown_blocks = torch.randint(self.geometry.num_blocks, (m, 1), generator=generator)
        if seen is not None:
            shown_blocks = seen.cpu().gather(1, shown_blocks)
        shown = (torch.arange(n) < shown_blocks * self.geometry.tokens_per_block).to(tokens.device)
        visible = torch.zeros(m, n, dtype=torch.bool, device=tokens.device).scatter(1, token_order, shown)
        z, targets = self.conditions(tokens, visible, labels)[~visible], tokens[~visible]  # (hidden tokens, ...)
        t = torch.randint(TRAINING_STEPS, (len(z), TRAINING_DRAWS), generator=generator).to(tokens.device)
        noise = torch.randn(len(z), TRAINING_DRAWS, self.token_dim, generator=generator, dtype=torch.float32).to(tokens)
        return self.token_losses(z[:, None], targets[:, None], t, noise).mean()

    @torch.no_grad()
    def mean_loss(self, tokens: Tensor, labels: Tensor, token_order: Tensor) -> float:
        """Mean loss of a token when blocks are revealed one by one in an order, DiffLoss units."""
        block_order = self.token_block[token_order[:, :: self.geometry.tokens_per_block]]
        state, total = self.start(labels), 0.0
        one = torch.ones_like(labels)
        for step in range(self.geometry.num_blocks):
            block = block_order[:, step : step + 1]
            positions = self.block_tokens[block]
            total += self._loss_draws(self._state_conditions(state, positions), tokens, positions).mean(-1).sum().item()
            state = self.extend(state, tokens, block, one)
        return total / (token_order.numel())

    @torch.no_grad()
    def loss_noise(self, tokens: Tensor, labels: Tensor, repeats: int = 4) -> float:
        """How much a block's loss moves with the noise: standard deviation over noises, over the mean loss.

        Measured on the empty state: tokens (M, N, C), labels (M,); `repeats` independent sets of `loss_draws` noises.
        """
        blocks = torch.arange(self.geometry.num_blocks, device=labels.device).expand(len(labels), -1)
        positions = self.block_tokens[blocks]
        z = self._state_conditions(self.start(labels), positions)
        losses = [self._loss_draws(z, tokens, positions, seed).mean(-1).sum(-1) for seed in range(repeats)]
        stacked = torch.stack(losses)
        return (stacked.std(0).mean() / stacked.mean()).item()
