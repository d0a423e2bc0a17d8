"""A cache that cannot be written: whatever it holds is used, and what must be stored there says why it cannot be."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orderrl import compose
from orderrl.backbones import save_backbone
from orderrl.evaluate import evaluate
from orderrl.label import label
from orderrl.train import train
from tests.helpers import tiny_backbone
from tests.killing import table

EVALUATION = [
    *("labels.contexts=16", "eval.images=6", "eval.samples=0", "eval.features=null", "eval.states=8"),
    *("eval.reference_images=2", "eval.resamples=20", "eval.policies=[raster]", "eval.token_raster=[]"),
    "eval.planners=[newest]",
]
BC = ["agent=bc", "labels.contexts=16", "agent.steps=2", "planner.dim=32", "planner.stem=1"]


def places(home: Path, runs: str) -> list[str]:
    return [
        "backbone=digits",
        f"backbone.name={home / 'tiny.safetensors'}",
        f"cache_dir={home / 'cache'}",
        f"output_dir={home / runs}",
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache with labels and a planner that nobody may write to any more; an evaluation from before."""
    home = tmp_path_factory.mktemp("home")
    save_backbone(home / "tiny.safetensors", tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    train(compose("train", [*BC, *places(home, "before")]))
    evaluate(compose("evaluate", [*EVALUATION, *places(home, "before")]))
    inside = [home / "cache", *(home / "cache").rglob("*")]
    for path in inside:
        path.chmod(path.stat().st_mode & ~0o222)
    yield home
    for path in inside:
        path.chmod(path.stat().st_mode | 0o200)


def without_privileges(command: Callable[[], Any], output: Path) -> int:
    """Run a command in a process that may do what permissions allow and no more, even root's; its exit code."""

    def run() -> None:
        if os.geteuid() == 0 and sys.platform == "linux":
            header = (ctypes.c_uint32 * 2)(0x20080522, 0)
            ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)())  # no capabilities
        sys.stdout = output.open("w", buffering=1)
        try:
            command()
        except (ValueError, OSError) as error:
            print(f"error: {error}")
            os._exit(2)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def test_an_evaluation_reads_a_cache_that_it_can_not_write(home: Path, tmp_path: Path) -> None:
    config = compose("evaluate", [*EVALUATION, *places(home, "after")])
    assert without_privileges(lambda: evaluate(config), tmp_path / "out") == 0, (tmp_path / "out").read_text()
    shown = (tmp_path / "out").read_text()
    assert f"{home / 'cache'}: cannot be written (Permission denied); an interruption loses" in shown
    (before,), (after,) = ((home / runs / "evaluate").iterdir() for runs in ("before", "after"))
    assert table(before)["rows"] == table(after)["rows"]
    assert not (after / "unfinished").exists() and {path.name for path in after.iterdir()} == {
        path.name for path in before.iterdir()
    }


def test_training_and_labelling_find_what_is_there(home: Path, tmp_path: Path) -> None:
    for make, command, settings in ((train, "train", BC), (label, "label", BC[1:2])):
        config = compose(command, [*settings, *places(home, "found")])
        code = without_privileges(lambda make=make, config=config: make(config), tmp_path / "out")  # type: ignore[misc]
        assert code == 0 and "(cached" in (tmp_path / "out").read_text()


def test_what_would_have_to_be_stored_is_refused_before_the_work(home: Path, tmp_path: Path) -> None:
    config = compose("train", [*BC, "seed=5", *places(home, "refused")])
    assert without_privileges(lambda: train(config), tmp_path / "out") == 2
    assert (tmp_path / "out").read_text().splitlines()[-1] == (
        f"error: {home / 'cache'}: cannot be written (Permission denied); choose another cache_dir"
    )
