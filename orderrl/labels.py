"""A label set: made shard by shard by any number of processes, then assembled into one table on disk.

Nothing here holds more than a shard of contexts in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from orderrl.backbones import Backbone
from orderrl.data import TokenSet
from orderrl.oracle import Contexts, LabelConfig, label_contexts
from orderrl.runtime import distributed
from orderrl.runtime.finite import OVERFLOW, require_finite
from orderrl.runtime.job import Unfinished
from orderrl.runtime.progress import Advance
from orderrl.runtime.tables import Column, TableWriter, floats, open_table

_ROWS = 256  # of a label set, held in memory at a time


def plan_shards(contexts: Contexts, batch_size: int, shard_size: int) -> list[range]:
    """Rows of every shard.

    Cuts fall between the batches of equal length that `label_contexts` makes of all contexts, so shards give the same
    numbers as the whole to the last bit.

    Args:
        contexts: sorted by length.
        batch_size: contexts per call.
        shard_size: contexts of a shard, at least; the last may have fewer.

    Raises:
        ValueError: if shard_size is not positive.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, got {shard_size}")
    shards, start, row = [], 0, 0
    for count in contexts.length.unique_consecutive(return_counts=True)[1].tolist():
        for batch in torch.arange(count).split(batch_size):
            row += len(batch)
            if row - start >= shard_size:
                shards.append(range(start, row))
                start = row
    return [*shards, range(start, row)] if start < row else shards


def shard_name(shard: range) -> str:
    """Name of a shard's piece; with another cut it is another piece."""
    return f"labels-{shard.start:09d}-{shard.stop:09d}"


def label_shard(
    backbone: Backbone, data: TokenSet, settings: LabelConfig, contexts: Contexts, shard: range, advance: Advance
) -> dict[str, Tensor]:
    """Labels of a shard's contexts, as `label_contexts` gives them."""
    rows = torch.arange(shard.start, shard.stop)
    parts = []
    for part in label_contexts(backbone, data.tokens, data.labels, settings, contexts.select(rows)):
        parts.append(part)
        advance(len(part["label"]))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def label_shard_together(
    backbone: Backbone, data: TokenSet, settings: LabelConfig, contexts: Contexts, shard: range, advance: Advance
) -> dict[str, Tensor]:
    """The same with every batch shared out among all processes, which thereby make the same calls at the same time.

    A backbone whose weights are split over the processes asks for that. Contexts of a length are filled up to a
    multiple of the number of processes with repetitions of the last.
    """
    processes = distributed.size()
    mine: list[Tensor] = []
    kept: list[Tensor] = []
    for rows in torch.arange(shard.start, shard.stop).split(
        contexts.length[shard.start : shard.stop].unique_consecutive(return_counts=True)[1].tolist()
    ):
        missing = -len(rows) % processes
        padded = torch.cat([rows, rows[-1:].expand(missing)])
        mine.append(padded.view(-1, processes)[:, distributed.rank()])
        kept.append((torch.arange(len(padded)) < len(rows)).view(-1, processes)[:, distributed.rank()])
    selected, real = torch.cat(mine), torch.cat(kept)
    parts = list(label_contexts(backbone, data.tokens, data.labels, settings, contexts.select(selected)))
    advance(len(shard))
    here = {key: torch.cat([part[key] for part in parts])[real] for key in parts[0]}
    gathered = distributed.gather((selected[real], here))
    order = torch.cat([rows for rows, _ in gathered]).argsort()
    return {key: torch.cat([labels[key] for _, labels in gathered])[order] for key in here}


def missing_shards(work: Unfinished, shards: list[range]) -> list[range]:
    """The shards that are still to be made."""
    return distributed.on_main(lambda: [shard for shard in shards if not work.has(shard_name(shard))])


def make_shards(
    work: Unfinished, shards: list[range], make: Callable[[range], dict[str, Tensor]], together: bool
) -> None:
    """Make shards.

    Args:
        work: where they are kept.
        shards: those of this process.
        make: labels of one.
        together: all processes work on the same shards; else each has shards of its own.

    Raises:
        NotFiniteError: at the first shard whose labels are not finite; it is not kept.
    """
    for shard in shards:
        labels = make(shard)
        require_finite(f"labels of contexts {shard.start} to {shard.stop - 1}", labels, OVERFLOW)
        if not together or distributed.is_main():
            work.store(shard_name(shard), labels)
    distributed.barrier()


def label_columns(num_blocks: int, hidden_size: int) -> dict[str, Column]:
    """The columns of a label set, as `label_contexts` makes them."""
    return {
        "image": Column(),
        "order": Column((num_blocks,)),
        "length": Column(),
        "label": Column(),
        "hidden": floats(num_blocks, hidden_size),
        "entropy": floats(num_blocks),
        "visible": Column((num_blocks,), (torch.bool,)),
        "loss": floats(num_blocks),
        "gains": floats(num_blocks, num_blocks),
    }


def assemble(work: Unfinished, shards: list[range], folder: Path) -> None:
    """Write the shards one behind the other to a table.

    Args:
        work: holds the shards.
        shards: in the order of their rows.
        folder: made anew.

    Raises:
        ValueError: if a shard is missing, truncated, altered or of another length.
        OSError: if the disk is full.
    """
    with _new_table(folder) as table:
        for shard in shards:
            part = work.load(shard_name(shard))
            table.append(part)
            if table.rows != shard.stop - shards[0].start:
                raise ValueError(f"{work.folder}: {shard_name(shard)} does not have {len(shard)} rows")


def join(sets: Sequence[Path], folder: Path) -> None:
    """Write label sets one behind the other to a table; no more than a part of one is held in memory.

    Args:
        sets: folders that `assemble` made, of one backbone.
        folder: made anew.

    Raises:
        ValueError: if a set is damaged, or their columns differ.
        OSError: if the disk is full.
    """
    with _new_table(folder) as table:
        for part in sets:
            for rows in open_table(part).split(_ROWS):
                table.append(rows)


def _new_table(folder: Path) -> TableWriter:
    if folder.exists():  # half of it, from an interruption
        shutil.rmtree(folder)
    return TableWriter(folder)
