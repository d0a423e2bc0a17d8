"""Training a small VQ tokeniser on plain reconstruction.

The objective of VQ-VAE (van den Oord et al., 2017): reconstruction, codebook and commitment loss, with the
straight-through gradient; no discriminator and no perceptual loss. Codes that no position has chosen for a while start
anew at latents of the current batch (random restarts; Dhariwal et al., 2020). The averaged weights are kept.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.job import Job
from orderrl.runtime.learning_rate import warmed_cosine
from orderrl.runtime.optimisation import descend, parameter_groups
from orderrl.runtime.values import at_least, between, check_fields, one_of, positive, setting
from orderrl.tokenizers.layers import to_unit_range
from orderrl.tokenizers.vq import VQTokenizer

RECONSTRUCTIONS = ("l1", "l2")


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig:
    """How a tokeniser is trained."""

    steps: int = setting(1800, "Optimiser steps", at_least(1))
    batch_size: int = setting(16, "Images of a step", at_least(1))
    learning_rate: float = setting(1e-3, "Peak learning rate", positive())
    warmup: int = setting(100, "Steps of linear warm-up", at_least(0))
    weight_decay: float = setting(1e-4, "Weight decay of AdamW on matrices, except the codebook", at_least(0))
    reconstruction: str = setting(
        "l2", "Reconstruction loss of a pixel and channel in [-1, 1]: l1 or l2", one_of(RECONSTRUCTIONS)
    )
    codebook: float = setting(1.0, "Weight of the codebook loss, which moves codes to their latents", at_least(0))
    commitment: float = setting(0.25, "Weight of the commitment loss, which moves latents to codes", at_least(0))
    flips: bool = setting(True, "Mirror half of the images")
    restart_every: int = setting(50, "Steps after which codes that were not chosen start anew", at_least(1))
    restart_until: float = setting(0.7, "Share of the training after which codes are left alone", between("[0, 1]"))
    ema: float = setting(0.99, "Decay of the averaged weights that are saved", between("[0, 1]"))
    evaluate_every: int = setting(600, "Steps between evaluations", at_least(1))
    held_out_images: int = setting(500, "Images of an evaluation during training, at most", at_least(1))
    seed: int = 0  # of initialisation, batches and restarts

    def __post_init__(self) -> None:
        check_fields(self, at_least(0, "seed"))


def tokenizer_losses(tokenizer: VQTokenizer, images: Tensor, reconstruction: str) -> tuple[dict[str, Tensor], Tensor]:
    """Terms of the objective on images (n, 3, H, W) in [-1, 1], and what a restart needs.

    Scalars "reconstruction", "codebook" and "commitment", and the latents (n, h, w, e) as they were compared.
    """
    latents = tokenizer.latents(images)
    codes, indices = tokenizer.quantise(latents)
    x = tokenizer.quantize.normalised(latents.movedim(1, -1))
    chosen = tokenizer.quantize.lookup(indices)
    distance = F.l1_loss if reconstruction == "l1" else F.mse_loss
    losses = {
        "reconstruction": distance(tokenizer.pixels(codes), images),
        "codebook": F.mse_loss(chosen, x.detach()),
        "commitment": F.mse_loss(x, chosen.detach()),
    }
    return losses, x.detach()


@torch.no_grad()
def restart_codes(tokenizer: VQTokenizer, unused: Tensor, latents: Tensor, generator: torch.Generator) -> int:
    """Move unused codes to random latents.

    Args:
        tokenizer: changed in place.
        unused: (V,) bool.
        latents: (..., e) to draw from.
        generator: source of randomness, on the CPU.

    Returns:
        How many codes moved.
    """
    count = int(unused.sum())
    flat = latents.flatten(0, -2)
    chosen = torch.randint(len(flat), (count,), generator=generator).to(flat.device)
    tokenizer.quantize.embedding.weight[unused] = flat[chosen]
    return count


@torch.no_grad()
def reconstruction_quality(tokenizer: VQTokenizer, batches: Iterable[Tensor]) -> dict[str, float]:
    """How well 8-bit reconstructions agree with the images, and how much of the codebook they use.

    Args:
        tokenizer: in eval mode.
        batches: (n, 3, H, W) uint8 each.

    Returns:
        images; psnr (dB, mean over images); l1 (mean absolute error, pixel values in [0, 1]); usage (share of codes
        that occur); perplexity (exponential of the entropy of the codes' frequencies).
    """
    counts = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    psnr: list[Tensor] = []
    l1: list[Tensor] = []
    device = tokenizer.quant_conv.weight.device
    for images in batches:
        tokens = tokenizer.encode(images.to(device))
        grid = (images.shape[2] // tokenizer.downsampling, images.shape[3] // tokenizer.downsampling)
        error = (tokenizer.decode(tokens, grid).cpu().float() - images.cpu().float()) / 255
        mse = error.pow(2).mean((1, 2, 3)).clamp_min(1e-10)
        psnr.append(-10 * mse.log10())
        l1.append(error.abs().mean((1, 2, 3)))
        counts += tokens.cpu().flatten().bincount(minlength=tokenizer.vocab_size)
    share = counts / counts.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    return {
        "images": sum(len(part) for part in psnr),
        "psnr": torch.cat(psnr).mean().item(),
        "l1": torch.cat(l1).mean().item(),
        "usage": (counts > 0).double().mean().item(),
        "perplexity": entropy.exp().item(),
    }


@isolated_float32
def train_tokenizer(
    tokenizer: VQTokenizer,
    draw: Callable[[int, torch.Generator], Tensor],
    held_out: Callable[[], Iterable[Tensor]],
    config: TokenizerTrainingConfig,
    job: Job | None = None,
) -> None:
    """Train in place; on return the tokeniser holds the averaged weights.

    Args:
        tokenizer: trained in place.
        draw: gives a random batch (n, 3, H, W) uint8 of n training images.
        held_out: gives batches (n, 3, H, W) uint8 for the logged quality; never trained on.

    Metrics: loss and its terms, learning_rate, restarted; with held_out_psnr (dB), held_out_l1, held_out_usage and
    held_out_perplexity at every evaluation.
    """
    device = tokenizer.quant_conv.weight.device
    generator = torch.Generator().manual_seed(config.seed)
    groups = parameter_groups(tokenizer, config.weight_decay, (tokenizer.quantize.embedding.weight,))
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99))
    schedule = warmed_cosine(optimizer, config.steps, config.warmup)
    averaged = AveragedModel(tokenizer, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    mean = cast(VQTokenizer, averaged.module).eval()
    used = {"chosen": torch.zeros(tokenizer.vocab_size, dtype=torch.bool)}
    job = job or Job()
    steps = job.steps(
        config.steps, "training the tokeniser", "steps", "loss {loss:.4f}", tokenizer=tokenizer, averaged=averaged,
        optimizer=optimizer, schedule=schedule, generator=generator, used=used,
    )  # fmt: skip
    tokenizer.train()
    for step in steps:
        images = to_unit_range(draw(config.batch_size, generator)).to(device)
        if config.flips:
            mirrored = torch.rand(len(images), 1, 1, 1, generator=generator).to(device) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        losses, latents = tokenizer_losses(tokenizer, images, config.reconstruction)
        pull = config.codebook * losses["codebook"]
        loss = losses["reconstruction"] + pull + config.commitment * losses["commitment"]
        used["chosen"][tokenizer.quantize.nearest(latents).flatten().cpu()] = True
        mean_loss = descend(optimizer, loss, tokenizer)
        schedule.step()
        restarted = 0
        if (step + 1) % config.restart_every == 0 or step == 0:  # the first batch spreads the codes over its latents
            if step < config.restart_until * config.steps:
                restarted = restart_codes(tokenizer, ~used["chosen"].to(device), latents, generator)
            used["chosen"].zero_()
        averaged.update_parameters(tokenizer)
        row = {
            "loss": mean_loss,
            **{f"loss_{name}": value.item() for name, value in losses.items()},
            "learning_rate": float(schedule.get_last_lr()[0]),
            "restarted": float(restarted),
        }
        if (step + 1) % config.evaluate_every == 0 or step + 1 == config.steps:
            quality = reconstruction_quality(mean, held_out())
            row |= {f"held_out_{name}": value for name, value in quality.items() if name != "images"}
        job.log(**row)
    tokenizer.load_state_dict(mean.state_dict())
    tokenizer.eval()
