"""Fréchet distance by torch-fidelity in the digits classifier's features, against a direct formula."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch_fidelity
from scipy import linalg
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from orderrl.classifier import load_classifier
from orderrl.data import load_split
from orderrl.metrics import quality
from orderrl.metrics.quality import DIGITS, INCEPTION, class_accuracy, distance_name, frechet_distance, real_floor


@pytest.fixture(scope="module")
def real() -> Tensor:
    data = load_split("digits", "backbone")
    return data.images(data.tokens).contiguous()


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    quality._extractor.cache_clear()
    quality._reference_statistics.clear()
    yield
    quality._extractor.cache_clear()
    quality._reference_statistics.clear()


def noisy(images: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * sigma
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def direct_distance(first: Tensor, second: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) with scipy's matrix square root."""
    classifier = load_classifier("digits")
    a, b = (classifier.features(images).double().numpy() for images in (first, second))
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(linalg.sqrtm(s1) @ s2 @ linalg.sqrtm(s1)).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root))


def test_distance_agrees_with_the_direct_formula(real: Tensor) -> None:
    generated = noisy(real[:500], 40)
    assert frechet_distance(generated, real[500:], DIGITS) == pytest.approx(
        direct_distance(generated, real[500:]), rel=1e-4
    )


def test_distance_is_what_torch_fidelity_reports_for_the_registered_name(real: Tensor) -> None:
    class Images(Dataset[Tensor]):
        def __init__(self, images: Tensor) -> None:
            self.images = images

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> Tensor:
            return self.images[index]

    found = torch_fidelity.calculate_metrics(
        input1=Images(noisy(real[:300], 20)),
        input2=Images(real[300:600]),
        feature_extractor=DIGITS,
        fid=True,
        isc=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    ours = frechet_distance(noisy(real[:300], 20), real[300:600], DIGITS)
    assert found["frechet_inception_distance"] == pytest.approx(ours, rel=1e-6)
    assert 1 <= found["inception_score_mean"] <= 10


def test_identical_sets_have_no_distance_and_noise_adds_to_it(real: Tensor) -> None:
    values = [frechet_distance(noisy(real, sigma), real, DIGITS) for sigma in (0, 20, 60)]
    assert abs(values[0]) < 1e-3 * values[1]
    assert values[0] < values[1] < values[2]


def test_real_floor_is_positive_reproducible_and_below_noise(real: Tensor) -> None:
    floor = real_floor(real, DIGITS, repeats=2, seed=3)
    assert 0 < floor < frechet_distance(noisy(real, 60), real, DIGITS)
    assert floor == real_floor(real, DIGITS, repeats=2, seed=3)
    assert floor != real_floor(real, DIGITS, repeats=2, seed=4)


def test_reference_statistics_are_computed_once_and_follow_the_content(
    real: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    compute = quality._statistics

    def counted(images: Tensor, *rest: Any) -> dict[str, Any]:
        seen.append(images)
        return compute(images, *rest)

    monkeypatch.setattr(quality, "_statistics", counted)
    generated, reference = real[:100], real[100:200].clone()
    first = frechet_distance(generated, reference, DIGITS)
    assert frechet_distance(generated, reference.clone(), DIGITS) == first
    assert len(seen) == 3  # reference, generated, generated
    reference[0] = 255
    assert frechet_distance(generated, reference, DIGITS) != first


def test_class_accuracy_counts_matches() -> None:
    data = load_split("digits", "test")
    images = data.images(data.tokens)
    right = class_accuracy(images, data.labels, DIGITS)
    assert right >= 0.97
    assert class_accuracy(images, (data.labels + 1) % 10, DIGITS) <= 1 - right


class FakeInception(FeatureExtractorBase):
    """Stands for torch-fidelity's Inception: mean colours as features, remembers its weights file."""

    weights: str | None = None

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(name, features_list)
        type(self).weights = feature_extractor_weights_path

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("2048",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "2048"

    def forward(self, input: Tensor) -> tuple[Tensor, ...]:
        return (input.double().mean((2, 3)),)


def test_inception_goes_to_torch_fidelitys_own_extractor(
    real: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(quality.FEATURE_EXTRACTORS_REGISTRY, INCEPTION, FakeInception)
    torch.save({"w": torch.zeros(1)}, tmp_path / "inception.pth")
    coloured = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    value = frechet_distance(coloured, real, INCEPTION, weights=tmp_path / "inception.pth")
    assert value > 0
    assert FakeInception.weights == str(tmp_path / "inception.pth")
    assert quality.FEATURE_EXTRACTORS_REGISTRY[INCEPTION] is FakeInception


def test_inception_without_a_network_is_a_one_line_error(real: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise URLError("no network\nsecond line")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", no_network)
    with pytest.raises(ValueError, match=r"can't be downloaded.*pass weights=") as error:
        frechet_distance(real[:4], real[4:8], INCEPTION)
    assert "\n" not in str(error.value)


def test_weights_that_are_missing_pickled_or_of_another_network_are_refused(real: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        frechet_distance(real[:4], real[4:8], INCEPTION, weights=tmp_path / "none.pth")
    torch.save({"run": print}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="not a file of plain tensors"):
        frechet_distance(real[:4], real[4:8], INCEPTION, weights=tmp_path / "code.pth")
    torch.save({"w": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="do not fit"):
        frechet_distance(real[:4], real[4:8], INCEPTION, weights=tmp_path / "other.pth")


def test_only_inception_is_called_fid() -> None:
    assert distance_name(INCEPTION) == "FID"
    assert "FID" not in distance_name(DIGITS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: frechet_distance(x, x, "vgg"), "features='vgg'.*orderrl-digits, inception-v3-compat"),
        (lambda x: frechet_distance(x.float(), x, DIGITS), "generated must be uint8.*float32"),
        (lambda x: frechet_distance(x, x[:1], DIGITS), "reference must be uint8.*n >= 2"),
        (lambda x: real_floor(x, DIGITS, repeats=0), "repeats must be at least 1, got 0"),
        (lambda x: real_floor(x[:3], DIGITS), "at least 4 images.*got 3"),
        (lambda x: class_accuracy(x, torch.zeros(3).long(), INCEPTION), "no classifier"),
        (lambda x: class_accuracy(x, torch.zeros(3).long(), DIGITS), "labels must have shape"),
    ],
)
def test_bad_input_is_named(call: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(8, 3, 8, 8, dtype=torch.uint8))
