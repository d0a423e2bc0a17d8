"""Old names of commands and keys are answered with the new ones."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from orderrl import compose
from orderrl.runtime.renamed import COMMANDS, KEYS, with_new_names


@pytest.mark.parametrize(("old", "new"), COMMANDS.items())
def test_an_old_command_says_in_one_line_what_it_is_called_now(old: str, new: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"orderrl.{old} is called {new} now"):
        importlib.import_module(f"orderrl.{old}")
    assert importlib.import_module(f"orderrl.{new.split()[0]}")


def test_an_old_command_line_ends_in_one_line() -> None:
    ended = subprocess.run([sys.executable, "-m", "orderrl.ablate"], capture_output=True, text=True, timeout=60)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode != 0 and "python -m orderrl.analyze" in line


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("grid=canvas", "suite=canvas"),
        ("room=null", "headroom=null"),
        ("room.draws=[1]", "headroom.draws=[1]"),
        ("+room.steps=4", "+headroom.steps=4"),
        ("~room", "~headroom"),
    ],
)
def test_an_old_key_is_taken_by_its_new_name(given: str, taken: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert with_new_names([given, "seed=1"]) == [taken, "seed=1"]
    (line,) = capsys.readouterr().err.splitlines()
    assert any(line == f"{old} is called {new} now" for old, new in KEYS.items())


def test_what_only_looks_like_an_old_key_stays() -> None:
    others = ["name=grid", "backbone.grid=1", "gridded=2", "roomy.draws=3", "--help", "policy=room=1"]
    assert with_new_names(others) == others


def test_a_config_is_composed_of_old_keys() -> None:
    assert compose("reproduce", ["grid=canvas"]) == compose("reproduce", ["suite=canvas"])
    assert compose("analyze", ["room=null"]).headroom is None
