"""What samples are compared with: real images, or statistics of them that others have published.

`open_reference` reads an image folder, a token set on disk, a `.npz` of ADM's evaluator (Dhariwal and Nichol, 2021),
and a statistics file from torch-fidelity's cache. Statistics without the images behind them have a mean and a
covariance only: they give Fréchet distances, but no kernel distance, precision or recall.
"""

import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from orderrl.backbones.memory import free_memory
from orderrl.data.token_files import DESCRIPTION, token_set_splits
from orderrl.metrics.feature_names import INCEPTION
from orderrl.metrics.features import Features, extract_features
from orderrl.metrics.images import ImageFolder, TokenImages
from orderrl.runtime.terminal import one_line

KINDS = "an image folder, a token set's folder, a .npz of ADM's evaluator, or a .pt statistics file of torch-fidelity"


_DAMAGED = (
    *(OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
"""What numpy and zipfile raise on a damaged archive; a head of a few bytes may ask for any memory."""


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution fitted to features."""

    mean: NDArray[np.float64]  # (d,) float64
    covariance: NDArray[np.float64]  # (d, d) float64

    def __post_init__(self) -> None:
        mean, covariance = (np.asarray(value, dtype=np.float64) for value in (self.mean, self.covariance))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"mean and covariance must have shapes (d,) and (d, d), got {mean.shape} and {covariance.shape}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("mean and covariance must be finite")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", covariance)


def fit_gaussian(features: Tensor) -> Gaussian:
    """Mean and covariance of features (n, d), n >= 2, by torch-fidelity.

    Raises:
        ValueError: if there are fewer than 2 rows.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics  # takes long to import

    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must have shape (n, d) with n >= 2, got {tuple(features.shape)}")
    found = fid_features_to_statistics(features)
    return Gaussian(found["mu"], found["sigma"])


@dataclass(frozen=True)
class Reference:
    """What samples are compared with."""

    source: str  # what it is, in words, for the protocol
    features: str  # name of the feature extractor behind the numbers
    pooled: Gaussian  # of the features of distances
    spatial: Gaussian | None = None  # of the spatial features; None where there are none
    # features of the images behind it; None where only statistics are known
    found: Features | None = field(default=None, repr=False)


def reference_of(
    images: Tensor | Dataset[Tensor] | Features,
    features: str,
    weights: Path | None = None,
    device: torch.device | None = None,
    source: str | None = None,
) -> Reference:
    """A reference made of images.

    Args:
        images: (n, 3, H, W) uint8 with n >= 2, a data set of such images, or their features.
        features, weights, device: as in `extract_features`.
        source: what they are, in words; None says how many.

    Raises:
        ValueError: if there are fewer than 2 images; else as `extract_features`.
    """
    found = images if isinstance(images, Features) else extract_features(images, features, weights, device)
    if found.name != features:
        raise ValueError(f"images have features {found.name!r}, not features={features!r}")
    return Reference(
        f"{len(found)} images" if source is None else source,
        features,
        fit_gaussian(found.pooled),
        None if found.spatial is None else fit_gaussian(found.spatial),
        found,
    )


def open_reference(
    path: Path, features: str, weights: Path | None = None, device: torch.device | None = None
) -> Reference:
    """Read a reference.

    Of a token set, all images of all splits count, as they are decoded.

    A `.npz` file has `mu` and `sigma` (and `mu_s`, `sigma_s` of spatial features), or `arr_0`, images (n, H, W, 3)
    uint8; ADM's own files have both, and then distances use the statistics, precision and recall the images. A
    statistics file of torch-fidelity (`…-EXTRACTOR-stat-fid-LAYER.pt`) holds `mu` and `sigma`. The file says whose
    features its statistics are: the key `features` of a `.npz`, or the name that
    torch-fidelity gave it; a file that does not say is taken for Inception's, as all published ones are.

    Args:
        features: the feature extractor of the samples.
        weights, device: as in `extract_features`.

    Raises:
        ValueError: if the file is missing, of another kind or damaged, or its statistics are of other features.
    """
    from orderrl.metrics.extractors import register_features  # takes long to import

    register_features(features)
    path = path.expanduser()
    if path.is_dir():
        if (path / DESCRIPTION).is_file():
            found = TokenImages(list(token_set_splits(path).values()), device)
            return reference_of(found, features, weights, device, f"{len(found)} images of the token set {path}")
        images = ImageFolder(path)
        left_out = f" (left out: {images.left_out})" if images.left_out else ""
        return reference_of(images, features, weights, device, f"{len(images)} images of {path}{left_out}")
    if not path.is_file():
        raise ValueError(f"reference={str(path)!r} does not exist; it must be {KINDS}")
    if path.suffix == ".npz":
        return _from_npz(path, features, weights, device)
    if path.suffix in (".pt", ".pth"):
        return _from_torch_fidelity(path, features)
    raise ValueError(f"reference={str(path)!r} is of no known kind; it must be {KINDS}")


def _from_npz(path: Path, features: str, weights: Path | None, device: torch.device | None) -> Reference:
    try:
        with zipfile.ZipFile(path) as archive:  # a small file may unpack to more than there is memory
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > (free := free_memory(torch.device("cpu"))):
            raise ValueError(f"its arrays take {unpacked / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free")
        with np.load(path, allow_pickle=False) as file:
            values = {key: file[key] for key in file.files}
    except _DAMAGED as error:
        raise ValueError(f"reference={str(path)!r} cannot be read as .npz arrays ({error})") from error
    named = str(values["features"]) if "features" in values else INCEPTION
    counted = {"mu", "sigma"} <= values.keys()
    found = None
    if "arr_0" in values:
        array = values["arr_0"]
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or len(array) < 2:
            raise ValueError(
                f"reference={str(path)!r}: arr_0 must be uint8 images (n, H, W, 3) with n >= 2, "
                f"got {array.dtype} {array.shape}"
            )
        found = extract_features(torch.from_numpy(array).permute(0, 3, 1, 2), features, weights, device)
    if not counted and found is None:
        raise ValueError(f"reference={str(path)!r} must hold mu and sigma, or arr_0; it holds {', '.join(values)}")
    if counted and named == features:
        pooled = _gaussian(path, values["mu"], values["sigma"])
        spatial = _gaussian(path, values["mu_s"], values["sigma_s"]) if {"mu_s", "sigma_s"} <= values.keys() else None
        images = "" if found is None else f", {len(found)} images for KID, precision and recall"
        return Reference(f"statistics of {path.name}{images}", features, pooled, spatial, found)
    if found is None:
        raise _other_features(path, named, features)
    return reference_of(found, features, source=f"{len(found)} images of {path.name}")


def _from_torch_fidelity(path: Path, features: str) -> Reference:
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    from orderrl.metrics.extractors import register_features

    kinds = {type(np.dtype(kind)) for kind in (np.float64, np.float32)}
    rebuild = np.zeros(0).__reduce__()[0]  # the function that makes unpickled arrays
    allowed: list[Any] = [np.ndarray, np.dtype, rebuild, *kinds]
    try:
        with torch.serialization.safe_globals(allowed):  # numpy arrays, and no other Python objects
            values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError) as error:
        why = one_line(error, 200)
        raise ValueError(f"reference={str(path)!r} is no statistics file of torch-fidelity ({why})") from error
    if not isinstance(values, dict) or not {"mu", "sigma"} <= values.keys():
        raise ValueError(f"reference={str(path)!r} is no statistics file of torch-fidelity: it has no mu and sigma")
    registered = register_features(features)
    if registered not in FEATURE_EXTRACTORS_REGISTRY:
        raise _other_features(path, path.stem, features)
    layer = FEATURE_EXTRACTORS_REGISTRY[registered].get_default_feature_layer_for_metric("fid")
    if "-stat-fid-" in path.stem:
        if not path.stem.endswith(f"-{registered}-stat-fid-{layer}"):
            raise _other_features(path, path.stem, f"{registered}-stat-fid-{layer}")
    elif features != INCEPTION:
        raise _other_features(path, INCEPTION, features)
    return Reference(f"statistics of {path.name}", features, _gaussian(path, values["mu"], values["sigma"]))


def _gaussian(path: Path, mean: Any, covariance: Any) -> Gaussian:
    try:
        return Gaussian(mean, covariance)
    except ValueError as error:
        raise ValueError(f"reference={str(path)!r}: {error}") from error


def _other_features(path: Path, named: str, features: str) -> ValueError:
    return ValueError(
        f"reference={str(path)!r} has statistics of the features {named!r}, but samples are measured in {features!r}; "
        "a file that names no features is taken for Inception's"
    )
