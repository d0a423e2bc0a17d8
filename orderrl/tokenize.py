"""Turn an image folder into a token set: `python -m orderrl.tokenize data=folder data.root=... output=...`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from orderrl.data.folder import FolderConfig, ImageSplit, folder_config, list_images, read_views
from orderrl.data.shards import Shard, TokenSetWriter, token_dtype
from orderrl.entry import run_application
from orderrl.finite import OVERFLOW, require_finite
from orderrl.pipeline import announce, section
from orderrl.pretrain_tokenizer import pretrain_tokenizer
from orderrl.random import Stream, keyed_index
from orderrl.runs import Advance, Cache, fingerprint, progress
from orderrl.tokenizers import KLTokenizer, Tokenizer, load_tokenizer
from orderrl.tokenizers.layers import latent_grid

BATCH_SIZE, SHARD_SIZE = 32, 5000  # images
_SPLIT_KEYS = {"backbone": 0, "planner": 1, "test": 2}


def tokenize(config: DictConfig) -> Path:
    """Make the token set of a config, or what is missing of it, and return its folder.

    Raises:
        ValueError: if the output holds another token set, or a file can't be read as an image.
    """
    return _tokenize(config, Path(config.output), config.tokenizer.get("path"))


def find_or_make_tokens(config: DictConfig) -> Path:
    """Folder of the token set of a config with the groups data (folder) and tokenizer, kept in the cache.

    A tokeniser that is still to be trained (`tokenizer=small` without a path) is trained first and kept, too.

    Args:
        config: with `cache_dir`, `output_dir`, `logger`, `device` and `seed`.
    """
    cache, path = Cache(config.cache_dir), config.tokenizer.get("path")
    data = asdict(folder_config(section(config, "data")))
    if path is None and "training" in config.tokenizer:
        description = {"data": data, "tokenizer": section(config, "tokenizer"), "seed": config.seed}
        key = fingerprint(description)
        folder = cache.find("tokenizers", key)
        if folder is None:
            made = pretrain_tokenizer(config)
            with cache.store("tokenizers", key, description) as folder:
                (folder / made.name).write_bytes(made.read_bytes())
            folder = cache.folder("tokenizers", key)
        path = folder / "tokenizer.safetensors"
    key = fingerprint({"data": data, "tokenizer": section(config, "tokenizer", "training"), "path": str(path)})
    return _tokenize(config, cache.folder("tokens", key), path)


def _tokenize(config: DictConfig, output: Path, path: str | Path | None) -> Path:
    tokenizer = load_tokenizer(config.tokenizer.name, path, config.device)
    assert path is not None  # every tokeniser comes from a file
    sample_seed = config.tokenizer.get("sample_seed") if config.tokenizer.get("sample") else None
    return tokenize_folder(
        tokenizer,
        folder_config(section(config, "data")),
        output,
        path,
        batch_size=config.get("batch_size", BATCH_SIZE),
        shard_size=config.get("shard_size", SHARD_SIZE),
        sample_seed=sample_seed,
        half=config.tokenizer.get("half", False),
    )


def tokenize_folder(
    tokenizer: Tokenizer,
    folder: FolderConfig,
    output: Path | str,
    tokenizer_path: str | Path,
    batch_size: int = BATCH_SIZE,
    shard_size: int = SHARD_SIZE,
    sample_seed: int | None = None,
    half: bool = False,
) -> Path:
    """Tokenise the images of a folder; shards that are there already are checked and kept.

    Args:
        tokenizer: frozen, on the device where it shall run.
        folder: images and crops.
        output: the token set's folder.
        tokenizer_path: file or hub name that the tokeniser came from, remembered for decoding.
        batch_size: images a call; all their views go together.
        shard_size: images a shard.
        sample_seed: of the noise of posterior samples, keyed by image and view; None takes posterior means.
        half: store continuous tokens as float16.

    Returns:
        The folder of the token set.

    Raises:
        ValueError: for another token set in the folder, an altered shard, or a file that can't be read as an image.
    """
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    classes, splits = list_images(folder)
    writer = TokenSetWriter(
        output,
        _identity(tokenizer, folder, classes, shard_size, sample_seed, half),
        splits,
        tokenizer_path,
        own=tokenizer.name == "small",
    )
    missing = writer.missing()
    announce(f"{len(writer.shards) - len(missing)} of {len(writer.shards)} shards are there in {writer.folder}")
    with progress(sum(len(shard.rows) for shard in missing), "tokenising", "images") as advance:
        for shard in missing:
            tokens, labels, skipped = _encode_shard(
                tokenizer, splits[shard.split], shard, folder, batch_size, sample_seed, advance
            )
            writer.write(shard, tokens, labels, skipped)
    writer.finish()
    counts = ", ".join(f"{split} {len(part)}" for split, part in splits.items())
    if writer.skipped:
        announce(f"left out, not readable: {', '.join(writer.skipped)}")
    announce(f"images: {counts}\ntokens: {writer.folder}")
    return writer.folder


def _identity(
    tokenizer: Tokenizer,
    folder: FolderConfig,
    classes: list[str],
    shard_size: int,
    sample_seed: int | None,
    half: bool,
) -> dict[str, Any]:
    """Plain values that determine every token."""
    source = asdict(folder)
    for key in ("skip_broken", "workers"):
        del source[key]
    for key in ("root", "test_root"):
        source[key] = None if source[key] is None else str(Path(source[key]).expanduser().resolve())
    config = getattr(tokenizer, "config", None)
    return {
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "config": None if config is None else config.to_dict(),
            "sample_seed": sample_seed,
        },
        "data": source,
        "grid": list(latent_grid(folder.image_size, folder.image_size, tokenizer.downsampling)),
        "vocab_size": tokenizer.vocab_size,
        "token_dim": tokenizer.token_dim,
        "dtype": token_dtype(tokenizer.vocab_size, half),
        "classes": classes,
        "views": folder.views,
        "shard_size": shard_size,
    }


def _encode_shard(
    tokenizer: Tokenizer,
    images: ImageSplit,
    shard: Shard,
    folder: FolderConfig,
    batch_size: int,
    sample_seed: int | None,
    advance: Advance,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Tokens and labels of every view, and the names of images that could not be read."""
    device = next(tokenizer.parameters()).device if isinstance(tokenizer, torch.nn.Module) else torch.device("cpu")
    tokens: list[np.ndarray] = []
    labels: list[Tensor] = []
    read: set[int] = set()
    for rows, views in read_views(images, list(shard.rows), folder, batch_size):
        pixels = views.flatten(0, 1).to(device)  # (k·V, 3, S, S)
        if sample_seed is not None and isinstance(tokenizer, KLTokenizer):
            noise = _noise(sample_seed, shard.split, rows, views.shape[1], tokenizer, folder)
            encoded = tokenizer.encode(pixels, noise.to(device))
        else:
            encoded = tokenizer.encode(pixels)
        require_finite(f"tokens of {images.names[rows[0]]}", {"tokens": encoded}, OVERFLOW)
        tokens.append(encoded.cpu().numpy())
        labels.append(images.labels[rows].repeat_interleave(views.shape[1]))
        read |= set(rows)
        advance(len(rows))
    skipped = [images.names[row] for row in shard.rows if row not in read]
    advance(len(skipped))
    if not tokens:
        side = folder.image_size // tokenizer.downsampling
        inner = (side * side,) if tokenizer.vocab_size is not None else (side * side, tokenizer.token_dim)
        return np.zeros((0, *inner), np.float32), np.zeros(0, np.int64), skipped
    return np.concatenate(tokens), torch.cat(labels).numpy(), skipped


def _noise(seed: int, split: str, rows: list[int], views: int, tokenizer: KLTokenizer, folder: FolderConfig) -> Tensor:
    """Standard normal noise (k·V, N, C) that depends on the image and the view alone."""
    side = folder.image_size // tokenizer.downsampling
    parts = []
    for row in rows:
        for view in range(views):
            key = int(keyed_index([Stream.TOKEN, seed, _SPLIT_KEYS[split], row, view], 2**53))
            generator = torch.Generator().manual_seed(key)
            parts.append(torch.randn(side * side, tokenizer.token_dim, generator=generator))
    return torch.stack(parts)


if __name__ == "__main__":
    run_application("tokenize", tokenize)
