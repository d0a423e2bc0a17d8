"""Quality of samples: Fréchet distance by torch-fidelity in named features, and class accuracy.

The mathematics and the Inception network are torch-fidelity's own; the digits classifier joins its registry as
"orderrl-digits". The distance is called FID only in Inception features (`distance_name`).
"""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_featuresdict_to_statistics, fid_statistics_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from orderrl.classifier import DigitsClassifier, load_classifier

DIGITS = "orderrl-digits"
INCEPTION = "inception-v3-compat"
FEATURES = (DIGITS, INCEPTION)
"""Feature extractors that distances can be measured in."""

_CACHED_REFERENCES = 8
_reference_statistics: OrderedDict[tuple[str, ...], dict[str, Any]] = OrderedDict()


class DigitsFeatureExtractor(FeatureExtractorBase):
    """The digits classifier for torch-fidelity: uint8 (n, 3, 8, 8) -> "penultimate" (n, 64) and "logits" (n, 10).

    Features are float64, so that torch-fidelity takes means and covariances in double precision.
    """

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)
        self.classifier = load_classifier("digits")

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names of the features."""
        return ("penultimate", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Logits for the inception score, the penultimate layer for every distance."""
        return "logits" if metric == "isc" else "penultimate"

    @staticmethod
    def can_be_compiled() -> bool:
        """Plain convolutions: yes."""
        return True

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """(1, 3, 8, 8) uint8."""
        return torch.zeros(1, 3, DigitsClassifier.height, DigitsClassifier.width, dtype=torch.uint8)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """The requested features in the order in which they were requested."""
        penultimate = self.classifier.features(input)
        offered = {"penultimate": penultimate, "logits": self.classifier.head(penultimate)}
        return tuple(offered[name].double() for name in self.features_list)


if DIGITS not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(DIGITS, DigitsFeatureExtractor)


class _Images(Dataset[Tensor]):
    """uint8 images (n, 3, H, W) as the data set that torch-fidelity reads."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.cpu()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def distance_name(features: str) -> str:
    """What the distance is called: "FID" in Inception features, else "Fréchet distance"."""
    return "FID" if features == INCEPTION else "Fréchet distance"


def frechet_distance(generated: Tensor, reference: Tensor, features: str, weights: Path | None = None) -> float:
    """Fréchet distance between Gaussians fitted to the features of two sets of images, by torch-fidelity.

    Reference statistics are kept for the last few reference sets of the process, found again by their content.

    Args:
        generated: (n, 3, H, W) uint8.
        reference: (m, 3, H, W) uint8.
        features: "orderrl-digits" (64 features of the digits classifier, 8x8 images) or "inception-v3-compat"
            (2048 features of torch-fidelity's Inception; only this is FID, Heusel et al., 2017).
        weights: Inception weights file; None downloads them (torch.hub's cache).

    Returns:
        The distance, in squared units of the features. It falls with n and m (bias): compare equal numbers only.

    Raises:
        ValueError: if features are unknown, images are not uint8 (n >= 2, 3, H, W), or the weights can't be had.
    """
    if features not in FEATURES:
        raise ValueError(f"features={features!r} is unknown; choose one of {', '.join(FEATURES)}")
    _check_images(generated, "generated")
    _check_images(reference, "reference")
    key = (features, str(weights), str(tuple(reference.shape)), _digest(reference))
    if key not in _reference_statistics:
        _reference_statistics[key] = _statistics(reference, features, weights)
        while len(_reference_statistics) > _CACHED_REFERENCES:
            _reference_statistics.popitem(last=False)
    _reference_statistics.move_to_end(key)
    ours = _statistics(generated, features, weights)
    return float(fid_statistics_to_metric(ours, _reference_statistics[key], verbose=False)[KEY_METRIC_FID])


def real_floor(real: Tensor, features: str, repeats: int = 5, seed: int = 0, weights: Path | None = None) -> float:
    """Real against real: the distance that a perfect generator would still show.

    The mean Fréchet distance between two disjoint random halves of the real images. Halves are smaller than the
    sets that samples are compared on, so this floor is a little too high.

    Args:
        real: (n, 3, H, W) uint8, n >= 4.
        features: as in `frechet_distance`.
        repeats: random splits that are averaged.
        seed: of the splits.
        weights: as in `frechet_distance`.

    Raises:
        ValueError: if repeats < 1 or there are fewer than 4 images; else as `frechet_distance`.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if len(real) < 4:
        raise ValueError(f"real must hold at least 4 images to be halved, got {len(real)}")
    generator = torch.Generator().manual_seed(seed)
    half = len(real) // 2
    total = 0.0
    for _ in range(repeats):
        order = torch.randperm(len(real), generator=generator).to(real.device)
        total += frechet_distance(real[order[:half]], real[order[half : 2 * half]], features, weights)
    return total / repeats


@torch.no_grad()
def class_accuracy(images: Tensor, labels: Tensor, features: str) -> float:
    """Share of images that the classifier assigns to the class they were conditioned on.

    Args:
        images: (n, 3, 8, 8) uint8.
        labels: (n,) int64.
        features: "orderrl-digits", the only features with a classifier of the same classes.

    Raises:
        ValueError: if the features have no classifier or images and labels do not fit.
    """
    if features != DIGITS:
        raise ValueError(f"features={features!r} have no classifier of these classes; choose {DIGITS}")
    _check_images(images, "images", at_least=1)
    if labels.shape != (len(images),):
        raise ValueError(f"labels must have shape ({len(images)},), one for each image, got {tuple(labels.shape)}")
    classifier = load_classifier("digits").to(images.device)
    predicted = torch.cat([classifier(part).argmax(-1) for part in images.split(1024)])
    return (predicted == labels.to(predicted.device)).float().mean().item()


def _check_images(images: Tensor, name: str, at_least: int = 2) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) < at_least:
        raise ValueError(
            f"{name} must be uint8 images of shape (n, 3, H, W) with n >= {at_least}, "
            f"got {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        )


def _digest(images: Tensor) -> str:
    return hashlib.sha256(images.cpu().contiguous().numpy().tobytes()).hexdigest()


def _statistics(images: Tensor, features: str, weights: Path | None) -> dict[str, Any]:
    """Mean and covariance of the features, computed by torch-fidelity."""
    extractor = _extractor(features, weights, images.is_cuda)
    found = get_featuresdict_from_dataset(
        _Images(images), extractor, batch_size=256, cuda=images.is_cuda, save_cpu_ram=True, verbose=False
    )
    return dict(fid_featuresdict_to_statistics(found, extractor.get_requested_features_list()[0]))


@lru_cache(maxsize=2)
def _extractor(features: str, weights: Path | None, cuda: bool) -> FeatureExtractorBase:
    """torch-fidelity's feature extractor with the layer that it uses for the Fréchet distance."""
    layer = FEATURE_EXTRACTORS_REGISTRY[features].get_default_feature_layer_for_metric("fid")
    if weights is not None:
        _check_weights(weights)
    try:
        return create_feature_extractor(
            features,
            [layer],
            cuda=cuda,
            verbose=False,
            feature_extractor_weights_path=None if weights is None else str(weights),
        )
    except (URLError, TimeoutError, ConnectionError) as error:
        raise ValueError(
            f"features={features!r}: the weights can't be downloaded ({_one_line(error)}); "
            "pass weights=<path of torch-fidelity's Inception weights>"
        ) from error
    except RuntimeError as error:
        raise ValueError(f"features={features!r}: the weights do not fit ({_one_line(error)})") from error


def _check_weights(weights: Path) -> None:
    """Refuse files that hold anything but tensors before torch-fidelity unpickles them."""
    if not weights.is_file():
        raise ValueError(f"weights={str(weights)!r} does not exist; it must be a file of Inception weights")
    try:
        torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"weights={str(weights)!r} is not a file of plain tensors ({_one_line(error)})") from error


def _one_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
