"""Rows of an evaluation: shared out among processes, and kept until the table is written.

An evaluation that was interrupted takes the rows that are there, if nothing that determines them has changed: config,
backbone, data, checkpoints, own policies and the package's own code. A finished evaluation starts anew.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from orderrl.agents.play import Rollout
from orderrl.agents.registry import NamedPolicy, policy_source
from orderrl.backbones import Backbone, backbone_fingerprint
from orderrl.data import TokenSet
from orderrl.evaluation.protocol import Evaluated, Protocol, free_folder
from orderrl.factory import section
from orderrl.geometry import BlockGrid
from orderrl.metrics.features import timm_source
from orderrl.runtime import distributed, job
from orderrl.runtime.cache import fingerprint
from orderrl.runtime.progress import progress
from orderrl.runtime.sources import source_identity
from orderrl.runtime.storage import checksum, damage, manifest

_SAMPLES = "samples"
_STORED = (Evaluated, Rollout, BlockGrid)  # classes that a row is made of


class Job(NamedTuple):
    """A row that is to be made.

    Attributes:
        name: of the policy.
        make: evaluates it under a protocol.
    """

    name: str
    make: Callable[[Protocol], Evaluated]


def evaluation_key(config: DictConfig, backbone: Backbone, data: TokenSet, policies: Sequence[NamedPolicy]) -> str:
    """Fingerprint of everything that determines the rows of an evaluation."""
    settings = section(config, "eval", "planners")
    weights = [settings[key] for key in ("reference", "feature_weights", "clip_weights")]
    named = [settings[key] for key in ("features", "classifier")]
    of_timm = [timm_source(name) for name in named if name]
    files = [*settings["token_raster"], *weights, *of_timm]
    description = {
        "backbone": backbone_fingerprint(backbone),
        "data": data.fingerprint,
        "eval": settings,
        "labels": section(config, "labels"),
        "seed": config.seed,
        "files": [source_identity(file) for file in files],
        "policies": [
            [policy.name, _acting(policy), source_identity(policy_source(policy.spec))] for policy in policies
        ],
        "code": code_fingerprint(),
    }
    return fingerprint(description)


def _acting(policy: NamedPolicy) -> str | None:
    """What acts with a planner's file, wherever it lies, PATH@cost0.5@4, spaced_PATH; other policies by their names."""
    spec = policy.spec
    return None if spec is None else str(replace(spec, kind="newest", name="") if spec.path is not None else spec)


def code_fingerprint() -> str:
    """Fingerprint of the package's own source."""
    folders = [path for name in ("", ".agents", ".envs") for path in importlib.import_module(f"orderrl{name}").__path__]
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.py"))
    return fingerprint([checksum(file) for file in files])


def make_rows(jobs: Sequence[Job], protocol: Protocol, work: job.Job, keep_samples: bool) -> list[Evaluated]:
    """All rows in the order of the jobs; processes take the missing ones in turn.

    Args:
        jobs: what is to be made.
        protocol: shared by all rows.
        work: keeps finished rows.
        keep_samples: also keep the generated images, in the work's folder.

    Returns:
        The rows in the main process, nothing in the others.
    """
    names = [f"row-{number:04d}" for number in range(len(jobs))]
    missing = distributed.on_main(lambda: [i for i, name in enumerate(names) if not _is_there(work, name)])
    mine = distributed.share_of(missing)
    with progress(len(mine), "evaluating", "policies") as advance:
        for number in mine:
            folder = work.folder / _SAMPLES / names[number]
            if folder.exists():  # of a row that was interrupted
                shutil.rmtree(folder)
            made = jobs[number].make(replace(protocol, samples_folder=folder) if keep_samples else protocol)
            work.store(f"{_SAMPLES}-{names[number]}", manifest(folder))
            work.store(names[number], made)
            advance(note=jobs[number].name)
    distributed.barrier()
    return [work.load(name, _STORED) for name in names] if distributed.is_main() else []


def _is_there(work: job.Job, name: str) -> bool:
    """Whether a row was made, with its images."""
    files = f"{_SAMPLES}-{name}"
    if not (work.has(name) and work.has(files)):
        return False
    wrong = damage(work.folder / _SAMPLES / name, work.load(files))
    if wrong is not None:
        print(f"{wrong}; making {name} again", flush=True)
    return wrong is None


def publish_samples(work: job.Job, folder: Path) -> None:
    """Copy the generated images of all rows to `folder/POLICY`, in the order of the rows.

    The work keeps its own until all is done: an interruption can come between.
    """
    for row in sorted((work.folder / _SAMPLES).glob("row-*")):
        for policy in sorted(row.iterdir()):
            shutil.copytree(policy, free_folder(folder, policy.name))


def log_values(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row."""
    return {key: value for key, value in row.items() if isinstance(value, float)}
