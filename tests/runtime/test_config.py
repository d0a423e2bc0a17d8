"""Hydra applications: what composes, what is explained, and what is refused in one line."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from omegaconf import DictConfig

from orderrl.backbones.presets import PRESETS
from orderrl.configs.schema import COMMANDS
from orderrl.runtime import config as config_module
from orderrl.runtime.config import compose, help_of, run_application

FILES = {
    "__init__.py": "",
    "schema.py": """from __future__ import annotations
from dataclasses import dataclass
from typing import Any
from orderrl.runtime.schema import MISSING, Node
from orderrl.runtime.values import at_least, one_of, setting

@dataclass
class Reward:
    form: str = setting("full", "how, full or cheap", one_of(("full", "cheap")))
    budgets: tuple[int, ...] = setting((1, 2, 4), "blocks a step, # included")
    mark: str = setting("a # b", "a text with a hash")

@dataclass
class Label:
    output_dir: str = setting("runs", "folder of the runs")

@dataclass
class Train(Label):
    seed: int = setting(0, "seed of everything")
    twice: int = setting("${seed}", "the seed again")
    reward: Reward = setting({}, "how it is rewarded")
    critic: Reward | None = setting(None, "how a critic is, null is none")
    extra: dict[str, Any] = setting({}, "anything")

@dataclass
class BC:
    name: str = setting("bc", "which agent")
    learning_rate: float = setting(1e-3, "step size")

@dataclass
class PPO:
    name: str = setting("ppo", "which agent")
    clip: float = setting(0.2, "clipping range")
    start: str = setting(MISSING, "where it starts")
    low: int = setting(1, "lower bound")
    high: int = setting(2, "upper bound")

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError(f"low={self.low} must not exceed high={self.high}")

@dataclass
class Data:
    name: str = setting(MISSING, "which data")
    list: tuple[int, ...] = setting([1], "values")

def nodes(overrides=()):
    kinds = {"label": "Label", "train": "Train", "agent/bc": "BC", "agent/ppo": "PPO", "data/_base": "Data"}
    defaults = {"label": [{"data": "digits"}], "train": [{"agent": "bc"}, {"data": "digits"}]}
    return {path: Node(f"{__name__}:{kind}", defaults=defaults.get(path, ())) for path, kind in kinds.items()}
""",
    "agent/fast.yaml": "defaults: [bc, _self_]\nlearning_rate: 0.1\n",
    "data/digits.yaml": "defaults: [_base, _self_]\nname: digits\nlist:\n  - 1\n  - 2\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    name = f"settings_{abs(hash(request.node.nodeid))}"
    for file, text in FILES.items():
        path = tmp_path / name / "configs" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(config_module, "CONFIGS", f"{name}.configs")
    return f"{name}.configs"


@pytest.fixture
def run(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[DictConfig]]]:
    """Runs the application ``train`` in an empty folder; returns the configurations that main was called with."""
    root, state = logging.getLogger(), Singleton.get_state()
    handlers, level = root.handlers[:], root.level
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def call(*arguments: str, main: Callable[[DictConfig], Any] = lambda config: None) -> list[DictConfig]:
        seen: list[DictConfig] = []

        def job(config: DictConfig) -> Any:
            seen.append(config)
            return main(config)

        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        run_application("train", job)
        return seen

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)
    Singleton.set_state(state)


def test_libraries_are_heard_from_warnings_on(
    run: Callable[..., list[DictConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: DictConfig) -> None:
        logging.getLogger("timm.models").info("found a checkpoint")
        logging.getLogger("timm.models").warning("no head")

    run(main=main)
    assert capsys.readouterr().out.splitlines() == ["no head"]


def _refusal(run: Callable[..., Any], capsys: pytest.CaptureFixture[str], *arguments: str, **options: Any) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*arguments, **options)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


# -- composing --------------------------------------------------------------------------------------------------------


def test_compose_resolves_and_follows_overrides(package: str) -> None:
    config = compose("train", ["agent=ppo", "seed=7", "agent.start=x"])
    assert config.agent == {"name": "ppo", "clip": 0.2, "start": "x", "low": 1, "high": 2}
    assert config.twice == 7 and "hydra" not in config


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sead=1"], ["sead", "did you mean seed", "output_dir"]),
        (["agent.learning=1"], ["agent.learning", "learning_rate", "name"]),
        (["agent=ppo", "agent.clp=1"], ["agent.clp", "did you mean clip", "start"]),
        (["nothing.at.all=1"], ["nothing", "seed"]),
        (["agent=pppo"], ["agent=pppo", "did you mean ppo", "bc, fast, ppo"]),
        (["data=imagenet"], ["data=imagenet", "digits"]),
        (["seed"], ["cannot read 'seed'", "key=value"]),
        (["seed=1,2"], ["--multirun", "seed=[1,2]"]),
        (["agent=runs/x/planner.safetensors"], ["agent=runs/x/planner", "bc, fast, ppo", "backbone.name=PATH"]),
        (["data='tokens:/a/b'"], ["data=tokens:/a/b is unknown", "digits", "data=tokens data.path=PATH"]),
        (["agent=/etc/passwd"], ["agent=/etc/passwd is unknown", "bc, fast, ppo"]),
        (["agent@seed=bc"], ["agent@seed=... cannot be moved to another place; write agent=CHOICE"]),
        ([f"seed={300 * '['}{300 * ']'}"], ["nested too deeply"]),
    ],
)
def test_what_is_unknown_is_refused_with_the_choices(
    package: str, run: Callable[..., Any], capsys: pytest.CaptureFixture[str], overrides: list[str], expected: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        compose("train", overrides)
    line = _refusal(run, capsys, *overrides)
    for part in expected:
        assert part in str(caught.value) and part in line
    assert "\n" not in str(caught.value)


def test_an_unknown_command_is_refused(package: str) -> None:
    with pytest.raises(ValueError, match="label, train"):
        compose("trian")


def test_compose_works_inside_an_application(package: str, run: Callable[..., list[DictConfig]]) -> None:
    inner: list[DictConfig] = []
    run("seed=1", main=lambda _: inner.append(compose("label")))
    assert inner[0].data.name == "digits"


# -- running ----------------------------------------------------------------------------------------------------------


def test_main_gets_the_resolved_configuration_and_hydra_writes_nothing(run: Callable[..., list[DictConfig]]) -> None:
    before = Path.cwd()
    (config,) = run("seed=5", "agent=bc")
    assert config == written_out(seed=5)
    assert Path.cwd() == before and not list(before.iterdir())
    assert "HYDRA_FULL_ERROR" not in os.environ


def written_out(seed: int) -> dict[str, Any]:
    """The fixture's configuration, resolved."""
    return {
        "agent": {"name": "bc", "learning_rate": 1e-3},
        "data": {"name": "digits", "list": [1, 2]},
        "output_dir": "runs",
        "seed": seed,
        "twice": seed,
        "reward": {"form": "full", "budgets": [1, 2, 4], "mark": "a # b"},
        "critic": None,
        "extra": {},
    }


@pytest.mark.parametrize("arguments", [["-m", "seed=1,2"], ["agent=bc", "--multirun", "seed=1,2"], ["seed=1,2", "-m"]])
def test_multirun(run: Callable[..., list[DictConfig]], arguments: list[str]) -> None:
    assert [config.seed for config in run(*arguments, "hydra/launcher=basic")] == [1, 2]
    written = [path for path in Path.cwd().rglob("*") if path.is_file()]
    assert [path.name for path in written] == ["multirun.yaml"]
    assert written[0].is_relative_to(Path.cwd() / "runs" / "multirun")


def test_multirun_refuses_what_is_unknown(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("-m", "agent=bc,pppo")
    assert capsys.readouterr().err == "error: agent=pppo is unknown (did you mean ppo?); choose one of bc, fast, ppo\n"


def test_cfg_job_prints_the_configuration(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--cfg", "job", "seed=8") == []
    assert "seed: 8" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError])
def test_wrong_input_found_by_main_is_one_line(
    run: Callable[..., Any], capsys: pytest.CaptureFixture[str], error: type[Exception]
) -> None:
    def main(config: DictConfig) -> None:
        raise error("budgets=(9,)\n  exceed the blocks")

    assert _refusal(run, capsys, main=main) == "error: budgets=(9,) exceed the blocks"


def test_a_missing_value_is_named(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert "agent.start=" in _refusal(run, capsys, "agent=ppo")


def test_the_full_error_can_be_asked_for(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def main(config: DictConfig) -> None:
        raise ValueError("no")

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="no"):
        run(main=main)
    with pytest.raises(Exception, match="nothing"):
        run("nothing=1")


def test_mistakes_of_the_program_keep_their_traceback(run: Callable[..., Any]) -> None:
    def main(config: DictConfig) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(main=main)


def test_interrupting_exits_with_130(run: Callable[..., Any]) -> None:
    def main(config: DictConfig) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run(main=main)
    assert caught.value.code == 130


def test_as_a_module_from_the_shell(package: str, tmp_path: Path) -> None:
    module = tmp_path / package.partition(".")[0] / "train.py"
    module.write_text(
        "from orderrl.runtime import config as config_module\n"
        f"config_module.CONFIGS = {package!r}\n"
        "def main(config):\n"
        "    print('seed', config.seed)\n"
        "    if config.seed < 0:\n"
        "        raise ValueError('seed must not be negative')\n"
        "if __name__ == '__main__':\n"
        "    config_module.run_application('train', main)\n"
    )
    work = tmp_path / "work"
    work.mkdir()
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-m", f"{module.parent.name}.train", *arguments]
        return subprocess.run(call, capture_output=True, text=True, cwd=work, env=environment)

    done, refused = start("seed=3"), start("seed=-1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "seed 3\n", "")
    assert (refused.returncode, refused.stderr) == (2, "error: seed must not be negative\n")
    assert not list(work.iterdir())


# -- help -------------------------------------------------------------------------------------------------------------


def test_documented_keys_are_the_leaves_with_the_meanings_of_their_fields(package: str) -> None:
    assert help_of("train").meanings == {
        "agent.name": "which agent",
        "agent.learning_rate": "step size",
        "data.name": "which data",
        "data.list": "values",
        "output_dir": "folder of the runs",
        "seed": "seed of everything",
        "twice": "the seed again",
        "reward.form": "how, full or cheap",
        "reward.budgets": "blocks a step, # included",
        "reward.mark": "a text with a hash",
        "critic": "how a critic is, null is none",
        "extra": "anything",
    }
    assert "agent.clip" in help_of("train", ["agent=ppo"]).meanings


def test_help_explains_groups_and_every_key(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("agent=ppo", "seed=4", "--help") == []
    text = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert rows[0].startswith("usage: python -m ")
    for row in (
        "agent bc, fast, ppo",
        "data digits",
        "agent.clip 0.2 clipping range",
        "agent.start ??? where it starts",
        "seed 4 seed of everything",
        "twice ${seed} the seed again",
        "reward.budgets [1, 2, 4] blocks a step, # included",
    ):
        assert row in rows
    assert "hydra" not in text


def test_help_refuses_unknown_choices(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert "bc, fast, ppo" in _refusal(run, capsys, "--help", "agent=pppo")


# -- the package's own configuration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes_and_every_key_has_a_meaning(command: str) -> None:
    compose(command)
    assert "" not in help_of(command).meanings.values()


def test_every_choice_of_every_group_composes_and_is_explained() -> None:
    one_of_a_family = {preset.family: name for name, preset in PRESETS.items()}
    alike = {*PRESETS} - {*one_of_a_family.values()}  # published backbones differ in their names
    seen = set()
    for command in COMMANDS:
        alone = command == "pretrain"  # others that have a group compose it alike
        new = []
        for group, choices in help_of(command).groups.items():
            others = [choice for choice in choices if (group, choice, alone) not in seen and choice not in alike]
            new.append([f"{group}={choice}" for choice in others])
            seen |= {(group, choice, alone) for choice in choices}
        for overrides in zip_longest(*new):  # one of every group at once
            chosen = [override for override in overrides if override]
            assert "" not in help_of(command, chosen).meanings.values(), (command, chosen)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["+agent.rate=1"], "there is no key agent.rate; keys here: learning_rate, name"),
        (["~reward.form"], "reward.form is missing: it can be changed, not removed"),
        (["agent=ppo", "agent.start=x", "agent.low=3"], "agent.low=3 must not exceed high=2"),
        (["reward.form=dear"], "reward.form='dear' is unknown; choose one of full, cheap"),
        (["critic={form:full,budgets:[1]}"], "critic.mark is missing"),
        (["+extra.a=1", "seed=x"], "seed must be a whole number, got 'x'"),
    ],
)
def test_values_are_checked_by_their_dataclass(package: str, overrides: list[str], line: str) -> None:
    with pytest.raises(ValueError) as caught:
        compose("train", overrides)
    assert str(caught.value).startswith(line)


def test_a_preset_holds_what_differs(package: str) -> None:
    config = compose("train", ["agent=fast", "+extra.a=1"])
    assert config.agent == {"name": "bc", "learning_rate": 0.1} and config.extra == {"a": 1}


def test_the_store_of_nodes_is_left_as_it_was(package: str) -> None:
    before = ConfigStore.instance().repo
    compose("train")
    assert ConfigStore.instance().repo is before and "train.yaml" not in before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 4.00 TiB for an array"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory:\n you tried"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    ],
)
def test_too_little_memory_is_one_line_that_says_what_to_make_smaller(
    run: Callable[..., list[DictConfig]], capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def main(config: DictConfig) -> None:
        raise error

    line = _refusal(run, capsys, main=main)
    assert line.startswith("error: too little memory (") and "batch_size" in line


def test_a_decompression_bomb_is_one_line(
    run: Callable[..., list[DictConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL.Image import DecompressionBombError

    def main(config: DictConfig) -> None:
        raise DecompressionBombError("Image size exceeds limit")

    assert _refusal(run, capsys, main=main) == "error: Image size exceeds limit"


def test_a_fault_of_the_program_keeps_its_traceback(run: Callable[..., list[DictConfig]]) -> None:
    def main(config: DictConfig) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(main=main)


@pytest.mark.parametrize("override", ["seed=abc", "seed=1e3", "reward.budgets=5", "reward.form=3", "twice=null"])
def test_a_wrong_type_is_refused_before_the_command_starts(
    run: Callable[..., list[DictConfig]], capsys: pytest.CaptureFixture[str], override: str
) -> None:
    def main(config: DictConfig) -> None:
        pytest.fail("work was done")

    assert override.partition("=")[0] in _refusal(run, capsys, override, main=main)
