"""What stands for files that others may change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from orderrl import compose
from orderrl.agents.agent import find_agent
from orderrl.agents.imitation import Config
from orderrl.factory import setup_of
from orderrl.runtime import sources
from orderrl.runtime.sources import file_versions, printable, source_identity
from orderrl.training import describe
from tests.helpers import tiny_backbone


def folder_of(root: Path, **contents: str) -> Path:
    root.mkdir()
    for name, content in contents.items():
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize("small", [True, False])
def test_another_content_is_another_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool) -> None:
    monkeypatch.setattr(sources, "SMALL", 100 if small else 1)
    root = folder_of(tmp_path / "x", a="one", b="two")
    seen = {source_identity(root), source_identity(root / "a")}
    (root / "a").write_text("six")
    os.utime(root / "a", (1, 1))
    seen |= {source_identity(root), source_identity(root / "a")}
    (root / "a").rename(root / "c")
    seen.add(source_identity(root))
    (root / "b").unlink()
    seen.add(source_identity(root))
    assert len(seen) == 6


def test_small_sources_are_known_by_content_alone(tmp_path: Path) -> None:
    """A copy, another time, or the same time and size with another content."""
    root, copy = (folder_of(tmp_path / name, a="one", b="two") for name in ("x", "y"))
    os.utime(copy / "a", (1, 1))
    before = source_identity(root)
    assert before == source_identity(copy) and source_identity(root / "a") == source_identity(copy / "a")
    state = (root / "a").stat()
    (root / "a").write_text("six")
    os.utime(root / "a", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert source_identity(root) != before


def test_large_sources_are_not_read_unless_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SMALL", 5)
    root = folder_of(tmp_path / "x", a="one", b="two")  # six bytes
    (root / "a").chmod(0)
    assert all("@" in version for version in file_versions([root / "a", root / "b"]))
    (root / "a").chmod(0o600)
    whole = source_identity(root, in_full=True)
    os.utime(root / "a", (1, 1))
    assert source_identity(root, in_full=True) == whole


def test_names_stand_for_themselves_and_what_is_no_file_is_missing(tmp_path: Path) -> None:
    assert source_identity(None) is None and source_identity("hf://owner/name/file.pt") == "hf://owner/name/file.pt"
    (tmp_path / "link").symlink_to(tmp_path / "link")
    assert file_versions([tmp_path / "nowhere", tmp_path / "link", tmp_path]) == ["missing"] * 3


def test_printable_names_are_one_line_and_stay_different() -> None:
    names = ["a\nb", "a\\nb", "a\tb", "é", "\udce9", "\\xe9", "\u202e", "a b"]
    shown = [printable(name) for name in names]
    assert len(set(shown)) == len(names) and all(text.isprintable() and text.encode() for text in shown)
    assert printable("schön, 'x'=[1]") == "schön, 'x'=[1]"


def test_imitated_policies_of_users_are_known_by_their_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "a_users_policy.py"
    module.write_text("def policy(observation, generator):\n    return observation['visible'].long().argmin(-1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = compose("train", ["agent=imitation", "data=digits"])
    setup = setup_of(config, tiny_backbone(8, 8, vocab_size=17, num_classes=10))

    def imitated(policy: str) -> Any:
        return describe(setup, "imitation", find_agent("imitation"), Config(policy=policy)).get("imitated")

    before = imitated("a_users_policy:policy")
    module.write_text(module.read_text().replace("argmin", "argmax"))
    assert before and imitated("a_users_policy:policy") != before
    assert imitated("raster") is None
