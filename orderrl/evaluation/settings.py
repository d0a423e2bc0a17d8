"""The settings of an evaluation.

Each names the part of the protocol that it enters, one of `orderrl.evaluation.protocol.PARTS`; others choose the rows
and what is measured of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from orderrl.agents.spec import MODE
from orderrl.backbones import Sampling
from orderrl.evaluation.columns import METRICS
from orderrl.metrics.clip_score import PROMPT
from orderrl.metrics.feature_names import own_features
from orderrl.metrics.recognisability import FILLS, OWN
from orderrl.runtime.values import Rule, Settings, at_least, member_of, one_of, positive, setting, zero_or_at_least

OWN_ORDER = "own"  # the order that a specialist was made for
_FEW = at_least(2)  # the fewest images that have an interval


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Sampling):
    """Settings of an evaluation, the config group `eval`, besides how tokens are drawn."""

    images: int = setting(297, "Test images for planning metrics, at most all", _FEW, part="images")
    samples: int = setting(300, "Generated images per row; 0 generates none", zero_or_at_least(2), part="samples")
    states: int = setting(64, "Shared states for calibration against the hindsight oracle", at_least(1), part="states")
    lookahead_states: int | None = setting(
        None,
        "Of these, states in which regret is also measured against lookahead; null measures none",
        at_least(1),
        part="lookahead",
    )
    lookahead_draws: int = setting(
        4, "Draws of each block by the backbone, for regret against lookahead", at_least(1), part="lookahead"
    )
    reference_images: int = setting(24, "Images for the rows of oracle and lookahead", _FEW, part="reference_images")
    resamples: int = setting(2000, "Bootstrap resamples", at_least(1), part="intervals")
    classifier: str | None = setting(
        OWN,
        "Classifier of recognisability: own (the shipped one of the data set), timm:MODEL, timm:MODEL:FILE, "
        "timm:local-dir:FOLDER; null measures none",
        part="recognisability",
        file=True,
    )
    hidden_fill: str = setting(
        "grey",
        "What the classifier sees where blocks are hidden: grey, or completion (drawn by the backbone, without the "
        "class)",
        one_of(FILLS),
        part="recognisability",
    )
    real_images: int = setting(10000, "Reference images of each split, at most", _FEW, part="real_images")
    features: str | None = setting(
        OWN,
        "Feature extractor of distances: own (shipped with the data set), inception-v3-compat, timm:MODEL, "
        "timm:MODEL:FILE, timm:local-dir:FOLDER or module:attribute; null scores no samples",
        part="features",
        file=True,
    )
    feature_weights: str | None = setting(
        None,
        "Weights file of the feature extractor; null takes its own (Inception's are downloaded)",
        part="feature_weights",
        file=True,
    )
    reference: str | None = setting(
        None,
        "What samples are compared with: an image folder, a token set's folder, a .npz of ADM's evaluator or a .pt of "
        "torch-fidelity; null takes the data's real images",
        part="reference",
        file=True,
    )
    kid_subsets: int = setting(
        20,
        "Random subsets of 1000 images that KID is averaged over; torch-fidelity's default is 100",
        at_least(1),
        part="kid_subsets",
    )
    distance_resamples: int = setting(
        100,
        "Bootstrap resamples of Fréchet distances, for their intervals; 0 gives none (2,048 features take minutes a "
        "row)",
        zero_or_at_least(2),
        part="intervals",
    )
    fid_infinity: bool = setting(
        False, "Whether Fréchet distances are also extrapolated to infinitely many samples", part="extrapolation"
    )
    clip_model: str | None = setting(
        None,
        "Network of the CLIP score, by its name in open_clip, such as ViT-L-14 (pip install 'orderrl[clip]'); null "
        "measures none",
        part="clip_score",
    )
    clip_weights: str = setting(
        "openai",
        "Weights of the CLIP network: a file, or a tag of open_clip, which downloads them",
        part="clip_score",
        file=True,
    )
    clip_prompt: str = setting(PROMPT, "Caption of a sample; {} is the name of its class", part="clip_score")
    keep_samples: bool = setting(
        False, "Whether the generated images of every row are kept as PNG, samples/POLICY/CLASS/000000.png"
    )
    sweep: list[int] = setting(
        [],
        "Budgets at which baselines and planners of one block a step are evaluated too; see eval=cost",
        at_least(1),
    )
    step_costs: list[float] | None = setting(
        None,
        "Step costs at which planners trained on a range of them act; null takes its ends and its middle",
        positive(),
    )
    modes: list[str] = setting(
        [],
        "Modes in which planners act: fast (scored once), semifast:N (N times), slow, best_of:N; none is slow",
        Rule((), lambda mode: MODE.fullmatch(mode) is not None, "={} must be of fast, slow, semifast:N and best_of:N"),
    )
    budgets: list[int] = setting([1], "Budgets of own policies (module:attribute) without a schedule", at_least(1))
    token_raster: list[str] = setting(
        [OWN],
        "Backbones scored in plain raster token order: self (the evaluated one), own (the shipped raster one of the "
        "data set), or names of others",
        file=True,
    )
    specialists: list[str] = setting(
        [],
        "Checkpoints of backbones that were trained for an order (pretrain training.order=...), each drawn in its own",
        file=True,
    )
    specialist_orders: list[str] = setting(
        [OWN_ORDER],
        "Orders in which specialists draw: own, and others by name, such as raster, to see what they forgot",
    )
    metrics: list[str] = setting(
        [], "Own metrics besides those that are registered, as module:attribute", member_of(METRICS)
    )
    planners: list[str] = setting(
        ["newest"], "Planner checkpoints to evaluate; newest finds those of this configuration"
    )
    foreign: list[str] = setting(
        [],
        "Images that other samplers drew, NAME=FILE.npz (arr_0 (n, H, W, 3) uint8, as ADM's evaluator reads it) or "
        "NAME=FOLDER: a row each, of sample quality alone",
    )
    sampled: list[str] = setting(["raster"], "Baselines whose samples are scored")
    policies: list[str] = setting(
        ["raster", "diagonal", "staggered", "centre", "multiscale", "halton", "random", "high_entropy", "fitted"],
        "Baselines and own policies (module:attribute); NAME@k reveals k blocks a step",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.budgets:
            raise ValueError("budgets must not be empty, got []")
        if self.reference is not None and self.features is None:
            raise ValueError(f"reference={self.reference!r} needs features to compare samples in, but features is null")
        wrong = [entry for entry in self.foreign if self.features is None or not all(entry.partition("="))]
        if wrong:
            raise ValueError(f"foreign={wrong[0]!r} must be NAME=FILE.npz or NAME=FOLDER, and needs features")
        names = [entry.partition("=")[0] for entry in self.foreign]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"foreign must give every name once, got {twice[0]!r} twice")

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})

    @property
    def weights(self) -> Path | None:
        """The weights file of the feature extractor; None is its own weights."""
        return None if self.feature_weights is None else Path(self.feature_weights).expanduser()

    def feature_name(self, data: str) -> str | None:
        """The feature extractor for a data set, "own" by its name, if one ships for it; None scores no samples."""
        if self.features != OWN:
            return self.features
        own = own_features(data)
        if own is None:
            raise ValueError(
                f"eval.features={OWN}: no feature extractor ships for data {data!r}; choose one, such as "
                "eval.features=inception-v3-compat, or eval.features=null, which scores no samples"
            )
        return own


@dataclass(frozen=True, kw_only=True)
class HeadroomConfig(Settings):
    """Settings of `orderrl.evaluation.headroom.measure_headroom`."""

    steps: int = setting(800, "Optimiser steps of each of the three planners that are cloned", at_least(1))
    draws: list[int] = setting([1, 4, 16], "Draws of each block by lookahead; [] is none", at_least(1))
    lookahead_states: int = setting(
        64, "Shared states, evenly spread over the lengths, that lookahead sees", at_least(1)
    )


def eval_config(values: Mapping[str, Any], data: str) -> EvalConfig:
    """The settings of the group `eval` from plain values; what can be refused before any work is refused."""
    try:
        settings = EvalConfig(**values)
    except ValueError as error:
        raise ValueError(f"eval.{error}") from error
    settings.feature_name(data)
    return settings
