"""Train a small VQ tokeniser on an image folder: `python -m orderrl.pretrain_tokenizer data=folder data.root=...`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from orderrl.data.folder import FolderConfig, ImageSplit, crops, folder_config, list_images, read_views
from orderrl.data.token_set import stratified_order
from orderrl.factory import section
from orderrl.runtime.cache import fingerprint
from orderrl.runtime.config import run_application
from orderrl.runtime.distributed import print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.job import Job
from orderrl.runtime.run import Run
from orderrl.tokenizers import VQConfig, VQTokenizer, save_tokenizer
from orderrl.tokenizers.training import TokenizerTrainingConfig, reconstruction_quality, train_tokenizer

_EVALUATION_BATCH = 100
_ATTEMPTS = 100  # draws of a batch, as long as broken files are among it


@isolated_float32
def pretrain_tokenizer(config: DictConfig) -> Path:
    """Train the tokeniser of a config on the backbone split and return its checkpoint.

    The run folder holds `tokenizer.safetensors`, and `results.json` with the reconstruction quality on the test split.

    Raises:
        ValueError: if the data are no image folder, or the tokeniser is not one to train.
    """
    chosen = section(config, "tokenizer")
    if "training" not in chosen:
        raise ValueError(f"tokenizer={config.tokenizer.name} comes with published weights; train tokenizer=small")
    folder = folder_config(section(config, "data"))
    settings = TokenizerTrainingConfig(**chosen["training"], seed=config.seed)
    images = list_images(folder)
    splits = images.splits
    torch.manual_seed(config.seed)
    tokenizer = VQTokenizer(VQConfig(**chosen["model"]), config.tokenizer.name).to(config.device)
    _check_size(folder, tokenizer)
    print_main(images.describe())
    what = {"tokenizer": chosen, "data": crops(folder), "seed": config.seed, "images": images.version}
    with (
        Run("pretrain_tokenizer", config) as run,
        Job(config.cache_dir, f"tokenizer-{fingerprint(what)}", config.checkpoint_seconds, run.folder, run) as job,
    ):
        path = run.folder / "tokenizer.safetensors"
        description = {"data": section(config, "data"), "split": "backbone", "training": chosen["training"]}
        source = _Images(splits["backbone"], folder)
        held_out = splits["planner" if len(splits["planner"]) else "backbone"]
        watched = partial(_batches, held_out, folder, settings.held_out_images)
        train_tokenizer(tokenizer, source.draw, watched, settings, job)
        test = splits["test"] if len(splits["test"]) else held_out
        quality = reconstruction_quality(tokenizer, _batches(test, folder, len(test)))
        save_tokenizer(path, tokenizer, description | {"test": quality})
        run.write_json("results.json", {"split": test.split, **quality})
        print_main(
            f"{quality['images']} {test.split} images: PSNR {quality['psnr']:.2f} dB, L1 {quality['l1']:.4f}, "
            f"{quality['usage']:.1%} of the codes in use, perplexity {quality['perplexity']:.0f}"
        )
        print_main(f"tokenizer: {path}\nrun: {run.folder}")
    return path


class _Images:
    """Random training batches; every file is read when it is drawn.

    Raises:
        ValueError: if there are no images to draw from.
    """

    def __init__(self, images: ImageSplit, config: FolderConfig) -> None:
        if not len(images):
            raise ValueError(f"data.root={images.root} has no images in split {images.split}; lower the other shares")
        self.images, self.config = images, config

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """A random view of `count` random images each, (count, 3, S, S) uint8."""
        parts: list[Tensor] = []
        missing = count
        for _ in range(_ATTEMPTS):  # more than one only where broken files are skipped
            rows = torch.randint(len(self.images), (missing,), generator=generator).tolist()
            for _, views in read_views(self.images, rows, self.config, missing):
                view = torch.randint(views.shape[1], (len(views),), generator=generator)
                parts.append(views[torch.arange(len(views)), view])
                missing -= len(views)
            if not missing:
                return torch.cat(parts)
        raise ValueError(f"data.root={self.images.root}: hardly any file can be read as an image")


def _batches(images: ImageSplit, config: FolderConfig, count: int) -> Iterator[Tensor]:
    """First views of a stratified sample of at most `count` images."""
    rows = stratified_order(images.labels)[:count].tolist()
    for _, views in read_views(images, rows, config, _EVALUATION_BATCH):
        yield views[:, 0]


def _check_size(folder: FolderConfig, tokenizer: Any) -> None:
    if folder.image_size % tokenizer.downsampling:
        raise ValueError(
            f"data.image_size={folder.image_size} must be a multiple of {tokenizer.downsampling}, "
            f"the downsampling of tokenizer={tokenizer.name}"
        )


if __name__ == "__main__":
    run_application("pretrain_tokenizer", pretrain_tokenizer)
