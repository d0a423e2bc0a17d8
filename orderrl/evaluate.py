"""Compare planners with hand-made orders on held-out images: `python -m orderrl.evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch import Tensor

from orderrl.agents.fitted import fit_order
from orderrl.agents.registry import NamedPolicy, make_policy, tell_apart
from orderrl.agents.spec import PolicySpec
from orderrl.backbones import Backbone, backbone_fingerprint, backbone_names, load_backbone
from orderrl.backbones.mar_backbone import MaskedTransformer
from orderrl.backbones.protocol import backbone_device
from orderrl.backbones.registry import TrainableBackbone
from orderrl.data import TokenSet, load_split
from orderrl.evaluation.comparison import comparisons, in_order
from orderrl.evaluation.protocol import (
    EMPTY_ROW,
    Evaluated,
    Protocol,
    check_images_suffice,
    evaluate_policy,
    evaluate_token_raster,
    policy_detail,
    statistics_described,
)
from orderrl.evaluation.recording import example_images
from orderrl.evaluation.rows import Job, evaluation_key, log_values, make_rows, publish_samples
from orderrl.evaluation.runs import protocol_identity, save_results
from orderrl.factory import open_backbone, sampling_of, setup_of
from orderrl.labels import find_or_make_labels, open_labels
from orderrl.metrics.calibration import lookahead_utility
from orderrl.metrics.clip_score import class_captions
from orderrl.metrics.features import Features, extract_features, own_features
from orderrl.metrics.quality import Quality, real_floor, sample_quality
from orderrl.metrics.recognisability import OWN, check_fill, make_recogniser
from orderrl.metrics.references import Reference, open_reference, reference_of
from orderrl.oracle import utilities
from orderrl.report import write_report
from orderrl.report.markdown import markdown_comparisons, markdown_table
from orderrl.report.screen import print_comparisons, print_results
from orderrl.runtime import job
from orderrl.runtime.config import run_application
from orderrl.runtime.distributed import is_main, launched, print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.run import Run
from orderrl.training import newest_planner

AGENTS = ("bc", "fitted_q", "ppo", "grpo")  # whose newest planners are evaluated; the last one draws
FLOOR_REPEATS = 5  # random halves of the real images


def fitted_order(config: DictConfig, backbone: Backbone) -> Tensor:
    """The fixed order fitted on the planner labels of a config, (B,) int64."""
    labels = open_labels(find_or_make_labels(setup_of(config, backbone)), backbone)
    utility = utilities(labels["gains"], backbone.geometry)
    return fit_order(labels["visible"], utility)


def newest_planners(config: DictConfig, backbone: Backbone) -> list[Path]:
    """The newest checkpoint of every agent for this config's backbone and data.

    Raises:
        ValueError: if there is none.
    """
    setup = setup_of(config, backbone)
    found = [path for agent in AGENTS if (path := newest_planner(setup, agent)) is not None]
    if not found:
        raise ValueError(
            f"no planner for backbone {config.backbone.name!r} in {config.cache_dir}; train one with "
            "`python -m orderrl.train agent=bc`"
        )
    return found


def make_protocol(config: DictConfig, backbone: Backbone) -> Protocol:
    """What every row of the table shares."""
    e = config.eval
    features = feature_name(config)
    if features is None and e.reference is not None:
        raise ValueError(f"reference={e.reference!r} needs features to compare samples in, but features is null")
    data = load_split(config.data.name, "test")
    real, reference = real_and_reference(config, backbone_device(backbone)) if features is not None else (None, None)
    images = min(e.images, len(data))
    subset = data.first(images)
    device = backbone_device(backbone)
    recogniser = make_recogniser(e.classifier, data, e.hidden_fill, device)
    clip = None
    if e.clip_model is not None:
        clip = class_captions(data, e.clip_model, e.clip_weights, e.clip_prompt, device)
    states = _shared_states(config, backbone, images) if backbone.order_robust else None
    lookahead = None
    if states is not None and e.lookahead_states is not None and backbone.vocab_size:
        lookahead = lookahead_utility(backbone, subset, states, e.lookahead_states, e.lookahead_draws, config.seed)
    return Protocol(
        backbone,
        subset,
        real,
        reference,
        states,
        features,
        e.samples,
        e.reference_images,
        sampling_of(e),
        e.resamples,
        config.seed,
        feature_weights(config),
        e.kid_subsets,
        lookahead=lookahead,
        recogniser=recogniser,
        distance_resamples=e.distance_resamples,
        extrapolate=e.fid_infinity,
        clip=clip,
    )


def check_settings(config: DictConfig) -> None:
    """Refuse what can be told from the config alone, before any work.

    Raises:
        ValueError: naming the key, its value, and what is allowed.
    """
    for key in ("images", "reference_images"):
        check_images_suffice(f"eval.{key}", config.eval[key])
    check_fill(config.eval.hidden_fill)
    feature_name(config)


def feature_name(config: DictConfig) -> str | None:
    """The feature extractor of a config, "own" by its name; None scores no samples.

    Raises:
        ValueError: if it is "own" and none ships for the data.
    """
    chosen: str | None = config.eval.features
    if chosen != OWN:
        return chosen
    own = own_features(config.data.name)
    if own is None:
        raise ValueError(
            f"eval.features={OWN}: no feature extractor ships for data {config.data.name!r}; choose one, such as "
            "eval.features=inception-v3-compat, or eval.features=null, which scores no samples"
        )
    return own


def feature_weights(config: DictConfig) -> Path | None:
    """The weights file of the feature extractor; None is its own weights."""
    return None if config.eval.feature_weights is None else Path(config.eval.feature_weights).expanduser()


def real_and_reference(config: DictConfig, device: torch.device) -> tuple[Features, Reference]:
    """Features of the data set's real images, and what samples are compared with: these, or `eval.reference`."""
    e, features, weights = config.eval, feature_name(config), feature_weights(config)
    assert features is not None
    named = None if e.reference is None else open_reference(Path(e.reference), features, weights, device)
    splits = all_splits(config.data.name)
    images = torch.cat([part.images(part.first(e.real_images).tokens[:], device) for part in splits])
    real = extract_features(images, features, weights, device)
    if named is not None:
        return real, named
    kept = "all" if len(images) == sum(map(len, splits)) else f"at most {e.real_images} of each of all"
    return real, reference_of(real, features, source=f"{len(images)} real images ({kept} splits)")


def real_row(protocol: Protocol) -> Quality | None:
    """What real images reach: two halves of them, or against a reference that was named, all of them."""
    real, reference = protocol.real, protocol.reference
    if real is None or reference is None:
        return None
    if reference.found is real:
        return real_floor(real, FLOOR_REPEATS, protocol.seed, max(1, protocol.kid_subsets // FLOOR_REPEATS))
    return sample_quality(real, reference, protocol.kid_subsets)


def _shared_states(config: DictConfig, backbone: Backbone, images: int) -> TensorDict:
    """Labelled random contexts of the first test images, for calibration."""
    wanted = {"contexts": config.eval.states, "kind": "pointwise", "samples": 1, "seed": config.seed}
    states = open_labels(find_or_make_labels(setup_of(config, backbone), "test", **wanted), backbone)
    return states[states["image"] < images]


def all_splits(name: str) -> list[Any]:
    """All splits of a data set."""
    return [load_split(name, split) for split in ("backbone", "planner", "test")]


def planner_specs(config: DictConfig, backbone: Backbone) -> list[PolicySpec]:
    """The planners of the table; none where there is no order to choose.

    Raises:
        ValueError: if an entry is no planner, or none is there.
    """
    specs: list[PolicySpec] = []
    for entry in config.eval.planners if backbone.order_robust else []:
        spec = PolicySpec.parse(entry)
        if spec.kind not in ("planner", "newest"):
            raise ValueError(f"eval.planners: {entry!r} is no planner; give a .safetensors file or newest")
        specs += [spec.at(path) for path in newest_planners(config, backbone)] if spec.kind == "newest" else [spec]
    return specs


def policy_of(config: DictConfig, backbone: Backbone) -> PolicySpec:
    """The policy of a config that has one; "newest" is the last of the agents' newest planners.

    Raises:
        ValueError: if it is no policy's name, or there is no planner.
    """
    spec = PolicySpec.parse(config.policy)
    if spec.kind != "newest":
        return spec
    spec = spec.at(newest_planners(config, backbone)[-1])
    print_main(f"policy: {spec}")
    return spec


def chosen_policies(
    config: DictConfig, backbone: Backbone, planners: Sequence[PolicySpec]
) -> list[tuple[NamedPolicy, bool]]:
    """Policies of the table, each with whether its samples are scored; all names are checked before any work."""
    order: dict[str, Tensor] = {}

    def fitted() -> Tensor:
        if "fitted" not in order:
            order["fitted"] = fitted_order(config, backbone)
        return order["fitted"]

    e = config.eval
    if not backbone.order_robust:
        print_main(
            f"{config.backbone.name} draws in raster order only: no policy to compare, its raster row stands alone"
        )
        return []
    for planner in planners:
        print_main(f"planner: {planner}")
    own_budgets = tuple(e.get("budgets", (1,)))

    def build(spec: PolicySpec) -> NamedPolicy:
        return make_policy(spec, backbone, fitted, own_budgets)

    listed = [PolicySpec.parse(text) for text in e.policies]
    baselines = dict.fromkeys(swept for spec in listed for swept in schedules(spec, (1,), e.sweep))
    told = [spec for planner in planners for spec in at_step_costs(planner, build(planner), e.step_costs)]
    swept_planners = dict.fromkeys(swept for spec in told for swept in schedules(spec, build(spec).budgets, e.sweep))
    sampled = {PolicySpec.parse(text) for text in e.sampled}

    def is_sampled(spec: PolicySpec) -> bool:
        return spec in sampled or bool(e.sweep and spec.family in sampled) or spec.kind in ("own", "planner")

    chosen = [(build(spec), is_sampled(spec)) for spec in baselines]
    return chosen + [(named, True) for named in tell_apart([build(spec) for spec in swept_planners])]


def at_step_costs(spec: PolicySpec, named: NamedPolicy, step_costs: Sequence[float] | None) -> list[PolicySpec]:
    """A planner that must be told what a step costs, once for every cost of a list; others stay as they are.

    Args:
        spec: what it was made of.
        named: the policy.
        step_costs: nats per image; None takes the ends of the range that the planner was trained on and their geometric
            mean, to two digits.
    """
    if named.step_cost_range is None:
        return [spec]
    low, high = named.step_cost_range
    between = min(max(float(f"{(low * high) ** 0.5:.2g}"), low), high)
    return [replace(spec, step_cost=float(cost)) for cost in step_costs or (low, between, high)]


def schedules(spec: PolicySpec, budgets: tuple[int, ...], sweep: Sequence[int]) -> list[PolicySpec]:
    """A policy, and if it reveals one block a step by no schedule of its own the same at every budget of a sweep.

    Own policies and references, which are evaluated on the first images only, stay as they are.
    """
    if spec.schedule or budgets != (1,) or spec.kind == "own" or not spec.rival:
        return [spec]
    return [spec, *(replace(spec, schedule=str(budget)) for budget in sweep if budget != 1)]


@isolated_float32
def evaluate(config: DictConfig) -> Path:
    """Evaluate all policies of a config and return the run folder with `results.json` and `report.html`.

    Raises:
        ValueError: if a policy or checkpoint is unknown, does not fit, or acts illegally.
    """
    check_settings(config)
    backbone = open_backbone(config)
    policies = chosen_policies(config, backbone, planner_specs(config, backbone))
    protocol = make_protocol(config, backbone)
    jobs = row_jobs(config, backbone, policies)
    key = evaluation_key(config, backbone, protocol.data, [named for named, _ in policies])
    with Run("evaluate", config) as run, job.Job(config.cache_dir, f"evaluation-{key}", instead=run.folder) as work:
        rows = make_rows(jobs, protocol, work, config.eval.keep_samples)
        if is_main():
            for number, row in enumerate(rows):
                run.log(log_values(row.row), number + 1)
            publish_samples(work, run.folder / "samples")
            _write_table(config, backbone, protocol, rows, run)
    return run.folder


def row_jobs(config: DictConfig, backbone: Backbone, policies: list[tuple[NamedPolicy, bool]]) -> list[Job]:
    """Every row of the table as something to be made."""
    raster = raster_backbones(config) if backbone.order_robust else ["self"]

    def policy_row(protocol: Protocol, named: NamedPolicy, sampled: bool) -> Evaluated:
        return evaluate_policy(protocol, named, sampled)

    def raster_row(protocol: Protocol, name: str) -> Evaluated:
        own = name == "self"
        other = backbone if own else load_backbone(name, device=config.device)
        if not isinstance(other, TrainableBackbone):
            raise ValueError(f"token_raster={name!r} must be a causal backbone of this package")
        return evaluate_token_raster(protocol, "token_raster" if own else name, other)

    return [
        *(Job(named.name, partial(policy_row, named=named, sampled=sampled)) for named, sampled in policies),
        *(Job(name, partial(raster_row, name=name)) for name in raster),
    ]


def raster_backbones(config: DictConfig) -> list[str]:
    """Backbones scored in plain raster token order; "own" is the data set's shipped raster one, if there is one."""
    own = f"{config.data.name}_raster"
    known = [name for name in config.eval.token_raster if name != OWN or own in backbone_names()]
    return [own if name == OWN else name for name in known]


def _write_table(config: DictConfig, backbone: Backbone, protocol: Protocol, rows: list[Evaluated], run: Run) -> None:
    """Compare the rows, write results and report, and print the main columns, planners first."""
    rows = in_order(rows)
    reached = real_row(protocol)
    known = {} if reached is None else {"policy": "real images", "features": protocol.features, **asdict(reached)}
    floor = [EMPTY_ROW | known] if known else []
    identity = protocol_identity(config, backbone, protocol)
    results: dict[str, Any] = {
        "protocol": describe(config, backbone, protocol),
        "identity": identity,
        "rows": [row.row for row in rows] + floor,
        "comparisons": comparisons(rows, protocol.resamples, config.seed),
    }
    save_results(run.folder, results, rows)
    details = [policy_detail(protocol, row) for row in rows if _pictured(row)]
    examples = example_images(protocol.data, backbone.geometry) if details else None
    report = write_report(run.folder, results, details, examples)
    run.log_figures(sorted((run.folder / "figures").glob("*.png")))
    tables = markdown_table(results["rows"]) + "\n" + markdown_comparisons(results["comparisons"])
    (run.folder / "results.md").write_text(tables, encoding="utf-8")
    print_results(results["rows"], results["comparisons"])
    print_comparisons(results["comparisons"])
    print_main(f"results: {run.folder / 'results.json'}\nreport: {report}")


def _pictured(row: Evaluated) -> bool:
    """Whether the report shows a policy's orders: planners of one seed, and everything else that has an order."""
    return row.rollout is not None and row.row["seed"] in (None, 0)


def describe(config: DictConfig, backbone: Backbone, protocol: Protocol) -> dict[str, Any]:
    """The protocol in plain values: on what every number was measured."""
    return {
        "data": _data_described(protocol.data),
        "backbone": f"{config.backbone.name} ({backbone_fingerprint(backbone)})",
        "block_grid": f"{backbone.geometry.rows}x{backbone.geometry.columns} blocks of "
        f"{backbone.geometry.block_size}x{backbone.geometry.block_size} tokens",
        "calibration": None
        if protocol.states is None
        else f"{len(protocol.states)} shared states of random contexts of test images, hindsight oracle",
        "references": f"oracle and lookahead on the first {protocol.reference_images} images",
        "samples": _compared(protocol),
        "features": protocol.features,
        "clip_score": None if protocol.clip is None else f"mean over the samples: {protocol.clip.described}",
        "recognisability": None if protocol.recogniser is None else protocol.recogniser.described,
        "losses": _loss_unit(backbone, protocol),
        "sampling": OmegaConf.to_container(OmegaConf.create(vars(protocol.sampling))),
        "seconds_per_image": "of drawing samples in batches of 250; rollout_seconds_per_image: of scoring the test "
        "images in the policy's order",
        **statistics_described(protocol),
        "seed": config.seed,
    }


def _data_described(data: TokenSet) -> str:
    """Which images, and of a data set that holds some of a model's classes how many; samples are of these, too."""
    some = (
        "" if data.present is None else f", {len(data.present)} of {data.num_classes} classes, samples of these alone"
    )
    return f"{data.name}/{data.split}, {len(data)} images{some}"


def _compared(protocol: Protocol) -> str | None:
    """What samples are compared with, and how far the distance depends on their number."""
    real, reference = protocol.real, protocol.reference
    if real is None or reference is None:
        return None
    floor = f"two halves of {len(real) // 2}" if reference.found is real else f"all {len(real)} of the data set"
    return (
        f"{protocol.samples} per row against {reference.source}; Fréchet distances fall with the number of images "
        f"(bias), so only equal numbers compare; the row of real images is {floor}; KID of "
        f"{protocol.kid_subsets} subsets"
    )


def _loss_unit(backbone: Backbone, protocol: Protocol) -> str:
    """The unit of every loss and gain; for masked models also how much a loss moves with its noises."""
    if not isinstance(backbone, MaskedTransformer):
        return "nats"
    some = protocol.data.tokens[:64].to(protocol.device), protocol.data.labels[:64].to(protocol.device)
    return (
        f"DiffLoss units, mean of {backbone.config.loss_draws} draws at fixed times; standard deviation over draws "
        f"{backbone.loss_noise(*some):.1%} of a block's loss"
    )


if __name__ == "__main__":
    run_application("evaluate", launched(evaluate))
