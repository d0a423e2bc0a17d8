"""The classifier oracle: what it sees, what its importance is, and labels made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from orderrl import compose
from orderrl.data import TokenSet
from orderrl.geometry import BlockGrid
from orderrl.labels import label_settings
from orderrl.oracle import LabelConfig, label_contexts, random_contexts, utilities
from orderrl.partial_classifier import (
    ClassifierConfig,
    PartialClassifier,
    cluster_orders,
    importance,
    random_kept,
    train_classifier,
)
from orderrl.runtime.job import Job
from orderrl.train import train
from tests.helpers import tiny_backbone, tiny_images

SMALL = ClassifierConfig(dim=16, depth=1, heads=2, steps=80, batch_size=64, learning_rate=1e-2)
GRID = BlockGrid(4, 4, 1)


def planted(continuous: bool, count: int = 200) -> TokenSet:
    """Images whose class is their token at place 5, all other tokens noise."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, (count, 16), generator=generator)
    labels = tokens[:, 5]
    if continuous:
        tokens = torch.nn.functional.one_hot(tokens, 4).float()
    return TokenSet("planted", "backbone", tokens, labels, 4, 4, 0 if continuous else 4, 4, 4 if continuous else 0)


def random_classifier(data: TokenSet) -> PartialClassifier:
    torch.manual_seed(0)
    classifier = PartialClassifier(SMALL, data).eval().requires_grad_(False)
    torch.nn.init.normal_(classifier.vit.get_classifier().weight)
    return classifier


@pytest.mark.parametrize("continuous", [True, False])
def test_it_sees_the_kept_tokens_whatever_their_order_and_no_others(continuous: bool) -> None:
    data = planted(continuous)
    classifier, tokens = random_classifier(data), data.tokens[:3]
    kept = torch.tensor([[2, 5, 7], [0, 1, 2], [9, 4, 15]])
    other = data.tokens[3:6].clone()
    rows = torch.arange(3)[:, None]
    other[rows, kept] = tokens[rows, kept]
    assert torch.allclose(classifier(tokens, kept), classifier(other, kept.flip(1)), atol=1e-5)
    assert not torch.allclose(classifier(tokens, kept), classifier(tokens), atol=1e-3)
    every = torch.arange(16).expand(3, -1)
    assert torch.allclose(classifier(tokens, every), classifier(tokens), atol=1e-5)


def test_patch_drop_keeps_between_a_share_and_all() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = {random_kept(2, 20, 0.1, generator).shape[1] for _ in range(300)}
    assert numbers == set(range(2, 21))


def test_random_partitions_do_not_depend_on_the_batch() -> None:
    keys = torch.tensor([7, 3, 9])
    orders = cluster_orders("random", GRID, 4, 5, (keys,))
    assert orders.shape == (3, 5, 16) and (orders.sort(-1).values == torch.arange(16)).all()
    assert torch.equal(cluster_orders("random", GRID, 4, 5, (keys[1:2],))[0], orders[1])
    assert len(orders.flatten(0, 1).unique(dim=0)) == 15


@pytest.mark.parametrize(("clusters", "shape"), [(4, (2, 2)), (16, (1, 1)), (8, (1, 2))])
def test_tiles_are_rectangles(clusters: int, shape: tuple[int, int]) -> None:
    parts = cluster_orders("tiles", GRID, clusters, 1, (torch.zeros(1),))[0, 0].view(clusters, -1)
    for tile in parts:
        extent = GRID.centres[tile].amax(0) - GRID.centres[tile].amin(0) + 1
        assert sorted(extent.tolist()) == sorted(shape)


def test_ranks_are_clusters_of_the_scores() -> None:
    scores = torch.randn(2, 16)
    assert torch.equal(
        cluster_orders("ranks", GRID, 4, 3, (torch.zeros(2),), scores)[:, 0], scores.argsort(-1, descending=True)
    )
    with pytest.raises(ValueError, match="grouping=ranks needs the scores"):
        cluster_orders("ranks", GRID, 4, 1, (torch.zeros(2),))
    with pytest.raises(ValueError, match="clusters=3 must divide the 16 blocks"):
        cluster_orders("random", GRID, 3, 1, (torch.zeros(2),))


@pytest.mark.parametrize("block_size", [1, 2])
def test_importance_is_the_probability_of_the_class_from_each_cluster_alone(block_size: int) -> None:
    data, geometry = planted(False), BlockGrid(4, 4, block_size)
    classifier, blocks = random_classifier(data), geometry.num_blocks
    clusters = min(4, blocks)
    orders = cluster_orders("random", geometry, clusters, 2, (torch.arange(3),))
    found = importance(classifier, geometry, data.tokens[:3], data.labels[:3], orders, clusters)
    for image in range(3):
        total = torch.zeros(blocks)
        for draw in range(2):
            for part in orders[image, draw].view(clusters, -1):
                kept = geometry.block_tokens[part].flatten()[None]
                logits = classifier(data.tokens[image : image + 1], kept)
                total[part] += logits.softmax(-1)[0, data.labels[image]] / 2
        assert torch.allclose(found[image], total, atol=1e-5)


def test_cumulative_importance_adds_up_to_what_the_whole_image_adds() -> None:
    data = planted(False)
    classifier = random_classifier(data)
    tokens, labels = data.tokens[:3], data.labels[:3]
    orders = cluster_orders("cumulative", GRID, 8, 1, (torch.arange(3),))
    found = importance(classifier, GRID, tokens, labels, orders, 8, cumulative=True)
    none, every = (
        classifier(tokens, kept).softmax(-1).gather(1, labels[:, None])[:, 0]
        for kept in (orders[:, 0, :0], orders[:, 0])
    )
    assert torch.allclose(found.sum(1) / 2, every - none, atol=1e-5)  # two blocks share a cluster's


@pytest.mark.parametrize("continuous", [True, False])
def test_training_finds_where_the_class_is(continuous: bool) -> None:
    data = planted(continuous)
    torch.manual_seed(0)
    classifier = PartialClassifier(SMALL, data)
    train_classifier(classifier, data, SMALL, 0, Job())
    orders = cluster_orders("random", GRID, 4, 16, (torch.arange(40),))
    found = importance(classifier, GRID, data.tokens[:40], data.labels[:40], orders, 4)
    assert (found.argmax(-1) == 5).float().mean() > 0.9


def test_labels_of_the_classifier_have_its_importance_as_utilities() -> None:
    backbone = tiny_backbone()
    data, config = tiny_images(backbone), LabelConfig(contexts=8, kind="classifier", clusters=3, samples=2)
    classifier = random_classifier(data)
    geometry, seen = backbone.geometry, 0
    contexts = random_contexts(config, len(data), 9)
    for part in label_contexts(backbone, data.tokens, data.labels, config, contexts, classifier):
        images = part["image"]
        orders = cluster_orders("random", geometry, 3, 2, (images,))
        worth = importance(classifier, geometry, data.tokens[images], data.labels[images], orders, 3)
        expected = worth.masked_fill(part["visible"], 0.0)
        assert torch.allclose(utilities(part["gains"], geometry), expected, atol=1e-5)
        seen += len(images)
    assert seen == 8


def test_other_labels_keep_their_place_in_the_cache() -> None:
    known = label_settings(LabelConfig())
    assert not {"clusters", "grouping", "classifier", "visible_states"} & known.keys()
    assert label_settings(LabelConfig(clusters=8)) == known
    assert label_settings(LabelConfig(kind="classifier")) != label_settings(LabelConfig(kind="classifier", clusters=8))


def test_one_command_trains_it_labels_with_it_and_clones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["labels.contexts=24", "labels.classifier.steps=2", "labels.classifier.dim=8", "labels.classifier.depth=1"]
    where = [f"cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path}", "backbone=digits", "labels=classifier"]
    steps = ["agent.steps=2", "agent.evaluate_every=1", "agent.batch_size=8", "planner.dim=8"]
    train(compose("train", [*where, *small, *steps]))
    assert "test images recognised from 25% of their tokens" in capsys.readouterr().out
    ste = ["agent=ste", "agent.oracle_coeff=1", "planner.stem=1", "planner.heads=2", "labels.grouping=ranks"]
    path = train(compose("train", [*where, *small, *steps, *ste]))
    assert path.is_file() and "classifier" not in capsys.readouterr().out  # the cached one
    with pytest.raises(ValueError, match=r"agent\.oracle_coeff=1 .* need labels=classifier"):
        train(compose("train", [*where[:3], *steps, *ste[:4]]))


@pytest.mark.parametrize("more", [[], ["agent=ste", "agent.oracle_coeff=1"]])
def test_clusters_that_do_not_fit_are_refused_before_a_classifier_is_trained(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orderrl.partial_classifier.train_classifier", lambda *_: pytest.fail("began to train"))
    where = [f"cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path}", "backbone=digits", "labels=classifier"]
    with pytest.raises(ValueError, match="clusters=5 must divide the 16 blocks"):
        train(compose("train", [*where, "labels.clusters=5", *more]))
