"""One row of the table: a policy's planning metrics, calibration and sample quality under one protocol."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from orderrl.agents.play import Rollout, roll_out
from orderrl.agents.policies import ReferencePolicy, all_scores
from orderrl.agents.registry import NamedPolicy
from orderrl.backbones import Backbone, Sampling, with_block_size
from orderrl.backbones.mar_backbone import MaskedTransformer
from orderrl.backbones.pretraining import mean_loss, raster_token_orders
from orderrl.backbones.protocol import backbone_device, check_fits
from orderrl.backbones.registry import TrainableBackbone
from orderrl.data import TokenSet
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.evaluation.drawing import Generated, balanced_labels, generate_images
from orderrl.evaluation.recording import ScoreLog, episodes, recorded
from orderrl.evaluation.row_entries import (
    code_lengths,
    entry,
    image_means,
    quality_intervals,
    recognisability_areas,
    recognisability_curve,
    state_mean,
)
from orderrl.metrics.calibration import LookaheadUtility, calibrate, regret, state_observation
from orderrl.metrics.clip_score import ClassCaptions
from orderrl.metrics.features import Features, extract_features, own_features
from orderrl.metrics.images import save_images
from orderrl.metrics.order import consecutive_distance, first_choice_entropy, visible_neighbours
from orderrl.metrics.quality import KID_SUBSETS, class_accuracy, fid_infinity, sample_quality
from orderrl.metrics.recognisability import Recogniser, complete, recognise
from orderrl.metrics.references import Reference
from orderrl.metrics.statistics import bootstrap_band, bootstrap_sums, ratio
from orderrl.oracle import utilities
from orderrl.report import Curve, PolicyDetail

WITH_INTERVAL = (
    "gain_auc",
    "likelihood_return",
    "far_gain",
    "decode_nll",
    "decode_bits",
    "decode_loss",
    "recognisability_auc",
    "recognisability_accuracy_auc",
    "oracle_top1",
    "oracle_spearman",
    "oracle_kendall",
    "regret",
    "lookahead_regret",
    "score_std",
    "consecutive_distance",
    "visible_neighbours",
    "steps",
    "decode_calls",
    "frechet_distance",
    "precision",
    "recall",
    "spatial_frechet_distance",
    "clip_score",
    "accuracy",
)
"""Numbers of a row whose 95 % interval over images stands under the same key with `_ci` behind it, [low, high]."""
WITHOUT_INTERVAL = (
    "policy",
    "family",
    "rival",
    "objective",
    "budgets",
    "R",
    "seed",
    "step_cost",
    "recognisability_curve",
    "calibration_error",
    "calibration_r2",
    "reliability",
    "visible_neighbours_curve",
    "first_choice_entropy",
    "seconds_per_image",
    "rollout_seconds_per_image",
    "frechet_distance_infinity",
    "inception_score",
    "kid",
    "cmmd",
    "features",
)
"""The others. `family` is the policy without schedule and step cost; `rival` is false for oracle and lookahead, which
know or try out hidden tokens and are evaluated on the first images only."""
EMPTY_ROW: dict[str, Any] = dict.fromkeys([*WITHOUT_INTERVAL, *WITH_INTERVAL, *(f"{key}_ci" for key in WITH_INTERVAL)])


def check_images_suffice(key: str, count: int) -> None:
    """Refuse fewer images than an interval over them needs.

    Raises:
        ValueError: naming the setting, if there are fewer than 2.
    """
    if count < 2:
        raise ValueError(f"{key} must be at least 2, the fewest images that have an interval, got {count}")


@dataclass(frozen=True)
class Protocol:
    """What every row of a table shares.

    Attributes:
        backbone: frozen.
        data: the test images.
        real: features of real images of the data set; None scores no samples.
        reference: what samples are compared with; None scores no samples.
        states: labelled contexts of test images, for calibration; None where there is no order to choose.
        features: feature extractor; None scores no samples.
        samples: generated images per row; 0 is none.
        reference_images: images for references that need much computation.
        sampling: how tokens are drawn.
        resamples: of the bootstrap.
        seed: of policies, samples and resamples.
        weights: file of the feature extractor; None is its own.
        kid_subsets: random subsets that the kernel distance is averaged over.
        samples_folder: where the generated images of every row are kept; None keeps none.
        lookahead: expected utilities in some of the states, for regret against lookahead; None measures none.
        recogniser: classifies partly revealed images; None measures no recognisability.
        distance_resamples: of the bootstrap of Fréchet distances; 0 gives them no interval.
        extrapolate: whether Fréchet distances are also extrapolated to endlessly many samples.
        clip: scores samples against captions of their classes; None measures no CLIP score.

    Raises:
        ValueError: if there are too few resamples, subsets, or images for an interval.
    """

    backbone: Backbone
    data: TokenSet
    real: Features | None
    reference: Reference | None
    states: TensorDict | None
    features: str | None
    samples: int
    reference_images: int
    sampling: Sampling
    resamples: int
    seed: int
    weights: Path | None = None
    kid_subsets: int = KID_SUBSETS
    samples_folder: Path | None = None
    lookahead: LookaheadUtility | None = None
    recogniser: Recogniser | None = None
    distance_resamples: int = 0
    extrapolate: bool = False
    clip: ClassCaptions | None = None

    def __post_init__(self) -> None:
        for key, count in (("images", len(self.data)), ("reference_images", self.reference_images)):
            check_images_suffice(key, count)
        if self.distance_resamples < 0 or self.distance_resamples == 1:
            raise ValueError(
                f"distance_resamples must be at least 2, or 0 for no interval, got {self.distance_resamples}"
            )
        if self.kid_subsets < 1:
            raise ValueError(f"kid_subsets must be at least 1, got {self.kid_subsets}")

    @property
    def device(self) -> torch.device:
        """Where the backbone runs."""
        return backbone_device(self.backbone)


def statistics_described(p: Protocol) -> dict[str, str | None]:
    """How agreement, intervals, comparisons and seeds were computed, for the protocol of a table."""
    lookahead = p.lookahead
    return {
        "lookahead_regret": None
        if lookahead is None
        else f"against the expected utility over {lookahead.draws} draws of each block by the backbone, on "
        f"{len(lookahead.rows)} of the shared states",
        "reliability": "scores of all candidates of the shared states mapped to utilities by the line that fits them "
        "best; calibration_error is the mean |predicted - actual| of bins of equal numbers, nats per token",
        "intervals": f"95 % percentile bootstrap over images, {p.resamples} resamples, states of an image together; "
        f"Fréchet distances: normal, standard error of {p.distance_resamples} resamples of the samples; CLIP score: "
        "bootstrap over samples; shares of samples: Wilson; none for inception score, kernel distance, first-choice "
        "entropy, calibration error, seconds",
        "extrapolation": "frechet_distance_infinity: line in 1 / samples through 15 sizes, read off at 0"
        if p.extrapolate
        else None,
        "comparisons": "paired over images; two-sided p-values of the same bootstrap, corrected by Holm for all "
        "comparisons of the table; effect size is the paired Cohen's d",
        "seeds": "a row is one training seed; comparisons average seeds and hold them fixed, seed_std is the standard "
        "deviation over them",
    }


@dataclass(frozen=True)
class Evaluated:
    """A row, and what comparisons and pictures need of it.

    Attributes:
        row: keys of `EMPTY_ROW`.
        per_image: (n,) of each image, in the order of the test images, by the row's key; under masked models
            `decode_nll` holds `decode_loss`.
        rollout: the trajectories behind it.
        scores: (T, images, B) float32, what the policy scored on the first images; None if it has no scores.
    """

    row: dict[str, Any]
    per_image: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    rollout: Rollout | None = field(default=None, repr=False)
    scores: Tensor | None = field(default=None, repr=False)

    @property
    def gain_auc(self) -> Tensor | None:
        """(n,) information-gain AUC; None where not measured."""
        return self.per_image.get("gain_auc")

    @property
    def decode_nll(self) -> Tensor | None:
        """(n,) code length, nats (DiffLoss units under masked models); None where not measured."""
        return self.per_image.get("decode_nll")

    @property
    def steps(self) -> Tensor | None:
        """(n,) planner steps; None where there is no planner."""
        return self.per_image.get("steps")


def evaluate_policy(
    protocol: Protocol, named: NamedPolicy, sampled: bool, advance: Callable[[float], None] | None = None
) -> Evaluated:
    """Evaluate one policy.

    Args:
        protocol: shared by all rows.
        named: the policy.
        sampled: whether images are generated and scored.
        advance: told how many images are generated.
    """
    p = protocol
    expensive = named.spec is not None and not named.spec.rival
    images = min(len(p.data), p.reference_images) if expensive else len(p.data)
    core = NextBlockCore(p.backbone, p.data, images, CoreConfig(budgets=named.budgets, strict=True), p.seed)
    generator = torch.Generator().manual_seed(p.seed)
    log = ScoreLog()
    rollout = roll_out(core, recorded(named, log), generator, torch.arange(images))
    areas, curve = _recognisability(p, rollout)
    per_image = planning_values(rollout, p.backbone.draws_per_block) | areas
    row = EMPTY_ROW | {
        "policy": named.name,
        "family": named.family or named.name,
        "rival": not expensive,
        "objective": named.objective,
        "budgets": list(named.budgets),
        "R": named.reasoning_steps,
        "seed": named.seed,
        "step_cost": named.step_cost,
        "recognisability_curve": curve,
        "visible_neighbours_curve": visible_neighbours(rollout).mean(0).tolist(),
        "first_choice_entropy": first_choice_entropy(rollout),
        "rollout_seconds_per_image": rollout.seconds / images,
    }
    row |= image_means(per_image, p.resamples, p.seed) | _calibration(p, named)
    row |= entry("far_gain", bootstrap_sums(rollout.far_gain_sums.cpu(), ratio, p.resamples, seed=p.seed))
    row |= code_lengths(row, p.backbone)
    if sampled and p.samples and not expensive:
        made = generate_images(
            p.backbone, p.data, named.policy, named.budgets, balanced_labels(p.samples, p.data.classes),
            p.sampling, p.seed, advance=advance,
        )  # fmt: skip
        row |= _quality(p, row, made)
    return Evaluated(row, per_image, rollout, log.scores)


def planning_values(rollout: Rollout, draws_per_block: int) -> dict[str, Tensor]:
    """Numbers of each image of a rollout, (n,) float on the CPU, by their keys in the row."""
    values = {
        "gain_auc": rollout.gain_auc,
        "likelihood_return": rollout.likelihood_return,
        "decode_nll": rollout.decode_nll,
        "steps": rollout.steps,
        "decode_calls": rollout.steps * draws_per_block,
        "consecutive_distance": consecutive_distance(rollout.order, rollout.geometry),
        "visible_neighbours": visible_neighbours(rollout).mean(1),
    }
    return {key: value.cpu() for key, value in values.items()}


def evaluate_token_raster(
    protocol: Protocol, name: str, backbone: TrainableBackbone, advance: Callable[[float], None] | None = None
) -> Evaluated:
    """Row of a backbone in plain raster token order: its code length and its samples.

    The whole image is one block, inside which the order is raster; gains do not apply.
    """
    geometry = backbone.geometry
    if geometry.height != geometry.width:
        raise ValueError(f"token_raster needs a square token grid, got {geometry.height}x{geometry.width}")
    check_fits(backbone, protocol.data)
    tokens = float(geometry.num_tokens)
    row = EMPTY_ROW | {"policy": name, "steps": tokens, "decode_calls": tokens}
    one_block = with_block_size(backbone, geometry.height)
    per_image: dict[str, Tensor] = {}
    if isinstance(backbone, MaskedTransformer):
        row["decode_nll"] = tokens * mean_loss(
            backbone, protocol.data, raster_token_orders(geometry, len(protocol.data))
        )
    else:
        per_image["decode_nll"] = _whole_image_losses(one_block, protocol.data)
        row |= image_means(per_image, protocol.resamples, protocol.seed)
    row |= code_lengths(row, backbone)
    if protocol.samples:

        def whole_image(observation: TensorDict, generator: torch.Generator) -> Tensor:
            return torch.zeros_like(observation["label"])

        labels = balanced_labels(protocol.samples, protocol.data.classes)
        made = generate_images(
            one_block, protocol.data, whole_image, (1,), labels, protocol.sampling, protocol.seed, advance=advance
        )
        row |= _quality(protocol, row, made)
    return Evaluated(row, per_image)


@torch.no_grad()
def _whole_image_losses(backbone: Backbone, data: TokenSet, batch_size: int = 64) -> Tensor:
    """Code length of each image under a backbone whose one block is the image, (n,), nats."""
    device, losses = backbone_device(backbone), []
    for rows in torch.arange(len(data)).split(batch_size):
        prefix = backbone.start(data.labels[rows].to(device))
        block = torch.zeros(len(rows), 1, dtype=torch.int64, device=device)
        losses.append(backbone.context_loss(prefix, data.tokens[rows].to(device), block)[0].loss[:, 0].cpu())
    return torch.cat(losses)


def _quality(p: Protocol, row: dict[str, Any], made: Generated) -> dict[str, Any]:
    """Scores of a row's samples; the images are kept if the protocol says so."""
    scores: dict[str, Any] = {"seconds_per_image": made.seconds / len(made.tokens)}
    if p.reference is None and p.clip is None and p.samples_folder is None:
        return scores
    by_class = made.labels.argsort(stable=True)  # the order of the kept files, on which random splits depend
    images, labels = p.data.images(made.tokens[by_class], p.device), made.labels[by_class]
    if p.samples_folder is not None:
        save_images(images, free_folder(p.samples_folder, folder_name(row["policy"], row["seed"])), labels)
    if p.clip is not None:
        scores |= image_means({"clip_score": p.clip.scores(images, labels)}, p.resamples, p.seed)
    if p.features is not None and p.reference is not None:
        scores |= {"features": p.features} | _against_reference(p, p.features, p.reference, images, labels)
    return scores


def _against_reference(
    p: Protocol, features: str, reference: Reference, images: Tensor, labels: Tensor
) -> dict[str, Any]:
    """What samples are worth compared with real images, and how many a classifier recognises, with intervals."""
    found = extract_features(images, features, p.weights, p.device)
    scores: dict[str, Any] = asdict(sample_quality(found, reference, p.kid_subsets))
    own = own_features(p.data.name)
    if own is not None:
        scores["accuracy"] = class_accuracy(images, labels, own)
    if p.extrapolate:
        scores["frechet_distance_infinity"] = fid_infinity(found, reference, seed=p.seed)
    return scores | quality_intervals(scores, found, reference, p.distance_resamples, p.seed)


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


def _calibration(p: Protocol, named: NamedPolicy) -> dict[str, Any]:
    """Agreement with oracle and lookahead on the shared states, as entries of a row."""
    states = p.states
    assert states is not None  # policies are evaluated on order-robust backbones only
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
        row |= {} if values is None else state_mean(key, values, states["image"], p.resamples, p.seed)
    if p.lookahead is not None:
        rows = p.lookahead.rows
        values = regret(first[rows], p.lookahead.utility, hidden[rows])
        row |= state_mean("lookahead_regret", values, states["image"][rows], p.resamples, p.seed)
    if found.reliability is not None:
        row |= {"calibration_error": found.reliability.error, "calibration_r2": found.reliability.r2}
        row["reliability"] = found.reliability.plain()
    return row


def first_choices(p: Protocol, named: NamedPolicy) -> tuple[Tensor, Tensor | None]:
    """The first-ranked block (m,) and, where a policy has them, the scores (m, B) in the shared states.

    The policy acts in its own kind of environment.
    """
    states = p.states
    assert states is not None
    generator = torch.Generator().manual_seed(p.seed)
    if isinstance(named.policy, ReferencePolicy):
        core = NextBlockCore(p.backbone, p.data, len(states), CoreConfig(budgets=named.budgets, strict=True), p.seed)
        core.reset(index=states["image"])
        core.show(states["order"], states["length"])
        scores = all_scores(named.policy, core)
    else:
        observation = state_observation(states, named.budgets).to(p.device)
        if named.scorer is None:
            action = named.policy(observation, generator)
            return (action if action.ndim == 1 else action[:, 0]).cpu(), None
        scores = named.scorer(observation, generator)
    scores = scores.cpu().float()
    return scores.masked_fill(states["visible"], -torch.inf).argmax(-1), scores


def _recognisability(p: Protocol, rollout: Rollout) -> tuple[dict[str, Tensor], dict[str, list[float]] | None]:
    """Areas of each image, and the curves over the revealed fraction; nothing without a classifier."""
    if p.recogniser is None:
        return {}, None
    found = recognise(
        p.recogniser, rollout, p.data, lambda moment: complete(p.backbone, p.data, rollout, moment, p.sampling, p.seed)
    )
    at = torch.linspace(0, 1, rollout.geometry.num_blocks + 1)
    curve = recognisability_curve(found, rollout.fraction, at, p.resamples, p.seed)
    return recognisability_areas(found, rollout.fraction), curve


def policy_detail(protocol: Protocol, evaluated: Evaluated) -> PolicyDetail:
    """What the report's pictures show of a policy, apart from its row."""
    rollout = evaluated.rollout
    assert rollout is not None
    geometry = rollout.geometry
    fractions = torch.linspace(0, 1, geometry.num_blocks + 1, device=rollout.losses.device)
    band = bootstrap_band(rollout.gain_curve(fractions).cpu(), protocol.resamples, seed=protocol.seed)
    last = (rollout.steps - 1).clamp_min(1)
    order = (rollout.reveal_step.float() / last[:, None]).mean(0).view(geometry.rows, geometry.columns)
    return PolicyDetail(
        evaluated.row["policy"],
        Curve(fractions.tolist(), *(values.tolist() for values in band)),
        order.cpu().tolist(),
        episodes(rollout, evaluated.scores),
    )
