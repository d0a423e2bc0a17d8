"""The protocol of an evaluation: what its settings open, and what is stored and said of it.

`PARTS` is the one record of it: each part has the value by which runs compare, its wording in the report, or both, and
every setting names its part. Numbers of two runs compare if their identities are equal. How many resamples made an
interval does not enter it, and neither do the policies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from orderrl.backbones import Backbone, backbone_fingerprint
from orderrl.backbones.mar_backbone import MaskedTransformer
from orderrl.backbones.protocol import backbone_device
from orderrl.data import TokenSet, load_split
from orderrl.data.token_files import DESCRIPTION, read_description, token_set_splits
from orderrl.evaluation.importance import class_importance
from orderrl.evaluation.settings import EvalConfig
from orderrl.factory import Setup
from orderrl.labels import find_or_make_labels, open_labels
from orderrl.metrics.calibration import LookaheadUtility, lookahead_utility
from orderrl.metrics.clip_score import ClassCaptions, class_captions
from orderrl.metrics.feature_names import name_by_content
from orderrl.metrics.features import Features, extract_features
from orderrl.metrics.quality import Quality, real_floor, sample_quality
from orderrl.metrics.recognisability import Recogniser, make_recogniser
from orderrl.metrics.references import Reference, open_reference, reference_of
from orderrl.oracle import CLASSIFIER
from orderrl.runtime.cache import fingerprint
from orderrl.runtime.sources import source_identity
from orderrl.runtime.storage import checksum

if TYPE_CHECKING:
    from tensordict import TensorDict

VERSION = 1  # of what the columns mean; raised when a number is measured in another way
SPLITS = ("backbone", "planner", "test")
FLOOR_REPEATS = 5  # random halves of the real images


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """What every row of a table shares; there are at least 2 images."""

    config: EvalConfig
    seed: int  # of policies, samples and resamples
    backbone: Backbone  # frozen
    backbone_name: str  # what it is called in the report
    data: TokenSet  # the test images
    real: Features | None = None  # features of real images of the data set; None scores no samples
    reference: Reference | None = None  # what samples are compared with; None scores no samples
    # labelled contexts of test images, for calibration; None where there is no order to choose
    states: TensorDict | None = None
    # expected utilities in some of the states, for regret against lookahead; None measures none
    lookahead: LookaheadUtility | None = None
    importance: Tensor | None = None  # (n, B), of the test images' blocks by labels=classifier; None measures none
    recogniser: Recogniser | None = None  # classifies partly revealed images; None measures no recognisability
    clip: ClassCaptions | None = None  # captions of the classes, for the CLIP score; None measures none
    samples_folder: Path | None = None  # where the generated images of every row are kept; None keeps none

    def __post_init__(self) -> None:
        if len(self.data) < 2:
            raise ValueError(
                f"images must be at least 2, the fewest images that have an interval, got {len(self.data)}"
            )

    @property
    def device(self) -> torch.device:
        """Where the backbone runs."""
        return backbone_device(self.backbone)

    @property
    def features(self) -> str | None:
        """The feature extractor by its name; None scores no samples."""
        return None if self.reference is None else self.reference.features

    def identity(self) -> dict[str, Any]:
        """Everything that the numbers depend on, apart from the policies, as plain values.

        Files and data stand here by their content and not by their place.
        """
        return {part.key: part.identity(self) for part in PARTS if part.identity is not None}

    def described(self) -> dict[str, Any]:
        """On what every number was measured and how, in words for the report."""
        said = {part.label or part.key: part.wording for part in PARTS if part.wording is not None}
        return {name: words if isinstance(words, str) else words(self) for name, words in said.items()}

    def real_row(self) -> Quality | None:
        """What real images reach: two halves of them, or against a reference that was named, all of them."""
        real, reference, subsets = self.real, self.reference, self.config.kid_subsets
        if real is None or reference is None:
            return None
        if reference.found is real:
            return real_floor(real, FLOOR_REPEATS, self.seed, max(1, subsets // FLOOR_REPEATS))
        return sample_quality(real, reference, subsets)


def open_protocol(config: EvalConfig, setup: Setup) -> EvaluationProtocol:
    """Open what the settings name, or refuse it; the shared states are found in the cache, or labelled."""
    backbone, data = setup.backbone, setup.data
    # what samples are compared with
    features, device = config.feature_name(data), backbone_device(backbone)
    real, reference = (None, None) if features is None else real_and_reference(config, data, device)
    # the test images, and who looks at them
    test = load_split(data, "test")
    recogniser, clip = make_recogniser(config.classifier, test, config.hidden_fill, device), None
    if config.clip_model is not None:
        clip = class_captions(test, config.clip_model, config.clip_weights, config.clip_prompt, device)
    subset = test.first(min(config.images, len(test)))
    # the shared states
    states, lookahead = None, None
    if backbone.order_robust:
        wanted: dict[str, Any] = {"contexts": config.states, "kind": "pointwise", "samples": 1, "seed": setup.seed}
        states = open_labels(find_or_make_labels(setup, "test", **wanted), backbone)
        states = states[states["image"] < len(subset)]
        if config.lookahead_states is not None and backbone.vocab_size:
            count, draws = config.lookahead_states, config.lookahead_draws
            lookahead = lookahead_utility(backbone, subset, states, count, draws, setup.seed)
    importance = class_importance(setup, subset) if setup.labels.kind == CLASSIFIER else None
    return EvaluationProtocol(
        config=config,
        seed=setup.seed,
        backbone=backbone,
        backbone_name=setup.backbone_name,
        data=subset,
        real=real,
        reference=reference,
        states=states,
        lookahead=lookahead,
        importance=importance,
        recogniser=recogniser,
        clip=clip,
    )


def real_and_reference(config: EvalConfig, data: str, device: torch.device) -> tuple[Features, Reference]:
    """Features of the data set's real images, and what samples are compared with: these, or `config.reference`."""
    features, weights = config.feature_name(data), config.weights
    assert features is not None
    named = None if config.reference is None else open_reference(Path(config.reference), features, weights, device)
    splits = [load_split(data, split) for split in SPLITS]
    images = torch.cat([part.images(part.first(config.real_images).tokens[:], device) for part in splits])
    real = extract_features(images, features, weights, device)
    if named is not None:
        return real, named
    kept = "all" if len(images) == sum(map(len, splits)) else f"at most {config.real_images} of each of all"
    return real, reference_of(real, features, source=f"{len(images)} real images ({kept} splits)")


# ---------------------------------------------------------------------- what is stored and said of it


class Part(NamedTuple):
    """A part of the protocol."""

    key: str  # under which its identity is stored
    # gives the plain value by which runs compare; None is no part of the identity
    identity: Callable[[EvaluationProtocol], Any] | None = None
    wording: str | Callable[[EvaluationProtocol], Any] | None = None  # what the report says; None says nothing
    label: str = ""  # what the report calls it; "" is the key


def _data(p: EvaluationProtocol) -> str:
    """Which images, and of a data set that holds some of a model's classes how many; samples are of these, too."""
    some, data = "", p.data
    if data.present is not None:
        some = f", {len(data.present)} of {data.num_classes} classes, samples of these alone"
    return f"{data.name}/{data.split}, {len(data)} images{some}"


def _blocks(p: EvaluationProtocol) -> str:
    geometry = p.backbone.geometry
    side = geometry.block_size
    return f"{geometry.rows}x{geometry.columns} blocks of {side}x{side} tokens"


def _states(p: EvaluationProtocol) -> str | None:
    if p.states is None:
        return None
    return f"{len(p.states)} shared states of random contexts of test images, hindsight oracle"


def _samples(p: EvaluationProtocol) -> str | None:
    """What samples are compared with, and how far the distance depends on their number."""
    real, reference = p.real, p.reference
    if real is None or reference is None:
        return None
    floor = f"two halves of {len(real) // 2}" if reference.found is real else f"all {len(real)} of the data set"
    return (
        f"{p.config.samples} per row against {reference.source}; Fréchet distances fall with the number of images "
        f"(bias), so only equal numbers compare; the row of real images is {floor}; KID of {p.config.kid_subsets} "
        "subsets"
    )


def _arithmetic(p: EvaluationProtocol) -> str:
    """What the backbone computes in, where it is not float32."""
    parameter = next(iter(getattr(p.backbone, "parameters", list)()), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    return "" if dtype == torch.float32 else f" in {str(dtype).removeprefix('torch.')}"


def _reference(p: EvaluationProtocol) -> str | None:
    """What stands for the images or statistics that samples are compared with."""
    if p.reference is None:
        return None
    if p.config.reference is None:
        splits = [load_split(p.data.name, split).fingerprint for split in SPLITS]
        return fingerprint([splits, p.config.real_images])
    path = Path(p.config.reference).expanduser()
    if (path / DESCRIPTION).is_file():
        tokenizer = read_description(path)["identity"]["tokenizer"]["fingerprint"]
        return fingerprint([tokenizer, [part.fingerprint for part in token_set_splits(path).values()]])
    return str(source_identity(path, in_full=True))


def _recognisability(p: EvaluationProtocol) -> str | None:
    recogniser = p.recogniser
    return None if recogniser is None else replace(recogniser, name=name_by_content(recogniser.name)).described


def _importance(p: EvaluationProtocol) -> str | None:
    return None if p.importance is None else fingerprint(p.importance.double().sum(0).tolist())


def _losses(p: EvaluationProtocol) -> str:
    """The unit of every loss and gain; for masked models also how much a loss moves with its noises."""
    if not isinstance(p.backbone, MaskedTransformer):
        return "nats"
    some = p.data.tokens[:64].to(p.device), p.data.labels[:64].to(p.device)
    return (
        f"DiffLoss units, mean of {p.backbone.config.loss_draws} draws at fixed times; standard deviation over draws "
        f"{p.backbone.loss_noise(*some):.1%} of a block's loss"
    )


def _lookahead(p: EvaluationProtocol) -> str | None:
    if p.lookahead is None:
        return None
    return (
        f"against the expected utility over {p.lookahead.draws} draws of each block by the backbone, on "
        f"{len(p.lookahead.rows)} of the shared states"
    )


def _intervals(p: EvaluationProtocol) -> str:
    return (
        f"95 % percentile bootstrap over images, {p.config.resamples} resamples, states of an image together; Fréchet "
        f"distances: normal, standard error of {p.config.distance_resamples} resamples of the samples; CLIP score: "
        "bootstrap over samples; shares of samples: Wilson; none for inception score, kernel distance, first-choice "
        "entropy, calibration error, seconds"
    )


PARTS = (
    Part("version", lambda _: VERSION),
    Part("data", lambda p: p.data.name.partition(":")[0], _data),  # without the folder of a token set
    Part("split", lambda p: p.data.split),
    Part("images", lambda p: len(p.data)),
    Part("content", lambda p: p.data.fingerprint),
    Part(
        "backbone",
        lambda p: backbone_fingerprint(p.backbone),
        lambda p: f"{p.backbone_name} ({backbone_fingerprint(p.backbone)}){_arithmetic(p)}",
    ),
    Part(
        "blocks",
        lambda p: [p.backbone.geometry.rows, p.backbone.geometry.columns, p.backbone.geometry.block_size],
        _blocks,
        label="block_grid",
    ),
    Part("states", lambda p: None if p.states is None else len(p.states), _states, label="calibration"),
    Part("importance", _importance),
    Part(
        "reference_images",
        lambda p: p.config.reference_images,
        lambda p: f"oracle and lookahead on the first {p.config.reference_images} images",
        label="references",
    ),
    Part("samples", lambda p: p.config.samples, _samples),
    Part("features", lambda p: None if p.features is None else name_by_content(p.features), lambda p: p.features),
    Part("feature_weights", lambda p: None if p.config.weights is None else checksum(p.config.weights)),
    Part("reference", _reference),
    Part("real_images", lambda p: None if p.real is None else p.config.real_images),
    Part("kid_subsets", lambda p: p.config.kid_subsets),
    Part(
        "clip_score",
        lambda p: None if p.clip is None else [p.clip.described, fingerprint(p.clip.captions)],
        lambda p: None if p.clip is None else f"mean over the samples: {p.clip.described}",
    ),
    Part("recognisability", _recognisability, lambda p: None if p.recogniser is None else p.recogniser.described),
    Part("losses", wording=_losses),
    Part("sampling", lambda p: asdict(p.config.sampling), lambda p: asdict(p.config.sampling)),
    Part(
        "seconds_per_image",
        wording="of drawing samples in batches of 250; rollout_seconds_per_image: of scoring the test images in the "
        "policy's order",
    ),
    Part(
        "lookahead",
        lambda p: None if p.lookahead is None else [len(p.lookahead.rows), p.lookahead.draws],
        _lookahead,
        label="lookahead_regret",
    ),
    Part(
        "reliability",
        wording="scores of all candidates of the shared states mapped to utilities by the line that fits them best; "
        "calibration_error is the mean |predicted - actual| of bins of equal numbers, nats per token",
    ),
    Part("intervals", wording=_intervals),
    Part(
        "extrapolation",
        wording=lambda p: (
            "frechet_distance_infinity: line in 1 / samples through 15 sizes, read off at 0"
            if p.config.fid_infinity
            else None
        ),
    ),
    Part(
        "comparisons",
        wording="paired over images; two-sided p-values of the same bootstrap, corrected by Holm for all comparisons "
        "of the table; effect size is the paired Cohen's d",
    ),
    Part(
        "seeds",
        wording="a row is one training seed; comparisons average seeds and hold them fixed, seed_std is the standard "
        "deviation over them",
    ),
    Part("seed", lambda p: p.seed, lambda p: p.seed),
)
