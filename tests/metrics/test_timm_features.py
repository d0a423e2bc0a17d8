"""Feature extractors that are models of timm: published ones, own checkpoints, and folders that timm saved."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor
from torch.nn import functional as F

from orderrl.data import load_split
from orderrl.metrics import extractors
from orderrl.metrics.extractors import register_features
from orderrl.metrics.features import extract_features
from orderrl.metrics.recognisability import make_recogniser

EXAMPLE = Path(__file__).parents[2] / "examples" / "timm_features.py"


@torch.no_grad()
def logits_of(model: Any, images: Tensor) -> Tensor:
    """What the model says of images resized to its own input size, (n, 3, H, W) uint8."""
    config = resolve_model_data_config(model)
    size, mode = config["input_size"][-2:], config["interpolation"]
    resized = F.interpolate(images / 255, size, mode=mode, antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return model((resized - mean) / std)


def test_a_timm_model_with_an_own_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = timm.create_model("test_resnet", num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "own.pth")
    name = f"timm:test_resnet:{tmp_path / 'own.pth'}"
    images = torch.randint(0, 256, (6, 3, 24, 24), dtype=torch.uint8)
    made = extract_features(images, name)
    logits = logits_of(model, images)
    assert made.logits is not None and made.spatial is None
    assert torch.allclose(made.logits, logits, atol=1e-5) and made.logits.shape == (6, 7)
    assert made.pooled.shape == (6, model.num_features)
    assert torch.allclose(model.get_classifier()(made.pooled), logits, atol=1e-5)
    registered = register_features(name)
    assert registered in extractors.FEATURE_EXTRACTORS_REGISTRY and registered == register_features(name)


def test_timm_checkpoints_without_a_classifier_have_no_score(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "body.pth")
    assert (
        extract_features(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), f"timm:test_resnet:{tmp_path / 'body.pth'}").logits
        is None
    )


def test_timm_models_that_do_not_exist_or_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "other.pth")
    torch.save({"run": print}, tmp_path / "code.pth")
    for name, message in {
        "timm:resnt50": "timm has no model 'resnt50'; close: .*resnet50",
        "timm:test_resnet:none.pth": "the checkpoint file none.pth does not exist",
        f"timm:test_resnet:{tmp_path / 'other.pth'}": "does not hold the weights of timm's test_resnet",
        f"timm:test_resnet:{tmp_path / 'code.pth'}": "does not hold the weights of timm's test_resnet",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            extract_features(images, name)
        assert "\n" not in str(error.value)


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (6, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with ten classes for images of 32 x 32, as timm saves it."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    save_for_hf(model, str(tmp_path / "model"), safe_serialization=True)
    return tmp_path / "model"


def test_a_folder_that_timm_saved_has_its_own_input_size(folder: Path, images: Tensor) -> None:
    name = f"timm:local-dir:{folder}"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert resolve_model_data_config(model)["input_size"] == (3, 32, 32)
    logits = logits_of(model, images)
    made = extract_features(images, name)
    assert made.logits is not None and torch.allclose(made.logits, logits, atol=1e-5)
    recogniser = make_recogniser(name, load_split("digits", "test"))
    assert recogniser is not None and torch.allclose(recogniser.classify(images), logits, atol=1e-5)


def test_a_folder_is_read_again_when_its_weights_change(folder: Path, images: Tensor) -> None:
    name = f"timm:local-dir:{folder}"
    before, registered = extract_features(images, name), register_features(name)
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=10, pretrained_cfg_overlay={"input_size": (3, 32, 32)})
    save_for_hf(model, str(folder), safe_serialization=True)
    after = extract_features(images, name)
    assert registered != register_features(name)
    assert before.pooled.shape == after.pooled.shape and not torch.allclose(before.pooled, after.pooled)


def test_folders_that_are_none_or_hold_other_weights_are_refused_in_one_line(folder: Path, images: Tensor) -> None:
    other = folder.parent / "other"
    save_for_hf(timm.create_model("test_vit", num_classes=10), str(other), safe_serialization=True)
    shutil.copy(folder / "config.json", other)
    empty = folder.parent / "empty"
    empty.mkdir()
    shutil.copy(folder / "config.json", empty)
    for name, message in {
        "timm:local-dir": "no folder must be a folder with timm's config.json",
        f"timm:local-dir:{folder.parent}": "must be a folder with timm's config.json",
        f"timm:local-dir:{other}": "other does not hold the weights of a model of timm",
        f"timm:local-dir:{empty}": "empty does not hold the weights of a model of timm",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            extract_features(images, name)
        assert "\n" not in str(error.value)


def test_the_example_trains_features_that_tell_classes_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0)
    for number, colour in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200)]):
        (tmp_path / "images" / f"class{number}").mkdir(parents=True)
        for i in range(40):
            pixels = np.array(colour) + noise.integers(-30, 31, (16, 16, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / f"class{number}" / f"{i}.png")
    spec = importlib.util.spec_from_file_location("timm_features", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = ["--image-size=16", "--input-size=32", "--model=test_resnet", "--epochs=12", "--batch-size=28"]
    module.main([str(tmp_path / "images"), str(tmp_path / "model"), *small])
    assert re.search(r"epoch 12/12: (100.0|9[0-9]\.[0-9])% of the test images", capsys.readouterr().out)
    flat = torch.tensor([(200, 30, 30), (30, 200, 30), (30, 30, 200)], dtype=torch.uint8)[:, :, None, None]
    made = extract_features(flat.expand(3, 3, 16, 16).contiguous(), f"timm:local-dir:{tmp_path / 'model'}")
    assert made.logits is not None and made.logits.argmax(-1).tolist() == [0, 1, 2]
