"""Published weights in every wrapping that files come in, and every refusal."""

from __future__ import annotations

import argparse
import json
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from orderrl.backbones import load_backbone
from orderrl.backbones.registry import new_backbone
from orderrl.runtime.weights import AVERAGED, NESTINGS, clean_names, load_weights, local_path, read_state
from tests.backbones.families import CAUSAL, images, tiny

SHAPE = CAUSAL | {"height": 4, "width": 4}
STATE: dict[str, Tensor] = tiny("randar", 4, 4, 1).state_dict()


def fresh() -> Any:
    return new_backbone("randar", SHAPE | {"block_size": 1})


def equals_state(model: Any) -> bool:
    return all(torch.equal(value, STATE[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("nesting", [None, *NESTINGS])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_nested_pickles(nesting: str | None, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    torch.save(STATE if nesting is None else {nesting: STATE, "epoch": 3}, path)
    assert equals_state(load_weights(fresh(), path))


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    other = {name: value + 1 for name, value in STATE.items()}
    torch.save({"model": other, "model_ema": STATE}, tmp_path / "w.pt")
    assert equals_state(load_weights(fresh(), tmp_path / "w.pt"))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"module.module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
        lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ],
)
def test_prefixes_of_wrappers(wrap: Any, tmp_path: Path) -> None:
    save_file({wrap(name): value for name, value in STATE.items()}, tmp_path / "w.safetensors")
    assert equals_state(load_weights(fresh(), tmp_path / "w.safetensors"))


def test_a_module_called_module_is_no_wrapper() -> None:
    assert set(clean_names({"module.a": torch.zeros(1), "b": torch.zeros(1)})) == {"module.a", "b"}


def test_shards(tmp_path: Path) -> None:
    names = sorted(STATE)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, kept in parts.items():
        save_file({name: STATE[name] for name in kept}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, kept in parts.items() for name in kept}}))
    assert equals_state(load_weights(fresh(), index))
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"two\.safetensors: does not exist"):
        load_weights(fresh(), index)


def test_keys_that_do_not_fit_are_listed_not_skipped(tmp_path: Path) -> None:
    state = dict(STATE)
    state["extra.weight"] = torch.zeros(1)
    state["norm.weight"] = torch.zeros(5)
    del state["output.weight"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="does not fit OrderRobustTransformer") as error:
        load_weights(fresh(), tmp_path / "w.safetensors")
    for part in ("missing: output.weight", "unexpected: extra.weight", "norm.weight (5,) instead of (32,)"):
        assert part in str(error.value)


class Settings:
    """Of a training script; a file with such an object is not opened."""


@pytest.mark.parametrize(
    ("beside", "advised"), [({}, "model"), ({"model_ema": STATE}, "model_ema"), ({"ema": STATE}, "ema")]
)
def test_pickles_that_want_more_are_refused_with_the_reason(
    beside: dict[str, Any], advised: str, tmp_path: Path
) -> None:
    torch.save({"model": STATE, **beside, "args": Settings()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"holds more than tensors .*Settings.*checkpoint\['{advised}'\]"):
        read_state(tmp_path / "w.pt")


AROUND: dict[str, Any] = {
    "arguments": argparse.Namespace(lr=1e-4, output_dir=Path("out"), betas=(0.9, 0.95)),
    "simple": types.SimpleNamespace(lr=1e-4),
    "plain": {"lr": 1e-4},
}
WRAPPED: dict[str, Any] = {
    "as it is": lambda name: name,
    "DDP": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled DDP": lambda name: f"module._orig_mod.{name}",
    "DDP compiled": lambda name: f"_orig_mod.module.{name}",
}


@pytest.mark.parametrize("averaged", AVERAGED)
@pytest.mark.parametrize("around", AROUND)
def test_training_checkpoints_give_the_averaged_weights_and_say_so(
    averaged: str, around: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = {name: value + 1 for name, value in STATE.items()}
    for wrapping, wrap in WRAPPED.items():
        kept = {wrap(name): value for name, value in STATE.items()}
        saved = {"model": raw, averaged: kept, "optimizer": {"state": {}}, "epoch": 3, "args": AROUND[around]}
        torch.save(saved, tmp_path / "w.pth")
        assert equals_state(load_weights(fresh(), tmp_path / "w.pth")), wrapping
        assert f"takes {averaged} (averaged weights), not model" in capsys.readouterr().out


def test_an_averaged_model_of_torch_is_unwrapped(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(load_weights(fresh(), saved(tmp_path / "w.pt", STATE)))
    raw = {name: value + 1 for name, value in STATE.items()}
    path = saved(tmp_path / "both.pt", {"model": raw, "ema": averaged.state_dict(), "args": AROUND["arguments"]})
    assert equals_state(load_weights(fresh(), path))


def saved(path: Path, contents: Any) -> Path:
    torch.save(contents, path)
    return path


class Attack:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_arguments_that_are_admitted_run_no_code(tmp_path: Path) -> None:
    """Whatever stands inside them: calls are refused, and names of their own methods are only values."""
    mark = tmp_path / "mark"
    for inside in (Attack(os.mkdir, str(mark)), Attack(eval, f"open({str(mark)!r}, 'w')"), Attack(getattr, "", "join")):
        for hidden in ({"lr": inside}, {"__setstate__": inside}, {"__class__": inside}):
            arguments = argparse.Namespace()
            arguments.__dict__.update(hidden)
            for suffix, zipped in ((".pt", True), (".pth", False)):
                torch.save(
                    {"model": STATE, "args": arguments}, tmp_path / f"w{suffix}", _use_new_zipfile_serialization=zipped
                )
                with pytest.raises(ValueError, match="could run code"):
                    read_state(tmp_path / f"w{suffix}")
    assert not mark.exists()
    shadowed = argparse.Namespace()
    shadowed.__dict__.update({"__setstate__": "os.system", "__class__": "x", "__reduce__": 1})
    assert equals_state(load_weights(fresh(), saved(tmp_path / "w.pt", {"model": STATE, "args": shadowed})))


def test_broken_files(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save(STATE, tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:500])
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": 1}, tmp_path / "number.pt")
    (tmp_path / "w.npz").write_bytes(b"")
    for file, message in {
        "w.safetensors": "truncated, damaged or not a safetensors file",
        "w.pt": "truncated, damaged or no PyTorch file",
        "list.pt": "holds a list, not a state dict",
        "number.pt": "is no state dict, it holds a",
        "w.npz": "must end in .safetensors",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_state(tmp_path / file)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_state(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one file in one revision, without a network."""
    commit = "0" * 40
    repository = tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    for ref in ("main", "v1"):
        (repository / "refs" / ref).write_text(commit)
    save_file(STATE, snapshot / "w.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_hub_names(hub: Path) -> None:
    assert equals_state(load_weights(fresh(), "hf://someone/model/w.safetensors"))
    assert local_path("hf://someone/model@v1/w.safetensors").is_file()
    with pytest.raises(ValueError, match="cannot be downloaded or found in the hub's cache"):
        local_path("hf://someone/model/other.safetensors")
    with pytest.raises(ValueError, match="cannot be downloaded or found in the hub's cache"):
        local_path("hf://someone/model@v2/w.safetensors")
    with pytest.raises(ValueError, match=r"is no hub name; write hf://OWNER/NAME"):
        local_path("hf://someone")


def test_a_published_model_with_a_path(tmp_path: Path) -> None:
    """The tiny stand-in of a published checkpoint: the preset's layout with smaller values."""
    save_file(STATE, tmp_path / "w.safetensors")
    shape = CAUSAL | {"height": 4, "width": 4, "block_size": 2, "multiple_of": 32}
    backbone: Any = load_backbone("randar_l", tmp_path / "w.safetensors", shape=shape)
    assert equals_state(backbone) and backbone.geometry.num_blocks == 4
    assert not backbone.training and not any(parameter.requires_grad for parameter in backbone.parameters())
    half: Any = load_backbone("randar_l", tmp_path / "w.safetensors", dtype="bfloat16", shape=shape)
    assert half.norm.weight.dtype == torch.bfloat16 and half.rope.dtype == torch.float32
    assert torch.equal(half.output.weight, STATE["output.weight"].bfloat16())
    assert images(backbone, 1).tokens.shape == (1, 16)
