"""One row of the table: a policy's planning metrics, calibration and sample quality under one protocol."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from orderrl.agents.policies import ReferencePolicy, all_scores
from orderrl.agents.registry import NamedPolicy
from orderrl.backbones import Backbone, Sampling, with_block_size
from orderrl.backbones.protocol import backbone_device, check_fits
from orderrl.backbones.registry import TrainableBackbone
from orderrl.backbones.training import mean_loss, raster_token_orders
from orderrl.classifier import CLASSIFIERS, load_classifier
from orderrl.data import TokenSet
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.render import partial_images
from orderrl.generation import Generated, balanced_labels, generate_images
from orderrl.metrics.calibration import Calibration, calibrate
from orderrl.metrics.features import DIGITS, Features, extract_features
from orderrl.metrics.images import save_images
from orderrl.metrics.planning import Rollout, act, roll_out
from orderrl.metrics.quality import KID_SUBSETS, class_accuracy, sample_quality
from orderrl.metrics.recognisability import area_over_fraction, progressive_recognisability
from orderrl.metrics.references import Reference
from orderrl.metrics.statistics import bootstrap_band, bootstrap_mean
from orderrl.oracle import utilities
from orderrl.report import PolicyDetail

EMPTY_ROW: dict[str, Any] = dict.fromkeys(
    (
        "policy",
        "objective",
        "budgets",
        "R",
        "seed",
        "gain_auc",
        "gain_auc_ci",
        "likelihood_return",
        "far_gain",
        "decode_nll",
        "decode_loss",
        "recognisability_auc",
        "oracle_top1",
        "oracle_spearman",
        "regret",
        "steps",
        "decode_calls",
        "seconds_per_image",
        "frechet_distance",
        "inception_score",
        "kid",
        "precision",
        "recall",
        "spatial_frechet_distance",
        "features",
        "accuracy",
    )
)
STRIP_FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


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

    def __post_init__(self) -> None:
        if self.kid_subsets < 1:
            raise ValueError(f"kid_subsets must be at least 1, got {self.kid_subsets}")

    @property
    def device(self) -> torch.device:
        """Where the backbone runs."""
        return backbone_device(self.backbone)


@dataclass(frozen=True)
class Evaluated:
    """A row, and what comparisons and pictures need of it.

    Attributes:
        row: keys of `EMPTY_ROW`.
        gain_auc, decode_nll, steps: (n,) per image, in the order of the test images; None where not measured.
        rollout: the trajectories behind it.
    """

    row: dict[str, Any]
    gain_auc: Tensor | None = None
    decode_nll: Tensor | None = None
    steps: Tensor | None = None
    rollout: Rollout | None = field(default=None, repr=False)


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
    expensive = named.reference and named.name.partition("@")[0].partition(":")[0] in ("oracle", "lookahead")
    images = min(len(p.data), p.reference_images) if expensive else len(p.data)
    core = NextBlockCore(p.backbone, p.data, images, CoreConfig(budgets=named.budgets, strict=True), p.seed)
    generator = torch.Generator().manual_seed(p.seed)
    rollout = roll_out(core, named.policy, generator, torch.arange(images))
    auc = rollout.gain_auc.cpu()
    interval = bootstrap_mean(auc, p.resamples, seed=p.seed)
    agreement = _calibration(p, named)
    row = EMPTY_ROW | {
        "policy": named.name,
        "objective": named.objective,
        "budgets": list(named.budgets),
        "R": named.reasoning_steps,
        "seed": named.seed,
        "gain_auc": interval.mean,
        "gain_auc_ci": [interval.low, interval.high],
        "likelihood_return": rollout.likelihood_return.mean().item(),
        "far_gain": rollout.far_gain,
        "decode_nll" if p.backbone.vocab_size else "decode_loss": rollout.decode_nll.mean().item(),
        "recognisability_auc": _recognisability(p, rollout),
        "oracle_top1": agreement.top1,
        "oracle_spearman": agreement.spearman,
        "regret": agreement.regret,
        "steps": rollout.steps.mean().item(),
        "decode_calls": rollout.steps.mean().item() * p.backbone.draws_per_block,
        "seconds_per_image": rollout.seconds / images,
    }
    if sampled and p.samples and not expensive:
        made = generate_images(
            p.backbone, p.data, named.policy, named.budgets, balanced_labels(p.samples, p.data.num_classes),
            p.sampling, p.seed, advance=advance,
        )  # fmt: skip
        row |= _quality(p, row, made)
    return Evaluated(row, auc, rollout.decode_nll.cpu(), rollout.steps.cpu(), rollout)


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
    loss = mean_loss(backbone, protocol.data, raster_token_orders(geometry, len(protocol.data)))
    row = EMPTY_ROW | {"policy": name, "decode_nll": loss * geometry.num_tokens, "steps": float(geometry.num_tokens)}
    row["decode_calls"] = float(geometry.num_tokens)
    if protocol.samples:

        def whole_image(observation: TensorDict, generator: torch.Generator) -> Tensor:
            return torch.zeros_like(observation["label"])

        labels = balanced_labels(protocol.samples, protocol.data.num_classes)
        one_block = with_block_size(backbone, geometry.height)
        made = generate_images(
            one_block, protocol.data, whole_image, (1,), labels, protocol.sampling, protocol.seed, advance=advance
        )
        row |= _quality(protocol, row, made)
    return Evaluated(row)


def _quality(p: Protocol, row: dict[str, Any], made: Generated) -> dict[str, Any]:
    """Scores of a row's samples; the images are kept if the protocol says so."""
    seconds = {"seconds_per_image": made.seconds / len(made.tokens)}
    if p.features is None and p.samples_folder is None:
        return seconds
    images = p.data.images(made.tokens)
    if p.samples_folder is not None:
        save_images(images, _free_folder(p.samples_folder, folder_name(row["policy"], row["seed"])))
    if p.features is None or p.reference is None:
        return seconds
    found = extract_features(images, p.features, p.weights, p.device)
    scores = asdict(sample_quality(found, p.reference, p.kid_subsets))
    accuracy = class_accuracy(images, made.labels, DIGITS) if p.data.name in CLASSIFIERS else None
    return seconds | scores | {"features": p.features, "accuracy": accuracy}


def _free_folder(parent: Path, name: str) -> Path:
    """A folder that no other row has: two checkpoints may have one name and seed."""
    number = 1
    while (folder := parent / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder


def folder_name(policy: str, seed: int | None) -> str:
    """The folder of a policy's samples: its name, in characters that every file system takes, and its seed."""
    name = re.sub(r"[^\w.@+=-]+", "_", policy)
    return name if seed is None else f"{name}_seed{seed}"


def _calibration(p: Protocol, named: NamedPolicy) -> Calibration:
    """Agreement with the oracle on the shared states, in the policy's own kind of environment."""
    states = p.states
    assert states is not None  # policies are evaluated on order-robust backbones only
    core = NextBlockCore(p.backbone, p.data, len(states), CoreConfig(budgets=named.budgets, strict=True), p.seed)
    core.reset(index=states["image"])
    core.show(states["order"], states["length"])
    generator = torch.Generator().manual_seed(p.seed)
    scores: Tensor | None = None
    if isinstance(named.policy, ReferencePolicy):
        scores = all_scores(named.policy, core)
    elif named.scorer is not None:
        scores = named.scorer(core.observation(), generator)
    hidden = ~states["visible"]
    if scores is None:
        action = act(named.policy, core, generator)
        first = action if action.ndim == 1 else action[:, 0]
    else:
        first = scores.cpu().masked_fill(~hidden, -torch.inf).argmax(-1)
    utility = utilities(states["gains"], p.backbone.geometry, torch.ones_like(states["gains"][0]))
    return calibrate(first.cpu(), None if scores is None else scores.cpu().float(), utility, hidden)


def _recognisability(p: Protocol, rollout: Rollout) -> float | None:
    """None for data sets without a classifier of their own."""
    if p.data.name not in CLASSIFIERS:
        return None
    classifier = load_classifier(p.data.name)
    result = progressive_recognisability(
        classifier, rollout.geometry, p.data.images(rollout.tokens.cpu()), rollout.labels.cpu(), rollout.visible.cpu()
    )
    return area_over_fraction(result.confidence, rollout.fraction.cpu()).mean().item()


def policy_detail(protocol: Protocol, evaluated: Evaluated, examples: int = 3) -> PolicyDetail:
    """What the report's pictures show of a policy."""
    rollout = evaluated.rollout
    assert rollout is not None
    geometry, data = rollout.geometry, protocol.data
    fractions = torch.linspace(0, 1, geometry.num_blocks + 1, device=rollout.losses.device)
    band = bootstrap_band(rollout.gain_curve(fractions).cpu(), protocol.resamples, seed=protocol.seed)
    last = (rollout.steps - 1).clamp_min(1)
    order = (rollout.reveal_step.float() / last[:, None]).mean(0).view(geometry.rows, geometry.columns)
    strips = []
    for fraction in STRIP_FRACTIONS:
        moment = (rollout.fraction <= fraction + 1e-6).sum(0) - 1  # the last moment that has not passed the fraction
        visible = rollout.visible.gather(0, moment.view(1, -1, 1).expand(1, -1, geometry.num_blocks))[0]
        strips.append(partial_images(data, geometry, rollout.tokens[:examples], visible[:examples]))
    return PolicyDetail(
        name=evaluated.row["policy"],
        fraction=fractions.tolist(),
        gain_mean=list(map(float, band[0])),
        gain_low=list(map(float, band[1])),
        gain_high=list(map(float, band[2])),
        mean_reveal_step=order.cpu().tolist(),
        strips=torch.stack(strips, dim=1),
        strip_fractions=list(STRIP_FRACTIONS),
    )
