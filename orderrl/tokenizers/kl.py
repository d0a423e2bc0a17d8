"""KL autoencoder of MAR: images as grids of continuous tokens.

The autoencoder of latent diffusion (Rombach et al., 2022) with the weights trained for MAR (Li et al., 2024). Notable:
the encoder has attention at one nominal resolution and the decoder in its middle only; the decoder's stages are indexed
by level, so `up.0` is the highest resolution; the factor 0.2325 belongs to the tokens, not to the autoencoder: it is
applied in `encode` and undone in `decode`. State-dict keys are the published ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orderrl.runtime.cache import fingerprint
from orderrl.runtime.values import at_least, check_fields, positive, setting
from orderrl.runtime.weights import weights_fingerprint
from orderrl.tokenizers.layers import (
    Decoder,
    Encoder,
    Names,
    StackConfig,
    TwoStacks,
    latent_grid,
    to_pixels,
    to_unit_range,
)

SCALE = 0.2325  # of the published KL-16: makes the tokens' standard deviation about 1
NAMES = Names("block", "down", "up", ("block_1", "attn_1", "block_2"), up_from_top=True)
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class KLConfig(TwoStacks):
    """Shape of a KL autoencoder; the defaults are MAR's KL-16."""

    embed_dim: int = setting(16, "Channels of a token", at_least(1))
    use_variational: bool = setting(True, "Let the encoder give variances; without, every log-variance is 1")
    scale: float = setting(SCALE, "Factor from the posterior to tokens", positive())
    encoder: StackConfig = setting(StackConfig(attn_resolutions=(16,)), "Shape of the encoder")
    decoder: StackConfig = setting(StackConfig(), "Shape of the decoder, of as many resolutions")

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_stacks()


def _attention(config: StackConfig) -> list[bool]:
    return [config.resolution // 2**level in config.attn_resolutions for level in range(len(config.ch_mult))]


@dataclass(frozen=True)
class Posterior:
    """Independent normal distributions of latents."""

    moments: Tensor  # (n, 2e, h, w), mean then log-variance as the encoder gives them

    @property
    def mean(self) -> Tensor:
        """(n, e, h, w)."""
        return self.moments.chunk(2, dim=1)[0]

    @property
    def logvar(self) -> Tensor:
        """(n, e, h, w), clamped to [-30, 20]."""
        return self.moments.chunk(2, dim=1)[1].clamp(*LOGVAR_RANGE)

    def sample(self, noise: Tensor) -> Tensor:
        """The latents that standard normal noise (n, e, h, w) stands for."""
        return self.mean + (self.logvar / 2).exp() * noise

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence from the standard normal, nats per image, (n,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum((1, 2, 3))


class KLTokenizer(nn.Module):
    """Images to continuous tokens and back, see `orderrl.tokenizers.Tokenizer`."""

    UNUSED = "loss."  # the training loss's own weights, which published files carry

    def __init__(self, config: KLConfig, name: str = "kl") -> None:
        super().__init__()
        self.config, self.name = config, name
        self.downsampling = config.encoder.factor
        self.vocab_size: int | None = None
        self.token_dim = e = config.embed_dim
        self.encoder = Encoder(config.encoder, 2 * e, _attention(config.encoder), NAMES)
        self.decoder = Decoder(config.decoder, e, _attention(config.decoder), NAMES)
        self.quant_conv = nn.Conv2d(2 * e, 2 * e if config.use_variational else e, 1)
        self.post_quant_conv = nn.Conv2d(e, e, 1)

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that determine shape and weights."""
        return fingerprint([self.config.to_dict(), weights_fingerprint(self)])

    def posterior(self, images: Tensor) -> Posterior:
        """Distribution of the latents, not scaled: (n, 3, H, W) in [-1, 1] -> (n, e, h, w) each."""
        moments = self.quant_conv(self.encoder(images))
        if not self.config.use_variational:
            moments = torch.cat([moments, torch.ones_like(moments)], 1)
        return Posterior(moments)

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode latents that are not scaled, not clamped: (n, e, h, w) -> (n, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents))

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled tokens of images: the posterior's mean, or its sample under given noise.

        Args:
            images: (n, 3, H, W) uint8, or floating point in [-1, 1].
            noise: (n, N, C) standard normal; None takes the mean.

        Returns:
            (n, N, C) floating point, raster order, N = H·W / downsampling².

        Raises:
            ValueError: if height or width is not a multiple of the downsampling, values lie outside [-1, 1], or the
                noise has another shape.
        """
        images = to_unit_range(images).to(self.quant_conv.weight)
        grid = latent_grid(images.shape[2], images.shape[3], self.downsampling)
        posterior = self.posterior(images)
        if noise is None:
            return self.config.scale * posterior.mean.flatten(2).transpose(1, 2)
        want = (len(images), grid[0] * grid[1], self.token_dim)
        if noise.shape != want:
            raise ValueError(f"noise must have shape {want}, got {tuple(noise.shape)}")
        latents = posterior.sample(noise.to(images).transpose(1, 2).unflatten(2, grid))
        return self.config.scale * latents.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Images of tokens.

        Args:
            tokens: (n, N, C) floating point, scaled, raster order.
            grid: rows and columns of tokens, rows · columns = N.

        Returns:
            (n, 3, H, W) uint8.

        Raises:
            ValueError: if the shape does not fit.
        """
        want = (grid[0] * grid[1], self.token_dim)
        if tokens.ndim != 3 or tokens.shape[1:] != want:
            raise ValueError(f"tokens must have shape (n, {want[0]}, {want[1]}), got {tuple(tokens.shape)}")
        latents = tokens.to(self.quant_conv.weight).transpose(1, 2).unflatten(2, grid) / self.config.scale
        return to_pixels(self.pixels(latents))
