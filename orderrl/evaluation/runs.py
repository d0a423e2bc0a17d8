"""Finished evaluations: the identity of their protocol, and the values of single images that pairing needs.

Numbers of two runs compare if their identities are equal: `require_one_protocol` names what differs. How many resamples
made an interval is no part of it, and neither is which policies were evaluated.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from orderrl.backbones import Backbone, backbone_fingerprint
from orderrl.data import load_split
from orderrl.data.token_files import DESCRIPTION, read_description, token_set_splits
from orderrl.evaluation.protocol import Evaluated, Protocol
from orderrl.metrics.features import name_by_content
from orderrl.runtime.cache import fingerprint
from orderrl.runtime.sources import source_identity
from orderrl.runtime.storage import Unsealed, checksum, damage, manifest, read_sealed, write_sealed, written_aside

RESULTS = "results.json"
VALUES = "per_image.safetensors"
VERSION = 1  # of what the columns mean; raised when a number is measured in another way
_OF_THE_MACHINE = ("seconds_per_image", "rollout_seconds_per_image")  # differ between two evaluations of one policy


def protocol_identity(config: DictConfig, backbone: Backbone, protocol: Protocol) -> dict[str, Any]:
    """Everything that the numbers of an evaluation depend on, apart from the policies, as plain values.

    Files and data stand here by their content and not by their place.
    """
    e, geometry, recogniser = config.eval, backbone.geometry, protocol.recogniser
    return {
        "version": VERSION,
        "data": protocol.data.name.partition(":")[0],  # without the folder of a token set
        "split": protocol.data.split,
        "images": len(protocol.data),
        "content": protocol.data.fingerprint,
        "backbone": backbone_fingerprint(backbone),
        "blocks": [geometry.rows, geometry.columns, geometry.block_size],
        "states": None if protocol.states is None else len(protocol.states),
        "lookahead": None if protocol.lookahead is None else [len(protocol.lookahead.rows), protocol.lookahead.draws],
        "reference_images": protocol.reference_images,
        "recognisability": None
        if recogniser is None
        else replace(recogniser, name=name_by_content(recogniser.name)).described,
        "samples": protocol.samples,
        "sampling": asdict(protocol.sampling),
        "features": None if protocol.features is None else name_by_content(protocol.features),
        "feature_weights": None if protocol.weights is None else checksum(protocol.weights),
        "reference": None if protocol.reference is None else _reference_identity(config),
        "kid_subsets": protocol.kid_subsets,
        "clip_score": None if protocol.clip is None else [protocol.clip.described, fingerprint(protocol.clip.captions)],
        "real_images": None if protocol.real is None else e.real_images,
        "seed": protocol.seed,
    }


def _reference_identity(config: DictConfig) -> str:
    """What stands for the images or statistics that samples are compared with."""
    e = config.eval
    if e.reference is None:
        splits = [load_split(config.data.name, split).fingerprint for split in ("backbone", "planner", "test")]
        return fingerprint([splits, e.real_images])
    path = Path(e.reference).expanduser()
    if (path / DESCRIPTION).is_file():
        tokenizer = read_description(path)["identity"]["tokenizer"]["fingerprint"]
        return fingerprint([tokenizer, [part.fingerprint for part in token_set_splits(path).values()]])
    return str(source_identity(path, in_full=True))


def save_results(folder: Path, results: dict[str, Any], rows: Sequence[Evaluated]) -> None:
    """Write the files that `open_evaluation` reads.

    `per_image.safetensors` holds values of images as "<row>/<key>"; `results.json` holds the results, the size and
    checksum of the other file, and its own.

    Args:
        folder: of the run.
        results: plain values, among them the protocol's `identity` and all `rows`.
        rows: those that have values of images, from the first.
    """
    values = {
        f"{number}/{key}": value.contiguous() for number, row in enumerate(rows) for key, value in row.per_image.items()
    }
    with written_aside(folder / VALUES) as aside:
        save_file(values, aside)
        aside.chmod(0o644)  # safetensors writes files that others cannot read
    write_sealed(folder / RESULTS, results | {"files": manifest(folder, VALUES)})


@dataclass(frozen=True)
class Evaluation:
    """A finished run of `orderrl.evaluate`.

    Attributes:
        name: what it is called beside others.
        folder: of the run.
        identity: of its protocol, from `protocol_identity`.
        protocol: the same in words, for people.
        rows: of its table, with the values of single images where they were measured.
    """

    name: str
    folder: Path
    identity: dict[str, Any]
    protocol: dict[str, Any]
    rows: list[Evaluated]


def open_evaluation(folder: Path, name: str | None = None) -> Evaluation:
    """Read a run folder.

    Args:
        folder: of a finished run of `orderrl.evaluate`.
        name: what to call it; None is the folder's name.

    Raises:
        ValueError: if it is none, was written by an older version, or is damaged.
    """
    if not (folder / RESULTS).is_file():
        raise ValueError(
            f"{str(folder)!r} is no finished evaluation: it has no {RESULTS}; give folders that "
            "`python -m orderrl.evaluate` wrote, runs/evaluate/DATE"
        )
    try:
        results = read_sealed(folder / RESULTS)
        wrong = damage(folder, results["files"])
        identity, protocol, table = results["identity"], results["protocol"], results["rows"]
    except (Unsealed, KeyError) as error:
        raise ValueError(
            f"{str(folder)!r} is no evaluation, or an older version's ({error}); evaluate again"
        ) from error
    if wrong is not None:
        raise ValueError(f"{wrong}; evaluate again")
    values: dict[int, dict[str, Tensor]] = defaultdict(dict)
    try:
        stored = load_file(folder / VALUES)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(folder / VALUES)!r} can't be read ({error})") from error
    for key, value in stored.items():
        number, _, metric = key.partition("/")
        values[int(number)][metric] = value
    rows = [Evaluated(row, values.get(number, {})) for number, row in enumerate(table)]
    return Evaluation(name or folder.name, folder, identity, protocol, rows)


def open_evaluations(arguments: Sequence[str]) -> list[Evaluation]:
    """Read runs of one protocol from a command line's arguments, each FOLDER or NAME=FOLDER.

    Folders without a name are called by their own, with as many of their parents as it takes to tell them apart.

    Raises:
        ValueError: if a folder is no finished evaluation or given twice, names are equal, or protocols differ.
    """
    named = [_name_and_folder(argument) for argument in arguments]
    resolved = [folder.resolve() for _, folder in named]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise ValueError(f"{str(folder)!r} is given twice")
    depth = 1
    while len({folder.parts[-depth:] for folder in resolved}) < len(resolved):
        depth += 1
    names = [name or "/".join(folder.parts[-depth:]) for (name, _), folder in zip(named, resolved, strict=True)]
    if len(set(names)) < len(names):
        raise ValueError(f"runs must have different names, got {', '.join(names)}")
    found = [open_evaluation(folder, name) for name, (_, folder) in zip(names, named, strict=True)]
    require_one_protocol(found)
    return found


def _name_and_folder(argument: str) -> tuple[str, Path]:
    """NAME=FOLDER or FOLDER: names and folders may hold equals signs, so whatever is a folder there is taken."""
    if "=" not in argument or Path(argument).expanduser().is_dir():
        return "", Path(argument).expanduser()
    parts = argument.split("=")
    splits = [("=".join(parts[:i]), Path("=".join(parts[i:])).expanduser()) for i in range(1, len(parts))]
    return next((split for split in splits if split[1].is_dir()), splits[0])


def require_one_protocol(evaluations: Sequence[Evaluation]) -> None:
    """Refuse evaluations whose numbers do not compare.

    Raises:
        ValueError: naming everything in which a protocol differs from the first one's, with both values.
    """
    first, *others = evaluations
    for other in others:
        differing = [
            f"{key} ({_shown(first.identity.get(key))} in {first.name}, {_shown(other.identity.get(key))} in "
            f"{other.name})"
            for key in dict.fromkeys([*first.identity, *other.identity])
            if first.identity.get(key) != other.identity.get(key)
        ]
        if differing:
            raise ValueError(f"the runs have different protocols and do not compare: {'; '.join(differing)}")


def _shown(value: Any) -> str:
    return json.dumps(value).replace('"', "") if value is not None else "none"


def collected_rows(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The rows of all runs, with the names of their runs under "run".

    A row that several runs have with equal numbers stands once, with all their names; seconds may differ.
    """
    found: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = []
    for evaluation in evaluations:
        for evaluated in evaluation.rows:
            numbers = evaluated.row.items()
            key = {name: value for name, value in numbers if value is not None and name not in _OF_THE_MACHINE}
            known = next((runs for other, _, runs in found if other == key and evaluation.name not in runs), None)
            if known is None:
                found.append((key, evaluated.row, [evaluation.name]))
            else:
                known.append(evaluation.name)
    return [row | {"run": ", ".join(runs)} for _, row, runs in found]
