"""One row of the table: a policy's planning metrics, calibration and sample quality under one protocol."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orderrl.agents.play import Rollout, act, roll_out, seen_by
from orderrl.agents.policies import ASKING, Policy, ReferencePolicy, RescoringPolicy, all_scores
from orderrl.agents.registry import NamedPolicy, make_policy
from orderrl.agents.spec import PolicySpec
from orderrl.backbones import Backbone, load_backbone, with_block_size
from orderrl.backbones.mar_backbone import MaskedTransformer
from orderrl.backbones.pretraining import mean_loss, raster_token_orders
from orderrl.backbones.protocol import backbone_device, check_fits
from orderrl.backbones.registry import TrainableBackbone
from orderrl.data import TokenSet
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.observation import labelled
from orderrl.evaluation.columns import all_columns, empty_row
from orderrl.evaluation.drawing import balanced_labels, generate_images
from orderrl.evaluation.importance import content_agreement, early_agreement
from orderrl.evaluation.policies import own_order
from orderrl.evaluation.protocol import EvaluationProtocol
from orderrl.evaluation.recording import ScoreLog, recorded
from orderrl.evaluation.row_entries import (
    code_lengths,
    entry,
    image_means,
    quality_intervals,
    recognisability_areas,
    recognisability_curve,
    state_mean,
)
from orderrl.evaluation.settings import OWN_ORDER
from orderrl.metrics.calibration import calibrate, regret
from orderrl.metrics.feature_names import own_features
from orderrl.metrics.features import Features, extract_features
from orderrl.metrics.images import save_images
from orderrl.metrics.order import first_choice_entropy, place_entropy, visible_neighbours
from orderrl.metrics.quality import class_accuracy, fid_infinity, sample_quality
from orderrl.metrics.recognisability import complete, recognise
from orderrl.metrics.references import open_reference
from orderrl.metrics.statistics import bootstrap_sums, ratio
from orderrl.oracle import utilities

if TYPE_CHECKING:
    from tensordict import TensorDict

SHOWN_SAMPLES = 20
"""Images that the report shows of what each policy drew: one or two of each class where there are few."""


@dataclass(frozen=True)
class Evaluated:
    """A row, and what comparisons and pictures need of it.

    Attributes:
        row: entries as in `empty_row`.
        per_image: (n,) of each image, in the order of the test images, by the row's key; under masked models
            `decode_nll` holds `decode_loss`.
        rollout: the trajectories behind it.
        scores: (T, images, B) float32, what the policy scored on the first images; None if it has no scores.
        drawn: (up to `SHOWN_SAMPLES`, 3, H, W) uint8, the first images that it drew; None if it drew none.
    """

    row: dict[str, Any]
    per_image: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    rollout: Rollout | None = field(default=None, repr=False)
    scores: Tensor | None = field(default=None, repr=False)
    drawn: Tensor | None = field(default=None, repr=False)


def evaluate_policy(p: EvaluationProtocol, named: NamedPolicy, sampled: bool) -> Evaluated:
    """Evaluate one policy; `sampled` says whether images are generated and scored."""
    reference, c = named.spec is not None and not named.spec.rival, p.config
    few = reference and p.states is not None  # a specialist's own order is measured and drawn in full
    images = min(len(p.data), c.reference_images) if few else len(p.data)
    # the policy reveals the test images
    core = NextBlockCore(p.backbone, p.data, images, CoreConfig(budgets=named.budgets, strict=True), p.seed)
    generator = torch.Generator().manual_seed(p.seed)
    log = ScoreLog()
    rollout = roll_out(core, recorded(named, log), generator, torch.arange(images))
    # what that is worth, image by image
    areas, curve = _recognisability(p, rollout)
    per_image = planning_values(rollout, p.backbone) | areas
    if p.importance is not None:
        worth = p.importance[:images]
        per_image["importance_spearman"] = early_agreement(rollout, worth)
        planner = getattr(named.scorer, "planner", None)
        if planner is not None and planner.config.network == "orderhead":
            per_image |= content_agreement(planner, p.backbone, p.data, worth)
    row = empty_row() | {
        "policy": named.name,
        "family": named.family or named.name,
        "rival": not reference,
        "own": named.spec is not None and named.spec.kind == "own",
        "objective": named.objective,
        "budgets": list(named.budgets),
        "R": named.reasoning_steps,
        "seed": named.seed,
        "step_cost": named.step_cost,
        "recognisability_curve": curve,
        "visible_neighbours_curve": visible_neighbours(rollout).mean(0).tolist(),
        "first_choice_entropy": first_choice_entropy(rollout),
        "place_entropy": place_entropy(rollout),
        "rollout_seconds_per_image": rollout.seconds / images,
        "scorings": None if named.scorer is None else _scorings(named.policy, rollout),
    }
    if named.spec is not None and named.spec.hindsight:  # the order tells about the tokens: this is no code length
        per_image = {key: value for key, value in per_image.items() if key != "decode_nll"}
    row |= image_means(per_image, c.resamples, p.seed) | _calibration(p, named)
    row |= entry("far_gain", bootstrap_sums(rollout.far_gain_sums.cpu(), ratio, c.resamples, seed=p.seed))
    row |= code_lengths(row, p.backbone)
    # the images that it draws
    drawn = None
    if sampled and not few:
        candidates = 1 if named.spec is None else named.spec.candidates
        found, drawn = _samples(p, row, p.backbone, named.policy, named.budgets, candidates)
        row |= found
    return Evaluated(row, per_image, rollout, log.scores, drawn)


def evaluate_specialist(p: EvaluationProtocol, name: str, order: str = OWN_ORDER) -> Evaluated:
    """Row of a backbone that was trained for an order; the shared states are those of another backbone.

    Args:
        name: its checkpoint.
        order: in which it draws: "own", or a policy by name, to see what it forgot.

    Raises:
        ValueError: if it says no order, does not fit the data, or the policy is unknown.
    """
    specialist = load_backbone(name, device=p.device)
    try:
        check_fits(specialist, p.data)
    except ValueError as error:
        raise ValueError(f"eval.specialists: {name}: {error}") from error
    origin = getattr(specialist, "origin", None)
    if origin is None or not isinstance(specialist, TrainableBackbone):
        raise ValueError(
            f"eval.specialists: {name} says no order that it was made for; train one with `python -m orderrl.pretrain "
            "training.start=... training.order=...`"
        )
    p, label = replace(p, backbone=specialist, states=None, lookahead=None), f"specialist: {origin.label}"
    spec = own_order(specialist) if order == OWN_ORDER else PolicySpec.parse(order)
    if order != OWN_ORDER:
        label = f"{label}, drawn in {order}"
    if spec is None:
        made = evaluate_token_raster(p, label, specialist)
    else:
        made = evaluate_policy(p, replace(make_policy(spec, specialist), name=label, family=label), True)
    return replace(made, row=made.row | {"seed": origin.seed})


def _scorings(policy: Policy | ReferencePolicy, rollout: Rollout) -> float:
    """How often an image's blocks were scored, the mean."""
    if not isinstance(policy, RescoringPolicy):
        return rollout.steps.mean().item()
    return 1.0 if policy.period is None else (rollout.steps / policy.period).ceil().mean().item()


def planning_values(rollout: Rollout, backbone: Backbone) -> dict[str, Tensor]:
    """Numbers of each image of a rollout, (n,) float on the CPU, by their keys in the row."""
    measured = {column.name: column.per_image for column in all_columns() if column.per_image is not None}
    return {name: one_each(name, values(rollout, backbone), len(rollout.labels)) for name, values in measured.items()}


def one_each(metric: str, values: Any, count: int) -> Tensor:
    """Numbers of a metric's function on the CPU; refused unless there is one for each image, (count,)."""
    if not isinstance(values, Tensor) or values.shape != (count,):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"metric {metric!r} must give a tensor ({count},), one number for each image, got {got}")
    return values.cpu()


def evaluate_token_raster(p: EvaluationProtocol, name: str, backbone: TrainableBackbone) -> Evaluated:
    """Row of a backbone in plain raster token order: its code length and its samples.

    The whole image is one block, inside which the order is raster; gains do not apply.
    """
    geometry = backbone.geometry
    if geometry.height != geometry.width:
        raise ValueError(f"token_raster needs a square token grid, got {geometry.height}x{geometry.width}")
    check_fits(backbone, p.data)
    tokens = float(geometry.num_tokens)
    row = empty_row() | {"policy": name, "steps": tokens, "decode_calls": tokens}
    one_block = with_block_size(backbone, geometry.height)
    per_image: dict[str, Tensor] = {}
    if isinstance(backbone, MaskedTransformer):
        row["decode_nll"] = tokens * mean_loss(backbone, p.data, raster_token_orders(geometry, len(p.data)))
    else:
        per_image["decode_nll"] = _whole_image_losses(one_block, p.data)
        row |= image_means(per_image, p.config.resamples, p.seed)
    row |= code_lengths(row, backbone)

    def whole_image(observation: TensorDict, generator: torch.Generator) -> Tensor:
        return torch.zeros_like(observation["label"])

    found, drawn = _samples(p, row, one_block, whole_image, (1,))
    return Evaluated(row | found, per_image, drawn=drawn)


def evaluate_foreign(p: EvaluationProtocol, name: str, path: Path) -> Evaluated:
    """Row of images that something else drew, as `open_reference` reads them: their quality; the name says so."""
    assert p.reference is not None  # the settings see to it
    try:
        found = open_reference(path, p.reference.features, p.config.weights, p.device).found
    except (ValueError, OSError) as error:
        raise ValueError(f"eval.foreign: {name}={path}: {error}") from error
    if found is None:
        raise ValueError(f"eval.foreign: {name}={path}: holds statistics alone; give the images, arr_0 uint8")
    row = {"policy": f"{name} (foreign, {len(found)} images)", "family": name}
    return Evaluated(empty_row() | row | _quality(p, found))


@torch.no_grad()
def _whole_image_losses(backbone: Backbone, data: TokenSet, batch_size: int = 64) -> Tensor:
    """Code length of each image under a backbone whose one block is the image, (n,), nats."""
    device, losses = backbone_device(backbone), []
    for rows in torch.arange(len(data)).split(batch_size):
        prefix = backbone.start(data.labels[rows].to(device))
        block = torch.zeros(len(rows), 1, dtype=torch.int64, device=device)
        losses.append(backbone.context_loss(prefix, data.tokens[rows].to(device), block)[0].loss[:, 0].cpu())
    return torch.cat(losses)


def _samples(
    p: EvaluationProtocol,
    row: Mapping[str, Any],
    backbone: Backbone,
    policy: Policy | ReferencePolicy,
    budgets: tuple[int, ...],
    candidates: int = 1,
) -> tuple[dict[str, Any], Tensor | None]:
    """Images drawn in a policy's order: entries of its row, and the first of them; kept if the protocol says so."""
    if not p.config.samples:
        return {}, None
    wanted = balanced_labels(p.config.samples, p.data.classes)
    made = generate_images(backbone, p.data, policy, budgets, wanted, p.config.sampling, p.seed, candidates=candidates)
    found: dict[str, Any] = {"seconds_per_image": made.seconds / len(made.tokens)}
    measures = {column.name: column.per_sample for column in all_columns() if column.per_sample is not None}
    if p.clip is not None:
        measures["clip_score"] = p.clip.scores
    drawn = p.data.images(made.tokens[:SHOWN_SAMPLES], p.device).cpu()
    if p.reference is None and p.samples_folder is None and not measures:
        return found, drawn
    by_class = made.labels.argsort(stable=True)  # the order of the kept files, on which random splits depend
    images, labels = p.data.images(made.tokens[by_class], p.device), made.labels[by_class]
    if p.samples_folder is not None:
        save_images(images, free_folder(p.samples_folder, folder_name(row["policy"], row["seed"])), labels)
    for name, values in measures.items():
        found |= image_means({name: one_each(name, values(images, labels), len(images))}, p.config.resamples, p.seed)
    return found | _against_reference(p, images, labels), drawn


def _against_reference(p: EvaluationProtocol, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """What samples are worth compared with real images, and how many a classifier recognises, with intervals."""
    if p.reference is None:
        return {}
    own = own_features(p.data.name)
    known = {} if own is None else {"accuracy": class_accuracy(images, labels, own)}
    return _quality(p, extract_features(images, p.reference.features, p.config.weights, p.device), known)


def _quality(p: EvaluationProtocol, found: Features, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What samples of these features are worth, with intervals, and of scores that are known."""
    assert p.reference is not None
    scores: dict[str, Any] = asdict(sample_quality(found, p.reference, p.config.kid_subsets)) | dict(known or {})
    if p.config.fid_infinity:
        scores["frechet_distance_infinity"] = fid_infinity(found, p.reference, seed=p.seed)
    intervals = quality_intervals(scores, found, p.reference, p.config.distance_resamples, p.seed)
    return {"features": p.reference.features} | scores | intervals


def free_folder(parent: Path, name: str) -> Path:
    """A folder that no other row has: two checkpoints may have one name and seed."""
    number = 1
    while (folder := parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def folder_name(policy: str, seed: int | None) -> str:
    """The folder of a policy's samples: its name, in characters that every file system takes, and its seed."""
    name = re.sub(r"[^\w.@+=-]+", "_", policy)
    return name if seed is None else f"{name}_seed{seed}"


def _calibration(p: EvaluationProtocol, named: NamedPolicy) -> dict[str, Any]:
    """Agreement with oracle and lookahead on the shared states, as entries of a row."""
    states = p.states
    if states is None:  # of another backbone
        return {}
    first, scores = first_choices(p, named)
    hidden = ~states["visible"]
    utility = utilities(states["gains"], p.backbone.geometry)
    found = calibrate(first, scores, utility, hidden)
    per_state = {
        "oracle_top1": found.top1,
        "regret": found.regret,
        "oracle_spearman": found.spearman,
        "oracle_kendall": found.kendall,
        "score_std": found.score_std,
    }
    row: dict[str, Any] = {}
    for key, values in per_state.items():
        row |= {} if values is None else state_mean(key, values, states["image"], p.config.resamples, p.seed)
    if p.lookahead is not None:
        rows = p.lookahead.rows
        values = regret(first[rows], p.lookahead.utility, hidden[rows])
        row |= state_mean("lookahead_regret", values, states["image"][rows], p.config.resamples, p.seed)
    if found.reliability is not None:
        row |= {"calibration_error": found.reliability.error, "calibration_r2": found.reliability.r2}
        row["reliability"] = found.reliability.plain()
    return row


def first_choices(p: EvaluationProtocol, named: NamedPolicy) -> tuple[Tensor, Tensor | None]:
    """The first-ranked block (m,) and, where a policy has them, the scores (m, B) in the shared states.

    The policy acts in its own kind of environment.
    """
    states = p.states
    assert states is not None
    generator = torch.Generator().manual_seed(p.seed)
    policy = named.policy
    if isinstance(policy, ReferencePolicy) or any(getattr(policy, name, False) for name in ASKING):
        core = NextBlockCore(p.backbone, p.data, len(states), CoreConfig(budgets=named.budgets, strict=True), p.seed)
        core.reset(index=states["image"])
        once = isinstance(policy, RescoringPolicy) and policy.period is None
        if not once:  # what was scored on the empty image stands in every state
            core.show(states["order"], states["length"])
        scores = all_scores(policy, core) if isinstance(policy, ReferencePolicy) else None
        if named.scorer is not None and not isinstance(policy, ReferencePolicy):
            scores = named.scorer(seen_by(policy, core), generator)
        action = act(policy, core, generator) if scores is None else None
    else:
        observation = labelled(states, budgets=named.budgets).to(p.device)
        scores = None if named.scorer is None else named.scorer(observation, generator)
        action = policy(observation, generator) if scores is None else None
    if scores is None:
        assert action is not None
        return (action if action.ndim == 1 else action[:, 0]).cpu(), None
    scores = scores.cpu().float()
    return scores.masked_fill(states["visible"], -torch.inf).argmax(-1), scores


def _recognisability(
    p: EvaluationProtocol, rollout: Rollout
) -> tuple[dict[str, Tensor], dict[str, list[float]] | None]:
    """Areas of each image, and the curves over the revealed fraction; nothing without a classifier."""
    if p.recogniser is None:
        return {}, None
    completed = partial(complete, p.backbone, p.data, rollout, sampling=p.config.sampling, seed=p.seed)
    found = recognise(p.recogniser, rollout, p.data, completed)
    at = torch.linspace(0, 1, rollout.geometry.num_blocks + 1)
    curve = recognisability_curve(found, rollout.fraction, at, p.config.resamples, p.seed)
    return recognisability_areas(found, rollout.fraction), curve
