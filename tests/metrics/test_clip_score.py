"""CLIP score: against a direct computation on a tiny network, and what is refused without a download."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from orderrl.backbones import Sampling, with_block_size
from orderrl.data import load_split
from orderrl.evaluation.drawing import balanced_labels, generate_images
from orderrl.evaluation.protocol import EvaluationProtocol
from orderrl.evaluation.rows import evaluate_token_raster
from orderrl.evaluation.settings import EvalConfig
from orderrl.metrics import clip_score
from orderrl.metrics.clip_score import ClassCaptions, ClipNetwork, class_captions, load_clip
from tests.helpers import tiny_backbone

open_clip = pytest.importorskip("open_clip", reason="needs the extra clip: pip install 'orderrl[clip]'")

TINY = "tiny-for-tests"

SIZE = 32
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIZE, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
CAPTIONS = ["a photo of a cat", "two dogs", "the number seven", "a photo of a cat", "snow", "a red bus", "x", "nothing"]


def clip_scores(network: ClipNetwork, images: Tensor, captions: list[str]) -> Tensor:
    """Score of each image with its own caption."""
    one_each = ClassCaptions(network, tuple(captions), network.caption_features(captions))
    return one_each.scores(images, torch.arange(len(images)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network that open_clip knows by name, and its random weights in files of open_clip's layout."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / f"{TINY}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / f"{TINY}.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(TINY)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), folder / "weights.safetensors")
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder


@pytest.fixture(autouse=True)
def fresh_networks() -> Iterator[None]:
    clip_score._load_clip.cache_clear()
    yield
    clip_score._load_clip.cache_clear()


@pytest.fixture
def weights(folder: Path) -> str:
    return str(folder / "weights.safetensors")


def some_images() -> Tensor:
    return torch.randint(
        0, 256, (len(CAPTIONS), 3, 40, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def direct_scores(folder: Path, images: Tensor, captions: list[str]) -> Tensor:
    """100 max(cos, 0) image by image: crop, scale and normalise as CLIP does, encode, compare."""
    model: Any = open_clip.create_model(TINY)
    model.load_state_dict(torch.load(folder / "weights.pt"))
    model.eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    found = []
    for image, caption in zip(images, captions, strict=True):
        shown = Image.fromarray(image.permute(1, 2, 0).numpy())
        scale = SIZE / min(shown.size)
        shown = shown.resize((round(shown.width * scale), round(shown.height * scale)), Image.Resampling.BICUBIC)
        left, top = round((shown.width - SIZE) / 2), round((shown.height - SIZE) / 2)
        pixels = np.array(shown.crop((left, top, left + SIZE, top + SIZE)))
        with torch.no_grad():
            seen = model.encode_image(((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)[None])[0]
            read = model.encode_text(open_clip.SimpleTokenizer(context_length=12)(caption))[0]
        found.append(max(100 * float(seen @ read / (seen.norm() * read.norm())), 0.0))
    return torch.tensor(found)


def test_scores_are_those_of_a_direct_computation(folder: Path, weights: str) -> None:
    images = some_images()
    expected = direct_scores(folder, images, CAPTIONS)
    assert expected.min() > 1 and expected.std() > 1
    for file in (weights, str(folder / "weights.pt")):
        torch.testing.assert_close(clip_scores(load_clip(TINY, file), images, CAPTIONS), expected, atol=1e-3, rtol=1e-4)


def test_captions_that_do_not_fit_score_zero(folder: Path) -> None:
    state = torch.load(folder / "weights.pt")
    torch.save(state | {"text_projection": -state["text_projection"]}, folder / "opposite.pt")
    assert (clip_scores(load_clip(TINY, str(folder / "opposite.pt")), some_images(), CAPTIONS) == 0).all()


def test_scores_do_not_depend_on_the_batch(weights: str) -> None:
    network, images = load_clip(TINY, weights), some_images()
    torch.testing.assert_close(network.image_features(images, 3), network.image_features(images))
    torch.testing.assert_close(network.caption_features(CAPTIONS, 3), network.caption_features(CAPTIONS))


def test_samples_are_compared_with_captions_of_their_classes(weights: str) -> None:
    data = load_split("digits", "test")
    images, labels = data.images(data.tokens[:20]), data.labels[:20]
    clip = class_captions(data, TINY, weights, "the number {}, drawn")
    assert clip.captions[7] == "the number 7, drawn" and len(clip.captions) == 10
    expected = clip_scores(
        load_clip(TINY, weights), images, [f"the number {label}, drawn" for label in labels.tolist()]
    )
    torch.testing.assert_close(clip.scores(images, labels), expected)
    assert TINY in clip.described and "sha256:" in clip.described and "the number 0, drawn" in clip.described


def test_a_row_has_the_mean_over_its_samples_with_an_interval(weights: str) -> None:
    data = load_split("digits", "test")
    few, backbone = replace(data, tokens=data.tokens[:8], labels=data.labels[:8]), tiny_backbone(8, 8, 2, 17, 10)
    clip = class_captions(data, TINY, weights)
    config = EvalConfig(samples=30, resamples=200)
    protocol = EvaluationProtocol(config=config, seed=0, backbone=backbone, backbone_name="tiny", data=few, clip=clip)
    row = evaluate_token_raster(protocol, "token_raster", backbone).row
    assert row["clip_score_ci"][0] <= row["clip_score"] <= row["clip_score_ci"][1]
    assert row["frechet_distance"] is row["features"] is None and row["seconds_per_image"] > 0

    def whole(observation: Any, generator: torch.Generator) -> Tensor:
        return torch.zeros_like(observation["label"])

    made = generate_images(with_block_size(backbone, 8), few, whole, (1,), balanced_labels(30, 10), Sampling(), 0)
    scores = clip.scores(data.images(made.tokens), made.labels)
    assert row["clip_score"] == pytest.approx(scores.double().mean().item(), rel=1e-5)
    assert evaluate_token_raster(replace(protocol, clip=None), "x", backbone).row["clip_score"] is None


def test_imagenets_word_net_ids_become_names_and_others_are_refused(weights: str) -> None:
    ids = tuple(f"n{number:08d}" for number in range(1000))
    data = replace(load_split("digits", "test"), num_classes=1000, class_names=ids)
    clip = class_captions(data, TINY, weights)
    assert clip.captions[0] == "a photo of a tench" and clip.captions[999] == "a photo of a toilet paper"
    with pytest.raises(ValueError, match=r"the 10 classes .* WordNet ids such as 'n00000000', which are no captions"):
        class_captions(replace(data, num_classes=10, class_names=ids[:10]), TINY, weights)


@pytest.mark.parametrize(("tag", "quick"), [("openai", True), ("laion2b_s34b_b79k", False)])
def test_a_tag_says_which_activation_its_weights_need(monkeypatch: pytest.MonkeyPatch, tag: str, quick: bool) -> None:
    asked: dict[str, Any] = {}

    def create(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        return torch.nn.Identity(), None

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    assert load_clip("ViT-B-32", tag).weights == tag
    assert (asked["name"], asked["pretrained"], asked["force_quick_gelu"]) == ("ViT-B-32", tag, quick)


def test_what_can_not_be_scored_is_refused_in_one_line(folder: Path, weights: str) -> None:
    data = load_split("digits", "test")
    torch.save({"run": print}, folder / "code.pt")
    save_file({"w": torch.zeros(2)}, folder / "other.safetensors")
    images = some_images()
    for call, message in (
        (lambda: load_clip("ViT-B-33", weights), "clip_model='ViT-B-33' is no network of open_clip; close: .*ViT-B-32"),
        (lambda: load_clip("ViT-B-32", "none.pt"), "clip_weights='none.pt' does not exist.*a tag.*openai"),
        (lambda: load_clip(TINY, "none.pt"), "there is none for this network"),
        (lambda: load_clip(TINY, str(folder / "code.pt")), f"do not fit clip_model='{TINY}'"),
        (lambda: load_clip(TINY, str(folder / "other.safetensors")), f"do not fit clip_model='{TINY}'"),
        (lambda: class_captions(data, TINY, weights, "a photo"), "clip_prompt='a photo' must hold {} once"),
        (lambda: class_captions(replace(data, class_names=None), TINY, weights), "data 'digits' has no class names"),
        (lambda: class_captions(replace(data, num_classes=7), TINY, weights), "has 7 classes, but 10 class_names"),
        (lambda: clip_scores(load_clip(TINY, weights), images.float(), CAPTIONS), "images must be uint8"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_without_a_network_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **options: object) -> None:
        raise OSError("no network\nsecond line")

    monkeypatch.setattr("open_clip.factory.download_pretrained", no_network)
    with pytest.raises(
        ValueError, match=r"clip_weights='openai' cannot be downloaded \(.*no network second line.*the file"
    ) as error:
        load_clip("ViT-B-32")
    assert "\n" not in str(error.value)


def test_without_open_clip_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"needs open_clip, which is not installed: pip install 'orderrl\[clip\]'"):
        clip_score.load_clip(TINY, weights)
