"""What an unfinished job keeps: pieces, states, and what happens when they are damaged or cannot be written."""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from orderrl import compose
from orderrl.backbones import save_backbone
from orderrl.data import TokenSet
from orderrl.label import label
from orderrl.labels import LABELS, Label, label_part, plan_parts
from orderrl.oracle import LabelConfig, label_contexts, random_contexts
from orderrl.runtime import job as resuming
from orderrl.runtime.job import Job, finish
from orderrl.runtime.parts import assemble, make_parts, missing_parts, part_name
from orderrl.runtime.run import Run
from orderrl.train import train
from tests.helpers import tiny_backbone
from tests.killing import contents

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def work(tmp_path: Path) -> Job:
    return Job(tmp_path, "job", seconds=0)


class Logged(Run):
    """A run that keeps what is logged to it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.rows.append({**metrics, "step": step})


def ignore(count: float = 1, note: str = "") -> None:
    """A progress bar that nobody sees."""


# ---------------------------------------------------------------------- pieces


def test_a_piece_is_made_once(work: Job) -> None:
    made = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"x": torch.arange(3), "name": "a", "nested": [1.5, None]}

    first, second = work.piece("a", make), work.piece("a", make)
    assert len(made) == 1 and torch.equal(first["x"], second["x"]) and second["nested"] == [1.5, None]
    assert len(list(work.folder.glob("*.pt"))) == 1


def test_the_folder_goes_when_the_job_is_done_and_stays_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Job(tmp_path, "job") as work:
        work.store("a", 1)
        raise RuntimeError
    with Job(tmp_path, "job") as work:
        assert work.load("a") == 1
    assert not work.folder.exists()


def test_what_an_interruption_at_the_very_end_left_is_removed_and_its_metrics_are_not_lost(tmp_path: Path) -> None:
    work = Job(tmp_path, "job")
    work.history.append({"step": 1.0, "loss": 0.5})
    work.publish(lambda: None)
    del work  # as if its process were gone
    run = Logged()
    finish(tmp_path, "other", run)
    assert run.rows == []
    finish(tmp_path, "job", run)
    finish(tmp_path, "job", run)
    assert run.rows == [{"step": 1.0, "loss": 0.5}] and not list((tmp_path / "unfinished").iterdir())


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_a_damaged_piece_is_made_again_and_said_so(work: Job, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    work.store("a", torch.arange(100))
    work.store("b", torch.arange(5))
    (path,) = work.folder.glob("a.*.pt")
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[:-40], "altered": content[:-400] + b"x" + content[-399:], "empty": b""}[damage]
    )
    with pytest.raises(ValueError, match="truncated or altered"):
        work.load("a")
    assert work.piece("a", lambda: "new") == "new" and work.load("b").tolist() == [0, 1, 2, 3, 4]
    assert f"{path}: is truncated or altered; making it again" in capsys.readouterr().out


def test_a_missing_piece_is_named(work: Job) -> None:
    with pytest.raises(ValueError, match="a is missing; start the command again"):
        work.load("a")


def test_what_a_write_left_aside_is_removed_at_the_next_start(tmp_path: Path) -> None:
    Job(tmp_path, "job").store("a", 1)
    (tmp_path / "unfinished" / "job" / ".b.123.partial").write_bytes(b"half")
    again = Job(tmp_path, "job")
    assert again.load("a") == 1 and not list(again.folder.glob(".*.partial"))


def test_the_same_job_in_another_process_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    code = f"import time; from orderrl.runtime.job import Job; w = Job({str(tmp_path)!r}, 'job'); "
    code += "w.store('a', 1); print('ready', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        mine = Job(tmp_path, "job")
        assert mine.folder.name == "job-2" and not mine.has("a")
    finally:
        other.kill()
        other.wait()
    assert Job(tmp_path, "job").load("a") == 1, "the lock of a killed process is free"


# ---------------------------------------------------------------------- a full disk


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A disk that is full while the list's only entry is true: nothing can be flushed to it."""
    state, flush = [False], os.fsync

    def refuse(file: int) -> None:
        if state[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(file)

    monkeypatch.setattr(resuming.os, "fsync", refuse)
    yield state


def test_a_full_disk_is_an_error_and_leaves_what_was_good(work: Job, full: list[bool]) -> None:
    work.store("a", "old")
    full[0] = True
    for name in ("a", "b"):
        with pytest.raises(OSError, match="No space left on device"):
            work.store(name, "new")
    assert work.load("a") == "old" and not work.has("b") and not list(work.folder.glob(".*.partial"))


def test_a_disk_that_fills_up_while_pytorch_writes_is_the_same_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match="No space left"):
        resuming._write(Path("/dev/full"), torch.zeros(100_000))


def test_labelling_goes_on_after_a_full_disk(tmp_path: Path, full: list[bool]) -> None:
    save_backbone(tmp_path / "tiny.safetensors", tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    overrides = [
        "backbone=digits",
        f"backbone.name={tmp_path / 'tiny.safetensors'}",
        "labels.contexts=30",
        "labels.shard_size=8",
    ]
    overrides += ["labels.batch_size=8", f"output_dir={tmp_path / 'runs'}", f"cache_dir={tmp_path / 'cache'}"]
    config = compose("label", overrides)
    whole = contents(label(config) / "contexts", "*")
    config.cache_dir = str(tmp_path / "other")
    store = Job.store
    stored: list[str] = []

    def fill_up(self: Job, name: str, value: Any) -> None:
        full[0] = len(stored) == 2
        stored.append(name)
        store(self, name, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "store", fill_up)
        with pytest.raises(OSError, match="No space left on device"):
            label(config)
    full[0] = False
    (folder,) = (tmp_path / "other" / "unfinished").iterdir()
    good = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pt")}
    assert len(good) == 2 and not (tmp_path / "other" / "labels").exists()
    assert contents(label(config) / "contexts", "*") == whole


# ---------------------------------------------------------------------- loops


class Loop:
    """A little training with every kind of part."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.last = nn.Linear(4, 1)
        self.network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), self.last)
        self.optimizer = torch.optim.AdamW(self.network.parameters())
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, 20)
        self.generator = torch.Generator().manual_seed(0)
        self.best: dict[str, Any] = {"loss": 1e9}
        self.seen: list[float] = []

    def run(self, work: Job | None, until: int = 20) -> list[float]:
        steps = (work or Job()).steps(
            20, network=self.network, optimizer=self.optimizer, schedule=self.schedule,
            generator=self.generator, best=self.best, seen=self.seen,
        )  # fmt: skip
        for step in steps:
            if step == until:
                raise InterruptedError
            x = torch.randn(8, 4, generator=self.generator)
            loss = (self.network(x) - x.sum(1, keepdim=True)).pow(2).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.seen.append(loss.item())
            if loss.item() < self.best["loss"]:
                self.best |= {"loss": loss.item(), "bias": self.last.bias.detach().clone()}
        return [*self.seen, *(value.item() for p in self.network.parameters() for value in p.detach().flatten())]


@pytest.mark.parametrize("interruptions", [[1], [7], [19], [3, 8, 9]])
def test_a_loop_that_continues_does_what_it_would_have_done(
    tmp_path: Path, interruptions: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = Loop().run(None)
    for until in interruptions:
        with pytest.raises(InterruptedError), Job(tmp_path, "job", seconds=0) as work:
            Loop().run(work, until)
        torch.rand(3)  # whatever happens in between
    with Job(tmp_path, "job", seconds=0) as work:
        again = Loop()
        assert again.run(work) == expected
    assert again.best["loss"] == min(again.seen) and again.best["bias"].shape == (1,)
    assert f"continuing after step {interruptions[-1]} of 20" in capsys.readouterr().out


def test_a_damaged_state_is_refused_by_name_and_an_older_one_is_not_taken_in_silence(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError), Job(tmp_path, "job", seconds=0) as work:
        Loop().run(work, 5)
    (path,) = work.folder.glob("state.*.pt")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"state\..*truncated or altered.*remove it"):
        Loop().run(Job(tmp_path, "job"))
    path.unlink()
    with Job(tmp_path, "job") as work:
        assert Loop().run(work) == Loop().run(None)


def test_states_are_kept_no_more_often_than_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    monkeypatch.setattr(Job, "_keep", lambda self, step, parts: kept.append(step))
    now = [0.0]
    monkeypatch.setattr(resuming.time, "monotonic", lambda: now[0])
    for _ in Job(tmp_path, "job", seconds=10).steps(100):
        now[0] += 3
    assert kept == list(range(4, 100, 4))


# ---------------------------------------------------------------------- shards of labels


SETTINGS = LabelConfig(contexts=50, batch_size=4)


def shards_of(data: TokenSet) -> tuple[Any, list[range]]:
    contexts = random_contexts(SETTINGS, len(data), tiny_backbone().geometry.num_blocks)
    return contexts, plan_parts(contexts, SETTINGS.batch_size, 10)


def labels_of(backbone: Any, data: TokenSet, contexts: Any) -> Label:
    return lambda rows: label_contexts(backbone, data.tokens, data.labels, SETTINGS, contexts.select(rows))


@pytest.mark.parametrize("shard_size", [1, 7, 10, 50, 1000])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_shards_are_runs_of_whole_batches(data: TokenSet, shard_size: int, batch_size: int) -> None:
    contexts, _ = shards_of(data)
    shards = plan_parts(contexts, batch_size, shard_size)
    assert [row for shard in shards for row in shard] == list(range(50))
    assert all(len(shard) >= min(shard_size, 50) for shard in shards[:-1])
    batches, start = set(), 0
    for count in contexts.length.bincount().tolist():
        batches |= {start + offset for offset in range(0, count, batch_size)}
        start += count
    assert {shard.start for shard in shards} <= batches


def test_shards_give_what_the_whole_gives_to_the_last_bit(work: Job, data: TokenSet, tmp_path: Path) -> None:
    backbone = tiny_backbone()
    contexts, shards = shards_of(data)
    whole = [TensorDict(part) for part in label_contexts(backbone, data.tokens, data.labels, SETTINGS, contexts)]
    make_parts(work, LABELS, shards, lambda part: label_part(labels_of(backbone, data, contexts), part, ignore))
    assemble(work, LABELS, shards, tmp_path / "contexts")
    found = TensorDict.load_memmap(str(tmp_path / "contexts"))
    assert len(shards) > 3 and found.batch_size == torch.Size([50])
    for key in whole[0].keys():  # noqa: SIM118 - not a mapping
        assert torch.equal(found[key], torch.cat([part[key] for part in whole])), key


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_shard_that_is_damaged_or_missing_is_made_again_alone(
    work: Job, data: TokenSet, tmp_path: Path, damage: str
) -> None:
    backbone = tiny_backbone()
    contexts, shards = shards_of(data)
    made: list[range] = []

    def make(shard: range) -> dict[str, torch.Tensor]:
        made.append(shard)
        return label_part(labels_of(backbone, data, contexts), shard, ignore)

    make_parts(work, LABELS, missing_parts(work, LABELS, shards), make)
    assemble(work, LABELS, shards, tmp_path / "before")
    (path,) = work.folder.glob(f"{part_name(LABELS, shards[1])}.*.pt")
    path.write_bytes(path.read_bytes()[:1000]) if damage == "truncated" else path.unlink()
    with pytest.raises(ValueError, match="truncated or altered" if damage == "truncated" else "is missing"):
        assemble(work, LABELS, shards, tmp_path / "after")
    made.clear()
    make_parts(work, LABELS, missing_parts(work, LABELS, shards), make)
    assert made == [shards[1]]
    assemble(work, LABELS, shards, tmp_path / "after")
    assert contents(tmp_path / "before", "*") == contents(tmp_path / "after", "*")


def test_memory_stays_flat_while_labelling(tmp_path: Path) -> None:
    """The label set is five times as large as what the process may grow by."""
    code = f"""
import resource, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from orderrl.runtime.job import Job, finish
from orderrl.runtime.parts import assemble, make_parts
from orderrl.runtime.run import Run
from pathlib import Path
shards = [range(i, i + 64) for i in range(0, 40 * 64, 64)]
make = lambda shard: {{"label": torch.zeros(64, dtype=torch.int64), "hidden": torch.full((64, 16, 1024), 0.5)}}
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
with Job({str(tmp_path)!r}, "job") as work:
    make_parts(work, "x", shards[:4], make); assemble(work, "x", shards[:4], Path({str(tmp_path)!r}) / "few")
    before = peak()
    make_parts(work, "x", shards, make); assemble(work, "x", shards, Path({str(tmp_path)!r}) / "all")
print(peak() - before)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    megabytes = 40 * 64 * 16 * 1024 * 4 / 2**20
    assert megabytes == 160 and int(answer.stdout) < megabytes / 5, answer.stdout


def test_a_finished_training_that_is_interrupted_before_its_end_is_not_repeated(tmp_path: Path) -> None:
    """The metrics of a continued run are those of the whole run."""
    save_backbone(tmp_path / "tiny.safetensors", tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    overrides = [
        "backbone=digits",
        f"backbone.name={tmp_path / 'tiny.safetensors'}",
        "labels.contexts=30",
        "agent.steps=6",
    ]
    overrides += ["planner.dim=32", "planner.stem=1", "checkpoint_seconds=0", f"output_dir={tmp_path / 'runs'}"]
    config = compose("train", [*overrides, f"cache_dir={tmp_path / 'cache'}"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orderrl.training.save_planner", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    kept = train(config)
    lines = (kept.parent / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 6


def test_a_training_that_is_killed_between_its_result_and_its_end_still_logs_all_of_it(tmp_path: Path) -> None:
    save_backbone(tmp_path / "tiny.safetensors", tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    overrides = [
        "backbone=digits",
        f"backbone.name={tmp_path / 'tiny.safetensors'}",
        "labels.contexts=30",
        "agent.steps=6",
    ]
    overrides += ["planner.dim=32", "planner.stem=1", f"output_dir={tmp_path / 'runs'}"]
    config = compose("train", [*overrides, f"cache_dir={tmp_path / 'cache'}"])
    end = Job.__exit__

    def killed(self: Job, *error: Any) -> None:
        if "planners" in self.key:  # labels are done
            raise KeyboardInterrupt
        end(self, *error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "__exit__", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    (first,) = (tmp_path / "runs" / "train").iterdir()
    gc.collect()  # nobody holds the lock any more
    again = train(config)
    logged = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
              for run in (first, again.parent)]  # fmt: skip
    assert len(logged[0]) == 6 and logged[0] == logged[1]
    assert not list((tmp_path / "cache" / "unfinished").iterdir())
