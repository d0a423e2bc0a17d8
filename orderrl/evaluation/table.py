"""The table of an evaluation: its rows, shared out among processes and kept until all are there, and its results.

An evaluation that was interrupted takes the rows that are there, if nothing that determines them has changed: settings,
backbone, data, checkpoints, own policies and metrics, and the package's own code. A finished evaluation starts anew.
"""

import importlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from orderrl.agents.play import Rollout
from orderrl.agents.registry import NamedPolicy, policy_source
from orderrl.agents.spec import PolicySpec
from orderrl.backbones import backbone_fingerprint, backbone_names, load_backbone
from orderrl.backbones.registry import TrainableBackbone
from orderrl.data import TokenSet
from orderrl.envs.reward import OBJECTIVES
from orderrl.evaluation.columns import all_columns, empty_row
from orderrl.evaluation.comparison import comparisons
from orderrl.evaluation.detail import Curve, Drawn, Pictures, PolicyDetail
from orderrl.evaluation.protocol import EvaluationProtocol
from orderrl.evaluation.recording import episodes, example_images
from orderrl.evaluation.rows import (
    Evaluated,
    evaluate_foreign,
    evaluate_policy,
    evaluate_specialist,
    evaluate_token_raster,
    free_folder,
)
from orderrl.evaluation.settings import EvalConfig
from orderrl.factory import Setup
from orderrl.geometry import BlockGrid
from orderrl.metrics.feature_names import EXTRACTORS, is_own, timm_source
from orderrl.metrics.recognisability import OWN
from orderrl.metrics.statistics import bootstrap_band
from orderrl.runtime import distributed
from orderrl.runtime.cache import fingerprint
from orderrl.runtime.job import Job
from orderrl.runtime.progress import progress
from orderrl.runtime.sources import source_identity
from orderrl.runtime.storage import checksum, damage, manifest

_SAMPLES = "samples"
_STORED = (Evaluated, Rollout, BlockGrid)  # classes that a row is made of


class PendingRow(NamedTuple):
    """A row that is to be made."""

    name: str  # of the policy
    make: Callable[[EvaluationProtocol], Evaluated]  # evaluates it under a protocol


def pending_rows(config: EvalConfig, setup: Setup, policies: Sequence[tuple[NamedPolicy, bool]]) -> list[PendingRow]:
    """Every row of the table as something to be made; policies come with whether their samples are scored.

    Raises:
        ValueError: if images of `foreign` are not there.
    """
    backbone = setup.backbone

    def raster_row(protocol: EvaluationProtocol, name: str) -> Evaluated:
        own = name == "self"
        other = backbone if own else load_backbone(name, device=setup.device)
        if not isinstance(other, TrainableBackbone):
            raise ValueError(f"token_raster={name!r} must be a causal backbone of this package")
        return evaluate_token_raster(protocol, "token_raster" if own else name, other)

    raster = raster_backbones(config.token_raster, setup.data) if backbone.order_robust else ["self"]
    return [
        *(
            PendingRow(named.name, partial(evaluate_policy, named=named, sampled=sampled))
            for named, sampled in policies
        ),
        *(PendingRow(name, partial(raster_row, name=name)) for name in raster),
        *(
            PendingRow(f"{name} in {order}", partial(evaluate_specialist, name=name, order=order))
            for name in config.specialists
            for order in config.specialist_orders
        ),
        *(PendingRow(name, partial(evaluate_foreign, name=name, path=path)) for name, path in _foreign(config)),
    ]


def _foreign(config: EvalConfig) -> list[tuple[str, Path]]:
    """Names and places of images that others drew."""
    given = [entry.partition("=") for entry in config.foreign]
    found = [(name, Path(path).expanduser()) for name, _, path in given]
    for name, path in found:
        if not path.exists():
            raise ValueError(f"eval.foreign: {name}={path} does not exist")
    return found


def raster_backbones(names: Sequence[str], data: str) -> list[str]:
    """Backbones scored in plain raster token order; "own" is the data set's shipped raster one, if there is one."""
    own = f"{data}_raster"
    return [own if name == OWN else name for name in names if name != OWN or own in backbone_names()]


def evaluation_key(config: EvalConfig, setup: Setup, data: TokenSet, policies: Sequence[NamedPolicy]) -> str:
    """Fingerprint of everything that determines the rows of an evaluation on some images."""
    settings = asdict(config)
    del settings["planners"]  # they stand among the policies, by their content
    description = {
        "backbone": backbone_fingerprint(setup.backbone),
        "data": data.fingerprint,
        "eval": settings,
        "labels": asdict(setup.labels),
        "seed": setup.seed,
        "files": [source_identity(timm_source(name) or name) for name in _files(config)],
        "foreign": [source_identity(path) for _, path in _foreign(config)],
        "orders": [source_identity(policy_source(PolicySpec.parse(name))) for name in config.specialist_orders],
        "features": EXTRACTORS.version(config.features) if config.features and is_own(config.features) else None,
        "policies": [
            [policy.name, _acting(policy), source_identity(policy_source(policy.spec))] for policy in policies
        ],
        "objectives": [[name, OBJECTIVES.version(name)] for name in OBJECTIVES.own()],
        "metrics": [[name, source_identity(file)] for name, file in _own_metrics()],
        "code": code_fingerprint(),
    }
    return fingerprint(description)


def _files(config: EvalConfig) -> list[str]:
    """The values of all settings that may name files."""
    values = [getattr(config, field.name) for field in fields(config) if field.metadata.get("file")]
    return [name for value in values if value for name in (value if isinstance(value, list) else [value])]


def _own_metrics() -> Iterator[tuple[str, str | None]]:
    """Names and source files of all metrics that are functions."""
    for column in all_columns():
        for function in (column.per_image, column.per_sample):
            if function is not None:
                yield column.name, getattr(getattr(function, "__code__", None), "co_filename", None)


def _acting(policy: NamedPolicy) -> str | None:
    """What acts with a planner's file, wherever it lies, PATH@cost0.5@4, spaced_PATH; other policies by their names."""
    spec = policy.spec
    return None if spec is None else str(replace(spec, kind="newest", name="") if spec.path is not None else spec)


def code_fingerprint() -> str:
    """Fingerprint of the package's own source."""
    folders = [path for name in ("", ".agents", ".envs") for path in importlib.import_module(f"orderrl{name}").__path__]
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.py"))
    return fingerprint([checksum(file) for file in files])


def make_rows(pending: Sequence[PendingRow], protocol: EvaluationProtocol, work: Job) -> list[Evaluated]:
    """All rows in their order, in the main process alone; processes take the missing ones in turn.

    The job keeps finished rows, and their generated images if the settings say so.
    """
    names = [f"row-{number:04d}" for number in range(len(pending))]
    missing = distributed.on_main(lambda: [i for i, name in enumerate(names) if not _is_there(work, name)])
    mine, keep = distributed.share_of(missing), protocol.config.keep_samples
    with progress(len(mine), "evaluating", "policies") as advance:
        for number in reversed(mine):  # what the user named as a file comes first: it may be wrong
            folder = work.folder / _SAMPLES / names[number]
            if folder.exists():  # of a row that was interrupted
                shutil.rmtree(folder)
            made = pending[number].make(replace(protocol, samples_folder=folder) if keep else protocol)
            work.store(f"{_SAMPLES}-{names[number]}", manifest(folder))
            work.store(names[number], made)
            advance(note=pending[number].name)
    distributed.barrier()
    return [work.load(name, _STORED) for name in names] if distributed.is_main() else []


def _is_there(work: Job, name: str) -> bool:
    """Whether a row was made, with its images."""
    files = f"{_SAMPLES}-{name}"
    if not (work.has(name) and work.has(files)):
        return False
    wrong = damage(work.folder / _SAMPLES / name, work.load(files))
    if wrong is not None:
        print(f"{wrong}; making {name} again", flush=True)
    return wrong is None


def publish_samples(work: Job, folder: Path) -> None:
    """Copy the generated images of all rows to `folder/POLICY`, in the order of the rows.

    The work keeps its own until all is done: an interruption can come between.
    """
    for row in sorted((work.folder / _SAMPLES).glob("row-*")):
        for policy in sorted(row.iterdir()):
            shutil.copytree(policy, free_folder(folder, policy.name))


def tabulated(protocol: EvaluationProtocol, rows: Sequence[Evaluated]) -> dict[str, Any]:
    """What `results.json` holds of rows in the order of the table, planners first: see `in_order`."""
    reached = protocol.real_row()
    known = {} if reached is None else {"policy": "real images", "features": protocol.features, **asdict(reached)}
    return {
        "protocol": protocol.described(),
        "identity": protocol.identity(),
        "rows": [row.row for row in rows] + ([empty_row() | known] if known else []),
        "comparisons": comparisons(rows, protocol.config.resamples, protocol.seed),
    }


def pictures(protocol: EvaluationProtocol, rows: Sequence[Evaluated]) -> Pictures:
    """What the report shows of rows besides their numbers: of planners one seed, and of everything else all."""
    shown = [row for row in rows if row.row["seed"] in (None, 0)]
    details = [policy_detail(protocol, row) for row in shown if row.rollout is not None]
    examples = example_images(protocol.data, protocol.backbone.geometry) if details else None
    return Pictures(details, examples, [Drawn(row.row["policy"], row.drawn) for row in shown if row.drawn is not None])


def policy_detail(protocol: EvaluationProtocol, evaluated: Evaluated) -> PolicyDetail:
    """What the report's pictures show of a policy, apart from its row."""
    rollout = evaluated.rollout
    assert rollout is not None
    geometry = rollout.geometry
    fractions = torch.linspace(0, 1, geometry.num_blocks + 1, device=rollout.losses.device)
    band = bootstrap_band(rollout.gain_curve(fractions).cpu(), protocol.config.resamples, seed=protocol.seed)
    last = (rollout.steps - 1).clamp_min(1)
    order = (rollout.reveal_step.float() / last[:, None]).mean(0).view(geometry.rows, geometry.columns)
    return PolicyDetail(
        evaluated.row["policy"],
        Curve(fractions.tolist(), *(values.tolist() for values in band)),
        order.cpu().tolist(),
        episodes(rollout, evaluated.scores),
    )
