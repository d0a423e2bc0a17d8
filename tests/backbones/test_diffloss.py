"""Gaussian diffusion against closed forms, and the denoising network's sampler against its definition."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from orderrl.backbones.diffloss import (
    DiffLoss,
    GaussianDiffusion,
    cosine_betas,
    discretised_log_likelihood,
    respaced_timesteps,
)

STEPS = 7


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_diffloss() -> DiffLoss:
    """Three channels, conditions of five; random weights everywhere, so that every input matters."""
    diffloss = DiffLoss(token_dim=3, condition_dim=5, width=16, depth=2, num_sampling_steps=STEPS)
    with torch.no_grad():
        for parameter in diffloss.parameters():
            parameter.normal_(std=0.2)
    return diffloss


def noises(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Conditions (rows, 5), starting noise (rows, 3), step noise (S, rows, 3)."""
    return torch.randn(rows, 5), torch.randn(rows, 3), torch.randn(STEPS, rows, 3)


def test_betas_follow_the_squared_cosine() -> None:
    betas = cosine_betas(1000)
    wanted = 1.0
    for i in range(999):
        wanted *= 1 - betas[i]
        level = math.cos(((i + 1) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        assert wanted == pytest.approx(level / math.cos(0.008 / 1.008 * math.pi / 2) ** 2, rel=1e-9)
    assert betas[999] == 0.999


@pytest.mark.parametrize("steps", [2, 3, 21, 50, 999, 1000])
def test_kept_steps_are_even_and_keep_their_cumulative_alphas(steps: int) -> None:
    kept = respaced_timesteps(steps)
    assert len(set(kept)) == steps and kept[0] == 0 and kept[-1] == 999 and kept == sorted(kept)
    assert all(abs(index - i * 999 / (steps - 1)) <= 0.5 + 1e-9 for i, index in enumerate(kept))
    whole, part = GaussianDiffusion(), GaussianDiffusion(steps)
    torch.testing.assert_close(part.alphas_cumprod, whole.alphas_cumprod[kept])
    torch.testing.assert_close((1 - part.betas[:-1]).cumprod(0), whole.alphas_cumprod[kept[:-1]])
    assert part.timestep_map.tolist() == kept


@pytest.mark.parametrize("steps", [-1, 0, 1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_sampling_steps must lie in 2..1000, got {steps}"):
        DiffLoss(3, 5, 16, 2, steps)


@pytest.mark.parametrize("steps", [10, 1000])
def test_posterior_is_bayes_rule(steps: int) -> None:
    """q(x_{t-1} | x_t, x_0) from the product of two Gaussians, one of x_{t-1} and one of x_t given x_{t-1}."""
    process = GaussianDiffusion(steps)
    t = torch.tensor([1, steps // 2, steps - 2])
    x_start, x_t = torch.randn(3, 4), torch.randn(3, 4)
    kept = torch.from_numpy(1 - cosine_betas()).cumprod(0)[respaced_timesteps(steps)]  # float64
    before, beta = kept[t - 1, None], 1 - (kept[t] / kept[t - 1])[:, None]
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (before.sqrt() * x_start / (1 - before) + (1 - beta).sqrt() * x_t / beta) / precision
    torch.testing.assert_close(process.posterior_mean(x_start, x_t, t).double(), mean, rtol=1e-4, atol=1e-5)
    lower = process.posterior_log_variance_clipped.double()[t, None]
    torch.testing.assert_close(lower, -precision.log(), rtol=1e-4, atol=1e-4)


def test_true_noise_gives_back_the_clean_token_and_the_posterior() -> None:
    process = GaussianDiffusion(20)
    t = torch.tensor([0, 3, 17])
    x_start, noise, values = torch.randn(3, 3, 4).unbind(0)
    x_t = process.noised(x_start, t, noise)
    mean, log_variance, pred_xstart = process.reverse(torch.cat([noise, values], -1), x_t, t)
    torch.testing.assert_close(pred_xstart, x_start, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mean, process.posterior_mean(x_start, x_t, t), rtol=1e-4, atol=1e-4)
    for value, bound in ((-1.0, process.posterior_log_variance_clipped), (1.0, process.betas.log())):
        output = torch.cat([noise, torch.full_like(noise, value)], -1)
        torch.testing.assert_close(process.reverse(output, x_t, t).log_variance, bound[t, None].expand(-1, 4))
    assert ((log_variance - process.betas.log()[t, None]).sign() == (values - 1).sign()).all()


def test_reverse_step_adds_scaled_noise_except_at_the_end() -> None:
    process, t = GaussianDiffusion(20), torch.tensor([0, 0, 5, 19])
    output, x_t, noise = torch.randn(4, 6), torch.randn(4, 3), torch.randn(4, 3)
    mean, log_variance, _ = process.reverse(output, x_t, t)
    drawn = process.step(output, x_t, t, noise, temperature=0.7)
    assert torch.equal(drawn[:2], mean[:2])
    torch.testing.assert_close(drawn[2:], mean[2:] + 0.7 * (0.5 * log_variance[2:]).exp() * noise[2:])
    assert torch.equal(process.step(output, x_t, t, noise, temperature=0.0), mean)


def test_vb_is_the_divergence_of_the_reverse_step_from_the_posterior() -> None:
    process, t = GaussianDiffusion(), torch.tensor([1, 40, 500, 900])
    x_start, noise, values = torch.randn(3, 4, 3).unbind(0)
    predicted = noise + 0.1 * torch.randn(4, 3)
    x_t = process.noised(x_start, t, noise)
    output = torch.cat([predicted, values], -1)
    mse, vb = process.losses(output, x_start, x_t, t, noise)
    model = process.reverse(output.double(), x_t.double(), t)
    posterior = Normal(
        process.posterior_mean(x_start, x_t, t).double(),
        (0.5 * process.posterior_log_variance_clipped[t, None]).exp().double(),
    )
    divergence = kl_divergence(posterior, Normal(model.mean, (0.5 * model.log_variance).exp()))
    torch.testing.assert_close(vb.double(), divergence.mean(-1) / math.log(2), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(mse, ((predicted - noise) ** 2).mean(-1))


def test_vb_at_the_first_step_is_the_likelihood_of_a_bin() -> None:
    x, mean, log_scale = torch.randn(3, 500).double().clamp(-3, 3).unbind(0)
    x = x.clamp(-0.9, 0.9)
    normal = Normal(mean, log_scale.exp())
    probability = normal.cdf(x + 1 / 255) - normal.cdf(x - 1 / 255)
    approximate = discretised_log_likelihood(x, mean, log_scale).exp()
    assert (approximate - probability).abs().max() < 2e-3  # the tanh form is an approximation
    tails = torch.tensor([-1.5, 1.5]).double()
    total = discretised_log_likelihood(tails, torch.zeros(2).double(), torch.zeros(2).double()).exp()
    wanted = torch.stack([Normal(0.0, 1.0).cdf(tails[0] + 1 / 255), 1 - Normal(0.0, 1.0).cdf(tails[1] - 1 / 255)])
    torch.testing.assert_close(total, wanted.double(), atol=1e-3, rtol=0)
    process, t = GaussianDiffusion(), torch.tensor(0)
    noise, output = torch.randn(6, 3), torch.randn(6, 6)
    x_start = 0.01 * torch.randn(6, 3)
    x_t = process.noised(x_start, t, noise)
    model = process.reverse(output, x_t, t)
    likelihood = discretised_log_likelihood(x_start, model.mean, 0.5 * model.log_variance).mean(-1)
    vb = process.losses(output, x_start, x_t, t, noise).vb
    torch.testing.assert_close(vb, -likelihood / math.log(2))


def test_vb_teaches_the_variance_alone() -> None:
    process, t = GaussianDiffusion(), torch.tensor([0, 300])
    x_start, noise = torch.randn(2, 3), torch.randn(2, 3)
    output = torch.randn(2, 6, requires_grad=True)
    vb = process.losses(output, x_start, process.noised(x_start, t, noise), t, noise).vb
    (gradient,) = torch.autograd.grad(vb.sum(), output)
    assert (gradient[:, :3] == 0).all() and (gradient[1, 3:] != 0).all()


def test_losses_take_any_leading_shape() -> None:
    diffloss = random_diffloss()
    conditions, targets = torch.randn(2, 4, 5), torch.randn(2, 4, 3)
    t, noise = torch.randint(1000, (6, 2, 4)), torch.randn(6, 2, 4, 3)
    with torch.no_grad():
        together = diffloss.losses(conditions, targets, t, noise)
        assert together.mse.shape == together.vb.shape == (6, 2, 4)
        for draw in range(6):
            alone = diffloss.losses(conditions[1, 2], targets[1, 2], t[draw, 1, 2], noise[draw, 1, 2])
            torch.testing.assert_close(alone.mse, together.mse[draw, 1, 2], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(alone.vb, together.vb[draw, 1, 2], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_time_embedding_puts_cosines_first() -> None:
    embedding = random_diffloss().net.time_embed
    t = torch.tensor([0, 7, 999])
    angles = t[:, None] * 10000.0 ** (-torch.arange(128) / 128)
    wanted = embedding.mlp(torch.cat([angles.cos(), angles.sin()], 1))
    torch.testing.assert_close(embedding(t), wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_sampler_is_its_steps_one_after_another() -> None:
    diffloss = random_diffloss()
    z, start, steps = noises(5)
    x, process = start, diffloss.gen_diffusion
    for i, noise in zip(reversed(range(STEPS)), steps, strict=True):
        original = torch.full((5,), respaced_timesteps(STEPS)[i])
        x = process.step(diffloss.net(x, original, z), x, torch.full((5,), i), noise, 0.8)
    assert torch.equal(diffloss.sample(z, start, steps, temperature=0.8), x)
    changed = steps.clone()
    changed[-1] += 1
    assert torch.equal(diffloss.sample(z, start, changed, temperature=0.8), x)


@torch.no_grad()
def test_guidance_moves_from_unconditional_to_conditional() -> None:
    diffloss = random_diffloss()
    z, start, steps = noises(4)
    z_null = torch.randn(4, 5)
    plain = diffloss.sample(z, start, steps)
    torch.testing.assert_close(diffloss.sample(z, start, steps, 1.0, 1.0, z_null), plain, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(diffloss.sample(z, start, steps, 1.0, 3.0, z), plain, rtol=1e-3, atol=2e-3)
    x, t = torch.randn(4, 3), torch.tensor([0, 10, 500, 999])
    guided = diffloss.net.guided(x, t, z, z_null, 2.5)
    noise, values = torch.stack([diffloss.net(x, t, z), diffloss.net(x, t, z_null)]).chunk(2, -1)
    for half in range(2):
        torch.testing.assert_close(guided[half, :, :3], noise[1] + 2.5 * (noise[0] - noise[1]))
        torch.testing.assert_close(guided[half, :, 3:], values[half])


def test_sampler_refuses_what_it_cannot_use() -> None:
    diffloss = random_diffloss()
    z, start, steps = noises(4)
    with pytest.raises(ValueError, match=r"step_noise must have shape \(7, 4, 3\).*got \(6, 4, 3\)"):
        diffloss.sample(z, start, steps[1:])
    with pytest.raises(ValueError, match=r"guidance=2\.0 needs the unconditional"):
        diffloss.sample(z, start, steps, guidance=2.0)
