"""The diffusion loss of MAR: a small denoising network that models one continuous token given its condition.

Notable (Li et al., 2024, "Autoregressive Image Generation without Vector Quantization", section 3):
- Noise prediction with a learned-range variance, trained on mse + vb (Nichol and Dhariwal, 2021, "Improved
  Denoising Diffusion Probabilistic Models"). The vb term trains the variance alone.
- One training process of 1000 steps; sampling keeps some of its steps and derives their betas from the kept
  cumulative alphas. The network always gets the original index 0..999.
- Nothing here draws noise: every noise is an argument. Parameter names are the published ones.
- Schedule constants are computed in float64 and stored in float32. Half precision belongs to autocast, not to
  converted modules.
"""

import math
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orderrl.backbones.cpu_linear import Linear

TRAINING_STEPS = 1000
_NORM_EPS = 1e-6


def cosine_betas(steps: int = TRAINING_STEPS) -> NDArray[np.float64]:
    """Betas of the squared-cosine schedule, (steps,) float64, at most 0.999 (Nichol and Dhariwal, 2021, eq. 17)."""
    level = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - level[1:] / level[:-1], 0.999)


def respaced_timesteps(steps: int, training_steps: int = TRAINING_STEPS) -> list[int]:
    """Original indices of the `steps` in 2..training_steps that sampling keeps, ascending, first and last included."""
    if not 2 <= steps <= training_steps:
        raise ValueError(f"num_sampling_steps must lie in 2..{training_steps}, got {steps}")
    stride = (training_steps - 1) / (steps - 1)
    kept, position = [], 0.0
    for _ in range(steps):
        kept.append(round(position))
        position += stride
    return kept


class ReverseStep(NamedTuple):
    """p(x_{t-1} | x_t): a Gaussian with a mean and log variance for each channel, and the clean token behind it."""

    mean: Tensor  # (..., C)
    log_variance: Tensor  # (..., C)
    pred_xstart: Tensor  # (..., C)


class DiffusionLosses(NamedTuple):
    """The two terms of the diffusion loss, means over channels; their sum is what MAR trains on."""

    mse: Tensor  # (...), squared error of the predicted noise
    vb: Tensor  # (...), variational term in bits per channel; its gradient reaches the predicted variance alone


class GaussianDiffusion(nn.Module):
    """The constants of a diffusion process of S steps, kept from the 1000 original ones, and its steps.

    Indices t may have any shape that broadcasts against the leading shape of the tokens (..., C).

    Raises:
        ValueError: if the number of steps is not in 2..1000.

    Attributes:
        timestep_map: (S,) int64, original index of every step.
        betas, alphas_cumprod, posterior_log_variance_clipped, ...: (S,) float32, named as published.
    """

    timestep_map: Tensor
    betas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    log_betas: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor

    def __init__(self, num_timesteps: int = TRAINING_STEPS) -> None:
        super().__init__()
        self.num_timesteps = num_timesteps
        kept = respaced_timesteps(num_timesteps)
        self.register_buffer("timestep_map", torch.tensor(kept), persistent=False)
        for name, table in _tables(kept).items():
            self.register_buffer(name, torch.tensor(table.tolist(), dtype=torch.float32), persistent=False)

    def noised(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of clean tokens: x_start (..., C), t (...), noise (..., C) -> (..., C)."""
        return _at(self.sqrt_alphas_cumprod, t) * x_start + _at(self.sqrt_one_minus_alphas_cumprod, t) * noise

    def posterior_mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_start), (..., C) (Ho et al., 2020, eq. 7)."""
        return _at(self.posterior_mean_coef1, t) * x_start + _at(self.posterior_mean_coef2, t) * x_t

    def reverse(self, output: Tensor, x_t: Tensor, t: Tensor) -> ReverseStep:
        """p(x_{t-1} | x_t) from the network's output (..., 2C): predicted noise, then variance values.

        A variance value v in [-1, 1] interpolates between the lower and the upper bound of the log variance.
        The predicted clean token is not clipped.
        """
        noise, values = output.chunk(2, dim=-1)
        fraction = (values + 1) / 2
        upper, lower = _at(self.log_betas, t), _at(self.posterior_log_variance_clipped, t)
        log_variance = fraction * upper + (1 - fraction) * lower
        x_start = _at(self.sqrt_recip_alphas_cumprod, t) * x_t - _at(self.sqrt_recipm1_alphas_cumprod, t) * noise
        return ReverseStep(self.posterior_mean(x_start, x_t, t), log_variance, x_start)

    def step(self, output: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """Draw x_{t-1}: the noise (..., C) is scaled by the temperature, and left out at t = 0."""
        mean, log_variance, _ = self.reverse(output, x_t, t)
        return mean + (t > 0)[..., None] * (0.5 * log_variance).exp() * noise * temperature

    def losses(self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> DiffusionLosses:
        """Both loss terms of the network's output (..., 2C) at x_t = noised(x_start, t, noise)."""
        predicted, values = output.chunk(2, dim=-1)
        mse = (noise - predicted).square().mean(-1)
        model = self.reverse(torch.cat([predicted.detach(), values], dim=-1), x_t, t)
        true_mean = self.posterior_mean(x_start, x_t, t)
        true_log_variance = _at(self.posterior_log_variance_clipped, t)
        divergence = gaussian_kl(true_mean, true_log_variance, model.mean, model.log_variance)
        likelihood = discretised_log_likelihood(x_start, model.mean, 0.5 * model.log_variance)
        vb = torch.where((t == 0)[..., None], -likelihood, divergence).mean(-1) / math.log(2)
        return DiffusionLosses(mse, vb)


def _tables(kept: list[int]) -> dict[str, NDArray[np.float64]]:
    """The constants of the process that keeps some original steps, (S,) float64, by the names of their buffers."""
    original = np.cumprod(1 - cosine_betas())[kept]
    betas = 1 - original / np.append(1.0, original[:-1])
    cumulative = np.cumprod(1 - betas)
    previous = np.append(1.0, cumulative[:-1])
    variance = betas * (1 - previous) / (1 - cumulative)  # 0 at the first step, so its log takes the second's
    return {
        "betas": betas,
        "alphas_cumprod": cumulative,
        "sqrt_alphas_cumprod": np.sqrt(cumulative),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - cumulative),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / cumulative),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / cumulative - 1),
        "log_betas": np.log(betas),
        "posterior_log_variance_clipped": np.log(np.append(variance[1], variance[1:])),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - cumulative),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - cumulative),
    }


def _at(table: Tensor, t: Tensor) -> Tensor:
    """Table entries at indices t (...), with a dimension for the channels: (..., 1)."""
    return table[t][..., None]


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) of each element, nats."""
    difference = log_variance2 - log_variance1
    return 0.5 * (difference - 1 + (-difference).exp() + (mean1 - mean2).square() * (-log_variance2).exp())


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of the bin of width 2/255 around x under a Gaussian, nats, element by element.

    As published for images in [-1, 1]: the bins beyond +-0.999 reach to infinity, and the cumulative distribution
    is the tanh approximation of Page (1977). MAR applies it to latent tokens all the same.
    """
    centred, scale = x - mean, (-log_scale).exp()
    above, below = _normal_cdf(scale * (centred + 1 / 255)), _normal_cdf(scale * (centred - 1 / 255))
    probability = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return probability.clamp_min(1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


class TimeEmbedding(nn.Module):
    """Sinusoidal features of the original time index (cosines first), then two linear layers."""

    def __init__(self, dim: int, features: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(features, dim), nn.SiLU(), Linear(dim, dim))
        half = features // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.frequencies: Tensor

    def forward(self, t: Tensor) -> Tensor:
        angles = t[..., None] * self.frequencies  # (..., features / 2)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class ResidualBlock(nn.Module):
    """Feed-forward block modulated by the condition (adaLN: shift, scale, gate)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.mlp = nn.Sequential(Linear(dim, dim), nn.SiLU(), Linear(dim, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 3 * dim))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """Modulated norm without parameters of its own, then the output projection."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=_NORM_EPS, elementwise_affine=False)
        self.linear = Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(dim, 2 * dim))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DenoisingNetwork(nn.Module):
    """MLP from a noisy token, its original time index and its condition to noise and variance values."""

    def __init__(self, token_dim: int, condition_dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = Linear(condition_dim, width)
        self.input_proj = Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * token_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: Xavier matrices, zero modulation and a zero output layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(cast(nn.Linear, layer).weight, std=0.02)
        modulations = [block.adaLN_modulation for block in self._blocks()]
        for zeroed in (*(m[-1] for m in modulations), self.final_layer.adaLN_modulation[-1], self.final_layer.linear):
            nn.init.zeros_(cast(nn.Linear, zeroed).weight)

    def _blocks(self) -> list[ResidualBlock]:
        return [cast(ResidualBlock, block) for block in self.res_blocks]

    def forward(self, x: Tensor, t: Tensor, conditions: Tensor) -> Tensor:
        """x (..., C), t (...) original indices, conditions (..., D) -> (..., 2C): noise, then variance values.

        The leading shapes broadcast against each other.
        """
        dtype = self.input_proj.weight.dtype  # the process itself stays in the dtype of x
        y = self.time_embed(t) + self.cond_embed(conditions.to(dtype))
        h = self.input_proj(x.to(dtype))
        for block in self._blocks():
            h = block(h, y)
        return self.final_layer(h, y).to(x.dtype)

    def guided(
        self, x: Tensor, t: Tensor, conditions: Tensor, unconditional: Tensor, guidance: float | Tensor
    ) -> Tensor:
        """Output (2, ..., 2C) under both conditions for the same x, each with the guided noise in place of its own.

        Guided noise = unconditional + guidance * (conditional - unconditional); variance values are not mixed.
        """
        output = self(x, t, torch.stack([conditions, unconditional]))
        noise, values = output.chunk(2, dim=-1)
        mixed = noise[1] + guidance * (noise[0] - noise[1])
        return torch.cat([mixed.expand_as(noise), values], dim=-1)


class DiffLoss(nn.Module):
    """Distribution of a token (C) given its condition (D): a loss for training and scoring, a sampler for drawing.

    Args:
        num_sampling_steps: S, steps of the sampling process, 2..1000.

    Raises:
        ValueError: if num_sampling_steps is out of range.
    """

    def __init__(self, token_dim: int, condition_dim: int, width: int, depth: int, num_sampling_steps: int) -> None:
        super().__init__()
        self.token_dim = token_dim
        self.net = DenoisingNetwork(token_dim, condition_dim, width, depth)
        self.train_diffusion = GaussianDiffusion()
        self.gen_diffusion = GaussianDiffusion(num_sampling_steps)

    @property
    def num_sampling_steps(self) -> int:
        """S, steps of the sampling process."""
        return self.gen_diffusion.num_timesteps

    def losses(self, conditions: Tensor, targets: Tensor, t: Tensor, noise: Tensor) -> DiffusionLosses:
        """Loss terms of tokens at given times and noises; leading shapes broadcast against each other.

        Args:
            conditions: (..., D).
            targets: (..., C), clean tokens.
            t: (...) int64 in 0..999.
            noise: (..., C), standard normal.

        Returns:
            mse and vb, each (...).
        """
        x_t = self.train_diffusion.noised(targets, t, noise)
        return self.train_diffusion.losses(self.net(x_t, t, conditions), targets, x_t, t, noise)

    def sample(
        self,
        conditions: Tensor,
        start_noise: Tensor,
        step_noise: Tensor,
        temperature: float = 1.0,
        guidance: float | Tensor = 1.0,
        unconditional: Tensor | None = None,
    ) -> Tensor:
        """Draw tokens with the reverse process.

        Args:
            conditions: (..., D).
            start_noise: (..., C), standard normal.
            step_noise: (S, ..., C), standard normal, for the steps S-1, ..., 1, 0; the last is not used.
            temperature: scales the noise of the steps, not the starting noise.
            guidance: classifier-free guidance scale; a tensor broadcasts against (..., C).
            unconditional: (..., D), conditions under the dropped label; None samples without guidance.

        Returns:
            (..., C) tokens.

        Raises:
            ValueError: if step_noise has another number of steps, or guidance other than 1 lacks unconditional.
        """
        steps = self.num_sampling_steps
        if step_noise.shape != (steps, *start_noise.shape):
            raise ValueError(
                f"step_noise must have shape {(steps, *start_noise.shape)}: one noise for each sampling step and "
                f"entry of start_noise, got {tuple(step_noise.shape)}"
            )
        if unconditional is None and guidance != 1:
            raise ValueError(f"guidance={guidance} needs the unconditional conditions too; give them or use guidance=1")
        x, process = start_noise, self.gen_diffusion
        for index, noise in zip(range(steps - 1, -1, -1), step_noise, strict=True):
            t = torch.full(x.shape[:-1], index, device=x.device)
            original = process.timestep_map[t]
            if unconditional is None:
                output = self.net(x, original, conditions)
            else:
                output = self.net.guided(x, original, conditions, unconditional, guidance)[0]
            x = process.step(output, x, t, noise, temperature)
        return x
