"""Patches of pixels as tokens: nothing is lost, nothing is trained."""

from pathlib import Path

import pytest
import torch

from orderrl.data import load_split
from orderrl.data.encode import tokenize_folder
from orderrl.data.folder import FolderConfig
from orderrl.tokenizers import load_tokenizer
from tests.tokenizers.helpers import image_folder


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("side", [2, 4, 8])
def test_decoding_gives_the_pixels_back(side: int) -> None:
    tokenizer, images = load_tokenizer(f"patches{side}"), pixels(3, 3, 16, 24)
    tokens = tokenizer.encode(images)
    assert tokens.shape == (3, (16 // side) * (24 // side), 3 * side**2)
    assert torch.equal(tokenizer.decode(tokens, (16 // side, 24 // side)), images)


def test_a_token_is_its_own_patch_and_no_other() -> None:
    tokenizer, images = load_tokenizer("patches4"), pixels(1, 3, 32, 32)
    changed = images.clone()
    changed[:, :, 4:8, 8:12] = 255 - changed[:, :, 4:8, 8:12]  # row 1, column 2 of 8x8
    differs = (tokenizer.encode(images) != tokenizer.encode(changed)).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == [1 * 8 + 2]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        load_tokenizer("patches4").encode(pixels(1, 3, 6, 8))
    with pytest.raises(ValueError, match="tokenizer=patches4 has no weights, got path='a"):
        load_tokenizer("patches4", "a.pt")


def test_an_image_folder_is_a_set_of_continuous_tokens_without_any_training(tmp_path: Path) -> None:
    folder = FolderConfig(root=str(image_folder(tmp_path / "images")), image_size=16)
    written = tokenize_folder(load_tokenizer("patches4"), folder, tmp_path / "set", None)
    data = load_split(f"tokens:{written}", "backbone")
    assert (data.height, data.width, data.token_dim, data.vocab_size) == (4, 4, 48, 0)
    images = data.images(data.tokens[:])
    assert torch.equal(load_tokenizer("patches4").encode(images), data.tokens[:])
