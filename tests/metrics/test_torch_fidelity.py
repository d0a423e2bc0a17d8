"""The numbers of torch-fidelity itself, from its function and its command line, on the image files that are kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_fidelity
from torch import Tensor, nn
from torch_fidelity import fidelity
from torch_fidelity.feature_extractor_clip import VisionTransformer

from orderrl.data import load_split
from orderrl.metrics.extractors import CLIP_METADATA
from orderrl.metrics.feature_names import DIGITS
from orderrl.metrics.features import extract_features
from orderrl.metrics.images import save_images
from orderrl.metrics.quality import sample_quality
from orderrl.metrics.references import open_reference, reference_of
from orderrl.runtime.storage import checksum
from tests.metrics.test_quality import noisy


@pytest.fixture(scope="module")
def real() -> Tensor:
    data = load_split("digits", "backbone")
    return data.images(data.tokens).contiguous()


def torch_fidelity_metrics(generated: Any, reference: Any, name: str, **options: Any) -> dict[str, float]:
    return dict(
        torch_fidelity.calculate_metrics(
            input1=generated,
            input2=reference,
            feature_extractor=name,
            cuda=False,
            cache=False,
            save_cpu_ram=True,
            verbose=False,
            **options,
        )
    )


def test_every_number_is_torch_fidelitys_own_on_the_png_files(real: Tensor, tmp_path: Path) -> None:
    save_images(noisy(real[:300], 20), tmp_path / "generated")
    save_images(real[300:700], tmp_path / "real")
    wanted = torch_fidelity_metrics(
        str(tmp_path / "generated"), str(tmp_path / "real"), DIGITS,
        fid=True, isc=True, kid=True, prc=True, kid_subset_size=300,
    )  # fmt: skip
    reference = open_reference(tmp_path / "real", DIGITS)
    ours = sample_quality(extract_features(noisy(real[:300], 20), DIGITS), reference)
    assert ours.frechet_distance == pytest.approx(wanted["frechet_inception_distance"], rel=1e-6)
    assert ours.inception_score == pytest.approx(wanted["inception_score_mean"], rel=1e-6)
    assert ours.kid == pytest.approx(wanted["kernel_inception_distance_mean"], rel=1e-6)
    assert ours.precision == wanted["precision"] and ours.recall == wanted["recall"]
    assert ours.inception_score is not None and 1 <= ours.inception_score <= 10


@pytest.mark.parametrize("name", ["clip-vit-b-32", DIGITS])
def test_torch_fidelitys_command_line_agrees_on_kept_class_folders(
    real: Tensor, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its own features, and with those that this package registers."""
    labels = load_split("digits", "backbone").labels[:100].sort().values
    generated = noisy(real[:100], 20)
    save_images(generated, tmp_path / "generated", labels)
    save_images(real[100:200], tmp_path / "real")
    assert len(list((tmp_path / "generated").iterdir())) == 10  # a folder per class
    weights = None if name == DIGITS else tiny_clip(tmp_path / "clip.pt")
    if weights is not None:  # as if OpenAI had published them
        monkeypatch.setitem(CLIP_METADATA[name], "hash", checksum(weights))
    arguments = ["--input1", str(tmp_path / "generated"), "--input2", str(tmp_path / "real"), "--samples-find-deep"]
    arguments += ["--feature-extractor", name, "--fid", "--kid", "--kid-subset-size", "100", "--prc"]
    arguments += ["--cpu", "--json", "--silent", "--no-cache", "--save-cpu-ram"]
    arguments += ["--isc"] if weights is None else ["--feature-extractor-weights-path", str(weights)]
    monkeypatch.setattr(sys, "argv", ["fidelity", *arguments])
    fidelity.main()
    found = json.loads(capsys.readouterr().out)
    reference = reference_of(real[100:200], name, weights)
    ours = sample_quality(extract_features(generated, name, weights), reference)
    assert ours.frechet_distance > 0
    assert found["frechet_inception_distance"] == pytest.approx(ours.frechet_distance, rel=1e-4)
    assert found["kernel_inception_distance_mean"] == pytest.approx(ours.kid, rel=1e-4)
    assert (found["precision"], found["recall"]) == (ours.precision, ours.recall)
    if weights is None:
        assert found["inception_score_mean"] == pytest.approx(ours.inception_score, rel=1e-4)


def tiny_clip(path: Path) -> Path:
    """Random weights of a small CLIP image tower in a TorchScript archive, the file that torch-fidelity reads."""

    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = VisionTransformer(32, 16, width=64, layers=1, heads=1, output_dim=24)
            self.text_projection = nn.Parameter(torch.zeros(8, 24))  # tells the number of features

        def forward(self, images: Tensor) -> Tensor:
            return self.visual(images) + self.text_projection.sum(0)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        archive = torch.jit.trace(Clip().eval(), torch.zeros(1, 3, 32, 32))
    archive.save(str(path))
    return path
