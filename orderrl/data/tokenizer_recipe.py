"""A small VQ tokeniser trained on an image folder."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orderrl.data.folder import FolderConfig, Images, ImageSplit, crops, list_images, read_views
from orderrl.data.token_set import stratified_order
from orderrl.runtime.cache import Cache, fingerprint
from orderrl.runtime.distributed import print_main
from orderrl.runtime.job import Job
from orderrl.runtime.run import Run
from orderrl.tokenizers import VQConfig, VQTokenizer, save_tokenizer
from orderrl.tokenizers.training import TokenizerTrainingConfig, reconstruction_quality, train_tokenizer

_EVALUATION_BATCH = 100
_ATTEMPTS = 100  # draws of a batch, as long as broken files are among it


@dataclass(frozen=True)
class TokenizerRecipe:
    """Everything that determines a tokeniser that is trained; ValueError if it can't be, or does not fit the images."""

    settings: Mapping[str, Any]  # the config group `tokenizer` as plain values: its name, `model` and `training`
    folder: FolderConfig
    seed: int  # of initialisation, batches and restarts
    device: str  # where it is trained

    def __post_init__(self) -> None:
        name = self.settings["name"]
        if "training" not in self.settings:
            raise ValueError(f"tokenizer={name} comes with published weights; train tokenizer=small")
        factor = self.model.encoder.factor
        if self.folder.image_size % factor:
            raise ValueError(
                f"data.image_size={self.folder.image_size} must be a multiple of {factor}, the downsampling of "
                f"tokenizer={name}"
            )

    @property
    def model(self) -> VQConfig:
        """Shape of the tokeniser."""
        return VQConfig(**self.settings["model"])

    @cached_property
    def images(self) -> Images:
        """The images that there are now."""
        return list_images(self.folder)

    @property
    def description(self) -> dict[str, Any]:
        """Plain values that determine the result; images by their content, whatever folder they lie in."""
        return {
            "images": self.images.version,
            "data": crops(self.folder),
            "tokenizer": dict(self.settings),
            "seed": self.seed,
        }

    def train(self, cache_dir: str, checkpoint_seconds: float, new_run: Callable[[], Run]) -> Path:
        """Train on the backbone split and measure on the test split; the run gets checkpoint and `results.json`.

        The cache keeps the state of an unfinished training. Returns the checkpoint.
        """
        # build
        print_main(self.images.describe())
        training = TokenizerTrainingConfig(**self.settings["training"], seed=self.seed)
        torch.manual_seed(self.seed)
        tokenizer = VQTokenizer(self.model, self.settings["name"]).to(self.device)
        splits = self.images.splits
        source = _Images(splits["backbone"], self.folder)
        held_out = splits["planner" if len(splits["planner"]) else "backbone"]
        watched = partial(_batches, held_out, self.folder, training.held_out_images)
        # train
        key = f"tokenizer-{fingerprint(self.description)}"
        with new_run() as run, Job(cache_dir, key, checkpoint_seconds, run.folder, run) as job:
            train_tokenizer(tokenizer, source.draw, watched, training, job)
            # measure and keep
            test = splits["test"] if len(splits["test"]) else held_out
            quality = reconstruction_quality(tokenizer, _batches(test, self.folder, len(test)))
            path = run.folder / "tokenizer.safetensors"
            description = {"data": {"name": "folder", **asdict(self.folder)}, "split": "backbone"}
            save_tokenizer(path, tokenizer, description | {"training": self.settings["training"], "test": quality})
            run.write_json("results.json", {"split": test.split, **quality})
        print_main(
            f"{quality['images']} {test.split} images: PSNR {quality['psnr']:.2f} dB, L1 {quality['l1']:.4f}, "
            f"{quality['usage']:.1%} of the codes in use, perplexity {quality['perplexity']:.0f}"
        )
        return path

    def find_or_train(self, cache: Cache, train: Callable[[], Path]) -> Path:
        """The cached tokeniser of this recipe, or the one that `train` makes, which is kept."""
        key = fingerprint(self.description)
        found = cache.find("tokenizers", key)
        if found is None:
            made = train()
            with cache.store("tokenizers", key, self.description) as found:
                (found / made.name).write_bytes(made.read_bytes())
            found = cache.folder("tokenizers", key)
        return found / "tokenizer.safetensors"


class _Images:
    """Random training batches, of which there must be images; every file is read when it is drawn."""

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
