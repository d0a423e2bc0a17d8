"""The networks behind features, all of them feature extractors of torch-fidelity, whose import takes long.

`register_features` gives the name that torch-fidelity's own functions know them by.
"""

from __future__ import annotations

import difflib
import hashlib
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_clip import MODEL_METADATA as CLIP_METADATA
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from orderrl.metrics.classifier import CLASSIFIERS, load_classifier
from orderrl.metrics.feature_names import (
    EXTRACTORS,
    INCEPTION,
    LOCAL_DIR,
    SHIPPED,
    TIMM,
    UNREADABLE,
    is_own,
    timm_parts,
)
from orderrl.runtime.sources import source_identity
from orderrl.runtime.storage import checksum
from orderrl.runtime.terminal import one_line
from orderrl.runtime.weights import SCRIPT_ARGUMENTS

SPATIAL_CHANNELS = 7
"""Channels of the feature map that sFID looks at, as in ADM's evaluator (Dhariwal and Nichol, 2021)."""


def register_features(features: str) -> str:
    """The name under which torch-fidelity knows a feature extractor; timm models are registered on first use.

    Raises:
        ValueError: if the name is unknown, or a checkpoint file does not exist.
    """
    if features in FEATURE_EXTRACTORS_REGISTRY:
        return features
    if is_own(features):
        return features
    if not features.startswith(TIMM):
        others = (name for name in FEATURE_EXTRACTORS_REGISTRY if not name.startswith((SHIPPED, TIMM)))
        known = ", ".join([*(SHIPPED + name for name in CLASSIFIERS), *others, *EXTRACTORS])
        raise ValueError(
            f"features={features!r} is unknown; choose one of {known}, module:attribute, timm:MODEL, "
            f"timm:MODEL:CHECKPOINT_FILE or timm:{LOCAL_DIR}:FOLDER"
        )
    import timm  # takes long to import, and only some users need it

    model, file = timm_parts(features)
    if model == LOCAL_DIR:
        if not file or not (Path(file).expanduser() / "config.json").is_file():
            raise ValueError(f"features={features!r}: {file or 'no folder'} must be a folder with timm's config.json")
    elif not timm.is_model(model):
        close = difflib.get_close_matches(model.partition(".")[0], timm.list_models(), n=3)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ValueError(f"features={features!r}: timm has no model {model!r}{hint}")
    elif not file and not timm.is_model_pretrained(model):
        raise ValueError(
            f"features={features!r}: timm has no weights for {model!r}; name a file, timm:{model}:CHECKPOINT_FILE"
        )
    checkpoint = Path(file).expanduser() if file else None
    name = TIMM + model
    if checkpoint is not None:
        if model != LOCAL_DIR and not checkpoint.is_file():
            raise ValueError(f"features={features!r}: the checkpoint file {file} does not exist")
        version = hashlib.sha256(f"{checkpoint.resolve()} {source_identity(checkpoint)}".encode()).hexdigest()
        name += f":{checkpoint.stem}-{version[:8]}"
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        values = {"model_name": model, "checkpoint": checkpoint}
        register_feature_extractor(name, type("NamedTimmFeatureExtractor", (TimmFeatureExtractor,), values))
    return name


class _Extractor(FeatureExtractorBase):
    """What our extractors tell torch-fidelity of themselves; nothing is compiled."""

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("penultimate", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Logits for the inception score, the penultimate layer for every distance."""
        return "logits" if metric == "isc" else "penultimate"


class ShippedFeatureExtractor(_Extractor):
    """A shipped classifier for torch-fidelity, on its uint8 images (n, 3, side, side).

    Offers "penultimate" (n, 64), "logits" (n, 10) and "spatial" (n, 7 h w) of a last map h x w. Features are float64,
    so that torch-fidelity takes means and covariances in double precision.
    """

    classifier_name: ClassVar[str]  # in `orderrl.metrics.classifier`

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)
        self.classifier = load_classifier(self.classifier_name)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("penultimate", "logits", "spatial")

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """The requested features in the order in which they were requested."""
        maps: list[Tensor] = []
        flatten = self.classifier.convolutions[-1]  # its input is the last map, (n, 32, h, w)
        handle = flatten.register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0]))
        penultimate = self.classifier.features(input)
        handle.remove()
        offered = {
            "penultimate": penultimate,
            "logits": self.classifier.head(penultimate),
            "spatial": _first_channels(maps[0]),
        }
        return tuple(offered[name].double() for name in self.features_list)


class TimmInput(nn.Module):
    """Images as a model of timm sees them: uint8 (n, 3, H, W) -> float32 (n, 3, h, w).

    They are resized to the model's input size (no crop; antialiased, with the model's own interpolation) and
    normalised.

    Args:
        config: input_size, interpolation, mean and std, as `timm.data.resolve_model_data_config` gives them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.size = tuple(config["input_size"][-2:])
        self.mode = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Resize and normalise."""
        images = images.float() / 255
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode=self.mode, align_corners=False, antialias=True).clamp(0, 1)
        return (images - self.mean) / self.std


class TimmFeatureExtractor(_Extractor):
    """A model of timm for torch-fidelity, on uint8 images (n, 3, H, W), which `TimmInput` prepares.

    Offers "penultimate" (n, d), the input of its classifier, and "logits" (n, C).

    Attributes:
        model_name: in timm, or `LOCAL_DIR`.
        checkpoint: file of weights, loaded strictly; the number of classes is that of the file. None takes timm's own;
            for `LOCAL_DIR` it is the folder.
    """

    model_name: ClassVar[str]
    checkpoint: ClassVar[Path | None]

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)
        from timm.data import resolve_model_data_config

        self.model = _timm_model(self.model_name, self.checkpoint)
        self.prepare = TimmInput(resolve_model_data_config(self.model))
        self.eval().requires_grad_(False)

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        """The requested features in the order in which they were requested, float32."""
        body = self.model.forward_features(self.prepare(input))
        offered = {
            "penultimate": lambda: self.model.forward_head(body, pre_logits=True),
            "logits": lambda: self.model.forward_head(body),
        }
        return tuple(offered[name]().flatten(1) for name in self.features_list)


def _timm_model(name: str, checkpoint: Path | None) -> Any:
    """A model of timm with its published weights, those of a file, or a folder's with its settings.

    Raises:
        ValueError: if the file or folder does not hold exactly the model's tensors.
    """
    import timm

    if checkpoint is None:
        return timm.create_model(name, pretrained=True)
    try:
        if name == LOCAL_DIR:
            return timm.create_model(f"{LOCAL_DIR}:{checkpoint}", pretrained=True)
        with torch.serialization.safe_globals(SCRIPT_ARGUMENTS):  # timm's own training script keeps them beside
            state = timm.models.load_state_dict(str(checkpoint), weights_only=True)
        model: Any = timm.create_model(name, pretrained=False)
        heads = model.pretrained_cfg.get("classifier") or ""
        head = state.get(f"{heads if isinstance(heads, str) else heads[0]}.weight")
        model.reset_classifier(0 if head is None else len(head))
        model.load_state_dict(state, strict=True)
    except UNREADABLE as error:
        whose = "a model of timm" if name == LOCAL_DIR else f"timm's {name}"
        raise ValueError(f"{checkpoint} does not hold the weights of {whose} ({one_line(error, 200)})") from error
    return model


for _name in CLASSIFIERS:
    if SHIPPED + _name not in FEATURE_EXTRACTORS_REGISTRY:
        _kind = type("NamedShippedFeatureExtractor", (ShippedFeatureExtractor,), {"classifier_name": _name})
        register_feature_extractor(SHIPPED + _name, _kind)


# -- making them ------------------------------------------------------------------------------------------------------


def find_extractor(
    features: str, weights: Path | None, device: torch.device
) -> tuple[FeatureExtractorBase, dict[str, str]]:
    """torch-fidelity's feature extractor, and the names of its layers that are `Features`' attributes.

    Raises:
        ValueError: as of `orderrl.metrics.features.extract_features`.
    """
    return _extractor(register_features(features), features, weights, source_identity(weights), device)


@lru_cache(maxsize=2)
def _extractor(
    registered: str, features: str, weights: Path | None, version: str | None, device: torch.device
) -> tuple[FeatureExtractorBase, dict[str, str]]:
    """As `find_extractor`; `version` tells weights from others that were in the file when it was read last."""
    kind = FEATURE_EXTRACTORS_REGISTRY[registered]
    layers = {"pooled": kind.get_default_feature_layer_for_metric("fid")}
    scores = kind.get_default_feature_layer_for_metric("isc")
    if scores.startswith("logits"):
        layers["logits"] = scores
    if "spatial" in kind.get_provided_features_list():
        layers["spatial"] = "spatial"
    if weights is not None:
        _check_weights(weights, features)
    try:
        extractor = create_feature_extractor(
            registered,
            list(layers.values()),
            cuda=device.type == "cuda",
            verbose=False,
            feature_extractor_weights_path=None if weights is None else str(weights),
        )
    except OSError as error:  # of urllib, requests and the Hugging Face hub
        instead = (
            f"{features}:CHECKPOINT_FILE" if features.startswith(TIMM) else f"weights=<path of {_whose(features)}>"
        )
        raise ValueError(
            f"features={features!r}: the weights cannot be downloaded ({one_line(error, 200)}); pass {instead}"
        ) from error
    except NotImplementedError as error:
        raise ValueError(f"features={features!r} takes no weights file; set weights to None") from error
    except RuntimeError as error:
        raise ValueError(f"features={features!r}: the weights do not fit ({one_line(error, 200)})") from error
    if features.startswith(TIMM) and getattr(getattr(extractor, "model", None), "num_classes", 0) == 0:
        layers.pop("logits")
        extractor.features_list = list(layers.values())
    return extractor, layers


def _whose(features: str) -> str:
    return "torch-fidelity's Inception weights" if features == INCEPTION else "the network's weights"


@contextmanager
def inception_maps(extractor: FeatureExtractorBase) -> Iterator[list[Tensor]]:
    """Collects the spatial features of torch-fidelity's Inception, batch by batch; nothing for other networks."""
    maps: list[Tensor] = []
    block = getattr(getattr(extractor, "Mixed_6d", None), "branch1x1", None)
    if not isinstance(block, nn.Module):
        yield maps
        return
    handle = block.register_forward_hook(
        lambda module, inputs, output: maps.append(_first_channels(output).float().cpu())
    )
    try:
        yield maps
    finally:
        handle.remove()


def _first_channels(maps: Tensor) -> Tensor:
    """(n, C, h, w) -> (n, 7 h w), channels fastest, as TensorFlow lays them out."""
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def _check_weights(weights: Path, features: str) -> None:
    """Refuse files that hold anything but tensors before torch-fidelity unpickles them."""
    if features.startswith(SHIPPED):
        raise ValueError(f"weights={str(weights)!r}: {features} has its own, pass None")
    if features.startswith(TIMM):
        raise ValueError(f"weights={str(weights)!r}: name the file in features, timm:MODEL:CHECKPOINT_FILE")
    if not weights.is_file():
        raise ValueError(f"weights={str(weights)!r} does not exist; it must be a file of {_whose(features)}")
    if features.startswith("clip"):  # a TorchScript archive, whose code runs: nobody's but OpenAI's own
        if checksum(weights) != CLIP_METADATA[features]["hash"]:
            raise ValueError(f"weights={str(weights)!r} is not the file that OpenAI published for {features}")
        return
    try:
        torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"weights={str(weights)!r} is not a file of plain tensors ({one_line(error, 200)})") from error
