"""Loading tokenisers by name and path."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orderrl.tokenizers import PRESETS, VQConfig, VQTokenizer, load_tokenizer, registry, save_tokenizer
from tests.tokenizers.helpers import STACK, save_tiny_vq, tiny_vq


def test_an_own_tokeniser_comes_back_frozen_and_the_same(tmp_path: Path) -> None:
    path = save_tiny_vq(tmp_path / "own.safetensors")
    for loaded in (load_tokenizer(path), load_tokenizer("small", path)):
        assert loaded.fingerprint == tiny_vq().fingerprint and loaded.name == "small"
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_published_files_load_with_or_without_the_usage_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setitem(PRESETS, "vq16", VQConfig(24, 4, True, 32, STACK, STACK))
    state = tiny_vq().state_dict()
    for extra in ({}, {"quantize.codebook_used": torch.zeros(65536)}):
        path = tmp_path / f"published{suffix}"
        if suffix == ".pt":
            torch.save({"model": state | extra}, path)
        else:
            save_file({key: value.clone() for key, value in (state | extra).items()}, path)
        loaded = load_tokenizer("vq16", path)
        assert loaded.name == "vq16" and loaded.fingerprint == tiny_vq().fingerprint


def test_a_file_that_does_not_fit_is_refused_with_its_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.PRESETS, "vq16", VQConfig(24, 4, True, 32, STACK, STACK))
    state = {key: value.clone() for key, value in tiny_vq().state_dict().items()}
    del state["quant_conv.bias"]
    save_file(state | {"surplus": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"missing: quant_conv\.bias.*unexpected: surplus"):
        load_tokenizer("vq16", tmp_path / "other.safetensors")


def test_names_that_say_nothing_are_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vq16, vq8, kl16, patches2, patches4, patches8, small"):
        load_tokenizer("vq32")
    with pytest.raises(ValueError, match=r"vq16 needs weights: give tokenizer\.path=FILE.*vq_ds16_c2i\.pt"):
        load_tokenizer("vq16")
    with pytest.raises(ValueError, match=r"orderrl\.pretrain backbone=none"):
        load_tokenizer("small")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        load_tokenizer("vq16", tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load_tokenizer(tmp_path / "nowhere.safetensors")


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    tokenizer = VQTokenizer(VQConfig(24, 4, True, 32, STACK, STACK), "small")
    save_tokenizer(tmp_path / "odd.safetensors", tokenizer, {"model": {"layers": 3}})
    with pytest.raises(ValueError, match="does not describe a VQ tokeniser"):
        load_tokenizer(tmp_path / "odd.safetensors")
