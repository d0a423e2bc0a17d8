"""MAR: conditions that read visible tokens alone, a sampler that draws every token once, and the published numbers."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orderrl.backbones import build_backbone
from orderrl.backbones.mar import MAR, MARConfig, guidance_scale, hidden_after
from orderrl.verification.fixture import load_fixture
from orderrl.verification.mar import replay, tolerances

PARITY = Path(__file__).parents[3] / "shared" / "parity" / "mar_open.safetensors"
CONFIG = MARConfig(
    height=3,
    width=4,
    vae_embed_dim=2,
    patch_size=2,
    class_num=5,
    encoder_embed_dim=32,
    encoder_depth=2,
    encoder_num_heads=4,
    decoder_embed_dim=24,
    decoder_depth=2,
    decoder_num_heads=2,
    buffer_size=3,
    diffloss_d=2,
    diffloss_w=16,
    num_sampling_steps=4,
)


@pytest.fixture(scope="module")
def model() -> MAR:
    """3x4 tokens of 8 channels, encoder and decoder of different widths, large random weights."""
    torch.manual_seed(0)
    model = MAR(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_state(images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, visible sets of different sizes (none, all, and some between), labels with and without a class."""
    n = CONFIG.num_tokens
    count = torch.tensor([0, n, *torch.randint(n + 1, (images - 2,)).tolist()])
    visible = torch.rand(images, n).argsort(1).argsort(1) < count[:, None]
    return torch.randn(images, n, CONFIG.token_dim), visible, torch.arange(images) % (CONFIG.class_num + 1)


def keyed_noise(iteration: int, images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Noise that depends on image and position, whatever the batch or the iteration."""
    rows = []
    for image, position in zip(images.tolist(), positions.tolist(), strict=True):
        generator = torch.Generator().manual_seed(100 * image + position)
        rows.append(torch.randn(1 + CONFIG.num_sampling_steps, CONFIG.token_dim, generator=generator))
    noise = torch.stack(rows, 1) if rows else torch.zeros(1 + CONFIG.num_sampling_steps, 0, CONFIG.token_dim)
    return noise[0], noise[1:]


# ---------------------------------------------------------------------- published numbers


def test_published_outputs_are_reproduced() -> None:
    if not PARITY.exists():
        pytest.skip(f"needs the parity fixture of the official MAR code at {PARITY}, not in the repository")
    fixture = load_fixture(PARITY)
    computed, stated = replay(fixture), tolerances(fixture)
    assert computed.keys() == fixture.outputs.keys()
    for name, recorded in fixture.outputs.items():
        assert computed[name].shape == recorded.shape and computed[name].dtype == recorded.dtype, name
        difference = (computed[name].double() - recorded.double()).abs()
        assert (difference <= torch.as_tensor(stated.get(name, fixture.tolerance(name)))).all(), name


def test_tolerances_in_words_reach_the_rows_they_speak_of() -> None:
    if not PARITY.exists():
        pytest.skip(f"needs the parity fixture of the official MAR code at {PARITY}, not in the repository")
    fixture = load_fixture(PARITY)
    stated = tolerances(fixture)
    first = fixture.inputs["step_t"] == int(fixture.arguments["num_sampling_steps"]) - 1
    for name, wide in (("step_mean", 2e-3), ("step_sample", 2e-3), ("step_pred_xstart", 5e-2)):
        rows = torch.as_tensor(stated[name]).flatten()
        assert rows.tolist() == pytest.approx([wide if at_first else 1e-4 for at_first in first.tolist()])
    assert stated["step_log_variance"] == stated["diff_vb"] == stated["diff_loss"] == 1e-4


@pytest.mark.parametrize(("name", "millions"), [("mar_b", 208), ("mar_l", 479), ("mar_h", 943)])
def test_published_sizes(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = build_backbone(name)
    assert math.ceil(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


# ---------------------------------------------------------------------- tokens


def test_patchify_is_channel_major_and_invertible(model: MAR) -> None:
    latents = torch.randn(2, 2, 6, 8)
    tokens = model.patchify(latents)
    assert torch.equal(model.unpatchify(tokens), latents)
    for row, column, channel, i, j in ((0, 0, 0, 0, 1), (2, 3, 1, 1, 0), (1, 2, 1, 1, 1)):
        entry = tokens[:, row * 4 + column, channel * 4 + i * 2 + j]
        assert torch.equal(entry, latents[:, channel, 2 * row + i, 2 * column + j])


# ---------------------------------------------------------------------- conditions


def test_rows_that_see_different_numbers_of_tokens_equal_rows_alone(model: MAR) -> None:
    tokens, visible, labels = random_state(8)
    assert len(set(visible.sum(1).tolist())) > 2
    together = model.conditions(tokens, visible, labels)
    assert together.shape == (8, CONFIG.num_tokens, model.hidden_size)
    encoded = model.encode(tokens, visible, labels)
    for row in range(8):
        state = tokens[row : row + 1], visible[row : row + 1], labels[row : row + 1]
        torch.testing.assert_close(model.conditions(*state)[0], together[row], rtol=1e-4, atol=1e-5)
        alone = model.encode(*state)[0]
        torch.testing.assert_close(alone, encoded[row, : len(alone)], rtol=1e-4, atol=1e-5)


def test_rows_that_see_equally_many_tokens_equal_rows_alone(model: MAR) -> None:
    tokens, _, labels = random_state(6)
    visible = torch.rand(6, CONFIG.num_tokens).argsort(1).argsort(1) < 5
    together = model.conditions(tokens, visible, labels)
    for row in range(6):
        alone = model.conditions(tokens[row : row + 1], visible[row : row + 1], labels[row : row + 1])[0]
        torch.testing.assert_close(alone, together[row], rtol=1e-4, atol=1e-5)


def test_hidden_tokens_change_nothing_and_visible_ones_do(model: MAR) -> None:
    tokens, visible, labels = random_state(8)
    z = model.conditions(tokens, visible, labels)
    other = torch.where(visible[..., None], tokens, torch.full_like(tokens, torch.nan))
    assert torch.equal(model.conditions(other, visible, labels), z)
    changed = tokens.clone()
    row = 1
    changed[row, 7] += 1
    moved = (model.conditions(changed, visible, labels) - z).abs().amax((1, 2)) > 1e-4
    assert moved.tolist() == [i == row for i in range(8)]


def test_classes_matter_and_no_class_is_the_fake_latent(model: MAR) -> None:
    tokens, visible, labels = random_state(6)
    no_class = torch.full_like(labels, CONFIG.class_num)
    z, z_null = model.conditions(tokens, visible, labels), model.conditions(tokens, visible, no_class)
    assert ((z - z_null).abs().amax((1, 2)) > 1e-4).tolist() == (labels != CONFIG.class_num).tolist()
    twin = MAR(CONFIG).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        twin.class_emb.weight[2] = twin.fake_latent[0]
        torch.testing.assert_close(twin.conditions(tokens, visible, torch.full_like(labels, 2)), z_null)


def test_token_losses_are_both_terms(model: MAR) -> None:
    tokens, visible, labels = random_state(4)
    z, t, noise = model.conditions(tokens, visible, labels), torch.randint(1000, (4, 12)), torch.randn_like(tokens)
    mse, vb = model.diffloss.losses(z, tokens, t, noise)
    assert torch.equal(model.token_losses(z, tokens, t, noise), mse + vb)
    rows = model.token_losses(z[visible], tokens[visible], t[visible], noise[visible])
    torch.testing.assert_close(rows, (mse + vb)[visible], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- sampling


@pytest.mark.parametrize("num_iter", [1, 3, 12, 30])
def test_sampler_draws_every_token_once_from_the_end_of_the_order(model: MAR, num_iter: int) -> None:
    orders = torch.rand(3, 12).argsort(1)
    drawn: list[list[int]] = [[], [], []]
    steps = list(model.sampling_iterations(torch.tensor([0, 1, 5]), orders, keyed_noise, num_iter))
    assert len(steps) == num_iter
    for step in steps:
        for row in range(3):
            here = step.positions[step.images == row].tolist()
            assert here == sorted(here)
            tail = orders[row, 12 - len(drawn[row]) - len(here) : 12 - len(drawn[row])]
            assert sorted(tail.tolist()) == here
            drawn[row] += here
        assert torch.equal(step.tokens[step.images, step.positions], step.drawn)
    assert [sorted(row) for row in drawn] == [list(range(12))] * 3


def test_sampler_conditions_on_what_it_drew(model: MAR) -> None:
    labels, orders = torch.tensor([3, 4]), torch.rand(2, 12).argsort(1)
    steps = list(model.sampling_iterations(labels, orders, keyed_noise, 4, cfg=2.0, temperature=0.5))
    tokens, visible = torch.zeros_like(steps[0].tokens), torch.zeros(2, 12, dtype=torch.bool)
    for iteration, step in enumerate(steps):
        z = model.conditions(tokens, visible, labels)[step.images, step.positions]
        torch.testing.assert_close(step.conditions, z, rtol=1e-4, atol=1e-4)
        start, noise = keyed_noise(iteration, step.images, step.positions)
        scale = guidance_scale(2.0, "linear", step.num_hidden, 12)
        wanted = model.diffloss.sample(step.conditions, start, noise, 0.5, scale, step.unconditional)
        assert torch.equal(step.drawn, wanted)
        tokens, visible = step.tokens, visible.index_put((step.images, step.positions), torch.tensor(True))


def test_sampling_does_not_depend_on_the_batch_or_on_global_random_numbers(model: MAR) -> None:
    labels, orders = torch.tensor([3, 4]), torch.rand(2, 12).argsort(1)
    *_, both = model.sampling_iterations(labels, orders, keyed_noise, 3, cfg=1.5, cfg_schedule="constant")
    torch.manual_seed(123)
    *_, alone = model.sampling_iterations(labels[:1], orders[:1], keyed_noise, 3, cfg=1.5, cfg_schedule="constant")
    torch.testing.assert_close(
        alone.tokens[0], both.tokens[0], rtol=1e-3, atol=1e-2
    )  # the first reverse step magnifies rounding


def test_schedules() -> None:
    left = [12]
    for iteration in range(4):
        left.append(hidden_after(iteration, 4, left[-1], 12))
    assert left[1:] == [math.floor(12 * math.cos(math.pi / 8 * i)) for i in (1, 2, 3)] + [1]
    assert hidden_after(0, 100, 12, 12) == 11 and hidden_after(50, 100, 1, 12) == 1
    assert guidance_scale(3.0, "constant", 6, 12) == 3.0
    assert guidance_scale(3.0, "linear", 6, 12) == 2.0 and guidance_scale(1.0, "linear", 6, 12) == 1.0


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 0}, "height must be at least 1, got 0"),
        ({"buffer_size": 0}, "buffer_size must be at least 1, got 0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be positive, got 0.0"),
        ({"attn_dropout": 1.0}, r"attn_dropout must lie in \[0, 1\), got 1.0"),
        ({"encoder_num_heads": 5}, "encoder_num_heads=5 must divide encoder_embed_dim=32"),
        ({"decoder_num_heads": 5}, "decoder_num_heads=5 must divide decoder_embed_dim=24"),
        ({"num_sampling_steps": 1}, "num_sampling_steps must lie in 2..1000, got 1"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
