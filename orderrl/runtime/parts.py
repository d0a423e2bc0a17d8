"""Tables that are made in parts by any number of processes, and survive interruptions: labels, orders of images.

A part holds consecutive rows. It is a piece of the job, so that an interruption loses the part under way at most.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from orderrl.runtime import distributed
from orderrl.runtime.cache import Cache, fingerprint
from orderrl.runtime.finite import OVERFLOW, require_finite
from orderrl.runtime.job import Job, finish
from orderrl.runtime.progress import Advance, progress
from orderrl.runtime.tables import TableWriter

Make = Callable[[range], dict[str, Tensor]]


def find_table(cache: Cache, kind: str, description: Mapping[str, Any]) -> Path | None:
    """The cache's entry of a description, which holds a table; None if it is still to be made."""
    key = fingerprint(description)
    found = distributed.on_main(lambda: cache.find(kind, key))
    if found is not None:
        finish(cache.root, f"{kind}-{key}")
        distributed.print_main(f"{kind}: {found} (cached)")
    return found


def store_table(
    cache: Cache,
    kind: str,
    description: Mapping[str, Any],
    name: str,
    parts: Sequence[range],
    make: Callable[[range, Advance], dict[str, Tensor]],
    action: str,
    unit: str,
    together: bool = False,
) -> Path:
    """Make a table and keep it in the cache's entry of a description, whose folder is returned.

    Args:
        name: of the table in the entry.
        make: gives the rows of a part, and reports how many are done.
        action, unit: what is done with which rows, for the progress bar.
        together: whether all processes make every part together; else they share the parts out.
    """
    key = fingerprint(description)
    with Job(cache.root, f"{kind}-{key}") as job:
        # what an interrupted run left is kept, the rest is shared out
        missing, total = missing_parts(job, kind, parts), parts[-1].stop
        if len(missing) < len(parts):
            there = total - sum(map(len, missing))
            distributed.print_main(f"{kind}: {there} of {total} {unit} are there from an interrupted run")
        mine = missing if together else distributed.share_of(missing)
        with progress(sum(map(len, mine)), action, unit) as advance:
            make_parts(job, kind, mine, lambda part: make(part, advance), together)

        # the whole, put in its place
        def publish() -> None:
            assemble(job, kind, parts, job.folder / name)
            with cache.store(kind, key, description) as folder:
                (job.folder / name).rename(folder / name)

        distributed.on_main(publish)
    return cache.folder(kind, key)


def part_name(name: str, part: range) -> str:
    """Name of a part's piece; with another cut it is another piece."""
    return f"{name}-{part.start:09d}-{part.stop:09d}"


def missing_parts(job: Job, name: str, parts: Sequence[range]) -> list[range]:
    """The parts that are still to be made."""
    return distributed.on_main(lambda: [part for part in parts if not job.has(part_name(name, part))])


def make_parts(job: Job, name: str, parts: Sequence[range], make: Make, together: bool = False) -> None:
    """Make parts, finite ones, in this process; of those that all processes make together the main one keeps it."""
    for part in parts:
        made = make(part)
        require_finite(f"{name} of rows {part.start} to {part.stop - 1}", made, OVERFLOW)
        if not together or distributed.is_main():
            job.store(part_name(name, part), made)
    distributed.barrier()


def assemble(job: Job, name: str, parts: Sequence[range], folder: Path) -> None:
    """Write the parts, in the order of their rows, one behind the other to a table in a folder that is made anew."""
    with new_table(folder) as table:
        for part in parts:
            table.append(job.load(part_name(name, part)))
            if table.rows != part.stop - parts[0].start:
                raise ValueError(f"{job.folder}: {part_name(name, part)} does not have {len(part)} rows")


def new_table(folder: Path) -> TableWriter:
    """A table in a folder that is emptied: an interruption may have left half of it."""
    if folder.exists():
        shutil.rmtree(folder)
    return TableWriter(folder)
