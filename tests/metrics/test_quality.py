"""Sample quality: against direct formulas, torch-fidelity's own entry points, and what must hold by definition."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch_fidelity
import torchvision
from numpy.typing import NDArray
from PIL import Image
from scipy import linalg
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from orderrl.data import load_split
from orderrl.data.encode import tokenize_folder
from orderrl.data.folder import FolderConfig
from orderrl.data.token_files import token_set_splits
from orderrl.metrics import extractors
from orderrl.metrics.classifier import load_classifier
from orderrl.metrics.feature_names import CLIP, DIGITS, INCEPTION, own_features
from orderrl.metrics.features import Features, extract_features
from orderrl.metrics.images import ImageFolder, TokenImages, save_images
from orderrl.metrics.quality import (
    class_accuracy,
    cmmd,
    distance_name,
    fid_infinity,
    gaussian_distance,
    real_floor,
    sample_quality,
)
from orderrl.metrics.references import Gaussian, Reference, fit_gaussian, open_reference, reference_of
from tests.helpers import save_reference
from tests.tokenizers.helpers import image_folder, save_tiny_vq, tiny_vq


@pytest.fixture(scope="module")
def real() -> Tensor:
    data = load_split("digits", "backbone")
    return data.images(data.tokens).contiguous()


@pytest.fixture(scope="module")
def found(real: Tensor) -> Features:
    return extract_features(real, DIGITS)


@pytest.fixture(autouse=True)
def fresh_extractors() -> Iterator[None]:
    extractors._extractor.cache_clear()
    yield
    extractors._extractor.cache_clear()


def noisy(images: Tensor, sigma: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * sigma
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def formula(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) with scipy's matrix square root."""
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(linalg.sqrtm(s1) @ s2 @ linalg.sqrtm(s1)).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root))


def frechet_distance(generated: Tensor, reference: Tensor, features: str, weights: Path | None = None) -> float:
    one, other = (fit_gaussian(extract_features(x, features, weights).pooled) for x in (generated, reference))
    return gaussian_distance(one, other)


def direct_distance(first: Tensor, second: Tensor) -> float:
    classifier = load_classifier("digits")
    return formula(*(classifier.features(images).double().numpy() for images in (first, second)))


def test_distance_agrees_with_the_direct_formula(real: Tensor) -> None:
    generated = noisy(real[:500], 40)
    assert frechet_distance(generated, real[500:], DIGITS) == pytest.approx(
        direct_distance(generated, real[500:]), rel=1e-4
    )


def test_identical_sets_have_no_distance_and_noise_adds_to_it(real: Tensor) -> None:
    values = [frechet_distance(noisy(real, sigma), real, DIGITS) for sigma in (0, 20, 60)]
    assert abs(values[0]) < 1e-3 * values[1]
    assert values[0] < values[1] < values[2]


def test_real_floor_is_positive_reproducible_and_below_noise(real: Tensor, found: Features) -> None:
    floor = real_floor(found, repeats=2, seed=3, kid_subsets=2)
    assert 0 < floor.frechet_distance < frechet_distance(noisy(real, 60), real, DIGITS)
    assert floor == real_floor(found, repeats=2, seed=3, kid_subsets=2)
    assert floor != real_floor(found, repeats=2, seed=4, kid_subsets=2)


def test_a_set_against_itself(found: Features) -> None:
    same = sample_quality(found, reference_of(found, DIGITS), kid_subsets=5)
    assert abs(same.frechet_distance) < 1e-4 and same.spatial_frechet_distance is not None
    assert abs(same.spatial_frechet_distance) < 1e-4
    assert same.precision == same.recall == 1
    assert cmmd(found, found) == pytest.approx(0, abs=1e-9)


def test_kid_has_no_bias_where_the_distance_has(found: Features) -> None:
    values = [real_floor(found, repeats=1, seed=seed, kid_subsets=1) for seed in range(40)]
    kid = np.array([value.kid for value in values])
    assert abs(kid.mean()) < 3 * kid.std() / len(kid) ** 0.5 and kid.min() < 0 < kid.max()
    assert min(value.frechet_distance for value in values) > 0


def test_collapsed_samples_lose_recall_and_noise_loses_precision(real: Tensor, found: Features) -> None:
    reference = reference_of(found, DIGITS)
    collapsed = sample_quality(found.rows(torch.arange(40).repeat(20)), reference, 2)
    noise = torch.randint(0, 256, (600, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    random = sample_quality(extract_features(noise, DIGITS), reference, 2)
    assert collapsed.precision == 1 and collapsed.recall is not None and collapsed.recall < 0.3
    assert random.precision is not None and random.precision < 0.5


def test_spatial_features_are_seven_channels_of_the_last_map(real: Tensor, found: Features) -> None:
    classifier = load_classifier("digits")
    grey = real[:5].float().mean(1, keepdim=True) / 255
    maps = classifier.convolutions[:-1](grey)  # (5, 32, 4, 4)
    expected = torch.stack([maps[:, :7, y, x] for y in range(4) for x in range(4)], dim=1).flatten(1)
    assert found.spatial is not None and torch.allclose(found.spatial[:5].float(), expected)


def test_spatial_distance_agrees_with_the_direct_formula(real: Tensor, found: Features) -> None:
    generated = extract_features(noisy(real[:500], 40), DIGITS)
    ours = sample_quality(generated, reference_of(found, DIGITS), 1).spatial_frechet_distance
    assert generated.spatial is not None and found.spatial is not None
    direct = formula(generated.spatial.numpy(), found.spatial.numpy())
    assert ours == pytest.approx(direct, rel=1e-3)


def test_gaussians_have_the_distance_of_the_closed_form() -> None:
    one = Gaussian(np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    other = Gaussian(np.array([0.0, 0.0]), np.diag([1.0, 16.0]))
    assert gaussian_distance(one, other) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 4) ** 2)


def test_mmd_is_the_mean_over_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (7, 5))

    def mean(a: Tensor, b: Tensor) -> float:
        return sum(math.exp(-float(((i - j) ** 2).sum()) / (2 * 10**2)) for i in a for j in b) / (len(a) * len(b))

    one, other = (z / z.norm(dim=1, keepdim=True) for z in (x, y))
    naive = 1000 * (mean(one, one) + mean(other, other) - 2 * mean(one, other))
    assert cmmd(Features(CLIP, x), Features(CLIP, 5 * y), batch_size=3) == pytest.approx(naive, rel=1e-9)


def test_the_distance_of_endless_samples_is_extrapolated() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = Features(DIGITS, torch.randn(2000, 16, generator=generator, dtype=torch.float64))
    truth = Reference("the truth", DIGITS, Gaussian(np.zeros(16), np.eye(16)))
    finite = sample_quality(samples, truth).frechet_distance
    assert abs(fid_infinity(samples, truth)) < 0.3 * finite
    assert fid_infinity(samples, truth) == fid_infinity(samples, truth)


# ---------------------------------------------------------------------- references


def test_statistics_without_images_give_the_same_distances_and_nothing_else(found: Features, tmp_path: Path) -> None:
    whole = reference_of(found.rows(torch.arange(500, 1000)), DIGITS)
    save_reference(tmp_path / "real.npz", whole)
    read = open_reference(tmp_path / "real.npz", DIGITS)
    assert np.array_equal(read.pooled.covariance, whole.pooled.covariance) and read.found is None
    generated = found.rows(torch.arange(500))
    ours, wanted = (sample_quality(generated, reference, 2) for reference in (read, whole))
    assert ours.frechet_distance == wanted.frechet_distance
    assert ours.spatial_frechet_distance == wanted.spatial_frechet_distance
    assert ours.inception_score == wanted.inception_score
    assert ours.kid is ours.precision is ours.recall is None and wanted.kid is not None


def test_an_archive_larger_than_the_memory_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", arr_0=np.zeros((1000, 32, 32, 3), dtype=np.uint8))
    assert (tmp_path / "bomb.npz").stat().st_size < 100_000
    monkeypatch.setattr("orderrl.metrics.references.free_memory", lambda device: 1e6)
    with pytest.raises(ValueError, match=r"bomb.npz.*take 0.0 GB, and 0.0 GB of memory are free"):
        open_reference(tmp_path / "bomb.npz", DIGITS)


def test_images_in_an_npz_are_a_reference(real: Tensor, tmp_path: Path) -> None:
    images = real[:200]
    np.savez(tmp_path / "adm.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    read, wanted = open_reference(tmp_path / "adm.npz", DIGITS), reference_of(images, DIGITS)
    assert np.array_equal(read.pooled.mean, wanted.pooled.mean) and read.found is not None
    assert read.source == "200 images of adm.npz"


def test_adms_statistics_are_inceptions_and_its_images_serve_all_features(real: Tensor, tmp_path: Path) -> None:
    mu, sigma = np.zeros(64), np.eye(64)
    np.savez(tmp_path / "both.npz", arr_0=real[:100].permute(0, 2, 3, 1).numpy(), mu=mu, sigma=sigma)
    assert np.abs(open_reference(tmp_path / "both.npz", DIGITS).pooled.mean).max() > 0
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match="statistics of the features 'inception-v3-compat', but samples are measured"):
        open_reference(tmp_path / "statistics.npz", DIGITS)


def test_torch_fidelitys_own_statistics_file_is_a_reference(real: Tensor, found: Features, tmp_path: Path) -> None:
    save_images(real[:80], tmp_path / "real")
    torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "real"), input2=str(tmp_path / "real"), input1_cache_name="real",
        feature_extractor=DIGITS, fid=True, cuda=False, cache_root=str(tmp_path), save_cpu_ram=True, verbose=False,
    )  # fmt: skip
    path = tmp_path / f"real-{DIGITS}-stat-fid-penultimate.pt"
    read = open_reference(path, DIGITS)
    assert np.allclose(read.pooled.covariance, fit_gaussian(found.pooled[:80]).covariance)
    with pytest.raises(ValueError, match=r"statistics of the features 'real-orderrl-digits-stat-fid-penultimate'"):
        open_reference(path, INCEPTION)


def test_references_that_are_missing_damaged_or_code_are_refused(real: Tensor, tmp_path: Path) -> None:
    torch.save({"mu": print, "sigma": print}, tmp_path / "code.pt")
    (tmp_path / "broken.npz").write_bytes(b"PK no archive")
    (tmp_path / "words.txt").write_text("words")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.savez(tmp_path / "shape.npz", mu=np.zeros(64), sigma=np.eye(63), features=np.array(DIGITS))
    (tmp_path / "empty").mkdir()
    save_images(real[:2], tmp_path / "mixed")
    Image.new("RGB", (9, 8)).save(tmp_path / "mixed" / "wide.png")
    for name, message in {
        "none.npz": "does not exist; it must be an image folder",
        "code.pt": "is no statistics file",
        "broken.npz": "cannot be read",
        "words.txt": "of no known kind",
        "other.npz": "must hold mu and sigma, or arr_0; it holds weights",
        "shape.npz": "mean and covariance must have shapes",
        "empty": "holds no images",
        "mixed": "must have one size, but 000000.png has 8x8 pixels and wide.png has 9x8",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            open_reference(tmp_path / name, DIGITS)
        assert "\n" not in str(error.value)


def test_too_few_images_for_a_covariance_of_full_rank_are_warned_of(found: Features) -> None:
    with pytest.warns(UserWarning, match="generated: 50 images are too few for a covariance of 64 .* at least 65"):
        sample_quality(found.rows(torch.arange(50)), reference_of(found, DIGITS), 1)


def test_tiny_sets_have_no_score_precision_or_recall(found: Features) -> None:
    few = found.rows(torch.arange(3))
    with pytest.warns(UserWarning):
        tiny = sample_quality(few, reference_of(found, DIGITS), 1)
    assert tiny.inception_score is tiny.precision is tiny.recall is None and tiny.kid is not None


def test_a_folder_of_kept_images_is_read_back(real: Tensor, tmp_path: Path) -> None:
    save_images(real[:12], tmp_path / "kept")
    assert [path.name for path in ImageFolder(tmp_path / "kept").files[:2]] == ["000000.png", "000001.png"]
    folder = ImageFolder(tmp_path / "kept")
    assert torch.equal(torch.stack([folder[i] for i in range(12)]), real[:12])
    with pytest.raises(ValueError, match="must be empty"):
        save_images(real[:2], tmp_path / "kept")


# ---------------------------------------------------------------------- extractors


def test_inceptions_spatial_features_are_those_of_adms_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.save({}, tmp_path / "random.pth")
    made = extract_features(
        torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), INCEPTION, tmp_path / "random.pth"
    )
    assert made.spatial is not None and made.spatial.shape == (2, 17 * 17 * 7)
    assert made.pooled.shape == (2, 2048) and made.logits is not None and made.logits.shape == (2, 1008)
    assert (made.spatial >= 0).all() and made.spatial.std() > 0


@pytest.mark.parametrize("name", ["digits", "digits_patches", "canvas"])
def test_class_accuracy_counts_matches(name: str) -> None:
    data, own = load_split(name, "test"), own_features(name)
    assert own is not None
    images = data.images(data.tokens)
    right = class_accuracy(images, data.labels, own)
    assert right >= 0.97
    assert class_accuracy(images, (data.labels + 1) % 10, own) <= 1 - right


def test_canvases_are_measured_in_features_of_their_own_classifier() -> None:
    data = load_split("canvas", "test")
    images = data.images(data.tokens[:100])
    found, classifier = extract_features(images, "orderrl-canvas"), load_classifier("canvas")
    torch.testing.assert_close(found.pooled, classifier.features(images).double())
    torch.testing.assert_close(found.logits, classifier(images).double())
    assert found.spatial is not None and found.spatial.shape == (100, 7 * 3 * 3)
    others = data.images(data.tokens[100:])
    near, far = (frechet_distance(shown, others, "orderrl-canvas") for shown in (images, images // 2))
    assert near < far


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
    monkeypatch.setitem(extractors.FEATURE_EXTRACTORS_REGISTRY, INCEPTION, FakeInception)
    torch.save({"w": torch.zeros(1)}, tmp_path / "inception.pth")
    coloured = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    value = frechet_distance(coloured, real, INCEPTION, weights=tmp_path / "inception.pth")
    assert value > 0
    assert FakeInception.weights == str(tmp_path / "inception.pth")
    assert extractors.FEATURE_EXTRACTORS_REGISTRY[INCEPTION] is FakeInception


def test_inception_without_a_network_is_a_one_line_error(real: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise URLError("no network\nsecond line")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", no_network)
    with pytest.raises(ValueError, match=r"cannot be downloaded.*pass weights=") as error:
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
        (
            lambda x: frechet_distance(x, x, "vgg"),
            "features='vgg'.*orderrl-digits, orderrl-canvas, inception-v3",
        ),
        (lambda x: frechet_distance(x.float(), x, DIGITS), "images must be uint8.*float32"),
        (lambda x: real_floor(extract_features(x[:3], DIGITS)), "at least 4 images.*got 3"),
        (lambda x: reference_of(x[:1], DIGITS), "n >= 2"),
        (lambda x: extract_features(x, DIGITS, Path("w.pth")), "orderrl-digits has its own, pass None"),
        (lambda x: sample_quality(Features("a", torch.zeros(2, 3)), reference_of(x, DIGITS)), "'a', but reference"),
        (lambda x: fid_infinity(extract_features(x[:2], DIGITS), reference_of(x, DIGITS)), "at least 3 samples.*got 2"),
    ],
)
def test_bad_input_is_named(call: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(8, 3, 8, 8, dtype=torch.uint8))


def test_kept_samples_are_an_image_folder_of_classes(tmp_path: Path) -> None:
    labels = torch.arange(12).repeat_interleave(2)
    images = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8)
    save_images(images, tmp_path / "kept", labels)
    found = torchvision.datasets.ImageFolder(tmp_path / "kept")  # sorts folders as text
    assert found.targets == labels.tolist() and found.classes == [f"{label:02d}" for label in range(12)]
    for (picture, _), image in zip(found, images, strict=True):
        assert torch.equal(torch.from_numpy(np.array(picture)).permute(2, 0, 1), image)
    folder = ImageFolder(tmp_path / "kept")
    read = torch.stack([folder[i] for i in range(24)])
    assert torch.equal(read, images)
    with pytest.raises(ValueError, match=r"labels must have shape \(24,\)"):
        save_images(images, tmp_path / "other", labels[:3])


@pytest.mark.parametrize("features", [CLIP, "clip-vit-b-32", "dinov2-vit-b-14"])
def test_cmmd_stands_beside_the_other_numbers_in_clip_features_alone(features: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (Features(features, torch.randn(40, 6, generator=generator)) for _ in range(2))
    found = sample_quality(x, reference_of(y, features), 1)
    assert found.cmmd == (pytest.approx(cmmd(x, y)) if features.startswith("clip") else None)
    statistics = replace(reference_of(y, features), found=None)
    assert sample_quality(x, statistics, 1).cmmd is None


# ---------------------------------------------------------------------- token sets as reference


@pytest.fixture
def token_folder(tmp_path: Path) -> Path:
    """Forty decoded images: backbone (with mirror images), planner and test."""
    source = FolderConfig(str(image_folder(tmp_path / "images", per_class=10)), image_size=8, flips=True)
    weights = save_tiny_vq(tmp_path / "tokenizer.safetensors")
    return tokenize_folder(tiny_vq(), source, tmp_path / "set", weights, shard_size=4)


def test_a_token_set_is_a_reference_of_all_its_decoded_images(token_folder: Path) -> None:
    splits = token_set_splits(token_folder)
    images = torch.cat([part.images(part.tokens[:]) for part in splits.values()])
    assert list(splits) == ["backbone", "planner", "test"] and len(images) == sum(map(len, splits.values()))
    found = open_reference(token_folder, DIGITS)
    expected = reference_of(images, DIGITS)
    assert found.source == f"{len(images)} images of the token set {token_folder}"
    np.testing.assert_allclose(found.pooled.mean, expected.pooled.mean, rtol=1e-6)
    np.testing.assert_allclose(found.pooled.covariance, expected.pooled.covariance, rtol=1e-6)
    assert found.found is not None and len(found.found) == len(images)


def test_token_images_come_in_any_order_over_the_bounds_of_splits(token_folder: Path) -> None:
    splits = token_set_splits(token_folder)
    images = torch.cat([part.images(part.tokens[:]) for part in splits.values()])
    read = TokenImages(list(splits.values()))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    assert len(read) == len(images) and torch.equal(torch.stack(read.__getitems__(order)), images[order])
    assert torch.equal(read[len(images) - 1], images[-1])


def test_a_damaged_token_set_is_refused(token_folder: Path) -> None:
    shard = next(token_folder.glob("test*tokens*.npy"))
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(ValueError, match="truncated or altered"):
        open_reference(token_folder, DIGITS)
