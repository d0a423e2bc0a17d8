"""The order of splits: a seeded shuffle, every part of which holds all classes in proportion."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from orderrl.agents.bc import split_images
from orderrl.agents.dagger import own_contexts
from orderrl.agents.policies import ReferencePolicy
from orderrl.agents.registry import make_policy
from orderrl.data import TokenSet, load_split, load_token_set
from orderrl.data.encode import tokenize_folder
from orderrl.data.folder import FolderConfig, list_images
from orderrl.data.token_set import random_window, stratified_order
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.evaluation.protocol import open_protocol, real_and_reference
from orderrl.evaluation.recording import EXAMPLES, example_images
from orderrl.evaluation.settings import EvalConfig, eval_config
from orderrl.factory import section, setup_of
from orderrl.geometry import BlockGrid
from orderrl.oracle import LabelConfig, random_contexts
from orderrl.runtime.config import compose
from tests.helpers import tiny_backbone
from tests.tokenizers.helpers import image_folder, save_tiny_vq, tiny_vq

SPLITS = ("backbone", "planner", "test")
CLASSES = ("ant", "bee", "cat", "dog", "eel")


def most_uneven(labels: Tensor) -> float:
    """The largest number of images by which a class is too many or too few in a first part of the labels."""
    one_hot = torch.nn.functional.one_hot(labels).double()
    wanted = torch.arange(1, len(labels) + 1)[:, None] * one_hot.mean(0)
    return (one_hot.cumsum(0) - wanted).abs().max().item()


# -- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(50, 50, 50), (1, 7, 300), (4,), (3, 3, 90, 4), (1,) * 40])
@pytest.mark.parametrize("seed", range(3))
def test_every_first_part_has_all_classes_in_proportion(sizes: tuple[int, ...], seed: int) -> None:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    order = stratified_order(labels, seed)
    assert torch.equal(order.sort().values, torch.arange(len(labels)))
    assert most_uneven(labels[order]) <= 1 + max(len(sizes) * max(sizes) / sum(sizes), len(sizes)) / 2


def test_classes_of_equal_size_take_turns() -> None:
    labels = torch.arange(10).repeat_interleave(6)
    assert (labels[stratified_order(labels)].view(6, 10).sort(1).values == torch.arange(10)).all()


def test_which_image_of_a_class_comes_where_is_random() -> None:
    labels = torch.arange(4).repeat_interleave(5)
    first = torch.stack([stratified_order(labels, seed)[0] for seed in range(2000)])
    assert chisquare(torch.bincount(first, minlength=20).numpy()).pvalue > 1e-3
    assert torch.equal(stratified_order(labels, 3), stratified_order(labels, 3))


def test_no_images_have_an_order_too() -> None:
    assert len(stratified_order(torch.zeros(0, dtype=torch.int64))) == 0


def test_a_window_goes_on_at_the_start_and_begins_anywhere() -> None:
    generator = torch.Generator().manual_seed(0)
    windows = torch.stack([random_window(7, 9, generator) for _ in range(200)])
    assert (windows.diff(dim=1) % 7 == 1).all() and (windows >= 0).all() and (windows < 7).all()
    assert len(windows[:, 0].unique()) == 7


# -- splits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> FolderConfig:
    """Forty images of each of five classes: 140 backbone, 40 planner, 20 test."""
    root = image_folder(tmp_path_factory.mktemp("order") / "images", 40, CLASSES)
    return FolderConfig(str(root), image_size=8)


@pytest.fixture(scope="module")
def folder(images: FolderConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tokens")
    return tokenize_folder(tiny_vq(), images, where / "set", save_tiny_vq(where / "tokenizer.safetensors"))


def all_sets(folder: Path) -> Iterator[TokenSet]:
    for name in ("digits", "digits_patches", "canvas", f"tokens:{folder}"):
        yield from (load_split(name, split) for split in SPLITS)
    yield load_token_set(folder, "backbone", mapped=True)


def test_the_order_of_every_split_is_independent_of_the_class(folder: Path) -> None:
    for data in all_sets(folder):
        assert most_uneven(data.labels) < 6, data.name
        # neighbours are no more often of one class than by chance
        assert (data.labels[1:] == data.labels[:-1]).double().mean() < 2 / data.num_classes, data.name


def test_a_first_part_is_what_the_split_begins_with_under_an_identity_of_its_own(folder: Path) -> None:
    for data in all_sets(folder):
        part = data.first(7)
        assert torch.equal(part.tokens[:], data.tokens[:7]) and torch.equal(part.labels, data.labels[:7])
        assert part.fingerprint != data.fingerprint and data.first(10**6) is data


def test_the_order_is_part_of_the_identity(folder: Path) -> None:
    data = load_token_set(folder, "test")
    assert data.shuffled().fingerprint != data.fingerprint


def test_tokens_keep_their_labels(folder: Path, images: FolderConfig) -> None:
    """Reads the stored rows in the folder's order, which is by class, and looks every one up."""
    for split in SPLITS:
        data, listed = load_token_set(folder, split), list_images(images).splits[split]
        assert torch.equal(listed.labels, listed.labels.sort().values)
        stored = torch.empty_like(data.tokens)
        stored[stratified_order(listed.labels)] = data.tokens
        labels = torch.empty_like(data.labels)
        labels[stratified_order(listed.labels)] = data.labels
        assert torch.equal(labels, listed.labels)
        again = load_token_set(folder, split, mapped=True)
        assert torch.equal(again.tokens[:], data.tokens) and torch.equal(again.labels, data.labels)


# -- what commands take of a folder set -------------------------------------------------------------------------------


def even(labels: Tensor) -> bool:
    """Whether all five classes are there, none more than two images ahead of another."""
    counts = torch.bincount(labels, minlength=len(CLASSES))
    return int(counts.min()) > 0 and int(counts.max() - counts.min()) <= 2


def test_evaluation_takes_even_parts(folder: Path) -> None:
    name = f"tokens:{folder}"
    backbone = tiny_backbone(vocab_size=24, height=4, width=4, num_classes=5)
    settings = ["eval.images=10", "eval.samples=0", "eval.states=10", "eval.features=null", "eval.classifier=null"]
    config = compose("evaluate", [*settings, "eval.lookahead_states=null"])
    config.data.name, config.cache_dir = name, str(folder.parent / "cache")
    protocol = open_protocol(eval_config(section(config, "eval"), name), setup_of(config, backbone))
    assert len(protocol.data) == 10 and even(protocol.data.labels)
    assert protocol.states is not None and even(protocol.data.labels[protocol.states["image"]])
    shown = example_images(protocol.data, BlockGrid(4, 4, 2)).labels[:EXAMPLES]
    assert even(torch.tensor([CLASSES.index(str(name)) for name in shown]))


def test_the_reference_takes_even_parts_of_all_splits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []
    monkeypatch.setattr("orderrl.evaluation.protocol.extract_features", lambda images, *_: taken.append(images))
    monkeypatch.setattr("orderrl.evaluation.protocol.reference_of", lambda *_, **__: None)
    name = f"tokens:{folder}"
    real_and_reference(EvalConfig(real_images=10, features="inception-v3-compat"), name, torch.device("cpu"))
    wanted = [load_split(name, split).first(10) for split in SPLITS]
    assert torch.equal(taken[0], torch.cat([part.images(part.tokens[:]) for part in wanted]))
    assert all(even(part.labels) for part in wanted)


def test_label_contexts_and_what_clones_keep_back_are_even(folder: Path) -> None:
    data = load_token_set(folder, "planner")
    contexts = random_contexts(LabelConfig(contexts=20), len(data), 4)
    assert even(data.labels[contexts.image])
    for seed in range(5):
        train, kept_back = split_images(contexts.image, 0.5, torch.Generator().manual_seed(seed))
        assert even(data.labels[contexts.image[train]]) and even(data.labels[contexts.image[kept_back]])


def test_the_planners_own_states_are_of_all_classes(folder: Path) -> None:
    data = load_token_set(folder, "planner")
    backbone = tiny_backbone(vocab_size=24, height=4, width=4, num_classes=5)
    core, raster = NextBlockCore(backbone, data, 10, CoreConfig()), make_policy("raster", backbone).policy
    assert not isinstance(raster, ReferencePolicy)
    for seed in range(3):
        found = own_contexts(raster, core, torch.arange(len(data)), 10, 1.0, seed, 0)
        assert even(data.labels[found.image])
