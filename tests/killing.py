"""Commands as real processes that are killed at random moments and started again."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from orderrl.runtime.checkpoint import load_checkpoint
from orderrl.runtime.config import compose
from orderrl.runtime.storage import read_sealed
from tests.figures import render_nothing
from tests.processes import PROCESSES

DONE = "done.json"
_LONGEST = 600  # seconds that a command may take


@dataclass(frozen=True)
class Case:
    """A command that is killed.

    Attributes:
        command: its configuration.
        function: what `python -m` calls: module:function.
        overrides: of the configuration.
        read: everything of its result that must not depend on interruptions, given what the function returned.
    """

    command: str
    function: str
    overrides: list[str]
    read: Callable[[Path], Any]


def _work(case: Case, home: Path) -> None:
    render_nothing(pytest.MonkeyPatch())
    sys.stdout = (home / "out.txt").open("a", buffering=1)
    module, _, function = case.function.partition(":")
    places = [f"output_dir={home / 'runs'}"]
    places += [f"cache_dir={home / 'cache'}"] if case.command != "tokenize" else [f"output={home / 'tokens'}"]
    result = getattr(import_module(module), function)(compose(case.command, [*case.overrides, *places]))
    (home / "aside").write_text(json.dumps(str(result)))
    (home / "aside").replace(home / DONE)


def start(case: Case, home: Path) -> BaseProcess:
    """Start a command with its runs and cache in a folder."""
    home.mkdir(parents=True, exist_ok=True)
    process = PROCESSES.Process(target=_work, args=(case, home))
    process.start()
    return process


def finish(process: BaseProcess, home: Path) -> Path:
    """Wait for the end of a command that nobody kills."""
    process.join(_LONGEST)
    assert process.exitcode == 0, (home / "out.txt").read_text()
    return Path(json.loads((home / DONE).read_text()))


def kill_and_compare(case: Case, folder: Path, kills: int, seed: int) -> None:
    """Kill a command at random moments of its work until it ends, again and again, and compare every result.

    Args:
        case: the command.
        folder: empty.
        kills: how often it is killed in all.
        seed: of the moments.
    """
    warm = PROCESSES.Process(target=int)  # the first start waits for the server's imports
    warm.start()
    warm.join()
    began = time.monotonic()
    expected = case.read(finish(start(case, folder / "whole"), folder / "whole"))
    duration = time.monotonic() - began
    moments, done, attempt = random.Random(seed), 0, 0
    while done < kills:
        home = folder / f"killed-{attempt}"
        attempt += 1
        while not (home / DONE).exists():
            process = start(case, home)
            if done < kills:
                process.join(moments.uniform(0, duration))
                if process.is_alive():
                    assert process.pid is not None
                    os.kill(process.pid, signal.SIGKILL)
                    process.join()
                    done += 1
                    continue
            finish(process, home)
        found = case.read(Path(json.loads((home / DONE).read_text())))
        assert found == expected, f"{case.function}, seed {seed}, after {done} kills: {(home / 'out.txt').read_text()}"
        assert not list((home / "cache" / "unfinished").glob("*"))
        assert not [path for path in (home / "cache").rglob(".*") if path.name != ".lock"], "orphans"


# -- what must be equal -----------------------------------------------------------------------------------------------


def contents(folder: Path, pattern: str) -> dict[str, str]:
    """Checksums of files by name."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }


def weights(path: Path, kind: str) -> dict[str, Any]:
    """A checkpoint to the last bit."""
    tensors, config = load_checkpoint(path, kind)
    return {key: value.flatten().tolist() for key, value in tensors.items()} | {"config": config}


def metrics(folder: Path) -> list[dict[str, float]]:
    """All rows of a run's log without their times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


def table(folder: Path) -> dict[str, Any]:
    """The results of an evaluation without what was measured with a clock."""
    results = read_sealed(folder / "results.json")
    for row in results["rows"]:
        for key in [key for key in row if "seconds" in key]:
            del row[key]
    assert (folder / "report.html").stat().st_size and (folder / "results.md").stat().st_size
    return results | {"samples": contents(folder / "samples", "*.png")}
