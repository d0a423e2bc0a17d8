"""Token sets in memory."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from orderrl.data import TokenSet, load_split


def continuous_set() -> TokenSet:
    """Five images of 2x3 continuous tokens of 4 channels; their decoder paints every token's first channel."""
    tokens = torch.rand(5, 6, 4, generator=torch.Generator().manual_seed(0))

    def decoder(tokens: torch.Tensor) -> torch.Tensor:
        grey = (tokens[..., 0] * 255).to(torch.uint8)
        return grey.view(-1, 1, 2, 3).expand(-1, 3, -1, -1)

    return TokenSet("drawn", "test", tokens, torch.arange(5), 2, 3, 0, 5, token_dim=4, decoder=decoder)


def test_digits_are_grey_levels() -> None:
    data = load_split("digits", "test")
    images = data.images(data.tokens[:4])
    assert images.shape == (4, 3, 8, 8) and images.dtype == torch.uint8
    assert torch.equal(images[:, 0].flatten(1), (data.tokens[:4] * 255 / 16).round().to(torch.uint8))
    assert data.decoder is None and data.token_dim == 0
    assert data.class_names == tuple("0123456789")


def test_the_decoder_sees_one_dimension_of_images_whatever_the_shape() -> None:
    data = continuous_set()
    images = data.images(data.tokens)
    assert images.shape == (5, 3, 2, 3)
    assert torch.equal(data.images(data.tokens[2]), images[2])
    assert torch.equal(data.images(data.tokens[:4].unflatten(0, (2, 2))), images[:4].unflatten(0, (2, 2)))

    labels = torch.zeros(5, dtype=torch.int64)
    discrete = TokenSet("d", "test", torch.arange(6).expand(5, 6), labels, 2, 3, 6, 1, decoder=lambda t: (
        t.view(-1, 1, 2, 3).expand(-1, 3, -1, -1).to(torch.uint8)
    ))  # fmt: skip
    assert torch.equal(discrete.images(discrete.tokens[0]), discrete.images(discrete.tokens)[0])


def test_continuous_tokens_without_a_decoder_have_no_images() -> None:
    data = replace(continuous_set(), decoder=None)
    with pytest.raises(ValueError, match="no decoder"):
        data.images(data.tokens)


def test_the_fingerprint_follows_every_token() -> None:
    data = continuous_set()
    changed = data.tokens.clone()
    changed[3, 2, 1] += 1
    assert data.fingerprint == continuous_set().fingerprint != replace(data, tokens=changed).fingerprint
    assert replace(data, identity="given").fingerprint == "given"


def test_unknown_names_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"digits.*tokens:FOLDER"):
        load_split("imagenet", "test")
    with pytest.raises(ValueError, match=r"orderrl\.tokenize"):
        load_split("folder", "test")
    with pytest.raises(FileNotFoundError, match="no token set"):
        load_split("tokens:/nowhere", "test")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"tokens": torch.full((2, 4), 5)}, r"data 'x', split 'test': tokens must lie in 0..4, they lie in 5..5"),
        ({"tokens": torch.full((2, 4), -1)}, "tokens must lie in 0..4"),
        ({"tokens": torch.zeros(2, 4)}, "tokens must be int64, got torch.float32"),
        ({"tokens": torch.zeros(2, 3, dtype=torch.int64)}, r"tokens must have the shape \(2, 4\)"),
        ({"labels": torch.tensor([0, 3])}, "labels must lie in 0..2, they lie in 0..3"),
        ({"labels": torch.tensor([0])}, "tokens must have the shape"),
        ({"tokens": torch.full((2, 4, 3), torch.nan), "vocab_size": 0, "token_dim": 3}, "must be finite"),
    ],
)
def test_what_is_no_image_of_the_grid_is_refused(changed: dict[str, Any], match: str) -> None:
    good = TokenSet("x", "test", torch.zeros(2, 4, dtype=torch.int64), torch.tensor([0, 2]), 2, 2, 5, 3)
    with pytest.raises(ValueError, match=match):
        replace(good, **changed)
