"""What this machine can do: the measured matrix product and memory bandwidth."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from orderrl.backbones.cpu_linear import Linear

SIZE = 2048  # of the matrix product
COPIED = 2**27  # bytes of the copy, more than any cache
REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """The roofs that times are held against.

    Attributes:
        matrix_rate: operations per second of a 2048^3 product, best of several, by PyTorch's `matmul` or with packed
            weights (`orderrl.backbones.cpu_linear`), whichever is faster.
        plain_rate: the same by `matmul` alone.
        bandwidth: bytes per second of reading memory, best of several.
    """

    matrix_rate: float
    plain_rate: float
    bandwidth: float

    def seconds(self, operations: float, read: float = 0.0) -> float:
        """The least time for one forward of so many operations that reads so many bytes of weights and caches."""
        return max(operations / self.matrix_rate, read / self.bandwidth)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, the device's queue included."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def measured_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Measure the roofs of a device with the threads that the process has."""
    a, b = (torch.randn(SIZE, SIZE, device=device).to(dtype) for _ in range(2))
    packed = Linear(SIZE, SIZE, bias=False).to(device, dtype).requires_grad_(False)
    plain, best = (min(timed(call, device) for _ in range(REPEATS)) for call in (lambda: a @ b, lambda: packed(a)))
    source = torch.ones(COPIED // 4, device=device)
    reading = min(timed(lambda: source.sum(), device) for _ in range(REPEATS))
    operations = 2 * SIZE**3
    return Limits(operations / min(plain, best), operations / plain, COPIED / reading)


def processor(device: torch.device) -> str:
    """The name of what computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
