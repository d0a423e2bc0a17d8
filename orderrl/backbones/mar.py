"""MAR: a bidirectional generator of continuous tokens in any order.

Notable (Li et al., 2024, "Autoregressive Image Generation without Vector Quantization"):
- A masked autoencoder: the encoder reads the class (as `buffer_size` leading entries) and the visible tokens alone, the
  decoder gives every position a condition z, and a `DiffLoss` turns z into a distribution of the token there.
- States of one batch may see different numbers of tokens: shorter rows are padded and the padding is masked as a key.
- No row of the class table stands for "no class": that is the parameter `fake_latent`, here label `class_num`.
- Parameter names are the published ones; the transformer blocks are timm's, as published.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from orderrl.backbones.cpu_linear import Linear
from orderrl.backbones.diffloss import DiffLoss, respaced_timesteps
from orderrl.runtime.values import at_least, between, check_fields, positive, setting


@dataclass(frozen=True)
class MARConfig:
    """Shape of a `MAR`."""

    height: int  # token grid
    width: int  # token grid
    vae_embed_dim: int  # channels of the latent image
    patch_size: int = 1  # latent pixels along a side of a token; a token has vae_embed_dim * patch_size**2 channels
    class_num: int = 1000  # class labels; label class_num means no class
    encoder_embed_dim: int = setting(1024, "Width of the encoder", at_least(1))
    encoder_depth: int = setting(16, "Transformer blocks of the encoder", between("[1, 1000]"))
    encoder_num_heads: int = setting(16, "Attention heads of the encoder", at_least(1))
    decoder_embed_dim: int = setting(1024, "Width of the decoder", at_least(1))
    decoder_depth: int = setting(16, "Transformer blocks of the decoder", between("[1, 1000]"))
    decoder_num_heads: int = setting(16, "Attention heads of the decoder", at_least(1))
    mlp_ratio: float = 4.0  # feed-forward width as a multiple of the block's width
    buffer_size: int = setting(64, "Leading entries that carry the class", at_least(1))
    diffloss_d: int = setting(3, "Residual blocks of the denoising network", between("[1, 1000]"))
    diffloss_w: int = setting(1024, "Width of the denoising network", at_least(1))
    num_sampling_steps: int = setting(100, "Steps of the diffusion sampler, 2 to 1000", at_least(1))
    attn_dropout: float = setting(0.1, "Dropout rate of the attention, in training", between("[0, 1)"))
    proj_dropout: float = setting(0.1, "Dropout rate of the projections, in training", between("[0, 1)"))
    norm_eps: float = 1e-6  # epsilon of the layer norms of the transformer

    def __post_init__(self) -> None:
        check_fields(
            self,
            at_least(1, "height", "width", "vae_embed_dim", "patch_size", "class_num"),
            positive("mlp_ratio", "norm_eps"),
        )
        for part in ("encoder", "decoder"):
            heads, dim = getattr(self, f"{part}_num_heads"), getattr(self, f"{part}_embed_dim")
            if dim % heads:
                raise ValueError(f"{part}_num_heads={heads} must divide {part}_embed_dim={dim}")
        respaced_timesteps(self.num_sampling_steps)

    @property
    def num_tokens(self) -> int:
        """N, tokens of an image."""
        return self.height * self.width

    @property
    def token_dim(self) -> int:
        """C, channels of a token."""
        return self.vae_embed_dim * self.patch_size**2

    def to_dict(self) -> dict[str, int | float]:
        """Plain values, as stored in checkpoints."""
        return asdict(self)


class NoiseSource(Protocol):
    """Where the sampler's noise comes from: recorded, or keyed by image and position."""

    def __call__(self, iteration: int, images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Standard normal noise of n tokens drawn in one iteration.

        Args:
            iteration: 0..num_iter-1.
            images: (n,) int64, row of the batch of each token, ascending.
            positions: (n,) int64, raster position of each token, ascending within an image.

        Returns:
            Starting noise (n, C), and noise (S, n, C) of the reverse steps S-1, ..., 0.
        """


class SamplingIteration(NamedTuple):
    """What one iteration of the sampler did."""

    num_hidden: int  # tokens of each image left hidden by the schedule; 1 in the last iteration, which yet draws all
    guidance: float  # classifier-free guidance scale
    images: Tensor  # (n,) int64, which tokens were drawn, as in `NoiseSource`
    positions: Tensor  # (n,) int64, likewise
    conditions: Tensor  # (n, D)
    unconditional: Tensor | None  # (n, D) under the dropped label, or None without guidance
    drawn: Tensor  # (n, C)
    tokens: Tensor  # (M, N, C), all tokens so far; zero where hidden


class MAR(nn.Module):
    """Masked autoencoder over continuous tokens with a diffusion loss.

    Tokens are (M, N, C) in raster order, visible sets (M, N) bool, labels (M,) int64 with class_num for no class.
    """

    def __init__(self, config: MARConfig) -> None:
        from timm.models.vision_transformer import Block  # takes long to import

        super().__init__()
        c = self.config = config
        self.hidden_size = c.decoder_embed_dim  # D, width of the conditions z
        norm = cast(type[nn.Module], partial(nn.LayerNorm, eps=c.norm_eps))
        block = partial(
            Block,
            mlp_ratio=c.mlp_ratio,
            qkv_bias=True,
            norm_layer=norm,
            proj_drop=c.proj_dropout,
            attn_drop=c.attn_dropout,
        )
        encoder, decoder, length = c.encoder_embed_dim, c.decoder_embed_dim, c.buffer_size + c.num_tokens
        self.class_emb = nn.Embedding(c.class_num, encoder)
        self.fake_latent = nn.Parameter(torch.empty(1, encoder))
        self.z_proj = Linear(c.token_dim, encoder)
        self.z_proj_ln = nn.LayerNorm(encoder, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, length, encoder))
        self.encoder_blocks = nn.ModuleList(block(encoder, c.encoder_num_heads) for _ in range(c.encoder_depth))
        self.encoder_norm = norm(encoder)
        self.decoder_embed = Linear(encoder, decoder)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, length, decoder))
        self.decoder_blocks = nn.ModuleList(block(decoder, c.decoder_num_heads) for _ in range(c.decoder_depth))
        self.decoder_norm = norm(decoder)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, c.num_tokens, decoder))
        self.reset_parameters()
        self.diffloss = DiffLoss(c.token_dim, decoder, c.diffloss_w, c.diffloss_d, c.num_sampling_steps)

    def reset_parameters(self) -> None:
        """As published: Xavier matrices, and normal(0, 0.02) for every embedding."""
        for module in (m for name, m in self.named_modules() if not name.startswith("diffloss")):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name == "class_emb.weight" or "." not in name:
                nn.init.normal_(parameter, std=0.02)

    # ------------------------------------------------------------------ latent images and tokens

    def patchify(self, latents: Tensor) -> Tensor:
        """Latent images (M, vae_embed_dim, H*p, W*p) -> tokens (M, N, C), channel-major inside a token."""
        p = self.config.patch_size
        return rearrange(latents, "m c (h p) (w q) -> m (h w) (c p q)", p=p, q=p)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens (M, N, C) -> latent images (M, vae_embed_dim, H*p, W*p), the inverse of `patchify`."""
        p = self.config.patch_size
        return rearrange(tokens, "m (h w) (c p q) -> m c (h p) (w q)", h=self.config.height, p=p, q=p)

    # ------------------------------------------------------------------ conditions

    def encode(self, tokens: Tensor, visible: Tensor, labels: Tensor, scale: Tensor | None = None) -> Tensor:
        """Encode the class and the visible tokens; hidden tokens are never read.

        Args:
            scale: (M, N), factors of the visible tokens' embeddings; None is 1. Gradients with respect to it say what a
                token's visibility is worth.

        Returns:
            (M, buffer_size + V, encoder_embed_dim): the class entries, then the visible tokens in raster order. V is
            the largest number of visible tokens; rows that see fewer end in padding, which is undefined.
        """
        c = self.config
        table = torch.cat([self.class_emb.weight, self.fake_latent])
        start = F.embedding(labels, table)[:, None].expand(-1, c.buffer_size, -1)
        index, exists = _visible_index(visible)
        seen = tokens.gather(1, index[..., None].expand(-1, -1, c.token_dim))  # (M, V, C)
        if exists is not None:
            seen = seen.where(exists[..., None], 0)
        places = self.encoder_pos_embed_learned[0]
        seen = self.z_proj(seen)
        if scale is not None:
            seen = seen * scale.gather(1, index)[..., None]
        seen = seen + places[c.buffer_size + index]
        x = torch.cat([start + places[: c.buffer_size], seen], dim=1)  # (M, buffer + V, encoder_embed_dim)
        x = self.z_proj_ln(x)
        mask = None
        if exists is not None:  # nobody attends to padding
            keys = F.pad(exists, (c.buffer_size, 0), value=True)
            mask = torch.zeros_like(keys, dtype=x.dtype).masked_fill_(~keys, -torch.inf)[:, None, None]
        for block in self.encoder_blocks:
            x = block(x) if mask is None else block(x, attn_mask=mask)
        return self.encoder_norm(x)

    def decode_positions(self, encoded: Tensor, visible: Tensor) -> Tensor:
        """Conditions z of all positions from what `encode` returned for the same visible sets.

        Returns:
            (M, N, decoder_embed_dim): the normalised hidden state plus a learned embedding of the position.
        """
        c = self.config
        x = self.decoder_embed(encoded)
        start, seen = x[:, : c.buffer_size], x[:, c.buffer_size :]
        index, exists = _visible_index(visible)
        mask_token = self.mask_token.type_as(x)
        if exists is not None:  # padding stands where a token is hidden
            seen = torch.where(exists[..., None], seen, mask_token)
        grid = mask_token.expand(len(x), c.num_tokens, -1).scatter(1, index[..., None].expand_as(seen), seen)
        x = torch.cat([start, grid], dim=1) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, c.buffer_size :] + self.diffusion_pos_embed_learned

    def conditions(self, tokens: Tensor, visible: Tensor, labels: Tensor, scale: Tensor | None = None) -> Tensor:
        """Conditions z of all positions given the visible tokens and the class.

        Args:
            tokens: (M, N, C); what stands at hidden places is never read.
            visible: (M, N) bool; rows may see different numbers of tokens.
            labels: (M,) int64 in 0..class_num; class_num means no class.
            scale: as in `encode`.

        Returns:
            (M, N, D).
        """
        return self.decode_positions(self.encode(tokens, visible, labels, scale), visible)

    # ------------------------------------------------------------------ losses

    def token_losses(self, conditions: Tensor, targets: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Diffusion loss of tokens at given times and noises, mse + vb; leading shapes broadcast.

        Args:
            conditions: (..., D).
            targets: (..., C), the true tokens.
            t: (...) int64 in 0..999.
            noise: (..., C), standard normal.

        Returns:
            (...) in DiffLoss units (not nats).
        """
        mse, vb = self.diffloss.losses(conditions, targets, t, noise)
        return mse + vb

    # ------------------------------------------------------------------ sampling

    @torch.no_grad()
    def sampling_iterations(
        self,
        labels: Tensor,
        orders: Tensor,
        noise: NoiseSource,
        num_iter: int,
        cfg: float = 1.0,
        cfg_schedule: str = "linear",
        temperature: float = 1.0,
    ) -> Iterator[SamplingIteration]:
        """Generate images as published: several tokens an iteration, from the end of each order to its beginning.

        Args:
            labels: (M,) int64.
            orders: (M, N) int64, raster positions; the last entries are drawn first.
            noise: source of all randomness.
            num_iter: iterations of the cosine schedule.
            cfg: classifier-free guidance scale; 1 needs no unconditional pass.
            cfg_schedule: "linear" raises the scale from 1 towards cfg as tokens appear, "constant" keeps it.
            temperature: scales the noise of the reverse steps.

        Yields:
            What every iteration did; the tokens of the last are the images.
        """
        c = self.config
        tokens = self.fake_latent.new_zeros(len(labels), c.num_tokens, c.token_dim)
        rank = orders.argsort(1)  # (M, N), place of every position in the order
        before = c.num_tokens
        for iteration in range(num_iter):
            num_hidden = hidden_after(iteration, num_iter, before, c.num_tokens)
            keep = num_hidden if iteration + 1 < num_iter else 0
            images, positions = ((rank >= keep) & (rank < before)).nonzero(as_tuple=True)
            scale = guidance_scale(cfg, cfg_schedule, num_hidden, c.num_tokens)
            z, z_null = self._guided_conditions(tokens, rank >= before, labels, guided=cfg != 1)
            z = z[images, positions]
            z_null = None if z_null is None else z_null[images, positions]
            start_noise, step_noise = noise(iteration, images, positions)
            drawn = self.diffloss.sample(z, start_noise, step_noise, temperature, scale, z_null)
            tokens = tokens.index_put((images, positions), drawn)
            before = num_hidden
            yield SamplingIteration(num_hidden, scale, images, positions, z, z_null, drawn, tokens)

    def _guided_conditions(
        self, tokens: Tensor, visible: Tensor, labels: Tensor, guided: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Conditions (M, N, D) under the labels, and, in the same pass, under no class if guided."""
        if not guided:
            return self.conditions(tokens, visible, labels), None
        both = torch.cat([labels, torch.full_like(labels, self.config.class_num)])
        z, z_null = self.conditions(tokens.repeat(2, 1, 1), visible.repeat(2, 1), both).chunk(2)
        return z, z_null


def _visible_index(visible: Tensor) -> tuple[Tensor, Tensor | None]:
    """Raster positions of the visible tokens of each row: (M, N) bool -> (M, V) int64.

    V is the largest number in a row. The second result, (M, V) bool, says which entries exist; the others name hidden
    positions. It is None if all rows see equally many.
    """
    count = visible.sum(1)
    least, most = torch.stack(count.aminmax()).tolist() if len(count) else (0, 0)
    index = (~visible).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    exists = torch.arange(most, device=visible.device) < count[:, None]
    return index, None if least == most else exists


def hidden_after(iteration: int, num_iter: int, before: int, num_tokens: int) -> int:
    """Tokens that the cosine schedule leaves hidden after an iteration: fewer than before, but at least 1."""
    scheduled = math.floor(num_tokens * float(np.cos(math.pi / 2.0 * (iteration + 1) / num_iter)))
    return max(1, min(before - 1, scheduled))


def guidance_scale(cfg: float, cfg_schedule: str, num_hidden: int, num_tokens: int) -> float:
    """Guidance scale of an iteration that leaves num_hidden tokens hidden, by the schedule of the config."""
    if cfg_schedule == "constant":
        return cfg
    if cfg_schedule == "linear":
        return 1 + (cfg - 1) * (num_tokens - num_hidden) / num_tokens
    raise ValueError(f"cfg_schedule must be 'linear' or 'constant', got {cfg_schedule!r}")
