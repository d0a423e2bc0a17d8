"""Devices by name: those that the package runs on, refused in one line where they are not there."""

import re
from contextlib import AbstractContextManager, nullcontext

import torch


def checked_device(device: torch.device | str) -> torch.device:
    """A device that is there.

    Args:
        device: "cpu", "cuda" or "cuda:N". Apple's mps has no float64, which the keyed random numbers need.

    Raises:
        ValueError: if it is unknown or not there; with the choices.
    """
    number = re.fullmatch(r"(cpu|cuda)(?::(\d{1,3}))?", str(device))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    choices = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    advice = f"choose one of {', '.join(choices)}" if gpus else "use device=cpu"
    if number is None:
        raise ValueError(f"device={str(device)!r} is unknown; {advice}")
    kind, index = number.group(1), int(number.group(2) or 0)
    if index >= (gpus if kind == "cuda" else 1):
        raise ValueError(f"device={str(device)!r} is not available here; {advice}")
    return torch.device(str(device))


def moved(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A batch of a host's data on a device; nobody waits for a copy to a GPU, for which it is pinned."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def default_dtype(device: torch.device) -> torch.dtype | None:
    """What frozen models compute in where nobody says: bfloat16 on GPUs that have it; None leaves their parameters."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if able else None


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the one that "cuda" without a number means; the CPU needs nothing."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is fast on a device: CPUs without AVX-512 compute it at a tenth of the speed of float32."""
    return device.type != "cpu" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
