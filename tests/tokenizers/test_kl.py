"""The KL autoencoder: posterior, scale, shapes, and agreement with recorded runs."""

from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from orderrl.tokenizers import KLConfig, KLTokenizer, Posterior, StackConfig, Tokenizer
from orderrl.tokenizers.layers import to_pixels
from orderrl.verification import kl
from orderrl.verification.fixture import load_fixture
from tests.tokenizers.helpers import STACK, tiny_kl

PARITY = Path(__file__).resolve().parents[3] / "shared" / "parity"
FIXTURES = sorted(PARITY.glob("mar_vae*.safetensors"))


@pytest.mark.skipif(not FIXTURES, reason=f"no recorded runs of MAR's autoencoder in {PARITY}")
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_recorded_runs_are_reproduced(path: Path) -> None:
    fixture = load_fixture(path)
    ours = kl.replay(fixture)
    assert ours.keys() >= fixture.outputs.keys()
    for name, recorded in fixture.outputs.items():
        assert (ours[name] - recorded).abs().max() <= fixture.tolerance(name), name


def test_the_posterior_is_that_of_torch() -> None:
    posterior = Posterior(torch.randn(3, 8, 2, 2))
    same = Normal(posterior.mean, (posterior.logvar / 2).exp())
    expected = kl_divergence(same, Normal(0.0, 1.0)).sum((1, 2, 3))
    assert torch.allclose(posterior.kl(), expected, atol=1e-5)
    noise = torch.randn(3, 4, 2, 2)
    assert torch.allclose(posterior.sample(noise), same.mean + same.stddev * noise)


def test_log_variances_are_clamped() -> None:
    posterior = Posterior(torch.tensor([0.0, 100.0]).view(1, 2, 1, 1))
    assert posterior.logvar.item() == 20


def test_tokens_are_scaled_latents_in_raster_order() -> None:
    tokenizer = tiny_kl()
    assert isinstance(tokenizer, Tokenizer) and tokenizer.vocab_size is None and tokenizer.token_dim == 4
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    posterior = tokenizer.posterior(images)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (2, 24, 4)
    assert torch.allclose(tokens[1, 7], 0.2325 * posterior.mean[1, :, 1, 1])
    noise = torch.randn(2, 24, 4)
    drawn = tokenizer.encode(images, noise)
    spread = (posterior.logvar[1, :, 1, 1] / 2).exp() * noise[1, 7]
    assert torch.allclose(drawn[1, 7], 0.2325 * (posterior.mean[1, :, 1, 1] + spread), atol=1e-6)


def test_decoding_undoes_the_scale() -> None:
    tokenizer = tiny_kl()
    latents = torch.randn(2, 4, 4, 6)
    tokens = 0.2325 * latents.flatten(2).transpose(1, 2)
    assert (tokenizer.decode(tokens, (4, 6)).int() - to_pixels(tokenizer.pixels(latents)).int()).abs().max() <= 1


def test_without_variances_every_log_variance_is_one() -> None:
    config = KLConfig(embed_dim=4, use_variational=False, encoder=STACK, decoder=STACK)
    posterior = KLTokenizer(config).posterior(torch.zeros(1, 3, 8, 8))
    assert posterior.mean.shape == (1, 4, 4, 4) and torch.equal(posterior.logvar, torch.ones(1, 4, 4, 4))


def test_attention_follows_the_nominal_resolution() -> None:
    stack = StackConfig(ch=32, ch_mult=(1, 1, 2), num_res_blocks=2, resolution=64, attn_resolutions=(32,))
    config = KLConfig(embed_dim=4, encoder=stack, decoder=StackConfig(ch=32, ch_mult=(1, 1, 2)))
    keys = KLTokenizer(config).state_dict().keys()
    with_attention = {key.split(".attn.")[0] for key in keys if ".attn." in key}
    assert with_attention == {"encoder.down.1"}


def test_what_does_not_fit_is_refused() -> None:
    tokenizer = tiny_kl()
    images = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="noise must have shape"):
        tokenizer.encode(images, torch.zeros(1, 4, 16))
    with pytest.raises(ValueError, match=r"\(n, 16, 4\)"):
        tokenizer.decode(torch.zeros(1, 16, 3), (4, 4))
    with pytest.raises(ValueError, match="multiples of 2"):
        tokenizer.encode(torch.zeros(1, 3, 9, 8))
    with pytest.raises(ValueError, match="scale"):
        KLConfig(scale=0)
