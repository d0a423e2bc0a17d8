"""Files that are whole or not there: written aside and moved in, locked in the making, checked when they are read.

Three rules hold for everything that the package keeps.

- A file or folder gets its name when it is complete. Until then it is called `.NAME.UUID`, a file `.NAME.UUID.partial`.
  A folder aside holds a lock, which the system takes away when the process ends, however that is: `remove_orphans`
  removes the folders of processes that are gone, and never those of living ones.
- What is kept has its size and SHA-256 recorded, in a *manifest*: names of files to `{"bytes", "sha256"}`. Reading
  compares sizes first; contents are hashed once in every process, and again if a file's time or size changes.
- A JSON file that such records stand in is *sealed*: its key `sha256` is the hash of all its other keys.
"""

import hashlib
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import IO, Any
from weakref import WeakValueDictionary

from orderrl.runtime.jsonfile import read_json

try:
    import fcntl
except ImportError:  # Windows: no locks, so a job must not be started twice at a time there, and orphans stay
    fcntl = None  # type: ignore[assignment]

Manifest = dict[str, dict[str, Any]]

LOCK = ".lock"
SEAL = "sha256"
_ASIDE = re.compile(r"\..+\.[0-9a-f]{32}")
_UNLOCKED = 86_400.0  # seconds; a folder gets its lock at once, unless its process is killed just then
_POLL = 0.2  # seconds between two looks at a lock
_held: WeakValueDictionary[str, IO[bytes]] = WeakValueDictionary()  # lock files of this process, which may lock twice
_verified: set[tuple[str, int, int, str]] = set()  # (path, time of change, bytes, SHA-256) that were right


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system that names no file, as that of a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A file to write that becomes `path`, flushed to the disk, when the block ends without an error.

    OSError if it cannot be written; what was at `path` stays.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with naming(path):
            yield aside
            flush(aside)
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def filled_aside(final: Path, replace: Callable[[], bool] | None = None) -> Iterator[Path]:
    """An empty folder that becomes `final` when the block ends without an error.

    Args:
        final: nothing or an empty folder.
        replace: asked at the end if `final` is filled all the same: True replaces it, False drops what was made. None
            raises an error.

    Raises:
        OSError: if it cannot be written, or `final` is filled.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_orphans(final.parent)
    aside, lock = _locked_aside(final)
    try:
        yield aside
        if replace is not None and final.exists() and replace():
            remove_folder(final)
        try:
            aside.rename(final)
        except OSError:
            if replace is None or not final.exists() or replace():
                raise
        else:
            (final / LOCK).unlink(missing_ok=True)  # not before: a folder aside without a lock counts as an orphan
            if os.name == "posix":
                flush(final.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        lock.close()


def remove_folder(folder: Path) -> None:
    """Remove a folder in one move, else OSError, so that nobody ever finds half of it."""
    gone = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):  # another process did it
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def flush(path: Path) -> None:
    """Write what the system still holds of a file (or, on POSIX, of a folder's list of files) to the disk."""
    file = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


# -- locks ------------------------------------------------------------------------------------------------------------


def claim(lock: Path) -> IO[bytes] | None:
    """Create a lock file and lock it until it is closed, or until this process ends.

    Returns:
        The open file; None if a living process has locked it, or it is another user's.

    Raises:
        FileNotFoundError: if its folder is not there (any more).
        OSError: if its file system cannot be written.
    """
    while True:
        held = _held.get(str(lock.absolute()))
        if held is not None and not held.closed:
            return None
        try:
            file = lock.open("ab")
        except PermissionError:
            return None
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by processes that this one starts
            # between opening and locking the one before may have removed it, and another one made it anew
            mine, there = os.fstat(file.fileno()), lock.stat()
            if (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino):
                _held[str(lock.absolute())] = file
                return file
        except (BlockingIOError, PermissionError):
            file.close()
            return None
        except FileNotFoundError:
            pass
        file.close()


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for a folder; one that cannot be written is entered at once."""
    path, lock, said = folder.absolute().with_name(f".{folder.absolute().name}{LOCK}"), None, False
    with suppress(OSError):  # no rights, or no folder to hold it: what is written inside says so
        while (lock := claim(path)) is None and os.access(path, os.W_OK):
            if not said:
                print(f"{folder}: another process is making it; waiting", flush=True)
            said = True
            time.sleep(_POLL)
    try:
        yield
    finally:
        if lock is not None:
            with suppress(OSError):  # Windows removes no open file
                path.unlink()
            lock.close()


def remove_orphans(parent: Path) -> None:
    """Remove the folders aside in a folder whose process is gone: it was killed while it filled or emptied them."""
    if fcntl is None:
        return
    with suppress(OSError):  # nothing there, or not ours to change
        for folder in parent.iterdir():
            if _ASIDE.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
                remove_if_left(folder)


def remove_if_left(folder: Path) -> None:
    """Remove a folder if no living process holds its lock; one without a lock stays for a day."""
    with suppress(OSError):
        if not (folder / LOCK).exists() and time.time() - folder.stat().st_mtime < _UNLOCKED:
            return
        lock = claim(folder / LOCK)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            lock.close()


def _locked_aside(final: Path) -> tuple[Path, IO[bytes]]:
    while True:
        aside = final.with_name(f".{final.name}.{uuid.uuid4().hex}")
        aside.mkdir()
        with suppress(FileNotFoundError):  # taken for an orphan before it was locked
            lock = claim(aside / LOCK)
            if lock is not None:
                return aside, lock


# -- checking ---------------------------------------------------------------------------------------------------------


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(folder: Path, *names: str) -> Manifest:
    """Size and SHA-256 of files in a folder, which are flushed to the disk; without names, of all below it."""
    paths = [folder / name for name in names] or sorted(path for path in folder.rglob("*") if path.is_file())
    found: Manifest = {}
    for path in paths:
        if path.name != LOCK:
            flush(path)
            found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, SEAL: checksum(path)}
    return found


def damage(folder: Path, recorded: Any) -> str | None:
    """What is wrong with the files of a manifest: a line that names the first one, or None."""
    try:
        files = [(folder / name, entry["bytes"], entry[SEAL]) for name, entry in recorded.items()]
    except (AttributeError, KeyError, TypeError):
        return f"{folder}: its list of files is damaged"
    for path, size, _ in files:  # all sizes before any content
        try:
            found = path.stat().st_size
        except OSError:
            return f"{path}: is missing"
        if found != size or not path.is_file():
            return f"{path}: is truncated or altered ({found} bytes instead of {size})"
    for path, _, expected in files:
        if not is_intact(path, expected):
            return f"{path}: is altered (its checksum is not the one recorded)"
    return None


def is_intact(path: Path, expected: str) -> bool:
    """Whether a file has a SHA-256; computed once in every process, and again if its time or size changes."""
    state = path.stat()
    key = (str(path.resolve()), state.st_mtime_ns, state.st_size, expected)
    if key not in _verified:
        if checksum(path) != expected:
            return False
        _verified.add(key)
    return True


# -- JSON -------------------------------------------------------------------------------------------------------------


class Unsealed(ValueError):
    """A file that should be sealed and is not: an older version wrote it."""


def read_sealed(path: Path) -> dict[str, Any]:
    """A sealed JSON object, without its seal.

    Raises:
        ValueError: if it is damaged, altered or not sealed (then `Unsealed`), by its path.
        OSError: if it cannot be read.
    """
    values = read_json(path)
    seal = values.pop(SEAL, None)
    if seal is None:
        raise Unsealed(f"{path}: has no checksum, an older version wrote it")
    if seal != _digest(values):
        raise ValueError(f"{path}: is altered (its checksum is not the one in it)")
    return values


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one move, so that no reader sees half of it; numbers that are not finite become null."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(finite_or_none(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with the hash of all its values under `sha256`, as `read_sealed` reads it."""
    values = finite_or_none(value)
    write_json(path, {**values, SEAL: _digest(values)})


def finite_or_none(value: Any) -> Any:
    """Nested values as JSON takes them; numbers that are not finite become None."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return finite_or_none(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): finite_or_none(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [finite_or_none(item) for item in value]
    return value
