"""What is kept is whole or not there; living processes keep their locks, and what dead ones left is removed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tensordict import TensorDict

from orderrl.runtime import job as resuming
from orderrl.runtime import storage
from orderrl.runtime.cache import Cache
from orderrl.runtime.job import Job
from orderrl.runtime.storage import (
    claim,
    damage,
    filled_aside,
    is_intact,
    manifest,
    read_sealed,
    remove_orphans,
    write_sealed,
    written_aside,
)
from orderrl.runtime.tables import Column, TableWriter, floats, open_table, write_checksums

_FORK = multiprocessing.get_context("fork")


def in_another_process(work: Callable[[], Any], kill: bool = False) -> None:
    """Do something in a process that ends by itself, or is killed when it is done."""

    def run() -> None:
        storage._held.clear()  # a process of its own has locked nothing
        work()
        if kill:
            os.kill(os.getpid(), signal.SIGKILL)

    process = _FORK.Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if kill else 0)


# -- locks and orphans ------------------------------------------------------------------------------------------------


def test_a_lock_is_one_processs_until_it_is_closed(tmp_path: Path) -> None:
    lock = claim(tmp_path / "x")
    assert lock is not None and claim(tmp_path / "x") is None
    in_another_process(lambda: (_ for _ in ()).throw(AssertionError) if claim(tmp_path / "x") else None)
    lock.close()
    again = claim(tmp_path / "x")
    assert again is not None
    again.close()


def test_a_lock_of_a_file_that_was_replaced_in_the_meantime_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process is done between this one's opening and locking, and a third one makes the file anew."""
    lockf = storage.fcntl.lockf
    calls: list[int] = []

    def replace_first(file: Any, how: int) -> None:
        if not calls:
            (tmp_path / "x").unlink()
            (tmp_path / "x").touch()
        calls.append(how)
        lockf(file, how)

    monkeypatch.setattr(storage.fcntl, "lockf", replace_first)
    lock = claim(tmp_path / "x")
    assert lock is not None and os.fstat(lock.fileno()).st_ino == (tmp_path / "x").stat().st_ino and len(calls) == 2
    lock.close()


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_a_job_whose_folder_goes_while_it_is_claimed_makes_another(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, gone = tmp_path / "unfinished" / "job", tmp_path / "gone"

    where, name = (resuming, "claim") if moment == "before it is opened" else (storage.fcntl, "lockf")
    real = getattr(where, name)

    def late(*arguments: Any) -> Any:
        if not gone.exists():
            folder.rename(gone)
        return real(*arguments)

    monkeypatch.setattr(where, name, late)
    with Job(tmp_path, "job") as work:
        assert work.folder == folder and gone.exists()
        work.store("a", 1)
        in_another_process(lambda: Job(tmp_path, "job").folder.joinpath("seen").touch())
        assert not (folder / "seen").exists() and (tmp_path / "unfinished" / "job-2" / "seen").exists()
    assert not list((tmp_path / "unfinished").iterdir())


def test_processes_of_one_job_never_see_each_others_pieces(tmp_path: Path) -> None:
    def work() -> None:
        for _ in range(60):
            with Job(tmp_path, "job") as job:
                assert not job.has("labels")
                job.store("labels", os.getpid())
                assert job.load("labels") == os.getpid()

    processes = [_FORK.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not list((tmp_path / "unfinished").iterdir())


def test_a_lock_file_of_another_user_leads_to_a_second_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "unfinished" / "job").mkdir(parents=True)
    opened = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.parent.name == "job":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with Job(tmp_path, "job") as work:
        assert work.folder.name == "job-2"
    assert "job: in use by another process or user" in capsys.readouterr().out


def test_what_killed_processes_left_is_removed_and_what_living_ones_do_is_not(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fill(kill: bool) -> None:
        with cache.store("labels", "k", {}) as folder:
            (folder / "data").write_text("half")
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)

    in_another_process(lambda: fill(kill=True), kill=True)
    (orphan,) = (tmp_path / "labels").iterdir()
    with cache.store("labels", "other", {}) as living:
        assert not orphan.exists(), "removed by the next command"
        in_another_process(lambda: Cache(tmp_path).newest("labels"))
        assert living.exists()
    assert [path.name for path in (tmp_path / "labels").iterdir()] == ["other"]


def test_a_killed_second_job_goes_with_the_first_that_is_done(tmp_path: Path) -> None:
    with Job(tmp_path, "job"):
        in_another_process(lambda: Job(tmp_path, "job").store("a", 1), kill=True)
        assert {path.name for path in (tmp_path / "unfinished").iterdir()} == {"job", "job-2"}
    assert not list((tmp_path / "unfinished").iterdir())


def test_folders_that_are_no_orphans_stay(tmp_path: Path) -> None:
    names = [".git", ".cache.d", "labels", f".young.{'0' * 32}"]  # the last one may be locked in a moment
    for name in names:
        (tmp_path / name).mkdir()
    old = tmp_path / f".old.{'0' * 32}"
    old.mkdir()
    os.utime(old, (0, 0))
    remove_orphans(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names)


# -- writing ----------------------------------------------------------------------------------------------------------


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(RuntimeError), written_aside(tmp_path / "x") as aside:
        aside.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), filled_aside(tmp_path / "y") as folder:
        (folder / "x").write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"


def test_an_entry_that_is_replaced_on_purpose_is_there_all_the_time(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for text in ("old", "new"):
        with cache.store("planners", "k", {}, replace=True) as folder:
            (folder / "data").write_text(text)
            assert text == "old" or cache.find("planners", "k") is not None
    found = cache.find("planners", "k")
    assert found is not None and (found / "data").read_text() == "new"


# -- checking ---------------------------------------------------------------------------------------------------------


def test_a_manifest_names_what_differs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(100))
    recorded = manifest(tmp_path)
    assert damage(tmp_path, recorded) is None
    (tmp_path / "b").write_bytes(bytes(99) + b"x")
    assert damage(tmp_path, recorded) == f"{tmp_path / 'b'}: is altered (its checksum is not the one recorded)"
    (tmp_path / "b").write_bytes(b"")
    assert f"{tmp_path / 'b'}: is truncated or altered (0 bytes instead of 100)" == damage(tmp_path, recorded)
    (tmp_path / "b").unlink()
    assert damage(tmp_path, recorded) == f"{tmp_path / 'b'}: is missing"
    wrongs: list[Any] = [None, [], {"a": 1}, {"a": {"bytes": 3}}]
    for wrong in wrongs:
        assert "its list of files is damaged" in str(damage(tmp_path, wrong))


def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"a")
    expected = storage.checksum(path)
    hashed = Mock(side_effect=storage.checksum)
    monkeypatch.setattr(storage, "checksum", hashed)
    assert is_intact(path, expected) and is_intact(path, expected) and hashed.call_count == 1
    path.write_bytes(b"b")
    os.utime(path, (1, 1))
    assert not is_intact(path, expected) and hashed.call_count == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[1]", b'{"a": 1', b'{"a": ' * 100_000, b"1" * 10_000, b'{"a": 1, "sha256": "x"}', b'{"a": 1}'],
    ids=["empty", "not UTF-8", "a list", "cut", "deep", "a long number", "another seal", "no seal"],
)
def test_a_damaged_key_is_named_and_never_blocks_the_others(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Cache(tmp_path)
    for key in ("good", "bad"):
        with cache.store("planners", key, {"agent": "bc"}) as folder:
            (folder / "data").write_text(key)
    (cache.folder("planners", "bad") / "key.json").write_bytes(content)
    assert cache.newest("planners") == cache.folder("planners", "good")
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1 and str(tmp_path / "planners") in shown and "left out" in shown
    assert cache.find("planners", "bad") is None
    shown = capsys.readouterr().out
    assert shown.startswith(str(cache.folder("planners", "bad"))) and shown.endswith("making it again\n")


def test_the_newest_whole_entry_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = Cache(tmp_path)
    for key in ("a", "b"):
        with cache.store("planners", key, {}) as folder:
            (folder / "data").write_text(key)
    (cache.folder("planners", "b") / "data").write_text("B")
    assert cache.newest("planners") == cache.folder("planners", "a")
    assert f"{cache.folder('planners', 'b') / 'data'}: is altered" in capsys.readouterr().out


def test_an_entry_in_anothers_place_is_none(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for key in ("a", "b"):
        with cache.store("planners", key, {"name": key}) as folder:
            (folder / "data").write_text(key)
    cache.folder("planners", "a").rename(tmp_path / "x")
    cache.folder("planners", "b").rename(cache.folder("planners", "a"))
    assert cache.find("planners", "a") is None and cache.newest("planners") is None


def test_sealed_json_keeps_its_values_and_notices_every_change(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_sealed(path, {"a": [1, 0.1, None, "é"], "nan": float("nan")})
    assert read_sealed(path) == {"a": [1, 0.1, None, "é"], "nan": None}
    values = json.loads(path.read_text())
    without = {key: value for key, value in values.items() if key != "a"}
    for changed in (values | {"a": [1, 0.2, None, "é"]}, values | {"b": 1}, without):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=rf"{path}: is altered"):
            read_sealed(path)


# -- tables -----------------------------------------------------------------------------------------------------------


def some_rows(count: int, start: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(start)
    return TensorDict(
        {
            "index": torch.arange(start, start + count),
            "half": torch.randn(count, 2, generator=generator).bfloat16(),
            "flag": torch.rand(count, 3, generator=generator) < 0.5,
            "next": TensorDict({"reward": torch.randn(count, 1, generator=generator)}, [count]),
        },
        [count],
    )


@pytest.fixture
def table(tmp_path: Path) -> Path:
    with TableWriter(tmp_path / "table") as writer:
        writer.append(some_rows(3))
        writer.append(some_rows(4, 3))
    return tmp_path / "table"


def test_a_table_holds_its_rows_for_us_and_for_tensordict(table: Path) -> None:
    wanted = torch.cat([some_rows(3), some_rows(4, 3)])
    for found in (open_table(table), TensorDict.load_memmap(table)):
        assert found.batch_size == torch.Size([7]) and bool((found == wanted).all())
        assert found["half"].dtype == torch.bfloat16 and found["next", "reward"].shape == (7, 1)


def test_changing_an_opened_table_leaves_its_files_alone(table: Path) -> None:
    before = {path: path.read_bytes() for path in table.rglob("*.memmap")}
    open_table(table)["index"].zero_()
    assert {path: path.read_bytes() for path in table.rglob("*.memmap")} == before


def test_rows_of_other_columns_are_refused(tmp_path: Path) -> None:
    for other in (some_rows(2).exclude("flag"), some_rows(2).to(torch.float64), some_rows(2).unflatten(0, (1, 2))):
        with pytest.raises(ValueError, match="do not fit"), TableWriter(tmp_path / "t") as writer:
            writer.append(some_rows(2))
            writer.append(other)
        assert not (tmp_path / "t" / "meta.json").exists()
        for path in sorted((tmp_path / "t").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


COLUMNS = {
    "index": Column(),
    "half": floats(2),
    "flag": Column((3,), (torch.bool,)),
    "next.reward": floats(1),
}


def test_columns_are_compared_with_what_must_be_there(table: Path) -> None:
    assert len(open_table(table, COLUMNS, rows=7)) == 7
    for columns, message in [
        (COLUMNS | {"more": Column()}, "more is missing"),
        ({key: value for key, value in COLUMNS.items() if key != "flag"}, "flag does not belong here"),
        (COLUMNS | {"half": floats(3)}, "half is torch.bfloat16"),
        (COLUMNS | {"index": floats()}, "index is torch.int64"),
    ]:
        with pytest.raises(ValueError, match=f"{table}.*{message}"):
            open_table(table, columns)
    with pytest.raises(ValueError, match="7 rows instead of 8"):
        open_table(table, rows=8)


@pytest.mark.parametrize(
    "change",
    [
        {"index": {"device": "cpu", "shape": [7], "dtype": "torch.complex64", "is_nested": False}},
        {"index": {"device": "cpu", "shape": [2**62], "dtype": "torch.int64", "is_nested": False}},
        {"index": {"device": "cpu", "shape": [7, -1], "dtype": "torch.int64", "is_nested": False}},
        {"index": {"device": "cpu", "shape": [7], "dtype": "torch.int64", "is_nested": True}},
        {"index": {"type": "NonTensorData"}},
        {"../../etc/passwd": {"device": "cpu", "shape": [7], "dtype": "torch.uint8", "is_nested": False}},
        {"shape": [8]},
        {"shape": []},
        {"_type": "<class 'tensordict.tensorclass.NonTensorData'>"},
        {"_type": None},
    ],
)
def test_a_table_that_describes_anything_else_is_refused_by_its_path(table: Path, change: dict[str, Any]) -> None:
    described = json.loads((table / "meta.json").read_text()) | change
    (table / "meta.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=str(table)):
        open_table(table)


def test_an_emptied_column_is_refused_and_not_grown(table: Path) -> None:
    (table / "index.memmap").write_bytes(b"")
    with pytest.raises(ValueError, match=r"index\.memmap.*truncated or altered"):
        open_table(table)
    assert (table / "index.memmap").stat().st_size == 0


def test_a_table_with_checksums_notices_a_single_bit(table: Path) -> None:
    write_checksums(table)
    assert len(open_table(table)) == 7
    path = table / "next" / "reward.memmap"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    os.utime(path, (1, 1))
    with pytest.raises(ValueError, match=rf"{path}: is altered"):
        open_table(table)
