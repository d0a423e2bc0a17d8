"""VQ tokenisers: the search, the lookup, shapes, and agreement with recorded runs."""

from pathlib import Path

import pytest
import torch

from orderrl.tokenizers import PRESETS, StackConfig, Tokenizer, VQConfig, VQTokenizer, build_tokenizer
from orderrl.verification import vq
from orderrl.verification.fixture import load_fixture
from tests.tokenizers.helpers import STACK, tiny_vq

PARITY = Path(__file__).resolve().parents[3] / "shared" / "parity"
FIXTURES = sorted(PARITY.glob("llamagen_vq*.safetensors"))


@pytest.mark.skipif(not FIXTURES, reason=f"no recorded runs of LlamaGen's VQ tokeniser in {PARITY}")
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_recorded_runs_are_reproduced(path: Path) -> None:
    fixture = load_fixture(path)
    ours = vq.replay(fixture)
    assert ours.keys() >= fixture.outputs.keys()
    for name, recorded in fixture.outputs.items():
        assert ours[name].dtype == recorded.dtype
        assert (ours[name] - recorded).abs().max() <= fixture.tolerance(name), name


@pytest.mark.parametrize("l2_norm", [True, False])
def test_the_nearest_code_is_that_of_brute_force(l2_norm: bool) -> None:
    tokenizer = tiny_vq(l2_norm)
    latents = torch.randn(2, 5, 3, 4)
    codes = tokenizer.quantize.embedding.weight
    for place in ((0, 0, 0), (0, 4, 2), (1, 2, 1), (1, 3, 0)):
        x = latents[place]
        distances = []
        for code in codes:
            a, b = (x / x.norm(), code / code.norm()) if l2_norm else (x, code)
            distances.append(((a - b) ** 2).sum().item())
        assert tokenizer.quantize.nearest(latents)[place] == distances.index(min(distances))


def test_the_first_of_equal_codes_is_chosen() -> None:
    tokenizer = tiny_vq(False)
    tokenizer.quantize.embedding.weight[7] = tokenizer.quantize.embedding.weight[3]
    assert tokenizer.quantize.nearest(tokenizer.quantize.embedding.weight[7]) == 3


def test_codes_are_of_unit_length_at_lookup_only_if_the_codebook_is_normalised() -> None:
    everything = torch.arange(24)
    normalised, plain = tiny_vq(True).quantize, tiny_vq(False).quantize
    assert torch.allclose(normalised.lookup(everything).norm(dim=-1), torch.ones(24))
    assert torch.equal(plain.lookup(everything), plain.embedding.weight)
    assert not torch.allclose(plain.lookup(everything).norm(dim=-1), torch.ones(24), atol=0.1)


def test_the_length_of_a_stored_code_changes_nothing_if_the_codebook_is_normalised() -> None:
    tokenizer = tiny_vq(True)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    tokens = tokenizer.encode(images)
    before = tokenizer.decode(tokens, (4, 4))
    tokenizer.quantize.embedding.weight.mul_(torch.linspace(0.5, 3, 24)[:, None])
    assert torch.equal(tokenizer.encode(images), tokens)
    assert (tokenizer.decode(tokens, (4, 4)).int() - before.int()).abs().max() <= 1


def test_tokens_and_images_have_the_shapes_of_the_grid_also_if_it_is_not_square() -> None:
    tokenizer = tiny_vq()
    assert isinstance(tokenizer, Tokenizer)
    images = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (3, 24) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < tokenizer.vocab_size and len(tokens.unique()) > 3
    decoded = tokenizer.decode(tokens, (4, 6))
    assert decoded.shape == images.shape and decoded.dtype == torch.uint8


def test_tokens_stand_in_raster_order() -> None:
    tokenizer = tiny_vq()
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    _, indices = tokenizer.quantise(tokenizer.latents(images))
    assert torch.equal(tokenizer.encode(images), indices.flatten(1))
    assert torch.equal(indices[1, 2], tokenizer.encode(images)[1, 12:18])


def test_eight_bit_images_count_as_their_scaled_values() -> None:
    tokenizer = tiny_vq()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(tokenizer.encode(images), tokenizer.encode(images / 127.5 - 1))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 3, 7, 8, dtype=torch.uint8), ValueError, "7x8.*multiples of 2"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), ValueError, "(n, 3, H, W)"),
        (torch.full((1, 3, 8, 8), 200.0), ValueError, r"\[-1, 1\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), TypeError, "uint8"),
    ],
)
def test_images_that_cannot_be_encoded_are_refused(images: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("(n, 3, H, W)", r"\(n, 3, H, W\)")):
        tiny_vq().encode(images)


def test_tokens_that_cannot_be_decoded_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(n, 16\)"):
        tiny_vq().decode(torch.zeros(1, 15, dtype=torch.int64), (4, 4))
    with pytest.raises(ValueError, match=r"\[0, 24\)"):
        tiny_vq().decode(torch.full((1, 16), 24), (4, 4))


def test_the_straight_through_gradient_reaches_the_encoder_as_if_nothing_were_quantised() -> None:
    tokenizer = VQTokenizer(VQConfig(24, 4, False, 32, STACK, STACK))
    latents = torch.randn(1, 4, 2, 2, requires_grad=True)
    weight = torch.randn(1, 4, 2, 2)
    (tokenizer.quantise(latents)[0] * weight).sum().backward()
    assert latents.grad is not None and torch.allclose(latents.grad, weight)


def test_the_presets_have_the_published_size_and_factor() -> None:
    with torch.device("meta"):
        built = {name: VQTokenizer(config) for name, config in PRESETS.items() if isinstance(config, VQConfig)}
    assert {name: model.downsampling for name, model in built.items()} == {"vq16": 16, "vq8": 8}
    assert {name: model.vocab_size for name, model in built.items()} == {"vq16": 16384, "vq8": 16384}
    assert round(sum(p.numel() for p in built["vq16"].parameters()) / 1e6) == 72  # Sun et al. (2024): 72 M


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
        ({"encoder": {"ch": 20}}, "ch=20 must be a multiple of 32"),
        ({"encoder": {"ch_mult": []}}, "ch_mult"),
        ({"encoder": {"chh": 1}}, "no key chh"),
        ({"encoder": StackConfig(ch_mult=(1, 2))}, "same length"),
    ],
)
def test_impossible_shapes_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQConfig(**values)  # type: ignore[arg-type]


def test_the_fingerprint_follows_weights_and_shape() -> None:
    first, again, other = tiny_vq(seed=0), tiny_vq(seed=0), tiny_vq(seed=1)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    plain = build_tokenizer(VQConfig(24, 4, False, 32, STACK, STACK), "small")
    plain.load_state_dict(first.state_dict())
    assert plain.fingerprint != first.fingerprint
