"""The command `orderrl`, and how much help pages and imports load."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orderrl import __main__, __version__
from orderrl.configs.schema import COMMANDS
from orderrl.runtime.completion import completion_script

ROOT = Path(__file__).parents[1]
SLOW = {
    *("timm", "torchrl", "tensordict", "torchvision", "torch_fidelity", "torch._dynamo", "torch.distributed.fsdp"),
    *("wandb", "matplotlib", "sklearn", "scipy.stats", "huggingface_hub"),
}
"""What takes long to import beside PyTorch."""


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
    assert "contexts: 7" in output("label", "labels.contexts=7", "--cfg", "job")


def test_a_terminal_without_unicode_gets_like_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr(sys, "argv", ["orderrl"])
    __main__.main(["evaluate", "--help"])
    print("gain ↑ 0.19 ± 0.01, ≥ −3 … ☃", flush=True)
    shown = written.getvalue().decode("ascii")
    assert "Frechet" in shown and shown.endswith("gain ^ 0.19 +- 0.01, >= -3 ... ?\n")


COMPLETING = {"bash": "", "zsh": "autoload -U compinit bashcompinit; compinit -u -D; bashcompinit;"}


@pytest.mark.parametrize("shell", COMPLETING)
def test_the_shell_completes_commands_groups_and_keys(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    (tmp_path / "script").write_text(completion_script(["train", "evaluate", "compare"]))
    tab = 'source ./script; COMP_LINE="$0"; COMP_POINT=${#0}; _orderrl; echo "${COMPREPLY[@]}"'

    def completed(line: str) -> list[str]:
        call = [shell, "-c", COMPLETING[shell] + tab, line]
        answer = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, check=True)
        assert not answer.stderr
        start = line.split(" ")[-1]  # which zsh looks for itself, and bash behind "="
        return [word for word in answer.stdout.split() if shell == "bash" or word.startswith(start)]

    assert completed("orderrl tr") == ["train"]
    assert completed("orderrl ")[:3] == ["train", "evaluate", "compare"]
    choice = {"bash": "ppo", "zsh": "agent=ppo"}[shell]
    assert completed("orderrl train data=canvas agent=p") == [choice]
    assert completed("orderrl train agent=ppo agent.gae") == ["agent.gae_lambda="]
    assert completed("orderrl evaluate eval.resamp") == ["eval.resamples="]
    assert completed("orderrl compare runs/") == []  # the shell's own completion takes files


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import orderrl, orderrl.envs", {*SLOW, "torch", "hydra"}),
        (f"import {', '.join(f'orderrl.{name}' for name in COMMANDS)}", SLOW),
        ("from orderrl.__main__ import main; main(['train', '--help'])", SLOW),
    ],
)
def test_imports_load_what_they_need(statement: str, absent: set[str]) -> None:
    """What only some uses need is imported when they need it, so that answers to wrong input come soon."""
    code = f"import sys; {statement}; print('\\n' + ' '.join(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    assert not absent & set(answer.stdout.splitlines()[-1].split())
