"""Tables on disk: one raw file a column, in the layout of TensorDict's memory maps, read without TensorDict's reader.

`TensorDict.load_memmap` unpickles what it finds beside the columns and maps files of any size, which it thereby grows.
`open_table` reads nothing but raw numbers: names, dtypes, shapes and sizes of files are checked before one is mapped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from orderrl.runtime.jsonfile import read_json
from orderrl.runtime.storage import damage, flush, manifest, naming, read_sealed, write_json, write_sealed

if TYPE_CHECKING:
    from tensordict import TensorDict, TensorDictBase

CHECKSUMS = "checksums.json"
_META = "meta.json"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64)
_DTYPES = {str(dtype): dtype for dtype in (*_INTEGERS, *_FLOATS)}
Name = tuple[str, ...]  # ("next", "reward")


class Column(NamedTuple):
    """What a column must be."""

    shape: tuple[int, ...] = ()  # without the rows
    dtypes: tuple[torch.dtype, ...] = (torch.int64,)  # those that are allowed


def floats(*shape: int) -> Column:
    """A column of floating-point numbers of any precision."""
    return Column(shape, _FLOATS)


class TableWriter:
    """A new table that grows by rows; a context manager that completes it when the block ends without an error.

    Files are written and not mapped: what is mapped counts as memory, and a full disk would kill the process instead of
    raising an error.

    Args:
        folder: made if need be; must be empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, 0
        self._files: dict[Name, IO[bytes]] = {}
        self._columns: dict[Name, tuple[torch.Size, torch.dtype]] = {}
        self._stack = ExitStack()
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with naming(self.folder):  # what is still in Python's buffers is written now
            self._stack.close()
        if kind is None:
            for name in self._columns:
                flush(_file(self.folder, name))
            self._describe(())

    def append(self, rows: TensorDictBase | Mapping[str, Tensor]) -> None:
        """Add rows of the same columns, dtypes and lengths as before; OSError if the disk is full."""
        columns = dict(_leaves(rows))
        count = len(next(iter(columns.values())))
        found = {name: (values.shape[1:], values.dtype) for name, values in columns.items()}
        if not self._files:
            self._open(found)
        if found != self._columns or any(len(values) != count for values in columns.values()):
            raise ValueError(f"{self.folder}: rows {_shown(found)} do not fit {_shown(self._columns)}")
        for name, values in columns.items():
            raw = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # numpy has no bfloat16
            with naming(_file(self.folder, name)):
                self._files[name].write(raw.numpy().data)
        self.rows += count

    def _open(self, columns: dict[Name, tuple[torch.Size, torch.dtype]]) -> None:
        self._columns = columns
        for name in columns:
            path = _file(self.folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files[name] = self._stack.enter_context(path.open("xb"))

    def _describe(self, at: Name) -> None:
        """Write `meta.json` as TensorDict does, of a level and those below it."""
        inner = dict.fromkeys(name[len(at)] for name in self._columns if name[: len(at)] == at)
        described: dict[str, Any] = {}
        for key in inner:
            if (*at, key) in self._columns:
                shape, dtype = self._columns[(*at, key)]
                known = {"shape": [self.rows, *shape], "dtype": str(dtype)}
                described[key] = {"device": "cpu", **known, "is_nested": False}
            else:
                described[key] = {"type": "TensorDict"}
                self._describe((*at, key))
        last = {"shape": [self.rows], "device": "cpu", "_type": "<class 'tensordict._td.TensorDict'>"}
        write_json(self.folder.joinpath(*at, _META), described | last)


def write_checksums(folder: Path) -> None:
    """Record sizes and checksums of a table that is kept by nothing that does so; `open_table` compares them."""
    write_sealed(folder / CHECKSUMS, {"files": manifest(folder)})


def open_table(folder: Path | str, columns: Mapping[str, Column] | None = None, rows: int | None = None) -> TensorDict:
    """A table on disk; its columns are read as they are used, and changing them does not change the files.

    Args:
        columns: all columns that it must have; None takes those that there are.
        rows: how many it must have; None takes any number.

    Returns:
        Batch (rows,), on the CPU.

    Raises:
        ValueError: if a file is missing, damaged or of another size, by its path, or the columns are others.
        FileNotFoundError: if there is no table.
    """
    from tensordict import TensorDict  # takes long to import

    folder = Path(folder)
    if not (folder / _META).is_file():
        raise FileNotFoundError(f"{folder}: holds no table ({_META})")
    if (folder / CHECKSUMS).exists():
        wrong = damage(folder, read_sealed(folder / CHECKSUMS).get("files"))
        if wrong is not None:
            raise ValueError(f"{wrong}; make the table anew")
    found, count = _read_meta(folder)
    if rows is not None and count != rows:
        raise ValueError(f"{folder}: has {count} rows instead of {rows}")
    if columns is not None:
        _check_columns(folder, found, columns, count)
    for name, (shape, dtype) in found.items():  # all of them before the first is mapped
        path, size = _file(folder, name), math.prod(shape) * dtype.itemsize
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{path}: is missing, truncated or altered ({size} bytes must be there)")
    table = TensorDict({}, [count], device="cpu")
    for name, (shape, dtype) in found.items():
        table[name] = _map(_file(folder, name), shape, dtype)
    return table


def _read_meta(folder: Path) -> tuple[dict[Name, tuple[list[int], torch.dtype]], int]:
    """Shapes and dtypes of all columns, and the number of rows, from what the files `meta.json` say."""
    path = folder / _META
    described = read_json(path)
    batch = described.pop("shape", None)
    described.pop("device", None)
    found: dict[Name, tuple[list[int], torch.dtype]] = {}
    try:
        if not str(described.pop("_type")).endswith("TensorDict'>") or len(batch) != 1:
            raise ValueError("another kind of table")
        for key, entry in described.items():
            if not key.isidentifier():  # no way out of the folder
                raise ValueError(f"a column is called {key!r}")
            if entry.get("type") == "TensorDict":
                inner, count = _read_meta(folder / key)
                if count != batch[0]:
                    raise ValueError(f"{key} has {count} rows instead of {batch[0]}")
                found |= {(key, *name): value for name, value in inner.items()}
                continue
            shape, dtype = entry["shape"], _DTYPES[entry["dtype"]]
            sizes = all(type(size) is int and 0 <= size < 2**48 for size in shape)
            if not sizes or shape[:1] != batch or entry.get("is_nested"):
                raise ValueError(f"{key} has shape {shape}")
            found[(key,)] = shape, dtype
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: describes no table of this package ({type(error).__name__}: {error})") from error
    return found, batch[0]


def _check_columns(
    folder: Path, found: Mapping[Name, tuple[list[int], torch.dtype]], columns: Mapping[str, Column], rows: int
) -> None:
    names = {".".join(name): value for name, value in found.items()}
    problems = [f"{name} is missing" for name in columns if name not in names]
    problems += [f"{name} does not belong here" for name in names if name not in columns]
    for name in names.keys() & columns.keys():
        shape, dtype = names[name]
        wanted = columns[name]
        if shape != [rows, *wanted.shape] or dtype not in wanted.dtypes:
            problems.append(f"{name} is {dtype} {shape} instead of {wanted.dtypes[0]} {[rows, *wanted.shape]}")
    if problems:
        raise ValueError(f"{folder}: is no table of this kind ({'; '.join(sorted(problems)[:3])}); make it anew")


def _map(path: Path, shape: list[int], dtype: torch.dtype) -> Tensor:
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    raw = np.memmap(path, np.uint8, mode="c")  # private: needs no right to write
    return torch.from_numpy(raw).view(dtype).view(shape)


def _leaves(rows: TensorDictBase | Mapping[str, Tensor], at: Name = ()) -> list[tuple[Name, Tensor]]:
    leaves: list[tuple[Name, Tensor]] = []
    for key, value in rows.items():
        leaves += [((*at, key), value)] if isinstance(value, Tensor) else _leaves(value, (*at, key))
    return leaves


def _file(folder: Path, name: Name) -> Path:
    return folder.joinpath(*name[:-1], f"{name[-1]}.memmap")


def _shown(columns: Mapping[Name, tuple[torch.Size, torch.dtype]]) -> str:
    return json.dumps({".".join(name): f"{dtype} {list(shape)}" for name, (shape, dtype) in columns.items()})
