"""Training a small tokeniser."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from orderrl.tokenizers import VQConfig, VQTokenizer
from orderrl.tokenizers.training import (
    TokenizerTrainingConfig,
    reconstruction_quality,
    restart_codes,
    tokenizer_losses,
    train_tokenizer,
)
from tests.jobs import logged
from tests.tokenizers.helpers import STACK, tiny_vq


@pytest.fixture
def draw() -> Callable[[int, torch.Generator], Tensor]:
    """Images of one of eight plain colours."""
    colours = torch.randint(0, 256, (8, 3, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def sample(count: int, generator: torch.Generator) -> Tensor:
        return colours[torch.randint(8, (count,), generator=generator)].expand(-1, -1, 8, 8)

    return sample


def test_training_lowers_the_error_and_is_repeatable(draw: Callable[[int, torch.Generator], Tensor]) -> None:
    settings = TokenizerTrainingConfig(
        steps=30, batch_size=8, warmup=3, ema=0.8, evaluate_every=15, restart_every=5, learning_rate=3e-3
    )
    held_out = [draw(16, torch.Generator().manual_seed(7))]
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        tokenizer = VQTokenizer(VQConfig(24, 4, True, 32, STACK, STACK))
        before = reconstruction_quality(tokenizer.eval(), held_out)
        rows = logged(train_tokenizer, tokenizer, draw, lambda: held_out, settings)
        after = reconstruction_quality(tokenizer, held_out)
        results.append((rows, after))
    assert after["psnr"] > before["psnr"] + 1 and after["l1"] < before["l1"]
    assert results[0] == results[1]
    assert [row["step"] for row in rows if "held_out_psnr" in row] == [15, 30]
    assert rows[-1]["held_out_psnr"] == pytest.approx(after["psnr"])  # the averaged weights are what is kept


def test_restarting_moves_unused_codes_only_and_onto_latents() -> None:
    tokenizer = tiny_vq()
    before = tokenizer.quantize.embedding.weight.clone()
    unused = torch.arange(24) % 3 == 0
    latents = torch.randn(2, 2, 2, 4)
    assert restart_codes(tokenizer, unused, latents, torch.Generator().manual_seed(0)) == 8
    after = tokenizer.quantize.embedding.weight
    assert torch.equal(after[~unused], before[~unused])
    assert (after[unused][:, None] == latents.view(1, 8, 4)).all(-1).any(1).all()


def test_codebook_and_commitment_losses_pull_on_one_side_each() -> None:
    tokenizer = tiny_vq().requires_grad_(True)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    for name, moved, still in (
        ("codebook", tokenizer.quantize.embedding.weight, tokenizer.quant_conv.weight),
        ("commitment", tokenizer.quant_conv.weight, tokenizer.quantize.embedding.weight),
    ):
        tokenizer.zero_grad()
        losses, _ = tokenizer_losses(tokenizer, images, "l2")
        losses[name].backward()
        gradient = moved.grad
        # a normalised code is a function of its own weights alone, so commitment leaves them without any gradient
        assert gradient is not None and gradient.abs().max() > 0
        assert still.grad is None or still.grad.abs().max() == 0


def test_quality_is_that_of_its_definition() -> None:
    tokenizer = tiny_vq()
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    quality = reconstruction_quality(tokenizer, images.split(2))
    tokens = tokenizer.encode(images)
    decoded = tokenizer.decode(tokens, (4, 4))
    errors = [((a.double() - b.double()) / 255).pow(2).mean() for a, b in zip(images, decoded, strict=True)]
    assert quality["psnr"] == pytest.approx(sum(-10 * error.log10().item() for error in errors) / 5, rel=1e-5)
    assert quality["usage"] == pytest.approx(len(tokens.unique()) / 24)
    assert quality["images"] == 5 and 1 <= quality["perplexity"] <= len(tokens.unique()) + 1e-6


@pytest.mark.parametrize(
    ("values", "message"),
    [({"reconstruction": "l3"}, "l1, l2"), ({"steps": 0}, "steps must be at least 1"), ({"ema": 2}, "ema must lie in")],
)
def test_impossible_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerTrainingConfig(**values)  # type: ignore[arg-type]
