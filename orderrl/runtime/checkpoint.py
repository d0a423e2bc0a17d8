"""Checkpoints: safetensors files that carry their own configuration and a hash of it and their tensors."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from orderrl.runtime.finite import leaves, require_finite
from orderrl.runtime.jsonfile import parse_json
from orderrl.runtime.storage import written_aside
from orderrl.runtime.terminal import shorten

T = TypeVar("T", bound=nn.Module)
FORMAT = 1
MOST_CONFIG_BYTES = 2**20
_DIGEST = "sha256"
_REPEATED = re.compile(r"(?:^|[._])(?:layers|depth|stem|core|num_res_blocks|diffloss_d)$")  # keys that count parts
_MISFIT = "use the checkpoint's own configuration, or a checkpoint made for this one"
_PICKLE_SUFFIXES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def save_checkpoint(path: Path | str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write tensors and the configuration that rebuilds their owner to one safetensors file.

    The file is written aside and then moved into place, so ``path`` always holds a whole checkpoint.

    Args:
        path: the file; its folder is made if need be.
        tensors: names and tensors of any device; stored as they are, on the CPU.
        config: plain values (JSON). Its ``kind`` says what this is a checkpoint of, such as ``backbone``, ``planner``
            or ``classifier``.

    Raises:
        ValueError: if ``path`` does not end in ``.safetensors``, ``config`` names no kind, or a tensor is not finite.
        TypeError: if ``config`` holds something that JSON cannot.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a checkpoint's name must end in .safetensors")
    kind = config.get("kind")
    if not isinstance(kind, str):
        raise ValueError(f"{path}: config['kind'] must name what is saved, such as 'planner', got {kind!r}")
    require_finite(path, tensors, f"nothing was written; the training that made this {kind} diverged")
    metadata = {"format": str(FORMAT), "kind": kind, "config": json.dumps(config, sort_keys=True)}
    # A copy each: safetensors refuses tensors that share their memory, such as tied embeddings.
    contents = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    metadata[_DIGEST] = _digest(contents, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        save_file(contents, aside, metadata=metadata)
        _sort_header(aside)
        aside.chmod(0o644)  # safetensors writes files that others cannot read


def load_checkpoint(path: Path | str, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint of the given kind.

    Returns:
        The tensors on the CPU, and the configuration.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a pickle, truncated or damaged, not an OrderRL checkpoint, of a newer format or of
            another kind. One line each, which says what to do.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a checkpoint" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path}: {what}; give the path of a {kind} checkpoint (.safetensors)")
    _refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            config = _read_config(path, metadata, kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(
            f"{path}: is truncated, damaged or not a safetensors file ({error}); copy it again or make it anew"
        ) from error
    if _DIGEST in metadata and metadata[_DIGEST] != _digest(tensors, metadata):  # older versions kept none
        raise ValueError(f"{path}: is altered (its checksum is not the one in it); copy it again or make it anew")
    return tensors, config


def load_state(module: nn.Module, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Load tensors into a module, all of them and nothing else.

    Args:
        module: changed in place, and only if everything fits.
        tensors: the module's state dictionary.
        path: where they came from, for the message.

    Raises:
        ValueError: if keys are missing, unexpected or of another shape, all of them in one line; or if a tensor is not
            finite.
    """
    require_fit(module, {name: value.shape for name, value in tensors.items()}, path, _MISFIT)
    require_finite(path, tensors, "the training that made it diverged, or the file is damaged; use another one")
    module.load_state_dict(dict(tensors))


def rebuild(build: Callable[[], T], shape: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path | str) -> T:
    """Build the owner of a checkpoint's tensors and fill it, but only if it is no larger than they are.

    ValueError if the shape, the configuration read from the file, asks for more layers, or other shapes, than the file
    has tensors.
    """
    # every repeated part brings at least one tensor, so a number of parts above theirs is a lie, and would take hours
    for name, value in leaves(shape, int | float).items():
        if _REPEATED.search(name) and value > len(tensors):
            raise ValueError(f"{path}: its configuration has {name}={value}, but the file holds {len(tensors)} tensors")
    try:
        with torch.device("meta"):  # takes no memory
            module = build()
    except (RuntimeError, ValueError, TypeError) as error:  # sizes whose product overflows, widths that do not divide
        raise ValueError(f"{path}: its configuration cannot be built ({error}); make the checkpoint anew") from error
    require_fit(module, {name: value.shape for name, value in tensors.items()}, path, _MISFIT)
    module = build()
    load_state(module, tensors, path)
    return module


def require_fit(module: nn.Module, shapes: Mapping[str, torch.Size], path: Path | str, advice: str) -> None:
    """Refuse, in one line that ends with the advice, a file whose tensors are not exactly those of a module."""
    expected = module.state_dict()
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(shapes[name])} instead of {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & shapes.keys())
            if shapes[name] != expected[name].shape
        ],
    }
    found = "; ".join(f"{what}: {shorten(names)}" for what, names in problems.items() if names)
    if found:
        raise ValueError(f"{path}: does not fit {type(module).__name__} ({found}); {advice}")


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of names, dtypes, shapes and contents of all tensors, and of the configuration."""
    found = hashlib.sha256(json.dumps([metadata[key] for key in ("format", "kind", "config")]).encode())
    for name in sorted(tensors):
        values = tensors[name]
        found.update(json.dumps([name, str(values.dtype), list(values.shape)]).encode())
        found.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)  # numpy has no bfloat16
    return found.hexdigest()


def _sort_header(path: Path) -> None:
    """Sort what a safetensors file says of itself, so that equal checkpoints have equal bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # always, as long as both write JSON as short as can be
            file.seek(8)
            file.write(text.ljust(length))


def _refuse_pickle(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if path.suffix in _PICKLE_SUFFIXES or magic.startswith(_PICKLE_MAGIC):
        raise ValueError(
            f"{path}: is a pickle, which could run code when it is loaded; only .safetensors checkpoints are read here"
        )


def _read_config(path: Path, metadata: Mapping[str, str], kind: str) -> dict[str, Any]:
    if not {"format", "kind", "config"} <= metadata.keys():
        raise ValueError(f"{path}: was not written by OrderRL (it holds no configuration); give a {kind} checkpoint")
    if metadata["format"] != str(FORMAT):
        raise ValueError(
            f"{path}: has checkpoint format {metadata['format']}, this version reads {FORMAT}; "
            "use the OrderRL that wrote it, or make it anew"
        )
    if metadata["kind"] != kind:
        raise ValueError(f"{path}: is a {metadata['kind']} checkpoint; give a {kind} checkpoint")
    config = parse_json(metadata["config"], f"{path}: its configuration", MOST_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: its configuration is damaged (not a mapping); make the checkpoint anew")
    return config
