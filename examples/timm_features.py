"""A feature extractor for images that no published network was trained on: a small classifier of timm.

    python examples/timm_features.py cifar10/train cifar10_features
    python -m orderrl.evaluate … eval.features=timm:local-dir:cifar10_features

Distances in its features compare rows of one table; published numbers are in Inception's (`inception-v3-compat`). Like
the shipped classifiers it learns from the *backbone* split alone, which with the same shares and seed is that of
`python -m orderrl.tokenize data=folder`, so neither planner nor test images shape the features.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor
from torch.nn import functional as F

from orderrl.data.folder import FolderConfig, ImageSplit, list_images, read_views
from orderrl.metrics.extractors import TimmInput


def read_split(images: ImageSplit, config: FolderConfig) -> tuple[Tensor, Tensor]:
    """All images of a split, (n, 3, S, S) uint8, and their labels, (n,) int64."""
    read = list(read_views(images, range(len(images)), config, batch_size=256))
    rows = [row for some, _ in read for row in some]
    return torch.cat([views[:, 0] for _, views in read]), images.labels[rows]


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by up to an eighth of its side, edges repeated, and half of them mirrored."""
    count, side = len(images), images.shape[-1]
    margin = side // 8
    padded = F.pad(images.float(), [margin] * 4, mode="replicate")  # which uint8 has not
    top, left = torch.randint(2 * margin + 1, (2, count, 1), generator=generator) + torch.arange(side)
    moved = padded[
        torch.arange(count)[:, None, None, None],
        torch.arange(3)[:, None, None],
        top[:, None, :, None],
        left[:, None, None],
    ]
    mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, moved.flip(-1), moved)


def main(arguments: list[str] | None = None) -> None:
    """Train, print what it reaches on images that it has not seen, and save it as timm does."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("root", help="folder with one sub-folder of images for every class")
    parser.add_argument("output", help="folder of the model")
    parser.add_argument("--test-root", help="the same with test images (default: a tenth of root)")
    parser.add_argument("--image-size", type=int, default=32, help="side of the images, pixels (default: 32)")
    parser.add_argument("--input-size", type=int, default=64, help="side of what the model sees (default: 64)")
    parser.add_argument("--model", default="resnet10t", help="of timm (default: resnet10t)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    a = parser.parse_args(arguments)
    config = FolderConfig(a.root, a.test_root, image_size=a.image_size)
    listed = list_images(config)
    classes, splits = listed.classes, listed.splits
    images, labels = read_split(splits["backbone"], config)
    test_images, test_labels = read_split(splits["test"], config)

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    overlay = {"input_size": (3, a.input_size, a.input_size)}
    model = timm.create_model(a.model, num_classes=len(classes), pretrained_cfg_overlay=overlay)
    prepare = TimmInput(resolve_model_data_config(model))
    steps = a.epochs * -(-len(images) // a.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for epoch in range(a.epochs):
        model.train()
        for rows in torch.randperm(len(images), generator=generator).split(a.batch_size):
            logits = model(prepare(shifted(images[rows], generator)))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            found = torch.cat([model(prepare(some)).argmax(1) for some in test_images.split(256)])
        right = (found == test_labels).float().mean()
        print(f"epoch {epoch + 1}/{a.epochs}: {right:.1%} of the test images", flush=True)
    save_for_hf(model, a.output, safe_serialization=True)
    print(f"saved {Path(a.output)}; use it as timm:local-dir:{a.output}")


if __name__ == "__main__":
    main()
