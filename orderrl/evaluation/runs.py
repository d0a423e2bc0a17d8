"""Finished evaluations: the identity of their protocol, and the values of single images that pairing needs.

Numbers of two runs compare if their identities are equal: `require_one_protocol` names what differs.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from orderrl.evaluation.columns import all_columns
from orderrl.evaluation.rows import Evaluated
from orderrl.runtime.storage import Unsealed, damage, manifest, read_sealed, write_sealed, written_aside

RESULTS = "results.json"
VALUES = "per_image.safetensors"


def save_results(folder: Path, results: dict[str, Any], rows: Sequence[Evaluated]) -> None:
    """Write the files that `open_evaluation` reads.

    `per_image.safetensors` holds values of images as "<row>/<key>"; `results.json` holds the results, the size and
    checksum of the other file, and its own.

    Args:
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
    """A finished run of `orderrl.evaluate`."""

    name: str  # what it is called beside others
    folder: Path
    identity: dict[str, Any]  # of its protocol, from `EvaluationProtocol.identity`
    protocol: dict[str, Any]  # the same in words, for people
    rows: list[Evaluated]  # of its table, with the values of single images where they were measured


def open_evaluation(folder: Path, name: str | None = None) -> Evaluation:
    """Read a run folder.

    Args:
        folder: of a finished run of `orderrl.evaluate`.
        name: what to call it; None is the folder's name.

    Raises:
        ValueError: if it is no run of an evaluation, was written by an older version, or is damaged.
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
        raise ValueError(f"{str(folder / VALUES)!r} cannot be read ({error})") from error
    for key, value in stored.items():
        number, _, metric = key.partition("/")
        values[int(number)][metric] = value
    rows = [Evaluated(row, values.get(number, {})) for number, row in enumerate(table)]
    return Evaluation(name or folder.name, folder, identity, protocol, rows)


def open_evaluations(arguments: Sequence[str]) -> list[Evaluation]:
    """Read runs of one protocol from a command line's arguments, each FOLDER or NAME=FOLDER.

    Folders without a name are called by their own, with as many of their parents as it takes to tell them apart.
    ValueError if a folder is no finished evaluation or given twice, names are equal, or protocols differ.
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
    """Refuse evaluations whose numbers do not compare, by everything in which a protocol differs from the first's."""
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
    seconds = {column.name for column in all_columns() if column.clock}
    found: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = []
    for evaluation in evaluations:
        for evaluated in evaluation.rows:
            numbers = evaluated.row.items()
            key = {name: value for name, value in numbers if value is not None and name not in seconds}
            known = next((runs for other, _, runs in found if other == key and evaluation.name not in runs), None)
            if known is None:
                found.append((key, evaluated.row, [evaluation.name]))
            else:
                known.append(evaluation.name)
    return [row | {"run": ", ".join(runs)} for _, row, runs in found]


def collected(evaluations: Sequence[Evaluation], summary: str) -> dict[str, Any]:
    """What a page of several runs shows: summary, identity, runs (name to folder) and rows (with their runs' names)."""
    return {
        "summary": summary,
        "identity": evaluations[0].identity,
        "runs": {run.name: str(run.folder) for run in evaluations},
        "rows": collected_rows(evaluations),
    }


def ranked_rows(evaluations: Sequence[Evaluation], key: str) -> list[dict[str, Any]]:
    """The rows of all runs, best first; those without a value come last.

    ValueError if no column of the table has this key and says which direction is better.
    """
    directions = {column.name: column.direction for column in all_columns() if column.direction}
    if key not in directions:
        raise ValueError(f"rank={key!r} cannot be ranked by; choose one of {', '.join(directions)}")

    def place(row: dict[str, Any]) -> tuple[bool, float]:
        value = row.get(key)
        return value is None, -directions[key] * (value or 0)

    return sorted(collected_rows(evaluations), key=place)


def leaderboard(evaluations: Sequence[Evaluation], key: str) -> dict[str, Any]:
    """What `leaderboard.json` holds: as `collected`, its rows ranked by a metric."""
    rows, data = ranked_rows(evaluations, key), evaluations[0].protocol["data"]
    runs = "one run" if len(evaluations) == 1 else f"{len(evaluations)} runs of one protocol"
    summary = f"{len(rows)} rows of {runs}, on {data}, ranked by {key}."
    return collected(evaluations, summary) | {"rows": rows}
