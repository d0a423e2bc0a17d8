"""The key of an evaluation's rows: it changes with everything that determines them, files by their content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orderrl import compose
from orderrl.data import load_split
from orderrl.evaluation.settings import EvalConfig
from orderrl.evaluation.table import evaluation_key
from orderrl.factory import setup_of
from tests.helpers import tiny_backbone


def key(**settings: Any) -> str:
    setup = setup_of(compose("evaluate"), tiny_backbone(8, 8, vocab_size=17, num_classes=10))
    return evaluation_key(EvalConfig(**settings), setup, load_split("digits", "test"), [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classifier", "timm:test_vit:{}"),
        ("features", "timm:test_vit:{}"),
        ("feature_weights", "{}"),
        ("clip_weights", "{}"),
        ("reference", "{}"),
    ],
)
def test_rows_are_made_again_when_a_file_changes(tmp_path: Path, name: str, value: str) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"one")
    given = {name: value.format(file)}
    before = key(**given)
    assert before == key(**given) != key()
    file.write_bytes(b"two")
    assert key(**given) != before


def test_rows_are_made_again_when_a_backbone_in_raster_order_changes(tmp_path: Path) -> None:
    (tmp_path / "raster.safetensors").write_bytes(b"one")
    given = {"token_raster": ["own", str(tmp_path / "raster.safetensors")]}
    before = key(**given)
    (tmp_path / "raster.safetensors").write_bytes(b"two")
    assert key(**given) != before


def test_which_planners_there_are_is_known_by_the_policies_alone() -> None:
    assert key(planners=["a.safetensors"]) == key() != key(samples=2)


def test_rows_are_made_again_when_a_folder_of_timm_changes(tmp_path: Path) -> None:
    features = f"timm:local-dir:{tmp_path}"
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    before = key(features=features)
    (tmp_path / "model.safetensors").write_bytes(b"one")
    one = key(features=features)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert len({before, one, key(features=features)}) == 3


def test_files_are_found_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights.pth").write_bytes(b"one")
    before = key(feature_weights="~/weights.pth")
    (tmp_path / "weights.pth").write_bytes(b"two")
    assert key(feature_weights="~/weights.pth") != before


def test_rows_are_made_again_when_a_reference_of_images_changes(tmp_path: Path) -> None:
    """A picture replaced under its name, one more, and a hidden one, which is no picture."""
    reference = str(tmp_path)
    (tmp_path / "0.png").write_bytes(b"one")
    before = key(reference=reference)
    (tmp_path / ".hidden.png").write_bytes(b"one")
    assert key(reference=reference) == before
    (tmp_path / "0.png").write_bytes(b"two")
    replaced = key(reference=reference)
    (tmp_path / "1.png").write_bytes(b"three")
    assert len({before, replaced, key(reference=reference)}) == 3
