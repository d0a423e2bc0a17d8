"""Names of the features that images are measured in, and the functions that users add to them.

Names are those of torch-fidelity's registry (its Inception-v3, CLIP, DINOv2 and VGG networks), "orderrl-digits" and
"orderrl-canvas", the shipped classifiers, and "timm:MODEL" or "timm:MODEL:CHECKPOINT_FILE" for any model of timm, or
"timm:local-dir:FOLDER" for one that timm saved with its settings. Users add functions of images with
`register_extractor`, or name them as module:attribute; torch-fidelity does not know these.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from orderrl.metrics.classifier import CLASSIFIERS, own_classifier
from orderrl.runtime.registry import Registry
from orderrl.runtime.sources import source_identity

SHIPPED = "orderrl-"
DIGITS = SHIPPED + "digits"
INCEPTION = "inception-v3-compat"
CLIP = "clip-vit-l-14-336px"
"""The CLIP network that CMMD is defined with."""
TIMM = "timm:"
LOCAL_DIR = "local-dir"
"""timm's name for models in folders of config.json and weights, as `timm.models.save_for_hf` writes them."""
UNREADABLE = (
    *(RuntimeError, OSError, KeyError, ValueError, EOFError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError),
)
"""What libraries raise on a file of weights that is none."""


def timm_parts(name: str) -> tuple[str, str]:
    """Model and checkpoint of "timm:MODEL:CHECKPOINT_FILE" or "timm:local-dir:FOLDER"; "" where none is named."""
    model, _, file = name.removeprefix(TIMM).partition(":")
    return model, file


def timm_source(name: str) -> Path | None:
    """The file or folder that a timm model is read from, in a name as above; None for what timm downloads."""
    file = timm_parts(name)[1] if name.startswith(TIMM) else ""
    return Path(file).expanduser() if file else None


def is_own(name: str) -> bool:
    """Whether features are those of a user's function, which is then there."""
    return not name.startswith(TIMM) and EXTRACTORS.given(name) is not None and EXTRACTORS.find(name) is not None


def name_by_content(name: str) -> str:
    """The name of a feature extractor with the content of a checkpoint in place of its path, or of a user's file."""
    if is_own(name):
        return f"{name}:{EXTRACTORS.version(name)}"
    source = timm_source(name)
    return name if source is None else f"{TIMM}{timm_parts(name)[0]}:{source_identity(source, in_full=True)}"


def own_features(data: str) -> str | None:
    """The features of the shipped classifier that knows the images of a data set, None if there is none."""
    classifier = own_classifier(data)
    return None if classifier is None else SHIPPED + classifier


def _check_callable(name: str, extractor: Any) -> None:
    if not callable(extractor):
        raise ValueError(f"features {name!r} must be a function of images (n, 3, H, W) uint8, got {extractor!r:.60}")


def _networks() -> Iterable[str]:
    """Names of networks, which no function can have."""
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY  # takes long to import

    return ("own", *FEATURE_EXTRACTORS_REGISTRY, *(SHIPPED + name for name in CLASSIFIERS))


EXTRACTORS: Registry[Callable[[Tensor], Tensor]] = Registry(
    "features",
    "orderrl.features",
    check=_check_callable,
    taken=_networks,
)
"""Functions of a user: images (n, 3, H, W) uint8 -> features (n, d)."""
register_extractor = EXTRACTORS.register
