"""Images drawn by a backbone and a tokeniser, without a data set; and data sets of some of a model's classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from orderrl.backbones import Backbone, backbone_fingerprint, load_backbone, save_backbone
from orderrl.backbones.registry import new_backbone
from orderrl.data.encode import tokenize_folder
from orderrl.data.folder import FolderConfig
from orderrl.evaluate import evaluate
from orderrl.factory import FORMAT, set_without_images
from orderrl.generate import generate
from orderrl.label import label
from orderrl.labels import open_labels
from orderrl.planner import OrderHead, PlannerConfig, save_planner
from orderrl.runtime.cache import Cache, fingerprint
from orderrl.runtime.config import compose
from tests.backbones.families import MASKED
from tests.tokenizers.helpers import image_folder, save_tiny_vq, tiny_kl, tiny_vq

CLASSES = 6
SHAPE: dict[str, Any] = {"height": 4, "width": 4, "block_size": 2, "vocab_size": 24, "num_classes": CLASSES}
TINY = {"dim": 16, "layers": 1, "heads": 2, "multiple_of": 16}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments that name a tiny backbone of six classes; runs and cache go to the test's folder."""
    torch.manual_seed(0)
    backbone: Any = new_backbone("randar", SHAPE | TINY)
    torch.nn.init.normal_(backbone.output.weight)
    save_backbone(tmp_path / "backbone.safetensors", backbone, {})
    save_tiny_vq(tmp_path / "tokenizer.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORDERRL_CACHE", str(tmp_path / "cache"))
    return ["backbone=small", "backbone.name=backbone.safetensors"]


TOKENIZER = ["tokenizer=small", "tokenizer.path=tokenizer.safetensors"]


def some_classes(folder: Path) -> list[str]:
    """Arguments that name a token set of three of the six classes."""
    (folder / "ids.txt").write_text("cat 4\ncow 1\ndog 2\nbird 0\n")
    root = image_folder(folder / "images", per_class=10, classes=("cat", "cow", "dog"))
    source = FolderConfig(str(root), classes=str(folder / "ids.txt"), num_classes=CLASSES, image_size=8)
    tokenize_folder(tiny_vq(), source, folder / "tokens", folder / "tokenizer.safetensors")
    return ["data=tokens", "data.path=tokens"]


def samples(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): Image.open(path).tobytes() for path in sorted(run.glob("samples/*/*.png"))}


# -- without a data set -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["raster", "published"])
def test_no_data_set_is_needed_and_images_are_those_with_one(tmp_path: Path, model: list[str], policy: str) -> None:
    draw = [*model, f"policy={policy}", "label=4", "n=3", "keep_samples=true"]
    alone = samples(generate(compose("generate", [*draw, *TOKENIZER])))
    assert list(alone) == [f"samples/4/00000{number}.png" for number in range(3)]
    assert not (tmp_path / "cache").exists()
    assert alone == samples(generate(compose("generate", [*draw, *some_classes(tmp_path)])))


def test_classes_come_in_turn(model: list[str]) -> None:
    made = samples(generate(compose("generate", [*model, *TOKENIZER, "policy=raster", "n=8", "keep_samples=true"])))
    assert sorted({name.split("/")[1] for name in made}) == [str(number) for number in range(CLASSES)]


def test_the_newest_planner_of_the_backbone_is_found_without_its_data(tmp_path: Path, model: list[str]) -> None:
    draw = [*model, *TOKENIZER, "policy=newest", "n=2"]
    with pytest.raises(ValueError, match="no planner for backbone"):
        generate(compose("generate", draw))
    backbone = load_backbone(tmp_path / "backbone.safetensors")
    description = {
        "format": FORMAT, "backbone": backbone_fingerprint(backbone), "agent": {"name": "bc", "target": "utility"},
        "images": "others", "seed": 0, "budgets": [1], "objective": "context",
    }  # fmt: skip
    with Cache(tmp_path / "cache").store("planners", fingerprint(description), description) as folder:
        planner = OrderHead(PlannerConfig.for_backbone(backbone, dim=16))
        save_planner(folder / "planner.safetensors", planner, description)
    assert (generate(compose("generate", draw)) / "order.png").exists()


def test_what_needs_or_has_a_data_set_of_its_own_is_refused(tmp_path: Path, model: list[str]) -> None:
    for more, message in (
        (["policy=fitted"], "is fitted on labels, and there are none here"),
        (["policy=raster", "label=6"], "use 0 to 5 or null"),
        (["policy=raster", *some_classes(tmp_path)], "has a tokeniser of its own"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(compose("generate", [*model, *TOKENIZER, *more]))


def test_the_tokeniser_must_be_that_of_the_backbone() -> None:
    causal = new_backbone("randar", SHAPE | TINY | {"vocab_size": 25})
    masked = new_backbone("mar", {"height": 4, "width": 4, "block_size": 2, **MASKED, "vae_embed_dim": 4})
    tokenizers: list[tuple[Backbone, Any]] = [(causal, tiny_vq()), (causal, tiny_kl()), (masked, tiny_vq())]
    for backbone, tokenizer in tokenizers:
        with pytest.raises(ValueError, match="does not fit the backbone"):
            set_without_images(backbone, tokenizer)
    data = set_without_images(masked, tiny_kl())
    assert data.images(torch.randn(2, 16, 4)).shape == (2, 3, 8, 8) and len(data) == 0


# -- some of the classes ----------------------------------------------------------------------------------------------


def test_labels_and_evaluation_are_of_the_classes_that_are_there(tmp_path: Path, model: list[str]) -> None:
    data = some_classes(tmp_path)
    labels = label(compose("label", [*model, *data, "labels.contexts=16"]))
    found = open_labels(labels, load_backbone(tmp_path / "backbone.safetensors"))
    assert set(found["label"].tolist()) == {1, 2, 4}
    small = [
        "eval.images=3", "eval.states=4", "eval.reference_images=2", "eval.resamples=20", "eval.policies=[raster]",
        "eval.planners=[]", "eval.samples=4", "eval.features=orderrl-digits", "eval.keep_samples=true",
        "eval.kid_subsets=2",
        "eval.token_raster=[]", "eval.sampled=[raster]", "eval.classifier=null", "labels.contexts=16",
    ]  # fmt: skip
    run = evaluate(compose("evaluate", [*model, *data, *small]))
    described = json.loads((run / "results.json").read_text())["protocol"]["data"]
    assert described.endswith("3 images, 3 of 6 classes, samples of these alone")
    assert {path.parent.name for path in run.glob("samples/raster/**/*.png")} == {"1", "2", "4"}


def test_classes_in_turn_are_those_of_the_data_set(tmp_path: Path, model: list[str]) -> None:
    draw = [*model, *some_classes(tmp_path), "policy=raster", "n=4", "keep_samples=true"]
    made = samples(generate(compose("generate", draw)))
    assert {name.split("/")[1] for name in made} == {"1", "2", "4"}
