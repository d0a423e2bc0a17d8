"""The classifiers of the shipped data sets: they judge samples and partly revealed images.

Small convolutional networks trained on the *backbone* split of their data set only, so neither the planner's nor the
test images shape the features that the Fréchet distance is measured in. Half of their training images have
random blocks hidden under grey, so their confidence on a partly revealed image means something.

The shipped weights (seed 0, 3,000 steps; on one core half a minute for digits, 80 seconds for canvas) classify
of the 297 test images

    digits   99.7 % with everything revealed, 88.9 % with 8 random blocks of 16 hidden
    canvas   99.3 %                           76.8 %

`python -m orderrl.metrics.classifier NAME` makes them again.
"""

import argparse
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from orderrl.data import TokenSet, augmented, load_split
from orderrl.data.pictures import HIDDEN_GREY, hide_blocks
from orderrl.geometry import BlockGrid
from orderrl.runtime.checkpoint import load_checkpoint, load_state, save_checkpoint
from orderrl.runtime.finite import require_finite_losses
from orderrl.runtime.isolation import isolated_float32

NUM_FEATURES = 64
_WEIGHTS = Path(__file__).parent.parent / "weights"


@dataclass(frozen=True)
class ClassifierConfig:
    """A classifier's images and shape."""

    name: str  # of the data set that it is trained on
    data: tuple[str, ...]  # names of the data sets whose images it knows
    side: int  # height and width of the images, pixels
    block_size: int  # pixels along a side of the blocks that are hidden
    widths: tuple[tuple[int, ...], ...]  # channels of the 3x3 convolutions; between the groups the map is halved
    num_classes: int = 10  # class labels

    @property
    def geometry(self) -> BlockGrid:
        """The grid of the blocks that are hidden."""
        return BlockGrid(self.side, self.side, self.block_size)


CLASSIFIERS = {
    config.name: config
    for config in (
        ClassifierConfig("digits", ("digits", "digits_patches"), side=8, block_size=2, widths=((16, 32), (32,))),
        ClassifierConfig("canvas", ("canvas",), side=12, block_size=3, widths=((16, 32), (32, 48), (32,))),
    )
}


def own_classifier(data: str) -> str | None:
    """The shipped classifier that knows the images of a data set, None if there is none."""
    return next((name for name, config in CLASSIFIERS.items() if data in config.data), None)


class Classifier(nn.Module):
    """A few 3x3 convolutions and one layer of 64 features; about 48,000 parameters for digits, 61,000 for canvas."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        channels, side = 1, config.side
        for number, group in enumerate(config.widths):
            if number:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            for before, after in pairwise((channels, *group)):
                layers += [nn.Conv2d(before, after, 3, padding=1), nn.GELU()]
            channels = group[-1]
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        self.penultimate = nn.Linear(channels * side**2, NUM_FEATURES)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(NUM_FEATURES, config.num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features: uint8 (n, 3, side, side), else ValueError -> (n, 64) float32."""
        side = self.config.side
        if images.dtype != torch.uint8 or images.shape[1:] != (3, side, side):
            raise ValueError(
                f"images must be uint8 of shape (n, 3, {side}, {side}), "
                f"got {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
            )
        grey = images.float().mean(1, keepdim=True) / 255  # (n, 1, side, side) in [0, 1]
        return F.gelu(self.penultimate(self.convolutions(grey)))

    def forward(self, images: Tensor) -> Tensor:
        """Class logits: uint8 (n, 3, side, side) -> (n, classes) float32. Raises as `features` does."""
        return self.head(self.dropout(self.features(images)))


def random_visible(count: int, geometry: BlockGrid, generator: torch.Generator) -> Tensor:
    """Visible blocks of training images, (count, B) bool: all of them in half of the images, else a random few.

    The number of visible blocks of the other half is uniform in 1..B.
    """
    blocks = geometry.num_blocks
    shown = torch.randint(1, blocks + 1, (count, 1), generator=generator)
    ranks = torch.rand(count, blocks, generator=generator).argsort(1).argsort(1)
    complete = torch.rand(count, 1, generator=generator) < 0.5
    return complete | (ranks < shown)


@isolated_float32
def train_classifier(name: str = "digits", seed: int = 0, steps: int = 3000, batch_size: int = 128) -> Classifier:
    """Train on the backbone split of a data set, augmented, with hidden blocks in half of the images.

    Args:
        seed: of initialisation, batches, augmentation and hidden blocks.
        steps: optimiser steps (AdamW, one-cycle schedule); the weights are averaged over the last of them.

    Returns:
        The classifier in evaluation mode.

    Raises:
        ValueError: if the name is unknown, or steps or batch_size is not positive.
        NotFiniteError: at the first loss that is not finite.
    """
    for argument, value in {"steps": steps, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    config = _config(name)
    data, geometry = load_split(name, "backbone"), config.geometry
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier(config)
        averaged = AveragedModel(classifier, multi_avg_fn=get_ema_multi_avg_fn(0.995))
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        for step in range(steps):
            rows = torch.randint(len(data), (batch_size,), generator=generator)
            images = data.images(augmented(name, data.tokens[rows], generator, 1.0))
            images = hide_blocks(images, random_visible(batch_size, geometry, generator), geometry)
            loss = F.cross_entropy(classifier(images), data.labels[rows])
            require_finite_losses({"step": step, "loss": loss.item()})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(classifier)
    classifier.load_state_dict(averaged.module.state_dict())
    return classifier.eval()


@torch.no_grad()
def classifier_accuracy(classifier: Classifier, data: TokenSet, visible: Tensor | None = None) -> float:
    """Share of images that are classified correctly, with blocks hidden where visible (n, B) is False."""
    images = data.images(data.tokens)
    if visible is not None:
        images = hide_blocks(images, visible, classifier.config.geometry)
    return (classifier(images).argmax(-1) == data.labels).float().mean().item()


def save_classifier(classifier: Classifier, path: Path) -> None:
    """Write the weights and their config as safetensors."""
    name = classifier.config.name
    config = {"kind": "classifier", "name": name, "num_features": NUM_FEATURES, "hidden_grey": HIDDEN_GREY}
    save_checkpoint(path, classifier.state_dict(), config)


@isolated_float32
def load_classifier(name: str = "digits", path: Path | None = None) -> Classifier:
    """Load a classifier, frozen and in evaluation mode.

    Args:
        name: "digits" or "canvas".
        path: weights to load instead of the shipped ones.

    Raises:
        ValueError: if the name is unknown or the weights do not fit.
    """
    classifier = Classifier(_config(name))
    path = path or _WEIGHTS / f"{name}_classifier.safetensors"
    tensors, _ = load_checkpoint(path, kind="classifier")
    load_state(classifier, tensors, path)
    return classifier.eval().requires_grad_(False)


def _config(name: str) -> ClassifierConfig:
    if name not in CLASSIFIERS:
        raise ValueError(f"name={name!r} is not a classifier; choose one of {', '.join(CLASSIFIERS)}")
    return CLASSIFIERS[name]


def main() -> None:
    """Make the shipped weights of a classifier again and print what they reach."""
    parser = argparse.ArgumentParser(prog="python -m orderrl.metrics.classifier", description=main.__doc__)
    parser.add_argument("name", choices=CLASSIFIERS, nargs="?", default="digits", help="its data set (default: digits)")
    name = parser.parse_args().name
    classifier = train_classifier(name)
    test = load_split(name, "test")
    half = torch.rand(len(test), 16, generator=torch.Generator().manual_seed(0)).argsort(1) < 8
    path = _WEIGHTS / f"{name}_classifier.safetensors"
    save_classifier(classifier, path)
    print(f"test accuracy: {classifier_accuracy(classifier, test):.1%} with all blocks revealed")
    print(f"               {classifier_accuracy(classifier, test, half):.1%} with 8 random blocks of 16 hidden")
    print(f"saved {path}")


if __name__ == "__main__":
    main()
