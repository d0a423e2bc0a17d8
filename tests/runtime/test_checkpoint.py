"""Checkpoints come back as they were written, and every file that is not one is refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from orderrl.runtime.checkpoint import load_checkpoint, load_state, save_checkpoint

CONFIG = {"kind": "planner", "width": 8, "budgets": [1, 2, 4], "name": None}


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {"a": torch.randn(3, 4), "b": torch.arange(5), "half": torch.randn(2).bfloat16()}


@pytest.fixture
def path(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    save_checkpoint(tmp_path / "deep" / "x.safetensors", tensors, CONFIG)
    return tmp_path / "deep" / "x.safetensors"


def _message(path: Path, error: type[Exception] = ValueError, kind: str = "planner") -> str:
    with pytest.raises(error) as caught:
        load_checkpoint(path, kind)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_round_trip(path: Path, tensors: dict[str, Tensor]) -> None:
    loaded, config = load_checkpoint(path, "planner")
    assert config == CONFIG
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_views_and_shared_memory_are_saved(tmp_path: Path) -> None:
    whole = torch.randn(4, 6, requires_grad=True)
    save_checkpoint(tmp_path / "x.safetensors", {"a": whole, "b": whole, "t": whole.T[1:]}, CONFIG)
    loaded, _ = load_checkpoint(tmp_path / "x.safetensors", "planner")
    assert torch.equal(loaded["a"], whole) and torch.equal(loaded["b"], whole) and torch.equal(loaded["t"], whole.T[1:])


def test_a_failed_save_leaves_the_old_checkpoint(
    path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def fail(_: object, aside: Path, **__: object) -> None:
        Path(aside).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("orderrl.runtime.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, tensors, CONFIG)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("config", [{}, {"kind": 3}])
def test_a_checkpoint_names_its_kind(tmp_path: Path, config: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="kind"):
        save_checkpoint(tmp_path / "x.safetensors", {}, config)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_named_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.safetensors"):
        save_checkpoint(tmp_path / "x.pt", {}, CONFIG)


def test_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in _message(tmp_path / "nowhere.safetensors", FileNotFoundError)
    assert "folder" in _message(tmp_path, FileNotFoundError)


@pytest.mark.parametrize("keep", [0, 4, 20, 0.5, -1])
def test_truncated_file(path: Path, keep: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))] if isinstance(keep, float) else whole[:keep])
    assert "truncated" in _message(path)


@pytest.mark.parametrize("name", ["x.pt", "x.pth", "x.safetensors", "x"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_refused_whatever_their_name(tmp_path: Path, name: str, zipped: bool) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    message = _message(tmp_path / name)
    assert "pickle" in message and "run code" in message


def test_foreign_safetensors_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert "not written by OrderRL" in _message(tmp_path / "x.safetensors")


def test_another_kind(path: Path) -> None:
    message = _message(path, kind="backbone")
    assert "planner" in message and "backbone" in message


def test_another_format(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x.safetensors", metadata={"format": "99", "kind": "planner", "config": "{}"})
    assert "format 99" in _message(tmp_path / "x.safetensors")


def test_load_state_fills_a_module(path: Path) -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    load_state(target, source.state_dict(), path)
    assert torch.equal(source.weight, target.weight) and torch.equal(source.bias, target.bias)


def test_load_state_names_all_that_does_not_fit_and_changes_nothing(path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tensors = {
        "0.weight": torch.zeros(5, 3),
        "0.bias": torch.zeros(2),
        "1.bias": torch.zeros(2),
        "head": torch.zeros(1),
    }
    with pytest.raises(ValueError) as caught:
        load_state(module, tensors, path)
    message = str(caught.value)
    for part in (str(path), "missing: 1.weight", "unexpected: head", "0.weight (5, 3) instead of (2, 3)"):
        assert part in message
    assert "\n" not in message
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_others_can_read_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"kind": "planner"})
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o044 == 0o044


def test_equal_checkpoints_have_equal_bytes_in_every_process(path: Path, tensors: dict[str, Tensor]) -> None:
    """The library writes metadata in an order of its own, another one in every call."""
    for number in range(8):
        again = path.with_name(f"{number}.safetensors")
        save_checkpoint(again, dict(reversed(tensors.items())), dict(reversed(CONFIG.items())))
        assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("place", ["a tensor", "the configuration"])
def test_a_single_altered_bit_is_refused(path: Path, place: str) -> None:
    content = bytearray(path.read_bytes())
    content[-3 if place == "a tensor" else content.index(b"width")] ^= 1
    path.write_bytes(content)
    assert "is altered (its checksum is not the one in it)" in _message(path)


def test_checkpoints_of_versions_without_checksums_are_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    metadata = {"format": "1", "kind": "planner", "config": json.dumps(CONFIG)}
    save_file(tensors, tmp_path / "old.safetensors", metadata=metadata)
    assert load_checkpoint(tmp_path / "old.safetensors", "planner")[1] == CONFIG
