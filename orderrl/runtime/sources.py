"""What stands for files that others may change: their content or, where that is much to read, sizes and times.

A result that is kept is found by everything that determined it. A file of the user enters such a key by its version
and never by its path alone, so that another file in its place makes another key.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from orderrl.runtime.storage import checksum

SMALL = 2**26  # bytes: sources up to this size are told apart by their content
_BY_SYSTEMS = ("__MACOSX", "@eaDir", "lost+found")  # folders that archivers and file servers leave beside one's own


def file_versions(files: Sequence[Path], in_full: bool = False) -> list[str]:
    """What tells every file from another version of it under its name.

    Args:
        files: of one source, such as the images of a data set.
        in_full: read their content however large they are, so that copies in other places have equal versions.

    Returns:
        For up to 64 MiB in all, the first 16 digits of each file's checksum; beyond, "BYTES@TIME", its size and time
        of change in nanoseconds. "missing" for links that lead nowhere and for what is no file.
    """
    states = [_regular(path) for path in files]
    by_content = in_full or sum(state.st_size for state in states if state is not None) <= SMALL
    return [_version(path, state, by_content) for path, state in zip(files, states, strict=True)]


def source_identity(source: str | Path | None, in_full: bool = False) -> str | None:
    """What stands for a source in a key.

    Args:
        source: a file or folder; what is neither (the name of a model, a hub name) stands for itself.
        in_full: as in `file_versions`.

    Returns:
        For a file its version, see `file_versions`; for a folder a digest of the names and versions of its files.
    """
    if source is None:
        return None
    path = Path(source).expanduser()
    if path.is_file():
        return file_versions([path], in_full)[0]
    if not path.is_dir():
        return str(source)
    names = [name for name, reason in walk(path) if not reason]
    return digest_of_files(names, file_versions([path / name for name in names], in_full))


def walk(folder: Path) -> Iterator[tuple[str, str]]:
    """All files of a folder and its sub-folders.

    Links are followed. A folder that was reached before is not entered again, so that links may lead in circles and no
    file counts twice; neither is a hidden one, whose name begins with a dot, nor one that systems make for themselves.

    Args:
        folder: exists.

    Yields:
        Names relative to the folder, with "/" between folders, and why they don't count, in words: "hidden" or "found
        before by another path" for what is left out (folders end in "/"), "" for files.

    Raises:
        ValueError: if a folder cannot be read.
    """
    visited = {_inode(folder)}
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_unreadable):
        inside = Path(here).relative_to(folder)
        entered = []
        for name in sorted(folders):
            path = (inside / name).as_posix()
            if name.startswith(".") or name in _BY_SYSTEMS:
                yield f"{path}/", "hidden"
            elif (inode := _inode(folder / path)) in visited:
                yield f"{path}/", "found before by another path"
            else:
                visited.add(inode)
                entered.append(name)
        folders[:] = entered
        for name in sorted(files):
            yield (inside / name).as_posix(), "hidden" if name.startswith(".") else ""


def _inode(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino


def _refuse_unreadable(error: OSError) -> None:
    raise ValueError(f"{printable(str(error.filename))}: the folder cannot be read ({error.strerror})") from error


def digest_of_files(names: Sequence[str], versions: Sequence[str]) -> str:
    """Sixteen hexadecimal digits that determine the names and versions of some files; their order does not matter."""
    digest = hashlib.sha256()
    for name, version in sorted(zip(names, versions, strict=True)):
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + version.encode() + b"\0")
    return digest.hexdigest()[:16]


def _regular(path: Path) -> os.stat_result | None:
    try:
        state = path.stat()
    except OSError:  # a link that leads nowhere or to itself
        return None
    return state if stat.S_ISREG(state.st_mode) else None


def _version(path: Path, state: os.stat_result | None, by_content: bool) -> str:
    if state is None:
        return "missing"
    return checksum(path)[:16] if by_content else f"{state.st_size}@{state.st_mtime_ns}"


def printable(name: str) -> str:
    """A file's name in one line of UTF-8: backslashes and what cannot be printed are escaped as in Python."""
    escaped = name.replace("\\", "\\\\")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in escaped)
