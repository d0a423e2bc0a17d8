"""What a policy's name means, parsed once: everything else reads the fields of a `PolicySpec`.

    NAME[@MODE][@SCHEDULE]              a baseline: raster, spaced_random@4, halton@1+1+2+4+8, low_entropy@fast@cosine:8
    NAME[:DRAWS][@SCHEDULE]             a reference: oracle, confidence, lookahead:4
    PATH.safetensors[@costC][@MODE][@SCHEDULE]
                                        a planner; spaced_PATH and paired_PATH choose the blocks of a step in other ways
    newest[@costC][@MODE][@SCHEDULE]    the newest planner in the cache, where a command knows which that is
    MODULE:ATTRIBUTE[@SCHEDULE]         a user's own policy, or the NAME under which it is registered

A mode says when scores are made: fast (once, of the empty image), semifast:8 (at 8 steps, evenly spaced) or slow (at
every step, which no mode is too). best_of:8 is slow too, and draws 8 images for one: the one with the shortest code in
its own order is kept.

A path may hold any character: what follows its last ".safetensors" alone is a step cost or a schedule. A relative path
that begins like a prefix is taken whole if there is such a file, and can be written `./spaced_...`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from orderrl.agents.policies import POLICIES

REFERENCES = ("confidence", "lookahead", "oracle")
SPACED = "spaced_"
PAIRED = "paired_"
NEWEST = "newest"
SUFFIX = ".safetensors"
THRESHOLD = re.compile(r"(i?)<(-?\d*\.?\d+)(?:/(\d+(?:,\d+)*))?")  # kind, nats, budgets
STEPS = re.compile(r"\d+(?:\+\d+)*")
COSINE = re.compile(r"cosine:(\d+)")  # iterations
MODE = re.compile(r"fast|slow|semifast:([1-9]\d*)|best_of:([1-9]\d*)")  # scorings; images drawn for one
_NO_RIVALS = ("lookahead", "oracle")
_PLANNER = re.compile(rf"(.*{re.escape(SUFFIX)}|{NEWEST})(?:@(.*))?", re.DOTALL)
_COST = re.compile(r"cost(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)(?:@(.*))?", re.DOTALL)  # nats, schedule

Kind = Literal["baseline", "reference", "planner", "newest", "own"]


@dataclass(frozen=True)
class PolicySpec:
    """A policy's name in its parts; `str` writes it, and `PolicySpec.parse` reads that back.

    Attributes:
        kind: baseline, reference, planner (of a file), newest (planner in the cache) or own (of a user's module).
        name: of a baseline, reference or registered policy; a planner's path; MODULE:ATTRIBUTE.
        prefix: `SPACED`, `PAIRED` (planners alone) or "".
        draws: of lookahead; None takes one.
        step_cost: nats per image that a planner is told; None tells it nothing.
        mode: when scores are made, "fast", "semifast:8" or "slow", or how many images are drawn for one, "best_of:8";
            "" is slow.
        schedule: how many blocks a step reveals, "4", "1+1+2+4+8", "<1.5", "i<6/1,2,4,8" or "cosine:64"; "" is one
            block a step, or what a planner or a user's policy chooses itself.

    Raises:
        ValueError: if the schedule is none, or a part does not belong to the kind.
    """

    kind: Kind
    name: str
    prefix: str = ""
    draws: int | None = None
    step_cost: float | None = None
    mode: str = ""
    schedule: str = ""

    def __post_init__(self) -> None:
        if self.kind == "planner" and self.name.startswith((SPACED, PAIRED)):
            object.__setattr__(self, "name", f"./{self.name}")  # written so, it is not read as a prefix
        if self.schedule and not any(form.fullmatch(self.schedule) for form in (THRESHOLD, STEPS, COSINE)):
            raise _no_schedule(str(self), self.schedule)
        if self.mode and (self.kind in ("reference", "own") or self.prefix == PAIRED):
            raise ValueError(
                f"policy '{self}': modes are for block scores, of baselines and planners; leave out its mode"
            )

    @classmethod
    def parse(cls, text: str) -> PolicySpec:
        """Read a name as users write it.

        Raises:
            ValueError: if what stands behind its "@" is no schedule, or it has an argument that it does not take.
        """
        if not isinstance(text, str) or not text:
            raise ValueError(f"policy {text!r} must be a name, a planner's {SUFFIX} file or module:attribute")
        if text.endswith(SUFFIX) and Path(text).is_file():
            return cls("planner", text)
        prefix = next((p for p in (SPACED, PAIRED) if text.startswith(p)), "")
        if planner := _PLANNER.fullmatch(text.removeprefix(prefix)):
            return cls._planner(text, planner[1], planner[2], prefix)
        base, at, schedule = text.partition("@")
        if "/" in base:
            raise ValueError(f"policy {text!r} is no planner: its file must end in {SUFFIX}")
        if at and not schedule:
            raise _no_schedule(text, "")
        mode, schedule = _mode_and_schedule(text, schedule) if at else ("", "")
        name, colon, argument = base.partition(":")
        if name in REFERENCES:
            return cls(
                "reference", name, draws=_draws(text, name, argument) if colon else None, mode=mode, schedule=schedule
            )
        if colon or base in POLICIES:
            return cls("own", base, mode=mode, schedule=schedule)
        prefix = SPACED if base.startswith(SPACED) else ""
        return cls("baseline", base.removeprefix(prefix), prefix, mode=mode, schedule=schedule)

    @classmethod
    def _planner(cls, text: str, name: str, rest: str | None, prefix: str) -> PolicySpec:
        kind: Kind = "newest" if name == NEWEST else "planner"
        if rest is None:
            return cls(kind, name, prefix)
        told = _COST.fullmatch(rest)
        schedule = told[2] if told else rest
        if schedule == "":
            raise _no_schedule(text, "")
        mode, schedule = _mode_and_schedule(text, schedule or "")
        return cls(kind, name, prefix, step_cost=float(told[1]) if told else None, mode=mode, schedule=schedule)

    def __str__(self) -> str:
        draws = "" if self.draws is None else f":{self.draws}"
        cost = "" if self.step_cost is None else f"@{written_cost(self.step_cost)}"
        parts = "".join(f"@{part}" for part in (self.mode, self.schedule) if part)
        return f"{self.prefix}{self.name}{draws}{cost}{parts}"

    @property
    def family(self) -> PolicySpec:
        """The same whatever its schedule and step cost."""
        return replace(self, schedule="", step_cost=None)

    @property
    def candidates(self) -> int:
        """Images that are drawn for one."""
        found = MODE.fullmatch(self.mode)
        return int(found[2] or 1) if found else 1

    @property
    def rival(self) -> bool:
        """False for lookahead and oracle, which try out or know hidden tokens and are evaluated on the first images."""
        return not (self.kind == "reference" and self.name in _NO_RIVALS)

    @property
    def path(self) -> Path | None:
        """The checkpoint of a planner; None of other policies."""
        return Path(self.name) if self.kind == "planner" else None

    def at(self, path: Path | str) -> PolicySpec:
        """The same with a planner's file, for `newest`."""
        return replace(self, kind="planner", name=str(path))


def written_cost(step_cost: float) -> str:
    """A step cost as names have it: cost0.5."""
    short = f"{step_cost:g}"
    return f"cost{short if float(short) == step_cost else repr(float(step_cost))}"


def _mode_and_schedule(text: str, rest: str) -> tuple[str, str]:
    """What stands behind an @: a mode, a schedule, or both."""
    first, at, schedule = rest.partition("@")
    if not MODE.fullmatch(first):
        return "", rest
    if at and not schedule:
        raise _no_schedule(text, "")
    return first, schedule


def _draws(text: str, name: str, argument: str) -> int:
    if name != "lookahead":
        raise ValueError(f"policy {text!r}: {name} takes no number of draws; write {name}, or lookahead:4")
    if not re.fullmatch("[0-9]+", argument) or int(argument) < 1:
        raise ValueError(f"policy {text!r} must name a number of draws, for example lookahead:4")
    return int(argument)


def _no_schedule(text: str, schedule: str) -> ValueError:
    return ValueError(
        f"policy {text!r}: {schedule!r} is no schedule; write @4, @1+1+2+4+8, or a threshold in nats: @<1.5 (mean "
        "entropy), @i<6 (summed entropy), @i<6/1,2,4,8 (other budgets), or @cosine:8 (MAR's, in 8 iterations); before "
        "it may stand a mode, @fast, @semifast:8 or @slow; a planner's step cost is written @cost0.5"
    )
