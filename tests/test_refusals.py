"""Every command, as the command line starts it: a wrong value ends it with code 2 and one line, before any work."""

from pathlib import Path

import pytest

from tests.helpers import run_command

REFUSED = [
    ("label", ["labels.contexts=abc"], "labels.contexts"),
    ("train", ["agent=ppo", "agent.learning_rate=inf"], "agent.learning_rate"),
    ("pretrain", ["training.steps=0"], "training.steps"),
    (
        "pretrain",
        ["backbone=none", "data=folder", "tokenizer=small", "data.root=nowhere", "tokenizer.training.ema=2"],
        "tokenizer.training.ema",
    ),
    ("tokenize", ["data.root=nowhere", "output=set", "tokenizer.path=x", "shard_size=1e3"], "shard_size"),
    ("evaluate", ["eval.samples=1"], "eval.samples"),
    ("generate", ["n=0"], "n must be"),
    ("rollouts", ["split=train"], "split="),
    ("analyze", ["injected=[0]"], "injected"),
    ("reproduce", ["runs=[[agent=bc],[agent=bc,agent.steps=0]]"], "agent.steps"),
]


@pytest.mark.parametrize(("command", "arguments", "said"), REFUSED, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("device", [False, True], ids=["value", "device"])
def test_a_wrong_value_is_one_line_and_code_2(
    command: str,
    arguments: list[str],
    said: str,
    device: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(command, [*arguments[:-1], "device=gpu"] if device else arguments, monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert ("device='gpu' is unknown" if device else said) in line
    assert not list(tmp_path.iterdir())
