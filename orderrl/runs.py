"""Runs and caches: where results are written, how they are found again, and how progress is shown."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO, TypeVar

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from orderrl import distributed
from orderrl.storage import (
    Unsealed,
    damage,
    filled_aside,
    manifest,
    read_sealed,
    remove_orphans,
    sealed,
    written_aside,
)

T = TypeVar("T")
_PACKAGES = (
    *("orderrl", "torch", "torchvision", "torchrl", "tensordict", "gymnasium", "timm", "torch-fidelity"),
    *("hydra-core", "numpy", "scikit-learn", "safetensors"),
)
_WANDB_MODES = ("online", "offline", "disabled")
_PLAIN_INTERVAL = 10.0  # seconds between progress lines when the output is not a terminal


# -- identity ---------------------------------------------------------------------------------------------------------


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


def git_revision() -> dict[str, Any] | None:
    """Commit and whether files differ from it, of the checkout that this package is imported from; else None."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(root), *arguments]
        return subprocess.run(call, capture_output=True, check=True, text=True, timeout=10).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository, whose revision would say nothing.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, Any]:
    """Versions of Python, the platform and the packages that results depend on, and the git revision."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if found["orderrl"] is None:  # imported from a checkout that is not installed
        from orderrl import __version__

        found["orderrl"] = __version__
    return {**found, "git": git_revision()}


# -- one run's folder -------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one move, so that no reader sees half of it; numbers that are not finite become null."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON with a hash of itself, as `orderrl.storage.read_sealed` reads it."""
    write_json(path, sealed(_finite(value)))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _finite(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_finite(item) for item in value]
    return value


class Run:
    """One folder that holds everything a command did; a context manager.

    The folder is ``<output_dir>/<command>/<date>_<time>`` (with ``-2``, ``-3`` ... if that exists) and holds
    ``config.yaml`` (resolved), ``versions.json`` and ``metrics.jsonl``: a JSON object a line, with ``step``, ``time``
    in seconds since the start and the metrics. The command adds what it makes. Of many processes the main one makes the
    folder and writes; `log` and `write_json` do nothing in the others.

    Args:
        command: the entry point, such as ``train``.
        config: its configuration. Used here: ``output_dir`` (default ``runs``) and ``logger``; with
            ``logger.name=wandb`` the same metrics go to Weights & Biases, under ``logger.project`` and
            ``logger.mode`` (online, offline or disabled), with its files in the run's folder. Where these are null
            its own environment variables decide: WANDB_MODE, WANDB_DISABLED, WANDB_PROJECT, WANDB_NAME, WANDB_DIR.

    Attributes:
        folder: the run's folder.

    Raises:
        ValueError: if the logger or its mode is unknown, or Weights & Biases can't be started (nobody is logged in);
            the folder is then removed.
    """

    def __init__(self, command: str, config: Mapping[str, Any]) -> None:
        self.command = command
        self.config: dict[str, Any] = _plain(config)
        self._logger: dict[str, Any] = self.config.get("logger") or {}
        name = self._logger.get("name", "local")
        if name not in ("local", "wandb"):
            raise ValueError(f"logger.name={name!r} is unknown; choose one of local, wandb")
        if (mode := self._logger.get("mode")) not in (None, *_WANDB_MODES):
            raise ValueError(f"logger.mode={mode!r} is unknown; choose one of {', '.join(_WANDB_MODES)}, or null")
        parent = Path(self.config.get("output_dir", "runs")) / command
        self.folder = distributed.on_main(lambda: _new_folder(parent))
        self._start = time.monotonic()
        self._metrics: TextIO | None = None
        self._wandb: Any = None
        if distributed.is_main():
            (self.folder / "config.yaml").write_text(OmegaConf.to_yaml(self.config), encoding="utf-8")
            self.write_json("versions.json", versions())
            self._metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
            if name == "wandb":
                try:
                    self._wandb = self._start_wandb()
                except ValueError:
                    self._metrics.close()
                    shutil.rmtree(self.folder)
                    raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line of metrics.

        Args:
            metrics: names and scalars (numbers or one-element tensors).
            step: the x axis; what it counts is the command's choice.
        """
        if self._metrics is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        line = {"step": int(step), "time": round(time.monotonic() - self._start, 3), **_finite(values)}
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
        self._metrics.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=int(step))

    def write_json(self, name: str, value: Any) -> Path:
        """Write ``<folder>/<name>`` in one move and return its path; NaN and infinities become null."""
        if distributed.is_main():
            write_json(self.folder / name, value)
        return self.folder / name

    def log_figures(self, paths: Iterable[Path]) -> None:
        """Send pictures (PNG) to the logger, each under its file's name; the run's folder has them already."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in paths})

    def close(self, failed: bool = False) -> None:
        """Finish the logs; called by the context manager."""
        if self._metrics is not None:
            self._metrics.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))
            self._wandb = None

    def _start_wandb(self) -> Any:
        """Start logging to Weights & Biases; what the config leaves open its environment variables decide."""
        try:
            import wandb
        except ImportError as error:
            raise ValueError(f"logger=wandb needs the package wandb: pip install wandb ({error})") from error

        given, mode = os.environ.get, self._logger.get("mode")
        if mode is None and given("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
            mode = "disabled"  # wandb itself knows this variable no more, other trainers do
        try:
            return wandb.init(
                project=self._logger.get("project") or given("WANDB_PROJECT") or "orderrl",
                mode=mode,
                name=given("WANDB_NAME") or f"{self.command}_{self.folder.name}",
                dir=given("WANDB_DIR") or self.folder,
                config=self.config,
            )
        except (wandb.Error, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"logger=wandb can't be started: {reason}; log in with `wandb login`, or use logger.mode=offline"
            ) from error


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    container = OmegaConf.to_container(OmegaConf.create(dict(config)), resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _new_folder(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while True:
        folder = parent / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


# -- what is kept between runs ----------------------------------------------------------------------------------------


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
        wrong = self._damage(folder)
        if wrong is not None:
            _tell(f"{wrong}; making it again")
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
            OSError: if the cache can't be written.
        """
        final = self.folder(kind, key)
        with filled_aside(final, lambda: replace or self._damage(final) is not None) as aside:
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
                _tell(f"{_named(folder / 'key.json', error)}; left out")
        if older:
            _tell(f"{self.root / kind}: left out {older} of an older version, which kept no checksums")
        for _, folder, files in sorted(fitting, reverse=True, key=lambda found: found[:2]):
            wrong = damage(folder, files)
            if wrong is None:
                return folder
            _tell(f"{wrong}; left out")
        return None

    def _read(self, folder: Path) -> dict[str, Any]:
        """What an entry says of itself.

        Raises:
            ValueError, OSError, KeyError: if it is not what was written.
        """
        entry = read_sealed(folder / "key.json")
        if (entry["kind"], entry["key"]) != (folder.parent.name, folder.name):
            raise ValueError(f"{folder}: is {entry['kind']}/{entry['key']}, moved here by hand")
        return entry

    def _damage(self, folder: Path) -> str | None:
        try:
            return damage(folder, self._read(folder)["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            return _named(folder / "key.json", error)


def _named(path: Path, error: Exception) -> str:
    """An error of reading a file as a line that begins with a path."""
    if isinstance(error, OSError):
        return f"{path}: can't be read ({error.strerror})"
    return str(error) if isinstance(error, ValueError) else f"{path}: is damaged ({type(error).__name__}: {error})"


def _tell(line: str) -> None:
    if distributed.is_main():
        print(line, flush=True)


# -- progress ---------------------------------------------------------------------------------------------------------


class Advance(Protocol):
    """Reports ``count`` more items done, with an optional short note such as the current loss."""

    def __call__(self, count: float = 1, note: str = "") -> None:
        """Move the bar."""


@contextmanager
def progress(total: int | None, description: str, unit: str = "it") -> Iterator[Advance]:
    """Show how far a loop is: a bar with count, rate, time passed and time left.

    When the standard output is not a terminal, plain lines are printed instead, one in ten seconds and one at the end.
    Of many processes the main one shows its own.

    Args:
        total: number of items, None if it is not known.
        description: what is going on.
        unit: name of the items, plural, for the rate.

    Yields:
        A function to call when items are done.
    """
    if not distributed.is_main():
        yield lambda count=1, note="": None
        return
    console = Console()
    if not console.is_terminal:
        lines = _PlainLines(total, description, unit)
        yield lines
        lines.show()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, unit=unit, note="")

        def advance(count: float = 1, note: str = "") -> None:
            bar.advance(task, count)
            if note:
                bar.update(task, note=note)

        yield advance


def track(
    iterable: Iterable[T], total: int | None = None, description: str = "working", unit: str = "it"
) -> Iterator[T]:
    """Iterate and show how far it is, as :func:`progress` does; the total defaults to the iterable's length."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with progress(total, description, unit) as advance:
        for item in iterable:
            yield item
            advance()


class _RateColumn(ProgressColumn):
    """Items a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(_rate(speed, task.fields["unit"]) if speed else "")


class _PlainLines:
    """Progress for logs: occasional lines."""

    def __init__(self, total: int | None, description: str, unit: str) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done: float = 0
        self.note = ""
        self.start = self.shown = time.monotonic()

    def __call__(self, count: float = 1, note: str = "") -> None:
        self.done += count
        self.note = note or self.note
        if time.monotonic() - self.shown >= _PLAIN_INTERVAL and self.done != self.total:
            self.show()

    def show(self) -> None:
        self.shown = time.monotonic()
        elapsed = self.shown - self.start
        rate = self.done / max(elapsed, 1e-9)
        count = f"{self.done:g}" if self.total is None else f"{self.done:g}/{self.total}"
        parts = [f"{count} {self.unit}", _rate(rate, self.unit), f"{timedelta(seconds=round(elapsed))} passed"]
        if self.total is not None and 0 < self.done < self.total:
            parts.append(f"{timedelta(seconds=round((self.total - self.done) / rate))} left")
        print(f"{self.description}: " + ", ".join([*parts, *filter(None, [self.note])]), flush=True)


def _rate(rate: float, unit: str) -> str:
    return f"{rate:.3g} {unit}/s" if rate < 100 else f"{rate:,.0f} {unit}/s"
