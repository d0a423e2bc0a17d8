"""Quality of samples: distances from real images in named features, precision and recall, and class accuracy.

The Fréchet distance, inception score, kernel distance (KID), precision and recall are torch-fidelity's own functions,
on features that are extracted once. The distance is called FID only in Inception features (`distance_name`).
"""

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orderrl.metrics.classifier import load_classifier
from orderrl.metrics.feature_names import INCEPTION, SHIPPED
from orderrl.metrics.features import Features
from orderrl.metrics.references import Gaussian, Reference, fit_gaussian, reference_of

SCORE_SPLITS = 10
"""Parts of the samples that the inception score is averaged over, as is usual (Salimans et al., 2016)."""
KID_SUBSETS = 100
"""Random subsets that the kernel distance is averaged over, torch-fidelity's default."""
KID_SUBSET_SIZE = 1000
"""Images in each of them, or as many as there are."""
SIZES = 15  # of samples, from which the Fréchet distance is extrapolated
NEIGHBOURS = 3
"""k of the nearest-neighbour balls of precision and recall (Kynkäänniemi et al., 2019)."""
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0


@dataclass(frozen=True)
class Quality:
    """What one set of samples is worth; None where a number does not apply.

    Attributes:
        frechet_distance: between Gaussians fitted to the features, squared units (Heusel et al., 2017).
        inception_score: exp of the mutual information of image and predicted class, mean over 10 parts
            (Salimans et al., 2016); None for features without a classifier, or fewer than 10 images.
        kid: squared maximum mean discrepancy with a cubic kernel, unbiased (Bińkowski et al., 2018); it may be a
            little below 0. None where the images of the reference are not known.
        precision, recall: share of samples near real images, and of real images near samples, by the balls of
            3 nearest neighbours (Kynkäänniemi et al., 2019). None as `kid`, or with fewer than 4 images.
        spatial_frechet_distance: the Fréchet distance of spatial features (sFID; Nash et al., 2021; ADM's definition);
            None where the extractor or the reference has none.
        cmmd: kernel distance of CLIP features of unit length, times 1,000 (Jayasumana et al., 2024); None in other
            features, or where the images of the reference are not known.
    """

    frechet_distance: float
    inception_score: float | None
    kid: float | None
    precision: float | None
    recall: float | None
    spatial_frechet_distance: float | None
    cmmd: float | None = None


def distance_name(features: str) -> str:
    """What the distance is called: "FID" in Inception features, else "Fréchet distance"."""
    return "FID" if features == INCEPTION else "Fréchet distance"


def sample_quality(generated: Features, reference: Reference, kid_subsets: int = KID_SUBSETS) -> Quality:
    """All metrics of one set of samples, from features that are extracted once.

    Warns if there are too few images for a covariance of full rank: the Fréchet distance is then strongly biased.

    Args:
        generated: of n >= 2 samples, from `extract_features`.
        reference: in the same features, from `reference_of` or `open_reference`.
        kid_subsets: random subsets that KID is averaged over.

    Raises:
        ValueError: if the features differ, or there are fewer than 2 samples.
    """
    _check_same(generated, reference)
    _warn_of_few(generated, reference)
    spatial = None
    if generated.spatial is not None and reference.spatial is not None:
        spatial = gaussian_distance(fit_gaussian(generated.spatial), reference.spatial)
    precision, recall = _precision_recall(generated, reference)
    clip = generated.name.startswith("clip-")
    return Quality(
        frechet_distance=gaussian_distance(fit_gaussian(generated.pooled), reference.pooled),
        inception_score=_inception_score(generated),
        kid=_kid(generated, reference, kid_subsets),
        precision=precision,
        recall=recall,
        spatial_frechet_distance=spatial,
        cmmd=cmmd(generated, reference.found) if clip and reference.found is not None else None,
    )


def gaussian_distance(first: Gaussian, second: Gaussian) -> float:
    """Fréchet distance |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) by torch-fidelity, in squared units."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric  # takes long to import

    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"first and second must have one dimension, got {len(first.mean)} and {len(second.mean)}; "
            "these are statistics of different features"
        )
    one, other = ({"mu": g.mean, "sigma": g.covariance} for g in (first, second))
    return float(fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID])


def real_floor(real: Features, repeats: int = 5, seed: int = 0, kid_subsets: int = KID_SUBSETS) -> Quality:
    """Real against real: the numbers that a perfect generator would still show.

    Means over random splits into two disjoint halves. Halves are smaller than the sets that samples are compared on,
    so the floor of a biased distance is a little too high.

    Args:
        real: features of n >= 4 real images.
        repeats: random splits that are averaged.
        kid_subsets: random subsets of every split that KID is averaged over.

    Raises:
        ValueError: if there are fewer than 4 images.
    """
    if len(real) < 4:
        raise ValueError(f"real must hold at least 4 images to be halved, got {len(real)}")
    generator = torch.Generator().manual_seed(seed)
    half = len(real) // 2
    found = []
    for _ in range(repeats):
        order = torch.randperm(len(real), generator=generator)
        reference = reference_of(real.rows(order[half : 2 * half]), real.name)
        found.append(asdict(sample_quality(real.rows(order[:half]), reference, kid_subsets)))
    means: dict[str, Any] = {key: _mean([values[key] for values in found]) for key in found[0]}
    return Quality(**means)


def fid_infinity(generated: Features, reference: Reference, seed: int = 0) -> float:
    """The Fréchet distance that infinitely many samples would have, by extrapolation (Chong and Forsyth, 2020).

    The distance of n samples is linear in 1/n to first order; a line through the distances of random subsets of
    several sizes is read off at 1/n = 0. Sizes are evenly spaced from a tenth of the samples (5,000 of 50,000 in the
    paper) to all.

    Args:
        generated: of all samples.
        reference: in the same features.

    Raises:
        ValueError: if the features differ, or there are fewer than 3 samples.
    """
    _check_same(generated, reference)
    if len(generated) < 3:
        raise ValueError(f"generated must hold at least 3 samples to extrapolate from, got {len(generated)}")
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(max(2, len(generated) // 10), len(generated), SIZES).long().tolist()
    distances = []
    for size in sizes:
        rows = torch.randperm(len(generated), generator=generator)[:size]
        distances.append(gaussian_distance(fit_gaussian(generated.pooled[rows]), reference.pooled))
    return float(np.polyfit(1 / np.array(sizes), distances, deg=1)[1])


def cmmd(generated: Features, reference: Features, batch_size: int = 1024) -> float:
    """Kernel distance of features of unit length (CMMD; Jayasumana et al., 2024), times 1,000.

    The squared maximum mean discrepancy with the kernel exp(-|x - y|^2 / (2 sigma^2)), sigma = 10, in the estimator of
    least variance, which is a little too high (Gretton et al., 2012, eq. 5): means over all pairs, each image with
    itself included. It is CMMD in the features "clip-vit-l-14-336px"; in others it is the same distance, to be named
    with its features. `batch_size` rows of the kernel matrix are computed at once.
    """
    one, other = (torch.nn.functional.normalize(x.pooled.double(), dim=1) for x in (generated, reference))

    def mean_kernel(x: Tensor, y: Tensor) -> float:
        total = 0.0
        for rows in x.split(batch_size):
            squares = rows.square().sum(1)[:, None] + y.square().sum(1) - 2 * rows @ y.T  # (b, m)
            total += float((squares.clamp_min(0) / (-2 * CMMD_SIGMA**2)).exp().sum())
        return total / (len(x) * len(y))

    return CMMD_SCALE * (mean_kernel(one, one) + mean_kernel(other, other) - 2 * mean_kernel(one, other))


@torch.no_grad()
def class_accuracy(images: Tensor, labels: Tensor, features: str) -> float:
    """Share of images that the classifier of shipped features assigns to their class, (n,) int64."""
    classifier = load_classifier(features.removeprefix(SHIPPED)).to(images.device)
    predicted = torch.cat([classifier(part).argmax(-1) for part in images.split(1024)])
    return (predicted == labels.to(predicted.device)).float().mean().item()


def _inception_score(generated: Features) -> float | None:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    if generated.logits is None or len(generated) < SCORE_SPLITS:
        return None
    return float(isc_features_to_metric(generated.logits, splits=SCORE_SPLITS)[KEY_METRIC_ISC_MEAN])


def _kid(generated: Features, reference: Reference, subsets: int) -> float | None:
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    real = reference.found
    if real is None:
        return None
    size = min(KID_SUBSET_SIZE, len(generated), len(real))
    options = {"kid_subsets": subsets, "kid_subset_size": size, "verbose": False}
    return float(kid_features_to_metric(generated.pooled, real.pooled, **options)[KEY_METRIC_KID_MEAN])


def _precision_recall(generated: Features, reference: Reference) -> tuple[float | None, float | None]:
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    real = reference.found
    if real is None or min(len(generated), len(real)) <= NEIGHBOURS:
        return None, None
    # In parts: the whole matrix of distances between 50,000 images would take 10 GB.
    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": 2048, "save_cpu_ram": True, "verbose": False}
    found = prc_features_to_metric(generated.pooled, real.pooled, **options)
    return float(found[KEY_METRIC_PRECISION]), float(found[KEY_METRIC_RECALL])


def _check_same(generated: Features, reference: Reference) -> None:
    if generated.name != reference.features:
        raise ValueError(
            f"generated has the features {generated.name!r}, but reference those of {reference.features!r}"
        )


def _warn_of_few(generated: Features, reference: Reference) -> None:
    """Fewer images than features leave the covariance singular."""
    needed = generated.pooled.shape[1] + 1
    counts = {"generated": len(generated)}
    if reference.found is not None:
        counts["reference"] = len(reference.found)
    for name, count in counts.items():
        if count < needed:
            warnings.warn(
                f"{name}: {count} images are too few for a covariance of {needed - 1} features; the "
                f"{distance_name(generated.name)} needs at least {needed}",
                stacklevel=3,
            )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
