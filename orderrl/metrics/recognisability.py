"""Progressive recognisability: how early a classifier knows what the image will be.

The classifier is the one that ships with a data set, or any model of timm. Where blocks are still hidden it is shown
grey, or what the backbone itself would draw there given the visible part.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from orderrl.agents.play import Rollout, play
from orderrl.backbones.protocol import Backbone
from orderrl.backbones.sampling import Sampling
from orderrl.data import TokenSet
from orderrl.data.pictures import hide_blocks
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.metrics.classifier import CLASSIFIERS, load_classifier, own_classifier
from orderrl.metrics.feature_names import TIMM

OWN = "own"
FILLS = ("grey", "completion")


@dataclass(frozen=True)
class Recogniser:
    """Who recognises, and what stands where blocks are hidden."""

    name: str  # of the classifier
    classify: Callable[[Tensor], Tensor]  # uint8 images (m, 3, height, width) -> logits (m, classes)
    fill: str = "grey"  # "grey", or "completion", the backbone's own

    def __post_init__(self) -> None:
        if self.fill not in FILLS:
            raise ValueError(f"hidden_fill={self.fill!r} is unknown; choose one of {', '.join(FILLS)}")

    @property
    def described(self) -> str:
        """What is measured, in a line for the protocol."""
        filled = {
            "grey": "hidden blocks grey",
            "completion": "hidden blocks drawn by the backbone in raster order, without the class",
        }
        return f"confidence of the classifier {self.name} in the true class, and its accuracy; {filled[self.fill]}"


def make_recogniser(
    name: str | None, data: TokenSet, fill: str = "grey", device: torch.device | None = None
) -> Recogniser | None:
    """A classifier by name.

    Args:
        name: "own" is the shipped one of the data set, None where it has none; "timm:MODEL",
            "timm:MODEL:CHECKPOINT_FILE" and "timm:local-dir:FOLDER" are models of timm, whose classes must be those of
            the data, in its order; a name of `orderrl.metrics.classifier` is that one. None recognises nothing.
        fill: what stands where blocks are hidden, see `Recogniser`.

    Raises:
        ValueError: if the name or fill is unknown, the weights cannot be downloaded or found, or the classes differ in
            number.
    """
    name = own_classifier(data.name) if name == OWN else name
    if name is None:
        return None
    device = device or torch.device("cpu")
    if name in CLASSIFIERS:
        own = load_classifier(name).to(device)
        return Recogniser(name, lambda images: own(images.to(device)), fill)
    if not name.startswith(TIMM):
        known = ", ".join((OWN, *CLASSIFIERS, "timm:MODEL", "timm:MODEL:CHECKPOINT_FILE", "timm:local-dir:FOLDER"))
        raise ValueError(f"classifier={name!r} is unknown; choose one of {known}, or null for none")
    return Recogniser(name, _timm_classifier(name, data, device), fill)


def _timm_classifier(name: str, data: TokenSet, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The model behind a timm feature extractor, with its own input size and normalisation."""
    from torch_fidelity.utils import create_feature_extractor  # takes long to import

    from orderrl.metrics.extractors import register_features

    try:
        extractor = create_feature_extractor(register_features(name), ["logits"], cuda=False, verbose=False)
    except OSError as error:  # of urllib, requests and the Hugging Face hub
        raise ValueError(
            f"classifier={name!r}: the weights cannot be downloaded ({error}); name a file, {name}:CHECKPOINT_FILE"
        ) from error
    if extractor.model.num_classes != data.num_classes:
        raise ValueError(
            f"classifier={name!r} has {extractor.model.num_classes} classes, but data {data.name!r} has "
            f"{data.num_classes}; choose a model of the same classes in the same order"
        )
    extractor.to(device)
    return lambda images: extractor(images.to(device))[0]


class Recognisability(NamedTuple):
    """What the classifier says about partly revealed images."""

    confidence: Tensor  # (T, n) float32, probability of the true class
    correct: Tensor  # (T, n) bool, whether the true class is the most probable one


def recognise(
    recogniser: Recogniser, rollout: Rollout, data: TokenSet, completed: Callable[[int], Tensor]
) -> Recognisability:
    """How well the images of a rollout are recognised before each step and at the end.

    Args:
        recogniser: the classifier, and what stands where blocks are hidden.
        rollout: T steps on n images, T + 1 moments.
        data: decodes tokens.
        completed: the images at a moment with their hidden blocks drawn, (n, N) tokens, see `complete`; called for
            fill "completion" alone.

    Returns:
        Confidence and correctness, (T + 1, n) each.
    """
    moments = [
        classified(recogniser.classify, shown_images(recogniser.fill, rollout, moment, data, completed), rollout.labels)
        for moment in range(len(rollout.visible))
    ]
    confidence, correct = (torch.stack(parts) for parts in zip(*moments, strict=True))
    return Recognisability(confidence, correct)


def shown_images(
    fill: str, rollout: Rollout, moment: int, data: TokenSet, completed: Callable[[int], Tensor]
) -> Tensor:
    """The images of a rollout at a moment, (n, 3, height, width) uint8 on the CPU; arguments as in `recognise`."""
    if fill == "completion":
        return data.images(completed(moment))
    return hide_blocks(data.images(rollout.tokens), rollout.visible[moment].cpu(), rollout.geometry)


@torch.no_grad()
def complete(
    backbone: Backbone, data: TokenSet, rollout: Rollout, moment: int, sampling: Sampling = Sampling(), seed: int = 0
) -> Tensor:
    """The images of a rollout at one moment, their hidden blocks drawn by the backbone one by one in raster order.

    They are drawn under the dropped label: given the class, a backbone draws recognisable images from nothing.

    Args:
        data: any token set of the images' shape.
        rollout: its visible blocks stand in the prefix in the order in which they were revealed.
        moment: in 0..T.
        sampling: how tokens are drawn.
        seed: of the draws; image i is drawn with seed + i.

    Returns:
        Tokens like those of the rollout, equal to them in visible blocks.
    """
    config = CoreConfig("generate", sampling=sampling, strict=True, hindsight=False)
    core = NextBlockCore(backbone, data, len(rollout.tokens), config, seed, observe=False)
    core.reset(labels=torch.full_like(rollout.labels, backbone.num_classes))
    core.tokens = rollout.tokens.clone()
    core.show(rollout.order, rollout.visible[moment].sum(-1))
    play(core, lambda observation, _: observation["action_mask"].long().argmax(-1))
    return core.tokens


@torch.no_grad()
def classified(
    classify: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, batch_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """Probability of the true class, (n,) float32, and whether it is the most probable one, (n,) bool.

    Args:
        classify: uint8 images (m, 3, height, width) -> logits (m, classes).
        images: (n, 3, height, width) uint8, as they are shown.
        labels: (n,) int64, the true classes.
        batch_size: images in one call of the classifier.
    """
    logits = torch.cat([classify(part) for part in images.split(batch_size)])
    target = labels.to(logits.device)
    return logits.float().softmax(-1).gather(-1, target[:, None])[:, 0], logits.argmax(-1) == target


def at_fractions(values: Tensor, fraction: Tensor, at: Tensor) -> Tensor:
    """Values (T, n) at given revealed fractions (F,), held from their moment until the next one: (F, n).

    The moments' fractions (T, n) are as in `area_over_fraction`.
    """
    moment = (fraction[:, None] <= at.to(fraction)[None, :, None] + 1e-6).sum(0) - 1  # (F, n)
    return values.gather(0, moment)


def area_over_fraction(values: Tensor, fraction: Tensor) -> Tensor:
    """Area under the step curve of a value over the revealed fraction f in [0, 1].

    The value of a moment is held from its fraction until the fraction of the next moment, the last one until
    f = 1; so an image that shows four blocks at once earns nothing for them before they are there. A constant 1
    has area 1. Moments may repeat a fraction (finished images in a batch): they have no width.

    Args:
        values: (T, n) number or bool at T moments.
        fraction: (T, n) revealed fraction at these moments; starts at 0 (nothing revealed) and never falls.

    Returns:
        (n,) float64 (float32 on devices without float64).

    Raises:
        ValueError: if shapes differ, or the fractions do not start at 0, fall, or exceed 1.
    """
    edges = torch.cat([fraction.double(), torch.ones_like(fraction[:1], dtype=torch.float64)])  # (T + 1, n)
    return (values.double() * edges.diff(dim=0)).sum(0)
