"""CLIP score: how well images fit their captions (Hessel et al., 2021), in the networks of open_clip.

The score of an image and its caption is 100 max(cos, 0), with the cosine of their CLIP features, as in torchmetrics
(Hessel et al. write 2.5 instead of 100); that of a set of images is the mean. Where images have classes and no
captions, the caption is a prompt with the class's name, as in CLIP's zero-shot classification (Radford et al., 2021).

open_clip is the optional extra `clip`. Its networks come with their own tokeniser and image preprocessing.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from orderrl.data import TokenSet
from orderrl.data.classes import look_like_synsets
from orderrl.metrics.feature_names import UNREADABLE
from orderrl.metrics.images import check_images
from orderrl.runtime.sources import source_identity
from orderrl.runtime.storage import checksum
from orderrl.runtime.terminal import one_line

PROMPT = "a photo of a {}"


@dataclass(frozen=True)
class ClipNetwork:
    """A CLIP network of open_clip, frozen."""

    name: str  # in open_clip, such as "ViT-L-14"
    weights: str  # a tag of open_clip, or "sha256:" and the start of the checksum of a file
    model: Any = field(repr=False)  # has `encode_image` and `encode_text`
    # a PIL image to (3, S, S) float32, as the network was trained
    preprocess: Callable[[Image.Image], Tensor] = field(repr=False)
    tokenize: Callable[[list[str]], Tensor] = field(repr=False)  # captions to (n, L) int64
    device: torch.device  # where the model is

    @torch.no_grad()
    def image_features(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Features of unit length, (n, d) float32 on the CPU, of images (n, 3, H, W) uint8.

        ValueError if images have another shape or dtype.
        """
        check_images(images)
        found = []
        for part in images.permute(0, 2, 3, 1).cpu().split(batch_size):
            pixels = torch.stack([self.preprocess(Image.fromarray(np.asarray(image))) for image in part])
            found.append(F.normalize(self.model.encode_image(pixels.to(self.device)).float(), dim=-1).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def caption_features(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        """Features of unit length, (n, d) float32 on the CPU."""
        tokens = self.tokenize(list(captions))
        parts = [self.model.encode_text(part.to(self.device)).float() for part in tokens.split(batch_size)]
        return F.normalize(torch.cat(parts), dim=-1).cpu()


def load_clip(name: str, weights: str = "openai", device: torch.device | None = None) -> ClipNetwork:
    """A CLIP network by name.

    Args:
        name: of open_clip, such as "ViT-B-32" or "ViT-L-14". A file does not say which activation it was trained with:
            OpenAI's weights in a file need a name that ends in "-quickgelu".
        weights: a file of open_clip's layout (.safetensors, .bin, .pt), or a tag of open_clip, such as "openai", whose
            weights are downloaded on first use.
        device: where it runs; None is the CPU.

    Raises:
        ValueError: if open_clip is not installed, the name or tag is unknown, or weights cannot be downloaded or found,
            or do not fit.
    """
    return _load_clip(name, weights, source_identity(weights), device)


@lru_cache(maxsize=1)
def _load_clip(name: str, weights: str, version: str | None, device: torch.device | None) -> ClipNetwork:
    """`load_clip`; `version` tells weights from others that were in the file when it was read last."""
    open_clip = _open_clip(name)
    if name not in open_clip.list_models():
        close = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ValueError(f"clip_model={name!r} is no network of open_clip{hint}")
    file = Path(weights).expanduser()
    tags = open_clip.list_pretrained_tags_by_model(name)
    options: dict[str, Any] = {"pretrained": str(file)}
    if weights in tags:  # a tag says which activation its weights were trained with, a name need not
        known = open_clip.get_pretrained_cfg(name, weights)
        options = {"pretrained": weights, "force_quick_gelu": known.get("quick_gelu", False)}
    elif not file.is_file():
        raise ValueError(
            f"clip_weights={weights!r} does not exist; it must be a file of {name}'s weights, or a tag of open_clip, "
            f"which downloads them: {', '.join(tags) or 'there is none for this network'}"
        )
    try:
        model, preprocess = open_clip.create_model_from_pretrained(name, device=device or "cpu", **options)
        tokenize = open_clip.get_tokenizer(name)
    except (*UNREADABLE, AttributeError) as error:  # the last one is open_clip's, of arrays for another kind of network
        if weights in tags:
            reason, instead = "cannot be downloaded", "; download them elsewhere and set clip_weights to the file"
        else:
            reason, instead = f"do not fit clip_model={name!r}", ""
        raise ValueError(f"clip_weights={weights!r} {reason} ({one_line(error, 200)}){instead}") from error
    identity = weights if weights in tags else f"sha256:{checksum(file)[:16]}"
    model.eval().requires_grad_(False)
    return ClipNetwork(name, identity, model, preprocess, tokenize, device or torch.device("cpu"))


def _open_clip(name: str) -> ModuleType:
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(
            f"clip_model={name!r} needs open_clip, which is not installed: pip install 'orderrl[clip]'; or set "
            "clip_model=null, which measures no CLIP score"
        ) from error
    return open_clip


@dataclass(frozen=True)
class ClassCaptions:
    """Scores images against the captions of their classes."""

    network: ClipNetwork  # from `load_clip`
    captions: tuple[str, ...]  # of the classes, by label
    features: Tensor = field(repr=False)  # (num_classes, d) float32 of the captions

    @property
    def described(self) -> str:
        """What is measured, in a line for the protocol."""
        return (
            f"100 max(cos, 0) in the features of {self.network.name} ({self.network.weights}), captions such as "
            f"{self.captions[0]!r}"
        )

    def scores(self, images: Tensor, labels: Tensor) -> Tensor:
        """CLIP score of each image, (n,) float32: images (n, 3, H, W) uint8, labels (n,) int64."""
        cosines = (self.network.image_features(images) * self.features[labels.cpu()]).sum(-1)
        return 100 * cosines.clamp_min(0)


def class_captions(
    data: TokenSet, name: str, weights: str = "openai", prompt: str = PROMPT, device: torch.device | None = None
) -> ClassCaptions:
    """A CLIP network with a caption for every class of a data set: the prompt with the class's name for {}.

    ImageNet's 1,000 WordNet ids are replaced by the names that open_clip has for them. ValueError if the data has no
    class names, too few of them or WordNet ids without names, the prompt has no place for one, or as `load_clip`.
    """
    if prompt.count("{}") != 1:
        raise ValueError(f"clip_prompt={prompt!r} must hold {{}} once, where the name of the class stands")
    if data.class_names is None:
        raise ValueError(
            f"clip_model={name!r}: data {data.name!r} has no class names to make captions of; set clip_model=null"
        )
    names = data.class_names
    if len(names) != data.num_classes:
        raise ValueError(f"data {data.name!r} has {data.num_classes} classes, but {len(names)} class_names")
    if look_like_synsets(names):
        known = tuple(_open_clip(name).IMAGENET_CLASSNAMES)  # in the order of the ids
        if len(names) != len(known):
            raise ValueError(
                f"the {len(names)} classes of data {data.name!r} are called by WordNet ids such as {names[0]!r}, which "
                f"are no captions, and names are known for ImageNet's {len(known)} alone; rename the class folders"
            )
        names = known
    network = load_clip(name, weights, device)
    captions = tuple(prompt.replace("{}", each) for each in names)
    return ClassCaptions(network, captions, network.caption_features(captions))
