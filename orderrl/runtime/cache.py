"""Folders of finished work that are found again by everything that determined them."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from orderrl.runtime import distributed
from orderrl.runtime.storage import Unsealed, damage, filled_aside, manifest, read_sealed, remove_orphans, write_sealed


def fingerprint(value: Any) -> str:
    """Sixteen hexadecimal digits that determine nested plain values.

    Args:
        value: dictionaries with string keys (their order does not matter), sequences, dataclasses, strings, numbers,
            booleans, None and paths, nested at will; OmegaConf containers count as what they hold.

    Raises:
        TypeError: for anything else: its identity would not be what it prints.
        ValueError: for a number that is not finite.
    """
    text = json.dumps(_canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode()).hexdigest()[:16]


def _canonical(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    if is_dataclass(value) and not isinstance(value, type):
        return _canonical(asdict(value))
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"fingerprint: the keys of a dictionary must be strings, got {list(value)!r}")
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_canonical(item) for item in value]
    raise TypeError(f"fingerprint: plain values only, got {type(value).__name__}: {value!r}")


class Cache:
    """Folders kept under ``<root>/<kind>/<key>``, each of them complete or absent.

    An entry's ``key.json`` holds the description of everything that determined it, and its files' sizes and checksums.
    Entries are filled aside and moved into place, so a failure leaves nothing behind, and of several writers the first
    one wins. A damaged entry is as good as none: it is named in one line and gives way to a new one.

    Args:
        root: the cache's folder; made when something is stored.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def folder(self, kind: str, key: str) -> Path:
        """Where an entry is, or would be."""
        return self.root / kind / key

    def find(self, kind: str, key: str) -> Path | None:
        """The entry's folder if it is there, complete and unaltered; what is wrong is printed."""
        remove_orphans(self.root / kind)
        folder = self.folder(kind, key)
        if not folder.exists():
            return None
        wrong = self.damage(folder)
        if wrong is not None:
            distributed.print_main(f"{wrong}; making it again")
        return folder if wrong is None else None

    @contextmanager
    def store(self, kind: str, key: str, description: Mapping[str, Any], replace: bool = False) -> Iterator[Path]:
        """Fill a temporary folder that becomes the entry when the block ends without an error.

        Args:
            kind: what is stored, such as ``labels``.
            key: usually ``fingerprint(description)``.
            description: plain values that determined the entry.
            replace: a complete entry gives way; else it stays, and a damaged one gives way.

        Yields:
            The folder to write to. Afterwards the entry is at :meth:`folder`.

        Raises:
            OSError: if the cache cannot be written.
        """
        final = self.folder(kind, key)
        with filled_aside(final, lambda: replace or self.damage(final) is not None) as aside:
            yield aside
            entry = {"kind": kind, "key": key, "created": time.time(), "description": _canonical(description)}
            write_sealed(aside / "key.json", entry | {"files": manifest(aside)})

    def newest(self, kind: str, predicate: Callable[[dict[str, Any]], bool] = lambda _: True) -> Path | None:
        """The folder of the entry stored last whose description fulfils the predicate; damaged ones are left out."""
        remove_orphans(self.root / kind)
        fitting, older = [], 0
        for folder in sorted((self.root / kind).glob("[!.]*")):
            try:
                entry = self._read(folder)
                if predicate(entry["description"]):
                    fitting.append((float(entry["created"]), folder, entry["files"]))
            except Unsealed:
                older += 1
            except (OSError, ValueError, KeyError, TypeError) as error:
                distributed.print_main(f"{_named(folder / 'key.json', error)}; left out")
        if older:
            distributed.print_main(f"{self.root / kind}: left out {older} of an older version, which kept no checksums")
        for _, folder, files in sorted(fitting, reverse=True, key=lambda found: found[:2]):
            wrong = damage(folder, files)
            if wrong is None:
                return folder
            distributed.print_main(f"{wrong}; left out")
        return None

    def _read(self, folder: Path) -> dict[str, Any]:
        """What an entry says of itself; ValueError, OSError or KeyError if it is not what was written."""
        entry = read_sealed(folder / "key.json")
        if (entry["kind"], entry["key"]) != (folder.parent.name, folder.name):
            raise ValueError(f"{folder}: is {entry['kind']}/{entry['key']}, moved here by hand")
        return entry

    def damage(self, folder: Path) -> str | None:
        """What is wrong with an entry's folder, in a line that begins with a path; None if nothing is."""
        try:
            return damage(folder, self._read(folder)["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            return _named(folder / "key.json", error)


def _named(path: Path, error: Exception) -> str:
    """An error of reading a file as a line that begins with a path."""
    if isinstance(error, OSError):
        return f"{path}: cannot be read ({error.strerror})"
    return str(error) if isinstance(error, ValueError) else f"{path}: is damaged ({type(error).__name__}: {error})"
