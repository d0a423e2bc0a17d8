"""A label set: made shard by shard by any number of processes, then assembled into one memory-mapped table.

Nothing here holds more than a shard of contexts in memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import torch
from tensordict import TensorDict
from torch import Tensor

from orderrl import distributed
from orderrl.backbones import Backbone
from orderrl.data import TokenSet
from orderrl.finite import OVERFLOW, require_finite
from orderrl.oracle import Contexts, LabelConfig, label_contexts
from orderrl.resuming import Unfinished
from orderrl.runs import Advance


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


def assemble(work: Unfinished, shards: list[range], folder: Path) -> None:
    """Write the shards one behind the other to a memory-mapped TensorDict.

    Files are written and not mapped here: what is mapped counts as memory, and a full disk would kill the process
    instead of raising an error.

    Args:
        work: holds the shards.
        shards: in the order of their rows.
        folder: made anew.

    Raises:
        ValueError: if a shard is missing, truncated, altered or of another length.
        OSError: if the disk is full.
    """
    first = work.load(shard_name(shards[0]))
    with _filling(folder, TensorDict(first, batch_size=[len(shards[0])]), shards[-1].stop) as files:
        for shard in shards:
            part = work.load(shard_name(shard))
            for key, values in part.items():
                if len(values) != len(shard):
                    raise ValueError(f"{work.folder}: {shard_name(shard)} has {len(values)} rows, not {len(shard)}")
                files[key].write(values.contiguous().view(torch.uint8).numpy().data)  # numpy has no bfloat16


def join(sets: Sequence[Path], folder: Path) -> None:
    """Write label sets one behind the other to a memory-mapped TensorDict; nothing is held in memory.

    Args:
        sets: folders that `assemble` made, of one backbone.
        folder: made anew.

    Raises:
        OSError: if the disk is full.
    """
    opened = [TensorDict.load_memmap(str(part)) for part in sets]
    with _filling(folder, opened[0], sum(map(len, opened))) as files:
        for part in sets:
            for key, file in files.items():
                with _file(part, key).open("rb") as source:
                    shutil.copyfileobj(source, file)


def _file(folder: Path, key: str) -> Path:
    return folder / f"{key}.memmap"


@contextmanager
def _filling(folder: Path, like: TensorDict, rows: int) -> Iterator[dict[str, IO[bytes]]]:
    """The open files of a new memory-mapped TensorDict by key, flushed to the disk at the end."""
    if folder.exists():  # half of it, from an interruption
        shutil.rmtree(folder)
    like[:1].expand(rows).memmap_like(str(folder))
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {
            str(key): stack.enter_context(_file(folder, str(key)).open("r+b"))
            for key in like.keys()  # noqa: SIM118 - not a mapping
        }
        yield files
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
