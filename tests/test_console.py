"""The command `orderrl`, and how much help pages and imports load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orderrl import __main__, __version__
from orderrl.configs.schema import COMMANDS

ROOT = Path(__file__).parents[1]
SLOW = {"timm", "torchrl", "tensordict", "torchvision", "wandb", "matplotlib", "sklearn", "scipy", "torch._dynamo"}


def output(*arguments: str) -> str:
    call = [sys.executable, "-m", "orderrl", *arguments]
    answer = subprocess.run(call, capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_all_commands_are_listed_with_a_line_each() -> None:
    lines = {line.split()[0]: line for line in output("--help").splitlines() if line.startswith("  ")}
    assert set(COMMANDS) < set(lines) == set(__main__.COMMANDS)
    assert all(len(line.split()) > 3 for line in lines.values())
    assert output("--version") == f"orderrl {__version__}\n"


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("trian", "did you mean train"),
        ("xyz", "choose one of train, evaluate"),
        ("ablate", "it is called analyze now"),
        ("pretrain_tokenizer", "it is called pretrain backbone=none now"),
    ],
)
def test_an_unknown_command_is_answered_with_the_right_one(command: str, answer: str) -> None:
    with pytest.raises(SystemExit, match=answer):
        __main__.main([command])


def test_a_command_runs_as_its_module_does() -> None:
    composed = output("label", "labels.contexts=7", "--cfg", "job")
    assert "contexts: 7" in composed


@pytest.mark.parametrize(
    ("statement", "fewer_than"),
    [
        ("import orderrl", 450),
        ("import orderrl.envs", 450),
        ("import orderrl.label", 2398),
        ("import sys; from orderrl.__main__ import main; main(['train', '--help'])", 2398),
    ],
)
def test_imports_load_what_they_need(statement: str, fewer_than: int) -> None:
    count = f"{statement}; import sys; print('\\n' + ' '.join(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    loaded = set(answer.stdout.splitlines()[-1].split())
    assert len(loaded) < fewer_than and not loaded & SLOW
