"""A CUDA device made of CPU tensors: it computes what the CPU computes and refuses what CUDA refuses.

Tensors of the class `Simulated` hold a CPU tensor. To Python they lie on cuda:0; to C++ they claim PrivateUse1, because
autograd asks the driver about devices that claim CUDA. A dispatch mode sees every operator and applies CUDA's rules:

1. tensors move between devices by `to`, `cpu` and `copy_` alone;
2. a CPU index may index a CUDA tensor, a CUDA index no CPU tensor;
3. a CPU tensor without dimensions may stand beside CUDA tensors, any other may not;
4. what is drawn on the device needs a generator of the device; without one the device's own is used.

It also counts launches (operators that compute something; a real one may launch more than one kernel) and
synchronisations (the host waits for the device: its values are read, a shape depends on them, or a blocking copy).
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    MISSING = ""
except ImportError:
    MISSING = f"PyTorch {torch.__version__} has no _setup_privateuseone_for_python_backend"

CUDA = torch.device("cuda:0")
_claimed = False
_CLAIMED = "simulated"  # the name that C++ knows the device by
aten = torch.ops.aten
_FREE_BYTES = 2**33
_FREE_OF_CHARGE = {  # no kernel: metadata, or nothing is computed
    "detach", "alias", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh",
    "_unsafe_view", "_reshape_alias", "is_same_size", "sym_size", "sym_stride", "sym_numel", "_to_copy",
}  # fmt: skip
_WAITING = {  # the host needs values of the device
    "_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "_unique", "unique_consecutive", "masked_select",
    "equal", "bincount", "unique_dim_consecutive",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_", "_unsafe_index_put"}


class Counts:
    """Launches and synchronisations so far, by operator."""

    def __init__(self) -> None:
        self.launched: Counter[str] = Counter()
        self.waited: Counter[str] = Counter()

    @property
    def launches(self) -> int:
        """How many there were."""
        return self.launched.total()

    @property
    def synchronisations(self) -> int:
        """How many there were."""
        return self.waited.total()


_counts = Counts()
_recording: list[tuple[Any, Any, Any, Any]] | None = None  # operators of a graph, with what they were given and gave
_own_generator = torch.Generator()  # of the device


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count what happens inside."""
    global _counts
    outer, _counts = _counts, Counts()
    try:
        yield _counts
    finally:
        _counts = outer


class Simulated(torch.Tensor):
    """A tensor on the simulated device; `raw` is the CPU tensor that holds its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor, requires_grad: bool = False) -> Simulated:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(_CLAIMED, 0),
            requires_grad=requires_grad,
        )
        made.raw = raw
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def numpy(self, *, force: bool = False) -> Any:
        """Refused, as CUDA tensors refuse it."""
        if force:
            return self.detach().cpu().numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        """Where the values lie."""
        return self.raw.data_ptr()

    def tolist(self) -> Any:
        """Values, after waiting for them."""
        return self.detach().cpu().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self.raw!r} on {CUDA}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Simulated:
        if id(self) not in memo:
            made = Simulated(self.raw.clone(), self.requires_grad)
            made.__dict__ |= {key: copy.deepcopy(value, memo) for key, value in self.__dict__.items() if key != "raw"}
            memo[id(self)] = made
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)


class SimulatedGenerator(torch.Generator):
    """A generator that says where it is."""

    where: torch.device

    def __new__(cls, device: torch.device | str = "cpu") -> SimulatedGenerator:
        made = super().__new__(cls)
        made.where = CUDA if torch.device(device).type == "cuda" else torch.device("cpu")
        return made

    def __init__(self, device: torch.device | str = "cpu") -> None:
        pass

    device = property(lambda self: self.where)


# ---------------------------------------------------------------------- what C++ would ask the driver about


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`; a tensor that is already where and what it shall be is returned as it is."""
    copies = kwargs.pop("copy", False)
    other = kwargs.pop("other", args[0] if args and isinstance(args[0], Tensor) else None)
    if other is not None:
        args = (other.device, other.dtype, *args[1:])
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype = device or tensor.device, dtype or tensor.dtype
    if device.type == tensor.device.type and dtype == tensor.dtype and not copies and layout is None:
        return tensor
    return aten._to_copy.default(tensor, dtype=dtype, device=device, non_blocking=non_blocking, memory_format=layout)


def _as_tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """`torch.as_tensor`."""
    made = data if isinstance(data, Tensor) else _AS_TENSOR(data, dtype=dtype)
    return _to(made, device=made.device if device is None else device, dtype=dtype)


def _tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None, **kwargs: Any) -> Tensor:
    """`torch.tensor`."""
    return _to(_TENSOR(data, dtype=dtype, **kwargs), device="cpu" if device is None else device)


def _rms_norm(x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    """`torch.rms_norm`, on CUDA one kernel; with gradients its parts are."""
    if not isinstance(x, Simulated) or torch.is_grad_enabled():
        return _RMS_NORM(x, shape, weight, eps)
    _counts.launched["rms_norm"] += 1
    return Simulated(_computed(_RMS_NORM, (x.raw, shape, None if weight is None else weight.raw, eps), {}))


_AS_TENSOR, _TENSOR, _RMS_NORM = torch.as_tensor, torch.tensor, torch.rms_norm


# ---------------------------------------------------------------------- operators


def _each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """An argument or result with every tensor changed; operators nest them in lists and tuples alone."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)([_each(part, change) for part in value])
    return value


@cache
def _name(func: Any) -> str:
    return str(func._schema.name.removeprefix("aten::"))


@cache
def _draws(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator by the rules of the device."""
    leaves: list[Any] = []
    _each((args, tuple(kwargs.values())), leaves.append)
    ours = {id(leaf.raw): leaf for leaf in leaves if isinstance(leaf, Simulated)}
    named = kwargs.get("device")
    here = bool(ours) if named is None else named.type in ("cuda", _CLAIMED)
    if not ours and not here:
        return func(*args, **kwargs)
    name = _name(func)
    if _recording is not None and (name in _WAITING or len(ours) < len({id(leaf) for leaf in leaves}) or not here):
        raise RuntimeError(f"operation not permitted when stream is capturing: {name} waits or reads a CPU tensor")
    if name in ("_to_copy", "copy_"):
        _count_copy(name, args, kwargs, here if name == "_to_copy" else isinstance(args[0], Simulated))
    else:
        _check(name, args, leaves)
        _count(func, name, args)
    if kwargs.get("generator") is not None and kwargs["generator"].device.type != "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if named is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def raw(leaf: Tensor) -> Tensor:
        return leaf.raw if isinstance(leaf, Simulated) else leaf

    def wrapped(found: Tensor) -> Tensor:
        return ours[id(found)] if id(found) in ours else Simulated(found)

    own_draws = _draws(func) and kwargs.get("generator") is None
    with _drawing_here() if own_draws else contextlib.nullcontext():
        found = _computed(func, _each(args, raw), {key: _each(value, raw) for key, value in kwargs.items()})
    if name == "copy_":
        return args[0]
    return _each(found, wrapped) if here else found


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator gives; a graph that is being recorded remembers how."""
    found = func(*args, **kwargs)
    if _recording is not None and not getattr(func, "is_view", False):
        _recording.append((func, args, kwargs, found))
    return found


def _check(name: str, args: Any, leaves: list[Tensor]) -> None:
    """Refuse what mixes devices."""
    strangers = [leaf for leaf in leaves if not isinstance(leaf, Simulated) and leaf.ndim]
    if name in _INDEXING:
        if not isinstance(args[0], Simulated) and any(isinstance(index, Simulated) for index in args[1]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        indices = {id(index) for index in args[1]}
        strangers = [leaf for leaf in strangers if id(leaf) not in indices]
    if strangers and len(strangers) < len(leaves):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})"
        )


def _count_copy(name: str, args: Any, kwargs: dict[str, Any], here: bool) -> None:
    """Count a copy to the device or to the CPU; blocking ones and those to the CPU are waited for."""
    source, non_blocking = (args[0], False) if name == "_to_copy" else (args[1], len(args) > 2 and args[2])
    if isinstance(source, Simulated) == here:
        if name == "copy_" or kwargs.get("dtype") not in (None, source.dtype):
            _counts.launched[name] += 1
    elif not here or not (kwargs.get("non_blocking") or non_blocking):
        _counts.waited["to the device" if here else "to the CPU"] += 1


def _count(func: Any, name: str, args: Any) -> None:
    """Count an operator on the device."""
    if name in _WAITING:
        _counts.waited[name] += 1
    if name == "repeat_interleave" and "output_size" not in func._schema.overload_name and len(args) < 2:
        _counts.waited[name] += 1
    if name in _INDEXING:
        indices = [index for index in args[1] if index is not None]
        fills = name.startswith("index_put") and len(indices) == 1 and args[2].numel() == 1  # a masked fill
        for index in indices:
            if not isinstance(index, Simulated):
                _counts.waited["to the device"] += 1  # PyTorch copies it there
            elif index.dtype in (torch.bool, torch.uint8) and not fills:
                _counts.waited["index by mask"] += 1
    if not func.is_view and name not in _FREE_OF_CHARGE:
        _counts.launched[name] += 1


@contextlib.contextmanager
def _drawing_here() -> Iterator[None]:
    """Random operators that were given no generator use the device's, not the CPU's."""
    outer = torch.get_rng_state()
    torch.set_rng_state(_own_generator.get_state())
    try:
        yield
    finally:
        _own_generator.set_state(torch.get_rng_state())
        torch.set_rng_state(outer)


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


# ---------------------------------------------------------------------- the process


class _Graph:
    """A recorded sequence of operators, all of which are run again at every replay, over the same tensors."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.operators: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        """One launch."""
        _counts.launched["graph"] += 1
        for func, args, kwargs, found in self.operators:
            olds: list[Any] = []
            news: list[Any] = []
            _each(found, olds.append)
            _each(func(*args, **kwargs), news.append)
            for old, new in zip(olds, news, strict=True):
                if old is not new:
                    old.copy_(new)


@contextlib.contextmanager
def _graph(graph: _Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    """Record a graph; what is recorded is not launched."""
    global _recording
    _recording = graph.operators
    try:
        with counting():
            yield
    finally:
        _recording = None


class _Stream:
    """There is one stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = object.__hash__
    wait_stream = synchronize = lambda self, *_: None


class _Event:
    """Everything is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    record = synchronize = wait = lambda self, *_: None


class _Current(contextlib.nullcontext[None]):
    """There is one device only."""

    def __init__(self, *_: Any) -> None:
        super().__init__()


_QUERIES: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda *_: None,
    "_lazy_init": lambda: None,
    "_is_in_bad_fork": lambda: False,
    "mem_get_info": lambda *_: (_FREE_BYTES, _FREE_BYTES),
    "memory_reserved": lambda *_: 0,
    "memory_allocated": lambda *_: 0,
    "get_device_name": lambda *_: "simulated",
    "is_bf16_supported": lambda *_, **__: True,
    "empty_cache": lambda: None,
    "synchronize": lambda *_: None,
    "Event": _Event,
    "Stream": _Stream,
    "stream": _Current,
    "current_stream": _Stream,
    "CUDAGraph": _Graph,
    "graph": _graph,
    "graph_pool_handle": lambda: (0, 1),
    "is_current_stream_capturing": lambda: _recording is not None,
    "device": _Current,
    "manual_seed": _own_generator.manual_seed,
    "manual_seed_all": _own_generator.manual_seed,
    "get_rng_state": lambda *_: _own_generator.get_state(),
    "get_rng_state_all": lambda: [_own_generator.get_state()],
    "set_rng_state": lambda state, *_: _own_generator.set_state(state),
}


@contextlib.contextmanager
def simulated_cuda() -> Iterator[None]:
    """A process whose one CUDA device is simulated; it is not meant to do anything else afterwards."""
    global _claimed
    if not _claimed:  # which a process can do once
        _setup_privateuseone_for_python_backend(_CLAIMED)
        _claimed = True
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    with contextlib.ExitStack() as stack:
        for name, answer in _QUERIES.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch, "Generator", SimulatedGenerator))
        stack.enter_context(mock.patch.object(torch, "as_tensor", _as_tensor))
        stack.enter_context(mock.patch.object(torch, "tensor", _tensor))
        stack.enter_context(mock.patch.object(torch, "rms_norm", _rms_norm))
        stack.enter_context(mock.patch.object(torch.Tensor, "to", _to))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda tensor, *_: tensor))
        stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: _to(tensor, CUDA)))
        stack.enter_context(mock.patch.object(torch.Tensor, "cpu", lambda tensor, *_, **__: _to(tensor, "cpu")))
        stack.enter_context(_Device())
        try:
            yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
