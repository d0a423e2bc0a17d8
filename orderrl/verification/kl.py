"""Replays recorded runs of MAR's KL autoencoder."""

import torch
from torch import Tensor

from orderrl.tokenizers.kl import KLConfig, KLTokenizer
from orderrl.tokenizers.registry import load_weights
from orderrl.verification.family import recorded_stack
from orderrl.verification.fixture import Fixture

_ENCODER_ATTENTION = (16,)  # nominal resolution at which the published encoder has attention
_FIXED = {"in_channels": 3, "out_ch": 3, "double_z": True, "give_pre_end": False}


def config_of(fixture: Fixture) -> KLConfig:
    """The shape that the published constructor's arguments and the fixture's overrides describe."""
    arguments, config = fixture.arguments, fixture.description["config"]
    shared = {"ch_mult": arguments["ch_mult"]} if "ch_mult" in arguments else {}
    encoder = {"attn_resolutions": _ENCODER_ATTENTION, **shared, **(config.get("encoder_overrides") or {})}
    decoder = {**shared, **(config.get("decoder_overrides") or {})}
    names = ("embed_dim", "use_variational")
    return KLConfig(
        **{name: arguments[name] for name in names if name in arguments},
        encoder=recorded_stack(encoder, _FIXED),
        decoder=recorded_stack(decoder, _FIXED),
    )


@torch.no_grad()
def replay(fixture: Fixture) -> dict[str, Tensor]:
    """Compute every recorded output with our autoencoder under the recorded weights and inputs."""
    model = KLTokenizer(config_of(fixture)).eval()
    load_weights(model, fixture.weights, fixture.path)
    model = model.to(fixture.device)
    inputs = fixture.inputs
    posterior = model.posterior(inputs["image"])
    found = {
        "moments": _moments(fixture, posterior.moments),
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "kl": posterior.kl(),
        "decoded_mean": model.pixels(posterior.mean),
    }
    if "noise" in inputs:
        found["sample"] = posterior.sample(inputs["noise"])
    if "latent" in inputs:
        found["decoded_latent"] = model.pixels(inputs["latent"])
    if "scaled_latent" in inputs:
        found["decoded_scaled"] = model.pixels(inputs["scaled_latent"] / model.config.scale)
    return found


def _moments(fixture: Fixture, moments: Tensor) -> Tensor:
    """Means and log-variances, or the means alone where a model without variances was recorded before its constant."""
    recorded = fixture.outputs.get("moments", moments)
    return moments[:, : recorded.shape[1]]
