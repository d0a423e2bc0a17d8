"""Runs write what they promise, caches hold whole entries only, progress stays readable."""

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image

from orderrl.runtime import run as runs
from orderrl.runtime.cache import Cache, fingerprint
from orderrl.runtime.config import compose
from orderrl.runtime.loggers import register_logger
from orderrl.runtime.progress import progress
from orderrl.runtime.run import Run
from orderrl.runtime.storage import write_json


@dataclass
class Setting:
    name: str
    sizes: tuple[int, ...]


# -- fingerprint ------------------------------------------------------------------------------------------------------


def test_fingerprint_ignores_the_order_of_keys_and_the_kind_of_container() -> None:
    one = fingerprint({"a": [1, 2], "b": {"c": Path("x/y"), "d": None}})
    assert one == fingerprint({"b": {"d": None, "c": "x/y"}, "a": (1, 2)})
    assert one == fingerprint(OmegaConf.create({"b": {"d": None, "c": "x/y"}, "a": [1, 2]}))
    assert len(one) == 16 and int(one, 16) >= 0


def test_fingerprint_is_the_same_in_another_process() -> None:
    code = "from orderrl.runtime.cache import fingerprint; print(fingerprint({'a': {'x', }.pop(), 'b': 0.1}))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == fingerprint({"b": 0.1, "a": "x"})


@pytest.mark.parametrize(
    "other", [{"a": 2}, {"a": "1"}, {"b": 1}, {"a": True}, {"a": [1]}, {"a": None}, {"a": 1, "b": None}, [["a", 1]]]
)
def test_fingerprint_tells_values_apart(other: Any) -> None:
    assert fingerprint(other) != fingerprint({"a": 1})


def test_fingerprint_reads_dataclasses() -> None:
    assert fingerprint(Setting("x", (1, 2))) == fingerprint({"name": "x", "sizes": [1, 2]})
    assert fingerprint(Setting("x", (1, 2))) != fingerprint(Setting("x", (2, 1)))


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", Setting, {"a": lambda: 0}, {1: "a"}])
def test_fingerprint_refuses_what_has_no_plain_value(value: Any) -> None:
    with pytest.raises(TypeError, match="fingerprint"):
        fingerprint(value)


# -- runs -------------------------------------------------------------------------------------------------------------


def _config(tmp_path: Path, **logger: str) -> dict[str, Any]:
    return {"output_dir": str(tmp_path), "seed": 3, "logger": {"name": "local", **logger}}


def test_a_run_writes_its_folder(tmp_path: Path) -> None:
    with Run("train", OmegaConf.create({**_config(tmp_path), "copy_of_seed": "${seed}"})) as run:
        run.log({"loss": 1.5, "gain": float("nan")}, step=1)
        run.log({"loss": 1.25}, step=2)
        run.write_json("results.json", {"rows": [{"x": float("inf"), "y": 1.0}]})
    assert run.folder.parent == tmp_path / "train"
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["copy_of_seed"] == 3
    versions = json.loads((run.folder / "versions.json").read_text())
    assert {"python", "platform", "orderrl", "torch", "torchrl", "git"} <= versions.keys()
    assert versions["orderrl"] and versions["torch"]
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] == 1.5 and lines[0]["gain"] is None
    assert 0 <= lines[0]["time"] <= lines[1]["time"]
    assert json.loads((run.folder / "results.json").read_text()) == {"rows": [{"x": None, "y": 1.0}]}


def test_metrics_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    with Run("train", _config(tmp_path)) as run:
        run.log({"loss": 1.0}, step=0)
        assert json.loads((run.folder / "metrics.jsonl").read_text())["loss"] == 1.0


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    folders: list[Path] = []

    def start() -> None:
        with Run("train", _config(tmp_path)) as run:
            folders.append(run.folder)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 6


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Weights & Biases is told, without it."""
    calls: list[Any] = []

    class Fake:
        @staticmethod
        def init(**settings: Any) -> type["Fake"]:
            calls.append(settings)
            return Fake

        @staticmethod
        def log(values: dict[str, Any], step: int | None = None) -> None:
            calls.append((values, step))

        @staticmethod
        def finish(exit_code: int) -> None:
            calls.append(exit_code)

        Image = staticmethod(str)
        Error = RuntimeError

    monkeypatch.setitem(sys.modules, "wandb", Fake)
    return calls


def test_wandb_gets_the_same_metrics_and_figures(tmp_path: Path, fake_wandb: list[Any]) -> None:
    with (
        pytest.raises(RuntimeError),
        Run("train", _config(tmp_path, name="wandb", mode="offline", project="p")) as run,
    ):
        run.log({"loss": 1.0}, step=4)
        run.log_figures([tmp_path / "gain.png"])
        raise RuntimeError
    settings, line, figures, code = fake_wandb
    assert (settings["project"], settings["mode"], settings["dir"]) == ("p", "offline", run.folder)
    assert line == ({"loss": 1.0}, 4) and code == 1
    assert figures == ({"figures/gain": str(tmp_path / "gain.png")}, None)
    assert json.loads((run.folder / "metrics.jsonl").read_text())["loss"] == 1.0


def test_tensorboard_gets_the_same_metrics_and_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (4, 3), "red").save(tmp_path / "gain.png")
    with Run("train", _config(tmp_path, name="tensorboard")) as run:
        run.log({"loss": 1.5, "gain": float("nan")}, step=1)
        run.log({"loss": 1.25}, step=2)
        run.log_figures([tmp_path / "gain.png"])
    found = EventAccumulator(str(run.folder)).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 1.5), (2, 1.25)]
    assert (found.Images("figures/gain")[0].width, found.Images("figures/gain")[0].height) == (4, 3)


def test_what_cannot_start_a_log_is_refused() -> None:
    with pytest.raises(ValueError, match="logger 'wrong' has no method start"):
        register_logger("wrong", object())


def start_wandb(tmp_path: Path, environment: dict[str, str], **logger: str) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own, on a machine where nobody is logged in to W&B."""
    program = (
        "import orderrl.runtime.run, sys\n"
        f"with orderrl.runtime.run.Run('train', {_config(tmp_path / 'runs', name='wandb', **logger)!r}) as run:\n"
        "    run.log({'loss': 1.0}, 1)\n"
        "    print(run.logs[-1].run.settings.mode, run.logs[-1].run.settings.project)\n"
    )
    known = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path / "config")}
    call = [sys.executable, "-c", program]
    return subprocess.run(call, env={**known, **home, **environment}, capture_output=True, text=True, cwd=tmp_path)


@pytest.mark.parametrize(
    ("environment", "logger", "mode"),
    [
        ({"WANDB_MODE": "offline"}, {}, "offline"),
        ({"WANDB_MODE": "disabled"}, {}, "disabled"),
        ({"WANDB_DISABLED": "true"}, {}, "disabled"),
        ({"WANDB_MODE": "online"}, {"mode": "offline"}, "offline"),
        ({"WANDB_DISABLED": "true"}, {"mode": "offline"}, "offline"),
    ],
)
def test_the_environment_of_wandb_decides_where_the_config_does_not(
    environment: dict[str, str], logger: dict[str, str], mode: str, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    done = start_wandb(tmp_path, {**environment, "WANDB_PROJECT": "mine"}, **logger)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == mode and (mode == "disabled" or done.stdout.split()[1] == "mine")


def test_nobody_logged_in_to_wandb_is_one_line_and_leaves_no_folder(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = start_wandb(tmp_path, {})
    assert done.stderr.splitlines()[-1].startswith("ValueError: logger=wandb cannot be started: ")
    assert "logger.mode=offline" in done.stderr.splitlines()[-1]
    assert not any((tmp_path / "runs" / "train").iterdir())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["logger=aim"], "choose one of local, tensorboard, wandb"),
        (["logger=wandb", "logger.mode=of"], r"logger\.mode='of' is unknown; choose one of online, offline, disabled"),
    ],
)
def test_an_unknown_logger_or_mode_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose("train", overrides)


def test_wandb_is_not_imported_unless_asked_for() -> None:
    code = "import sys, orderrl.runtime.run; assert 'wandb' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_write_json_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_no_git_revision_outside_the_packages_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "site-packages" / "orderrl"
    inside.mkdir(parents=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(runs, "__file__", str(inside / "runtime" / "run.py"))
    assert runs.git_revision() is None
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "orderrl" / "runtime" / "run.py"))
    revision = runs.git_revision()
    assert revision is not None and len(revision["commit"]) == 40 and revision["dirty"] is False
    (tmp_path / "new").touch()
    assert (runs.git_revision() or {})["dirty"] is True


# -- cache ------------------------------------------------------------------------------------------------------------


def _store(cache: Cache, key: str, text: str = "x", **description: Any) -> None:
    with cache.store("labels", key, description) as folder:
        (folder / "data").write_text(text)


def test_an_entry_is_found_with_its_description(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert cache.find("labels", "k") is None and cache.newest("labels") is None
    _store(cache, "k", backbone="digits", path=Path("a/b"))
    folder = cache.find("labels", "k")
    assert folder == cache.folder("labels", "k") and folder is not None
    assert (folder / "data").read_text() == "x"
    entry = json.loads((folder / "key.json").read_text())
    assert entry["kind"] == "labels" and entry["key"] == "k"
    assert entry["description"] == {"backbone": "digits", "path": "a/b"}
    assert cache.find("planners", "k") is None


def test_an_entry_appears_only_when_it_is_complete_and_failures_leave_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with pytest.raises(RuntimeError), cache.store("labels", "k", {}) as folder:
        (folder / "data").write_text("half")
        assert cache.find("labels", "k") is None and cache.newest("labels") is None
        raise RuntimeError
    assert cache.find("labels", "k") is None
    assert not list((tmp_path / "labels").iterdir())


def test_of_concurrent_writers_the_first_one_wins(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with cache.store("labels", "k", {}) as slow:
        (slow / "data").write_text("slow")
        _store(cache, "k", "fast")
    assert (cache.folder("labels", "k") / "data").read_text() == "fast"
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["k"]


def test_an_entry_that_lost_its_key_is_made_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    _store(cache, "k", "old")
    (cache.folder("labels", "k") / "key.json").unlink()
    assert cache.find("labels", "k") is None
    _store(cache, "k", "new")
    assert (cache.folder("labels", "k") / "data").read_text() == "new"


def test_newest_asks_the_description(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for key, seed in (("c", 0), ("a", 1), ("b", 0)):
        _store(cache, key, seed=seed)
    assert cache.newest("labels") == cache.folder("labels", "b")
    assert cache.newest("labels", lambda description: description["seed"] == 1) == cache.folder("labels", "a")
    assert cache.newest("labels", lambda description: description["seed"] == 2) is None


# -- progress ---------------------------------------------------------------------------------------------------------


def test_progress_off_a_terminal_prints_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(5000, "counting", "numbers") as advance:
        for _ in range(5000):
            advance()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("counting: 5000/5000 numbers, ") and "numbers/s" in lines[0]


def test_plain_progress_prints_at_intervals_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("orderrl.runtime.progress.time.monotonic", lambda: now)
    with progress(100, "training", "steps") as advance:
        for _ in range(100):
            now += 0.5
            advance(note="loss 1.5")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training: 20/100 steps, 2 steps/s, 0:00:10 passed, 0:00:40 left, loss 1.5"
    assert len(lines) == 5 and lines[-1] == "training: 100/100 steps, 2 steps/s, 0:00:50 passed, loss 1.5"


def test_a_terminal_gets_a_bar_with_rate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress(50, "orders of a [/b] [red]c.safetensors", "numbers") as advance:  # of a folder with brackets
        advance(50, "d [/e]")
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert "orders of a [/b] [red]c.safetensors" in output and "50/50" in output and "d [/e]" in output


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_gets_a_bar_where_it_can_move(
    widgets: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("orderrl.runtime.progress.find_spec", lambda name: widgets or None)
    monkeypatch.setattr("rich.live.Live.start", lambda live, refresh: shown.append("bar"))
    monkeypatch.setattr("rich.live.Live.stop", lambda live: None)
    with progress(50, "counting", "numbers") as advance:
        advance(50)
    assert bool(shown) == widgets
    assert ("counting: 50/50" in capsys.readouterr().out) != widgets
