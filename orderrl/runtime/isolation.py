"""PyTorch's switches that a caller may have set, kept out of what the package does.

A default dtype or device, inference mode, switched-off gradients and autocast are the caller's business: what is built,
trained, labelled and played here is the same under all of them. `isolated` stands on everything that a caller enters
the package by; `isolated_float32` on what builds modules or runs a whole command, since modules take the default dtype;
`isolated_methods` on the backbones, which are asked with gradients or without.

The default dtype belongs to the whole process, the other switches to a thread. So everything that runs often names its
dtypes itself, and a thread of the caller's that creates tensors beside a running environment keeps its own default.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def own_modes(*, gradients: bool | None = True) -> Iterator[None]:
    """Tensors on the CPU unless a device is named, neither inference mode nor autocast, of this thread.

    Args:
        gradients: whether they are computed; None leaves that to the caller.
    """
    wanted = torch.is_grad_enabled() if gradients is None else gradients
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if torch.is_grad_enabled() != wanted:
            stack.enter_context(torch.set_grad_enabled(wanted))
        for device in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


class _Float32:
    """Makes float32 the default dtype while anyone is inside; the last one to leave restores what the first found."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._found = torch.float32

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._found = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    torch.set_default_dtype(self._found)


_float32 = _Float32()


@contextmanager
def own_modes_float32() -> Iterator[None]:
    """`own_modes`, and float32 as the default dtype of the process."""
    with own_modes(), _float32():
        yield


def isolated(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function, or each step of a generator, run in `own_modes`."""
    return _inside(own_modes, function)


def isolated_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function, or each step of a generator, run in `own_modes_float32`."""
    return _inside(own_modes_float32, function)


def isolated_methods(*names: str) -> Callable[[type[T]], type[T]]:
    """Make methods of a class run in `own_modes` with the caller's gradients."""

    def decorate(kind: type[T]) -> type[T]:
        for name in names:
            setattr(kind, name, _inside(partial(own_modes, gradients=None), getattr(kind, name)))
        return kind

    return decorate


def _inside(context: Callable[[], AbstractContextManager[None]], function: Callable[P, R]) -> Callable[P, R]:
    if not inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            with context():
                return function(*args, **kwargs)

        return run

    @functools.wraps(function)
    def iterate(*args: P.args, **kwargs: P.kwargs) -> Any:
        steps: Any = function(*args, **kwargs)
        try:
            while True:
                with context():
                    try:
                        value = next(steps)
                    except StopIteration as end:
                        return end.value
                yield value
        finally:
            with context():
                steps.close()

    return iterate
