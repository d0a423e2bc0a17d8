"""Names of policies: a path in them may hold any character."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from orderrl.agents.spec import PAIRED, SPACED, PolicySpec

NASTY = "@:=,+<>#?%$!&*~^'\"`()[]{}|\\ \tä字🙂.-_/"
SCHEDULES = ("", "4", "1+1+2+4+8", "<1.5", "i<6", "i<.5/1,2,4,8", "cosine:8")
MODES = ("", "fast", "slow", "semifast:8", "best_of:8")


def some_path(source: random.Random) -> str:
    """A path of characters that mean something elsewhere, and of pieces that a careless parser would split at."""
    pieces = [
        *NASTY,
        "spaced_",
        "paired_",
        "newest",
        ".safetensors",
        ".safetensors@4",
        "@cost0.5",
        "tokens:",
        "a",
        "hf://",
    ]
    return "".join(source.choices(pieces, k=source.randint(0, 12))) + ".safetensors"


def some_spec(source: random.Random) -> PolicySpec:
    schedule, mode = source.choice(SCHEDULES), source.choice(MODES)
    cost = source.choice([None, 0.5, 2.0, 1e-05, source.random() * 10 ** source.randint(-9, 9)])
    kind = source.choice(["planner", "planner", "newest", "baseline", "reference", "own"])
    if kind == "planner":
        prefix = source.choice(["", SPACED] if mode else ["", SPACED, PAIRED])
        return PolicySpec("planner", some_path(source), prefix, step_cost=cost, mode=mode, schedule=schedule)
    if kind == "newest":
        prefix = source.choice(["", SPACED])
        return PolicySpec("newest", "newest", prefix, step_cost=cost, mode=mode, schedule=schedule)
    if kind == "baseline":
        return PolicySpec(
            "baseline", source.choice(["random", "raster"]), source.choice(["", SPACED]), mode=mode, schedule=schedule
        )
    if kind == "reference":
        name, draws, rule = source.choice(
            [("oracle", None, ""), ("lookahead", 16, ""), ("confidence", None, "highest+near0.5"), ("native", None, "")]
        )
        return PolicySpec("reference", name, draws=draws, rule=rule, schedule=schedule)
    return PolicySpec("own", source.choice(["module:attribute", "a.b:c", "oracle_like:policy"]), schedule=schedule)


def test_what_is_written_is_read_back() -> None:
    source = random.Random(0)
    for _ in range(5000):
        spec = some_spec(source)
        assert PolicySpec.parse(str(spec)) == spec, str(spec)


def test_a_path_is_taken_whole() -> None:
    source = random.Random(1)
    for _ in range(2000):
        path = some_path(source)
        if path.startswith("hf://"):  # a name of the hub, no path
            continue
        if path.startswith((SPACED, PAIRED)):
            path = f"./{path}"
        for prefix in ("", SPACED, PAIRED):
            spec = PolicySpec.parse(f"{prefix}{path}@cost0.25@4")
            assert (spec.path, spec.prefix, spec.step_cost, spec.schedule) == (Path(path), prefix, 0.25, "4")
            assert PolicySpec.parse(f"{prefix}{path}").name == path


def test_a_file_that_is_called_like_a_prefix_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spaced_runs").mkdir()
    wrapped = PolicySpec.parse("spaced_runs/planner.safetensors")
    assert (wrapped.prefix, wrapped.name) == (SPACED, "runs/planner.safetensors")
    (tmp_path / "spaced_runs" / "planner.safetensors").touch()
    whole = PolicySpec.parse("spaced_runs/planner.safetensors")
    assert whole.prefix == "" and whole.path is not None and whole.path.is_file()
    assert PolicySpec.parse(str(whole)) == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("oracle:4", "oracle takes no argument; write oracle, or lookahead:4"),
        ("confidence:2@4", "'2' is no part of a rule of confidence; write highest, first and nearLAMBDA"),
        ("confidence:", "must name a rule, for example confidence:near0.1"),
        ("hindsight_confidence:first", "must name a rule, for example hindsight_confidence:near0.1"),
        ("lookahead:", "must name a number of draws"),
        ("lookahead:0", "must name a number of draws"),
        ("lookahead:x", "must name a number of draws"),
        ("random@", "'' is no schedule"),
        ("a.safetensors@", "'' is no schedule"),
        ("a.safetensors@cost0.5@", "'' is no schedule"),
        ("a.safetensors@4@cost0.5", "is no schedule"),
        ("raster@cost0.5", "is no schedule"),
        ("/home/jane@example.org/planner.pt", "its file must end in .safetensors"),
        ("", "must be a name"),
    ],
)
def test_what_would_be_ignored_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicySpec.parse(text)


def test_a_family_is_the_policy_without_schedule_and_cost() -> None:
    spec = PolicySpec.parse("spaced_a@b/c.safetensors@cost0.5@4")
    assert str(spec.family) == "spaced_a@b/c.safetensors" and spec.family == replace(spec, schedule="", step_cost=None)
    names = ("oracle@4", "lookahead:4", "confidence", "random", "oracle_x:p")
    assert [PolicySpec.parse(name).rival for name in names] == [False, False, True, True, True]


@pytest.mark.parametrize("text", ["oracle@fast", "paired_a.safetensors@fast", "module:attribute@semifast:4"])
def test_modes_are_for_what_has_block_scores(text: str) -> None:
    with pytest.raises(ValueError, match="modes are for block scores, of baselines and planners"):
        PolicySpec.parse(text)
