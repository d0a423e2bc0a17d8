"""The key of an evaluation's rows: it changes with everything that determines them, files by their content."""

from __future__ import annotations

from pathlib import Path

import pytest

from orderrl import compose
from orderrl.data import load_split
from orderrl.evaluation.rows import evaluation_key
from tests.helpers import tiny_backbone


def key(*overrides: str) -> str:
    data = load_split("digits", "test")
    return evaluation_key(
        compose("evaluate", [*overrides]), tiny_backbone(8, 8, vocab_size=17, num_classes=10), data, []
    )


@pytest.mark.parametrize(
    "setting",
    [
        "classifier=timm:test_vit:{}",
        "features=timm:test_vit:{}",
        "feature_weights={}",
        "clip_weights={}",
        "reference={}",
    ],
)
def test_rows_are_made_again_when_a_file_changes(tmp_path: Path, setting: str) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"one")
    override = f"eval.{setting.format(file)}"
    before = key(override)
    assert before == key(override) != key()
    file.write_bytes(b"two")
    assert key(override) != before


def test_rows_are_made_again_when_a_folder_of_timm_changes(tmp_path: Path) -> None:
    override = f"eval.features=timm:local-dir:{tmp_path}"
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    before = key(override)
    (tmp_path / "model.safetensors").write_bytes(b"one")
    one = key(override)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert len({before, one, key(override)}) == 3


def test_files_are_found_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights.pth").write_bytes(b"one")
    before = key("eval.feature_weights='~/weights.pth'")
    (tmp_path / "weights.pth").write_bytes(b"two")
    assert key("eval.feature_weights='~/weights.pth'") != before


def test_rows_are_made_again_when_a_reference_of_images_changes(tmp_path: Path) -> None:
    """A picture replaced under its name, one more, and a hidden one, which is no picture."""
    override = f"eval.reference={tmp_path}"
    (tmp_path / "0.png").write_bytes(b"one")
    before = key(override)
    (tmp_path / ".hidden.png").write_bytes(b"one")
    assert key(override) == before
    (tmp_path / "0.png").write_bytes(b"two")
    replaced = key(override)
    (tmp_path / "1.png").write_bytes(b"three")
    assert len({before, replaced, key(override)}) == 3
