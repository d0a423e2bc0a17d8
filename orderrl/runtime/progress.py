"""How far a loop is: bars on a terminal and in notebooks, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import Protocol

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

from orderrl.runtime import distributed

_PLAIN_INTERVAL = 10.0  # seconds between progress lines when the output is not a terminal


class Advance(Protocol):
    """Reports ``count`` more items done, with an optional short note such as the current loss."""

    def __call__(self, count: float = 1, note: str = "") -> None:
        """Move the bar."""


def unseen(count: float = 1, note: str = "") -> None:
    """The `Advance` of a bar that is not shown."""


@contextmanager
def progress(total: int | None, description: str, unit: str = "it") -> Iterator[Advance]:
    """Show how far a loop is: a bar with count, rate, time passed and time left.

    In a notebook with ipywidgets the bar moves in the cell's output. Where the standard output is no terminal either,
    plain lines are printed instead, one in ten seconds and one at the end. Of many processes the main one shows its
    own.

    Args:
        total: number of items, None if it is not known.
        unit: name of the items, plural, for the rate.

    Yields:
        A function to call when items are done.
    """
    if not distributed.is_main():
        yield unseen
        return
    console = Console()
    if not (console.is_terminal or (console.is_jupyter and find_spec("ipywidgets"))):
        lines = _PlainLines(total, description, unit)
        yield lines
        lines.show()
        return
    columns = (
        TextColumn("{task.description}", markup=False),  # names and paths may have brackets
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, unit=unit, note="")

        def advance(count: float = 1, note: str = "") -> None:
            bar.advance(task, count)
            if note:
                bar.update(task, note=note)

        yield advance
        bar.refresh()  # a notebook keeps what was drawn last, and rich draws ten times a second


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
