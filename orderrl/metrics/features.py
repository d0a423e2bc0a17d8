"""Features of images: what every distance between sets of images is measured in.

One pass over the images gives everything that the metrics of `orderrl.metrics.quality` need. `feature_names` says what
there is to choose from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from orderrl.metrics.feature_names import EXTRACTORS, is_own
from orderrl.metrics.images import TensorImages, check_images
from orderrl.runtime.devices import current_device
from orderrl.runtime.finite import require_finite


@dataclass(frozen=True)
class Features:
    """What one pass over n images gives."""

    name: str  # of the feature extractor
    pooled: Tensor  # (n, d), the features of distances, precision and recall
    logits: Tensor | None = None  # (n, C) of its classifier, for the inception score; None where it has none
    # (n, s), the first 7 channels of a feature map, for the spatial distance; None where it has none
    spatial: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pooled)

    def rows(self, rows: Tensor) -> Features:
        """The features of some images, given by their numbers, int64."""
        return replace(
            self,
            pooled=self.pooled[rows],
            logits=None if self.logits is None else self.logits[rows],
            spatial=None if self.spatial is None else self.spatial[rows],
        )


def extract_features(
    images: Tensor | Dataset[Tensor],
    features: str,
    weights: Path | None = None,
    device: torch.device | None = None,
    batch_size: int = 256,
) -> Features:
    """Features of images, on the CPU, in one pass.

    The spatial features of Inception are those of ADM's evaluator: the layer "mixed_6/conv" of its TensorFlow graph,
    which is `Mixed_6d.branch1x1` in torch-fidelity's names, 17 x 17 places of 7 channels (2,023 numbers, channels
    fastest). Those of the shipped classifiers are the first 7 channels of their last map (digits: 4 x 4, 112 numbers).

    Args:
        images: (n, 3, H, W) uint8, or a data set of (3, H, W) uint8 images such as `ImageFolder`.
        weights: file of the network's weights, for torch-fidelity's own networks; None downloads them (torch.hub's
            cache). A timm checkpoint is part of the name.
        device: where the network runs; None is where the images are.

    Raises:
        ValueError: if features are unknown, weights cannot be downloaded or found or do not fit, or images have another
            shape or dtype.
    """
    if isinstance(images, Tensor):
        check_images(images)
        device = device or images.device
        images = TensorImages(images)
    device = torch.device("cpu") if device is None else device
    if is_own(features):
        return _sound(Features(features, _own_features(features, images, device, batch_size)))
    from torch_fidelity.utils import get_featuresdict_from_dataset  # takes long to import

    from orderrl.metrics.extractors import find_extractor, inception_maps

    with current_device(device):  # where torch-fidelity puts networks and images
        extractor, layers = find_extractor(features, weights, device)
        with inception_maps(extractor) as maps:
            found = get_featuresdict_from_dataset(
                images, extractor, batch_size=batch_size, cuda=device.type == "cuda", save_cpu_ram=True, verbose=False
            )
    result = {key: found[layer] for key, layer in layers.items()}
    if maps:
        result["spatial"] = torch.cat(maps)
    return _sound(Features(features, **result))


def _sound(found: Features) -> Features:
    """Features, refused where they are not finite: no distance could be told from them."""
    require_finite(f"features={found.name!r}", {"features": found.pooled}, "use another extractor, or other weights")
    return found


def _own_features(name: str, images: Dataset[Tensor], device: torch.device, batch_size: int) -> Tensor:
    """What a user's function gives, (n, d) float64 on the CPU."""
    function, parts = EXTRACTORS.find(name), []
    for batch in DataLoader(images, batch_size):
        part = function(batch.to(device))
        if not isinstance(part, Tensor) or part.is_complex() or part.ndim != 2 or len(part) != len(batch):
            got = f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(
                f"features={name!r} must give real numbers ({len(batch)}, d) for as many images, got {got}"
            )
        parts.append(part.double().cpu())
    return torch.cat(parts)
