"""Crash-safe long jobs: what one has done outlives an interruption at any moment, even SIGKILL.

A training is a loop over its steps, which shows how far it is, logs its metrics and continues where it stopped:

    for step in job.steps(600, "cloning", "steps", "loss {loss:.3f}", planner=planner, optimizer=optimizer):
        ...
        job.log(loss=loss.item())

Every long job keeps a folder `<cache>/unfinished/<key>` while it is under way; the key determines its result. In it are

- *pieces*: finished parts that depend on nothing but the key (a shard of labels, a row of a table). A job that starts
  again takes those that are there and makes the rest;
- *states*: everything that a training loop changes (weights, optimizer, generators, step), replaced from time to time.
  A loop that starts again continues from the last one.

Files are written aside, flushed to the disk and moved into place; their names carry checksums of job, name and content.
So a file is there and whole, or it does not count. When the job is done, its result is in the cache or in a run's
folder and this folder goes. A job that fails (a full disk, an error) leaves it, and goes on when it is started again;
but a training that diverged starts anew, for from its states it would only diverge again.

A job holds the lock in its folder. A second one of the same key that runs at the same time, and one that finds a folder
of another user, takes `<key>-2`, `<key>-3` ...; they go with the first that is done.
"""

import errno
import hashlib
import os
import pickle
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol, Self

import torch
from torch import Tensor

from orderrl.runtime import distributed
from orderrl.runtime.finite import DIVERGED, NotFiniteError, leaves, require_finite, require_finite_losses
from orderrl.runtime.progress import Advance, progress, unseen
from orderrl.runtime.run import Run
from orderrl.runtime.storage import LOCK, claim, naming, remove_folder, remove_if_left, remove_orphans
from orderrl.runtime.terminal import one_line

FOLDER = "unfinished"
_DIGITS = 16  # of the checksum in a file's name
_STATE = "state"
_HISTORY = "history"
_NO_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)


class Stateful(Protocol):
    """What PyTorch's modules, optimizers and schedules are."""

    def state_dict(self) -> Any:
        """Everything that changes."""

    def load_state_dict(self, state: Any) -> Any:
        """Take what `state_dict` gave."""


Part = Stateful | torch.Generator | dict[str, Any] | list[Any]


class Job:
    """A long job and its folder; a context manager that removes the folder when the job ends without an error.

    With several processes all of them use one folder: any of them stores pieces, the main one states. A second job of
    the same key that runs at the same time gets a folder of its own.

    Args:
        root: the cache's folder; None for a job that nobody resumes: it keeps nothing on the disk and shows nothing.
        key: determines the job's result.
        seconds: between two states of a loop.
        instead: takes the place of a cache that cannot be written, for jobs whose result does not go there: a run's
            folder, which the next run does not look into.
        run: logs the rows of metrics; of a job that continues those of its earlier steps too.

    Attributes:
        folder: where pieces and states are.
        history: rows of metrics; kept with the states of a loop, so that a log can be written again.
    """

    folder: Path

    def __init__(
        self,
        root: Path | str | None = None,
        key: str = "",
        seconds: float = 60.0,
        instead: Path | None = None,
        run: Run | None = None,
    ) -> None:
        self._lock: IO[bytes] | None = None
        self.seconds, self.key, self.run = seconds, key, run
        self.history: list[dict[str, float]] = []
        self._step = self._logged = 0
        self._evaded = False
        self._kept = root is not None
        if root is not None:
            self.folder = distributed.on_main(lambda: self._claim_or_evade(Path(root), instead))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._kept:
            return
        if kind is None:
            distributed.barrier()  # others may still read
            if distributed.is_main():
                remove_folder(self.folder)
                for other in self.folder.parent.glob(f"{self.key}*"):  # of the same job, killed
                    if other.name == self.key or other.name.removeprefix(f"{self.key}-").isdecimal():
                        remove_if_left(other)
                if self._evaded:
                    self.folder.parent.rmdir()
        elif issubclass(kind, NotFiniteError) and distributed.is_main():
            for path in self.folder.glob(f"{_STATE}.*.pt"):  # on the way to what was not finite; pieces are good
                path.unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()

    def _claim_or_evade(self, root: Path, instead: Path | None) -> Path:
        try:
            return self._claim(root / FOLDER)
        except OSError as error:
            if error.errno not in _NO_RIGHTS:
                raise
            if instead is None:
                raise OSError(f"{root}: cannot be written ({error.strerror}); choose another cache_dir") from error
            print(f"{root}: cannot be written ({error.strerror}); an interruption loses what is unfinished", flush=True)
            self._evaded = True
            return self._claim(instead / FOLDER)

    def _claim(self, root: Path) -> Path:
        """The job's folder, locked; the system takes the lock away when the process ends, however that is."""
        remove_orphans(root)
        number = 1
        while self._lock is None:
            folder = root / (self.key if number == 1 else f"{self.key}-{number}")
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._lock = claim(folder / LOCK)
            except (FileNotFoundError, FileExistsError):  # the job was done just now, and its folder went
                if folder.is_file():
                    raise
                continue
            if self._lock is None:
                print(f"{folder}: in use by another process or user; this one does the job on its own", flush=True)
                number += 1
        for path in folder.glob(".*.partial"):  # what an interruption left half written
            path.unlink()
        return folder

    # ------------------------------------------------------------------ pieces

    def has(self, name: str) -> bool:
        """Whether a piece is there and whole; a damaged one is removed and said so."""
        path = self._find(name)
        if path is None:
            return False
        if self._is_whole(path):
            return True
        print(f"{path}: is truncated or altered; making it again", flush=True)
        path.unlink(missing_ok=True)
        return self.has(name)

    def load(self, name: str, classes: Sequence[type] = ()) -> Any:
        """A piece that is there, its tensors on the CPU.

        Args:
            classes: that it may hold besides tensors and plain values.

        Raises:
            ValueError: if it is not, or is truncated or altered.
        """
        path = self._find(name)
        if path is None:
            raise ValueError(f"{self.folder}: {name} is missing; start the command again to make it")
        if not self._is_whole(path):
            raise ValueError(
                f"{path}: is truncated or altered (its checksum is not the one in its name); remove it and start the "
                "command again: it makes or does again what is missing, and keeps the rest"
            )
        try:
            with torch.serialization.safe_globals(list(classes)):
                return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: was not written by this package ({one_line(error, 200)}); remove it") from error

    def store(self, name: str, value: Any) -> None:
        """Keep a piece: tensors and plain values, nested at will.

        Raises:
            OSError: if it cannot be written, for example because the disk is full; what was there before stays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".{name}.{uuid.uuid4().hex}.partial"
        try:
            _write(aside, value)
            path = self.folder / f"{name}.{self.checksum(name, aside)}.pt"
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        for other in self.folder.glob(f"{name}.*.pt"):
            if other != path:
                other.unlink(missing_ok=True)

    def piece(self, name: str, make: Callable[[], Any]) -> Any:
        """A piece: taken if it is there, else made and kept."""
        if not self._kept:
            return make()
        if not self.has(name):
            self.store(name, make())
        return self.load(name)

    def batches(
        self,
        name: str,
        count: int,
        size: int,
        make: Callable[[Tensor], dict[str, Tensor]],
        description: str = "",
        unit: str = "rows",
    ) -> dict[str, Tensor]:
        """Tensors made in batches of rows 0 .. count - 1 and joined; every batch is a piece.

        Args:
            name: of the pieces, in front of their numbers.
            make: gives the tensors of some rows (m,) int64, first dimension m or what m rows lead to.
            unit: what the bar counts, plural.
        """
        parts = []
        with self._bar(count, description, unit) as advance:
            for number, rows in enumerate(torch.arange(count).split(size)):
                parts.append(self.piece(f"{name}-{number:05d}", partial(make, rows)))
                advance(len(rows))
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def checksum(self, name: str, path: Path) -> str:
        """What the name of a piece's file carries: of the job, the piece and the file's content."""
        begun = hashlib.sha256(f"{self.key}/{name}/".encode())
        with path.open("rb") as file:
            return hashlib.file_digest(file, begun.copy).hexdigest()[:_DIGITS]

    def _is_whole(self, path: Path) -> bool:
        name, found, _ = path.name.rsplit(".", 2)
        return self.checksum(name, path) == found

    def _find(self, name: str) -> Path | None:
        """The newest file of a name; an interruption can leave the one before it."""
        found = list(self.folder.glob(f"{name}.*.pt"))
        return max(found, key=lambda path: path.stat().st_mtime_ns) if found else None

    # ------------------------------------------------------------------ loops

    def steps(
        self, total: int, description: str = "", unit: str = "steps", note: str = "", /, **parts: Part
    ) -> Iterator[int]:
        """Numbers of the job's loop that are still to be done, from 0 up to `total`.

        Before the first, the parts get the state that an interrupted run left, with PyTorch's global generators; after
        a step the state is kept if the last one is older than `seconds`. An interrupted loop that continues does
        exactly what it would have done.

        Args:
            unit: what the bar counts, plural.
            note: stands behind the bar, filled with the last row of metrics: "loss {loss:.3f}".
            parts: everything that a step changes. Generators, modules and the like; dictionaries and lists of plain
                values and tensors get their contents replaced.

        Raises:
            ValueError: if the state is truncated or altered.
            NotFiniteError: if a state that is to be kept holds tensors that are not finite.
            OSError: if it cannot be written; the one before it stays.
        """
        with self._bar(total, description, unit) as advance:
            done = self._continue(total, parts)
            if done:
                advance(done)
            kept = time.monotonic()
            for step in range(done, total):
                self._step = step + 1
                yield step
                advance(1, note.format_map(self.history[-1]) if note and self.history else "")
                if step + 1 < total and self._is_time(kept):
                    self._keep(step + 1, parts)
                    kept = time.monotonic()

    def _bar(self, total: int, description: str, unit: str) -> AbstractContextManager[Advance]:
        """A progress bar, which a job that nobody resumes does not show."""
        return progress(total, description, unit) if self._kept else nullcontext(unseen)

    def log(self, **metrics: float) -> None:
        """Log a row of metrics of the current step; before the first that is step 0.

        Raises:
            NotFiniteError: if a loss is not finite; the row is logged before.
        """
        self.record(**metrics)
        require_finite_losses(self.history[-1])

    def record(self, **metrics: float) -> None:
        """The same for a loop that ends well when its loss is not finite."""
        self.history.append({"step": self._step} | metrics)
        self._log_history()

    def _log_history(self) -> None:
        """Log the rows that the log does not have yet."""
        for row in self.history[self._logged :]:
            if self.run is not None:
                self.run.log(row, int(row["step"]))
        self._logged = len(self.history)

    def _continue(self, total: int, parts: dict[str, Part]) -> int:
        """How many steps are done; parts, history and global generators are as after the last of them."""
        if not self._kept or distributed.on_main(lambda: self._find(_STATE)) is None:
            return 0
        state = self.load(_STATE)
        done: int = state["step"]
        self.history[:] = state["history"]
        self._log_history()
        for key, part in parts.items():
            _restore(part, state["parts"][key])
        _set_global_generators(state["generators"], done)
        distributed.print_main(f"continuing after step {done} of {total} ({self.folder})")
        return done

    def publish(self, store: Callable[[], Any]) -> None:
        """Put the result in its place, in the main process; `finish` finds the rows of metrics if that is all."""

        def keep_and_store() -> None:
            self.store(_HISTORY, self.history)
            store()

        distributed.on_main(keep_and_store)

    def _is_time(self, kept: float) -> bool:
        return self._kept and distributed.on_main(lambda: time.monotonic() - kept >= self.seconds)

    def _keep(self, step: int, parts: dict[str, Part]) -> None:
        state = {
            "step": step,
            "history": self.history,
            "parts": {key: _capture(part) for key, part in parts.items()},
            "generators": distributed.gather(_global_generators()),
        }
        if distributed.is_main():
            require_finite(f"state after step {step}", leaves(state["parts"], Tensor), DIVERGED)
            self.store(_STATE, state)


def finish(root: Path | str, key: str, run: Run | None = None) -> None:
    """Remove what an interruption between a job's result and its end left; its metrics are logged by the run."""
    if not distributed.is_main() or not (Path(root) / FOLDER / key).exists():
        return

    def take() -> list[dict[str, float]]:
        with Job(root, key) as job:
            return list(job.load(_HISTORY)) if job.has(_HISTORY) else []

    with suppress(OSError):  # a cache that cannot be written
        for row in distributed.alone(take):
            if run is not None:
                run.log(row, int(row["step"]))


def _write(path: Path, value: Any) -> None:
    """Write and flush to the disk."""
    try:
        with naming(path), path.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:  # PyTorch's writer hides what the system said
        raise OSError(f"{path.parent}: cannot be written to (is the disk full?): {error}") from error


def _capture(part: Part) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    return part if isinstance(part, dict | list) else part.state_dict()


def _restore(part: Part, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, dict):
        part.clear()
        part.update(state)
    elif isinstance(part, list):
        part[:] = state
    else:
        part.load_state_dict(state)


def _global_generators() -> dict[str, Any]:
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": gpus}


def _set_global_generators(states: list[dict[str, Any]], step: int) -> None:
    """Those of this process; with another number of processes than before, new ones."""
    if len(states) != distributed.size():
        torch.manual_seed(torch.initial_seed() + step + distributed.rank())
        return
    mine = states[distributed.rank()]
    torch.set_rng_state(mine["cpu"])
    for index, state in enumerate(mine["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, index)
