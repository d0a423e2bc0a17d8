"""Recorded numbers of a published implementation, and how far ours may lie from them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from orderrl.runtime.devices import checked_device
from orderrl.runtime.jsonfile import read_json

DEFAULT_TOLERANCE = 1e-4  # float32
# A guidance scale as meanings state it: "cfg_scale 3.0", "cfg_scales (1.0, 4.0)", "guidance_scale 4.0", "cfg 2.0".
_SCALE = re.compile(r"\b(?:cfg_scales?|guidance_scale|cfg)\b\s*=?\s*\(?\s*(\d+(?:\.\d+)?)(?:\s*,\s*(\d+(?:\.\d+)?))?")


@dataclass(frozen=True)
class Fixture:
    """What one run of a published implementation got and gave."""

    path: Path  # the safetensors file; the JSON lies beside it under the same name
    description: dict[str, Any]  # the whole JSON: source, config, meaning of every tensor, numerics
    weights: dict[str, Tensor]  # the complete state dict under its published keys
    inputs: dict[str, Tensor]  # recorded inputs by name
    outputs: dict[str, Tensor]  # recorded outputs by name
    device: torch.device  # where it is replayed, and where the inputs lie

    @property
    def constructor(self) -> str:
        """Name of the published model class, as recorded."""
        return str(self.description["config"]["constructor"])

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the published constructor."""
        return dict(self.description["config"]["arguments"])

    @property
    def files(self) -> list[str]:
        """Published source files that the fixture was made with; they tell models of one class name apart."""
        return [str(name) for name in self.description["source"]["files"]]

    def meaning(self, name: str) -> str:
        """What a recorded tensor is, with the arguments of the call that gave it."""
        return str(self.description["io"][name]["meaning"])

    def argument(self, name: str, key: str, default: float | None = None) -> float:
        """A number that the meaning of an output names, such as `cfg_scale 3.0`, or the default, else ValueError."""
        found = re.search(rf"\b{key}\b\s*=?\s*(-?\d+(?:\.\d+)?(?:e-?\d+)?)", self.meaning(name))
        if found is None and default is None:
            raise ValueError(f"{self.path}: the meaning of {name!r} does not state {key}")
        return float(found.group(1)) if found else float(default)  # type: ignore[arg-type]

    def tolerance(self, name: str) -> float:
        """Largest absolute difference that is rounding: 0 for indices, else what `numerics` states.

        What it states for an output by name, or for outputs like `sample_outputs`, was measured on them as they are.
        What it states for logits or in general is for one forward, and is multiplied with `amplification`.
        """
        if not self.outputs[name].is_floating_point():
            return 0.0
        numerics = self.description.get("numerics", {})
        stated = {key.removeprefix("suggested_tolerance").lstrip("_"): value for key, value in numerics.items()}
        for key, value in stated.items():
            if key and isinstance(value, int | float) and _concerns(key, name):
                return float(value) * (1 if key == name or key.endswith("_outputs") else self.amplification(name))
        general = stated.get("", DEFAULT_TOLERANCE)
        return float(general) * self.amplification(name)

    def amplification(self, name: str) -> float:
        """How much guidance magnifies rounding in an output: max(1, scale).

        Guided values are u + s (c - u) = s c - (s - 1) u, with the conditional c and the unconditional u from two
        forwards. An error of c comes out s times as large, one of u s - 1 times, one that both share as it is.
        """
        said = " ".join(self.meaning(key) for key in (name, name.removesuffix("_logits")) if key in self.outputs)
        scales = [float(number) for pair in _SCALE.findall(said) for number in pair if number]
        return max([1.0, *scales])


def _concerns(key: str, name: str) -> bool:
    """Whether the tolerance `suggested_tolerance_<key>` speaks of an output: by its name or its kind."""
    if key.endswith("_outputs"):
        return name.startswith(key.removesuffix("outputs"))
    return key == name or name.endswith(f"_{key}") or name.startswith(f"{key}_")


def load_fixture(path: str | Path, device: torch.device | str = "cpu") -> Fixture:
    """Read a fixture.

    Args:
        path: NAME.safetensors, with NAME.json beside it.
        device: where it is to be replayed.

    Raises:
        ValueError: if a file is missing, broken, or not a fixture, or the device is not there.
    """
    path, device = Path(path), checked_device(device)
    beside = path.with_suffix(".json")
    for file in (path, beside):
        if not file.is_file():
            raise ValueError(f"{file} does not exist; a fixture is NAME.safetensors with NAME.json beside it")
    try:
        tensors = load_file(path)
        description = read_json(beside)
        roles = {name: entry["role"] for name, entry in description["io"].items()}
        _ = description["config"]["arguments"], description["config"]["constructor"], description["source"]["files"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a fixture ({type(error).__name__}: {error})") from error
    absent = [name for name in roles if f"io/{name}" not in tensors]
    if absent:
        raise ValueError(f"{path}: {', '.join(absent)} is described but not recorded")
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    io = {role: {name: tensors[f"io/{name}"] for name in roles if roles[name] == role} for role in ("input", "output")}
    inputs = {name: value.to(device) for name, value in io["input"].items()}
    return Fixture(path, description, weights, inputs, io["output"], device)
