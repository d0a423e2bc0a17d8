"""Gain labels, found in the cache or made: the value of every hidden block in many contexts.

A set of labels is made in parts by any number of processes, then assembled into one table on disk; nothing here holds
more than a part of the contexts in memory. The fingerprint of everything that determines a set is its key in the cache,
so no label is made twice and none that is out of date is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orderrl.backbones import Backbone, backbone_fingerprint
from orderrl.backbones.fsdp import fix_memory, split_weights
from orderrl.backbones.protocol import backbone_device
from orderrl.data import TokenSet, load_split
from orderrl.factory import FORMAT, Setup
from orderrl.oracle import CLASSIFIER, Contexts, LabelConfig, label_contexts, random_contexts
from orderrl.partial_classifier import PartialClassifier, find_or_train_classifier, require_clusters
from orderrl.runtime import distributed
from orderrl.runtime.cache import Cache
from orderrl.runtime.job import Job
from orderrl.runtime.parts import find_table, new_table, store_table
from orderrl.runtime.progress import Advance
from orderrl.runtime.run import Run
from orderrl.runtime.storage import read_sealed
from orderrl.runtime.tables import Column, floats, open_table

if TYPE_CHECKING:
    from tensordict import TensorDict

LABELS = "labels"  # in the cache
_ROWS = 256  # of a label set, held in memory at a time


def label_description(setup: Setup, data: TokenSet, settings: LabelConfig) -> dict[str, Any]:
    """What determines a set of labels."""
    return {
        "format": FORMAT,
        "backbone": backbone_fingerprint(setup.backbone),
        "data": data.fingerprint,
        "labels": label_settings(settings),
    }


def label_settings(settings: LabelConfig) -> dict[str, Any]:
    """The settings on which labels depend."""
    values = asdict(settings)
    del values["batch_size"]
    for key in ("clusters", "grouping", "classifier") if settings.kind != CLASSIFIER else ():
        del values[key]
    if not values["visible_states"]:
        del values["visible_states"]
    return values


def find_or_make_labels(setup: Setup, split: str = "planner", run: Run | None = None, **changes: Any) -> Path:
    """Folder of the labels of random contexts: a table in `contexts`, and its description.

    Args:
        setup: with the backbone that scores the blocks.
        changes: replaces values of `setup.labels`.

    Raises:
        ValueError: if the backbone knows raster order only, or has no token probabilities and the labels need them.
    """
    setup.require_order_robust("label")
    data, settings = load_split(setup.data, split), replace(setup.labels, **changes)

    def contexts() -> Contexts:
        return random_contexts(settings, len(data), setup.backbone.geometry.num_blocks)

    return find_or_label(setup, data, settings, contexts, label_description(setup, data, settings), run)


def random_label_sets(setup: Setup, *how: Any) -> tuple[Path, ...]:
    """The labels of random contexts as all that an agent learns from, for `Agent.label_sets`."""
    return (find_or_make_labels(setup),)


def find_or_label(
    setup: Setup,
    data: TokenSet,
    settings: LabelConfig,
    make_contexts: Callable[[], Contexts],
    description: dict[str, Any],
    run: Run | None = None,
) -> Path:
    """The cached labels of a description, or those of the contexts that are made; interrupted labelling continues."""
    backbone, cache = setup.backbone, Cache(setup.cache_dir)
    found = find_table(cache, LABELS, description)
    if found is not None:
        return found
    if settings.kind not in ("pointwise", CLASSIFIER) and not backbone.vocab_size:
        raise ValueError(
            f"labels.kind={settings.kind!r} needs token probabilities, which a backbone of continuous tokens does not "
            "have; use labels=pointwise or classifier"
        )
    classifier = None
    if settings.kind == CLASSIFIER:
        require_clusters(settings.grouping, backbone.geometry, settings.clusters, scored=False)
        classifier = find_classifier(setup, settings)
    where = f"{settings.contexts} contexts of {data.name}/{data.split}"
    distributed.print_main(f"labels: none for this config yet, labelling {where}")
    contexts = make_contexts()
    parts = plan_parts(contexts, settings.batch_size, setup.shard_size)
    if setup.fsdp:
        split_weights(backbone, setup.device)
        fix_memory(backbone)

    def label(rows: Tensor) -> Iterator[dict[str, Tensor]]:
        return label_contexts(backbone, data.tokens, data.labels, settings, contexts.select(rows), classifier)

    def make(part: range, advance: Advance) -> dict[str, Tensor]:
        made = label_together(label, contexts, part, advance) if setup.fsdp else label_part(label, part, advance)
        if run is not None:
            run.log({"mean_gain": made["gains"].mean().item()}, part.stop)
        return made

    return store_table(cache, LABELS, description, "contexts", parts, make, "labelling", "contexts", setup.fsdp)


def find_classifier(setup: Setup, settings: LabelConfig) -> PartialClassifier:
    """The frozen classifier of some labels, on the backbone's device; trained if it is not in the cache."""
    found = find_or_train_classifier(
        setup.data, settings.classifier, settings.seed, setup.cache_dir, setup.checkpoint_seconds
    )
    return found.to(backbone_device(setup.backbone))


def open_labels(folder: Path, backbone: Backbone) -> TensorDict:
    """Labels on disk, read as they are used; ValueError if they are of another backbone, or not of this package."""
    have, want = read_sealed(folder / "key.json")["description"]["backbone"], backbone_fingerprint(backbone)
    if have != want:
        raise ValueError(
            f"{folder}: labels made for backbone {have} do not fit backbone {want}; make new ones with "
            "`python -m orderrl.label`"
        )
    return _open(folder / "contexts", backbone)


def open_joined(sets: Sequence[Path], backbone: Backbone, job: Job) -> TensorDict:
    """Sets of labels as one; several are copied to the job's folder, which goes when the job is done."""
    opened = [open_labels(found, backbone) for found in sets]
    if len(sets) == 1:
        return opened[0]
    folder = job.folder / "contexts"
    distributed.on_main(lambda: join([found / "contexts" for found in sets], folder))
    return _open(folder, backbone)


def _open(folder: Path, backbone: Backbone) -> TensorDict:
    return open_table(folder, label_columns(backbone.geometry.num_blocks, backbone.hidden_size))


# ---------------------------------------------------------------------- made in parts


Label = Callable[[Tensor], Iterator[dict[str, Tensor]]]
"""Rows (m,) int64 of the contexts -> their labels, batch by batch, as `label_contexts` gives them."""


def plan_parts(contexts: Contexts, batch_size: int, least: int) -> list[range]:
    """Rows of every part of at least so many contexts, sorted by length; the last may have fewer.

    Cuts fall between the batches of equal length that `label_contexts` makes of all contexts, so parts give the same
    numbers as the whole to the last bit.
    """
    parts, start, row = [], 0, 0
    for count in contexts.length.unique_consecutive(return_counts=True)[1].tolist():
        for batch in torch.arange(count).split(batch_size):
            row += len(batch)
            if row - start >= least:
                parts.append(range(start, row))
                start = row
    return [*parts, range(start, row)] if start < row else parts


def label_part(label: Label, part: range, advance: Advance) -> dict[str, Tensor]:
    """Labels of a part's contexts."""
    batches = []
    for batch in label(torch.arange(part.start, part.stop)):
        batches.append(batch)
        advance(len(batch["label"]))
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def label_together(label: Label, contexts: Contexts, part: range, advance: Advance) -> dict[str, Tensor]:
    """The same with every batch shared out among all processes, which thereby make the same calls at the same time.

    A backbone whose weights are split over the processes asks for that. Contexts of a length are filled up to a
    multiple of the number of processes with repetitions of the last.
    """
    processes = distributed.size()
    mine: list[Tensor] = []
    kept: list[Tensor] = []
    sizes = contexts.length[part.start : part.stop].unique_consecutive(return_counts=True)[1].tolist()
    for rows in torch.arange(part.start, part.stop).split(sizes):
        missing = -len(rows) % processes
        padded = torch.cat([rows, rows[-1:].expand(missing)])
        mine.append(padded.view(-1, processes)[:, distributed.rank()])
        kept.append((torch.arange(len(padded)) < len(rows)).view(-1, processes)[:, distributed.rank()])
    selected, real = torch.cat(mine), torch.cat(kept)
    batches = list(label(selected))
    advance(len(part))
    here = {key: torch.cat([batch[key] for batch in batches])[real] for key in batches[0]}
    gathered = distributed.gather((selected[real], here))
    order = torch.cat([rows for rows, _ in gathered]).argsort()
    return {key: torch.cat([labels[key] for _, labels in gathered])[order] for key in here}


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


def join(sets: Sequence[Path], folder: Path) -> None:
    """Write label sets of one backbone one behind the other to a table; no more than a part of one is in memory."""
    with new_table(folder) as table:
        for part in sets:
            for rows in open_table(part).split(_ROWS):
                table.append(rows)
