"""Tables that are made in parts by any number of processes, and survive interruptions: labels, orders of images.

A part holds consecutive rows. It is a piece of the job, so that an interruption loses the part under way at most.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from orderrl.runtime import distributed
from orderrl.runtime.finite import OVERFLOW, require_finite
from orderrl.runtime.job import Job
from orderrl.runtime.tables import TableWriter

Make = Callable[[range], dict[str, Tensor]]


def part_name(name: str, part: range) -> str:
    """Name of a part's piece; with another cut it is another piece."""
    return f"{name}-{part.start:09d}-{part.stop:09d}"


def missing_parts(job: Job, name: str, parts: Sequence[range]) -> list[range]:
    """The parts that are still to be made."""
    return distributed.on_main(lambda: [part for part in parts if not job.has(part_name(name, part))])


def make_parts(job: Job, name: str, parts: Sequence[range], make: Make, together: bool = False) -> None:
    """Make parts in this process; of those that all processes make together the main one keeps the result.

    Raises:
        NotFiniteError: at the first part that is not finite; it is not kept.
    """
    for part in parts:
        made = make(part)
        require_finite(f"{name} of rows {part.start} to {part.stop - 1}", made, OVERFLOW)
        if not together or distributed.is_main():
            job.store(part_name(name, part), made)
    distributed.barrier()


def assemble(job: Job, name: str, parts: Sequence[range], folder: Path) -> None:
    """Write the parts, in the order of their rows, one behind the other to a table in a folder that is made anew.

    Raises:
        ValueError: if a part is missing, truncated, altered or of another length.
        OSError: if the disk is full.
    """
    with new_table(folder) as table:
        for part in parts:
            made: Mapping[str, Tensor] = job.load(part_name(name, part))
            table.append(made)
            if table.rows != part.stop - parts[0].start:
                raise ValueError(f"{job.folder}: {part_name(name, part)} does not have {len(part)} rows")


def new_table(folder: Path) -> TableWriter:
    """A table in a folder that is emptied: an interruption may have left half of it."""
    if folder.exists():
        shutil.rmtree(folder)
    return TableWriter(folder)
