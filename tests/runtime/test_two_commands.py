"""Two commands at once on one cache: both end well, with the same result, and it is there once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orderrl.data.encode import tokenize_folder
from orderrl.data.folder import SPLITS, FolderConfig
from orderrl.data.token_files import load_token_set
from orderrl.distillation import ImageOrders
from orderrl.partial_classifier import ClassifierConfig, find_or_train_classifier
from orderrl.pretrain import find_or_make_tokens
from orderrl.runtime.cache import Cache
from orderrl.runtime.config import compose
from orderrl.runtime.weights import weights_fingerprint
from tests.figures import render_nothing
from tests.helpers import tiny_backbone, tiny_images
from tests.processes import PROCESSES
from tests.tokenizers.helpers import image_folder, save_tiny_vq, tiny_vq

TOKENIZER = [
    *("data=folder", "data.image_size=8", "tokenizer=small", "tokenizer.training.steps=2", "backbone=small"),
    *("tokenizer.training.batch_size=4", "tokenizer.model.codebook_size=16", "tokenizer.model.z_channels=32"),
]


def orders(home: Path) -> Any:
    backbone = tiny_backbone()
    source = ImageOrders("low_entropy", backbone, tiny_images(backbone, 20), home / "cache", 0)
    return source.images(source.extract(backbone, 0)).order.tolist()


def classifier(home: Path) -> Any:
    config = ClassifierConfig(dim=8, depth=1, heads=1, steps=3, batch_size=4)
    return weights_fingerprint(find_or_train_classifier("digits", config, 0, home / "cache", 0.0))


def tokenizer(home: Path) -> Any:
    places = [f"data.root={home / 'images'}", f"cache_dir={home / 'cache'}", f"output_dir={home / 'runs'}"]
    return tokens_of(find_or_make_tokens(compose("pretrain", [*TOKENIZER, *places])))


def tokens(home: Path) -> Any:
    source = FolderConfig(str(home / "images"), image_size=8)
    return tokens_of(tokenize_folder(tiny_vq(), source, Cache(home / "cache"), home / "vq.safetensors", shard_size=1))


def tokens_of(folder: Path) -> Any:
    return str(folder), [load_token_set(folder, split).tokens.tolist() for split in SPLITS]


def run(command: Callable[[Path], Any], home: Path, number: int, together: Any) -> None:
    render_nothing(pytest.MonkeyPatch())
    sys.stdout = (home / f"out-{number}.txt").open("w", buffering=1)
    together.wait()
    (home / f"result-{number}.json").write_text(json.dumps(command(home)))


@pytest.mark.parametrize("command", [orders, classifier, tokenizer, tokens])
def test_two_commands_at_once_make_one_thing(command: Callable[[Path], Any], tmp_path: Path) -> None:
    image_folder(tmp_path / "images", per_class=10)
    save_tiny_vq(tmp_path / "vq.safetensors")
    together = PROCESSES.Barrier(2)
    both = [PROCESSES.Process(target=run, args=(command, tmp_path, number, together)) for number in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
    assert [process.exitcode for process in both] == [0, 0]
    first, second = (json.loads((tmp_path / f"result-{number}.json").read_text()) for number in range(2))
    assert first == second == json.loads(json.dumps(command(tmp_path)))
    left = [path for path in (tmp_path / "cache").rglob("*") if path.name.startswith(".") or "partial" in path.name]
    kinds = {kind.name: len(list(kind.iterdir())) for kind in (tmp_path / "cache").iterdir()}
    assert not left and kinds.pop("unfinished", 0) == 0 and set(kinds.values()) == {1}
