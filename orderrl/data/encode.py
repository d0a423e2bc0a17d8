"""Image folders as token sets: every view of every image through a tokeniser, shard by shard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orderrl.data.folder import SPLITS, FolderConfig, Images, ImageSplit, crops, list_images, read_views
from orderrl.data.token_files import Shard, TokenSetWriter, token_dtype
from orderrl.runtime.cache import Cache, fingerprint
from orderrl.runtime.distributed import print_main
from orderrl.runtime.finite import OVERFLOW, require_finite
from orderrl.runtime.progress import Advance, progress
from orderrl.runtime.random import Stream, keyed_index
from orderrl.runtime.sources import printable
from orderrl.runtime.storage import alone_in
from orderrl.tokenizers import KLTokenizer, Tokenizer, load_tokenizer
from orderrl.tokenizers.layers import latent_grid

BATCH_SIZE, SHARD_SIZE = 32, 5000  # images
_SPLIT_KEYS = {"backbone": 0, "planner": 1, "test": 2}


def tokenize_with(
    chosen: Mapping[str, Any], folder: FolderConfig, output: Path | Cache, device: str, **sizes: int
) -> Path:
    """`tokenize_folder` with the tokeniser of the config group `tokenizer`, given as plain values."""
    path = chosen.get("path")
    tokenizer = load_tokenizer(chosen["name"], path, device)
    sample_seed = chosen["sample_seed"] if chosen.get("sample") else None
    half = chosen.get("half", False)
    return tokenize_folder(tokenizer, folder, output, path, sample_seed=sample_seed, half=half, **sizes)


def tokenize_folder(
    tokenizer: Tokenizer,
    folder: FolderConfig,
    output: Path | str | Cache,
    tokenizer_path: str | Path | None,
    batch_size: int = BATCH_SIZE,
    shard_size: int = SHARD_SIZE,
    sample_seed: int | None = None,
    half: bool = False,
) -> Path:
    """Tokenise the images of a folder; shards that are there already are checked and kept.

    Args:
        tokenizer: frozen, on the device where it shall run.
        output: the token set's folder, or a cache, where other images or crops have another one and what is damaged
            is made again.
        tokenizer_path: file or hub name that the tokeniser came from, remembered for decoding; None if from none.
        batch_size: images a call; all their views go together.
        sample_seed: of the noise of posterior samples, keyed by image and view; None takes posterior means.
        half: store continuous tokens as float16.

    Returns:
        The folder of the token set.

    Raises:
        ValueError: for another token set in the folder, one of images that have changed since, an altered shard, or a
            file that cannot be read as an image.
    """
    images = list_images(folder)
    print_main(images.describe())
    identity = _identity(tokenizer, folder, images, shard_size, sample_seed, half)
    cached = isinstance(output, Cache)  # what is damaged there is made again; elsewhere it is refused
    where = output.folder("tokens", fingerprint(identity)) if isinstance(output, Cache) else output
    Path(where).parent.mkdir(parents=True, exist_ok=True)
    with alone_in(Path(where)):
        writer = TokenSetWriter(where, identity, images, tokenizer_path, own=tokenizer.name == "small", remake=cached)
        missing = writer.missing()
        print_main(f"{len(writer.shards) - len(missing)} of {len(writer.shards)} shards are there in {writer.folder}")
        with progress(sum(len(shard.rows) for shard in missing), "tokenising", "images") as advance:
            for shard in missing:
                tokens, labels, skipped = _encode_shard(
                    tokenizer, images.splits[shard.split], shard, folder, batch_size, sample_seed, advance
                )
                writer.write(shard, tokens, labels, skipped)
        writer.finish()
    if writer.skipped:
        print_main(f"left out, not readable: {', '.join(map(printable, writer.skipped))}")
    print_main(f"tokens: {writer.folder}")
    return writer.folder


def _identity(
    tokenizer: Tokenizer, folder: FolderConfig, images: Images, shard_size: int, sample_seed: int | None, half: bool
) -> dict[str, Any]:
    """Plain values that determine every token."""
    config = getattr(tokenizer, "config", None)
    return {
        "tokenizer": {
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "config": None if config is None else config.to_dict(),
            "sample_seed": sample_seed,
        },
        "data": crops(folder),
        "images": {split: len(images.splits[split]) for split in SPLITS},
        "files": images.version,
        "classes": images.classes,
        "present": images.present,
        "grid": list(latent_grid(folder.image_size, folder.image_size, tokenizer.downsampling)),
        "vocab_size": tokenizer.vocab_size,
        "token_dim": tokenizer.token_dim,
        "dtype": token_dtype(tokenizer.vocab_size, half),
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
    parameters = tokenizer.parameters() if isinstance(tokenizer, torch.nn.Module) else ()
    device = next((parameter.device for parameter in parameters), torch.device("cpu"))
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
