"""What a policy's name means, parsed once: everything else reads the fields of a `PolicySpec`.

    NAME[@MODE][@SCHEDULE]              a baseline: raster, spaced_random@4, halton@1+1+2+4+8, low_entropy@fast@cosine:8
    NAME[:ARGUMENT][@SCHEDULE]          a reference: oracle, lookahead:4, confidence:highest+near0.1, native
    PATH.safetensors[@costC][@MODE][@SCHEDULE]
                                        a planner; spaced_PATH and paired_PATH choose the blocks of a step in other ways
    hf://OWNER/NAME/planner.safetensors the same of the Hugging Face Hub
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

from orderrl.agents.confidence import ConfidenceRule
from orderrl.agents.policies import POLICIES
from orderrl.runtime.weights import HUB, local_path

REFERENCES = ("confidence", "hindsight_confidence", "lookahead", "native", "oracle")
HINDSIGHT = ("hindsight_confidence", "oracle")  # read the tokens that they rank: no code length belongs to their orders
SPACED = "spaced_"
PAIRED = "paired_"
NEWEST = "newest"
FITTED = "fitted"  # the fixed order that is fitted on gain labels
SUFFIX = ".safetensors"
_COUNT = "[0-9]{1,9}"  # of a size that all that is made of it can have
THRESHOLD = re.compile(rf"(i?)<(-?[0-9]{{0,30}}\.?[0-9]{{1,30}})(?:/({_COUNT}(?:,{_COUNT})*))?")  # kind, nats, budgets
STEPS = re.compile(rf"{_COUNT}(?:\+{_COUNT})*")
COSINE = re.compile(f"cosine:({_COUNT})")  # iterations
MODE = re.compile("fast|slow|semifast:([1-9][0-9]{0,8})|best_of:([1-9][0-9]{0,8})")  # scorings; images drawn for one
_NO_RIVALS = ("hindsight_confidence", "lookahead", "oracle")
_PLANNER = re.compile(rf"(.*{re.escape(SUFFIX)}|{NEWEST})(?:@(.*))?", re.DOTALL)
_COST = re.compile(r"cost((?:[0-9]{1,30}\.?[0-9]{0,30}|\.[0-9]{1,30})(?:e[+-]?[0-9]{1,2})?)(?:@(.*))?", re.DOTALL)

Kind = Literal["baseline", "reference", "planner", "newest", "own"]


@dataclass(frozen=True)
class PolicySpec:
    """A policy's name in its parts; `str` writes it, and `PolicySpec.parse` reads that back.

    Attributes:
        kind: baseline, reference, planner (of a file), newest (planner in the cache) or own (of a user's module).
        name: of a baseline, reference or registered policy; a planner's path; MODULE:ATTRIBUTE.
        prefix: `SPACED`, `PAIRED` (planners alone) or "".
        draws: of lookahead; None takes one.
        rule: of confidence, as `orderrl.agents.confidence.ConfidenceRule` reads it; "" is OAR's own.
        step_cost: nats per image at which a planner acts; None where the name gives none.
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
    rule: str = ""
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

        ValueError if what stands behind its "@" is no schedule, or it has an argument that it does not take.
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
            if colon and name != "lookahead":
                return cls("reference", name, rule=_rule(text, name, argument), mode=mode, schedule=schedule)
            return cls("reference", name, draws=_draws(text, argument) if colon else None, mode=mode, schedule=schedule)
        if colon or base in POLICIES:
            return cls("own", base, mode=mode, schedule=schedule)
        prefix = SPACED if base.startswith(SPACED) else ""
        return cls("baseline", base.removeprefix(prefix), prefix, mode=mode, schedule=schedule)

    @classmethod
    def _planner(cls, text: str, name: str, rest: str | None, prefix: str) -> PolicySpec:
        kind: Kind = "newest" if name == NEWEST else "planner"
        if rest is None:
            return cls(kind, name, prefix)
        cost = _COST.fullmatch(rest)
        schedule = cost[2] if cost else rest
        if schedule == "":
            raise _no_schedule(text, "")
        mode, schedule = _mode_and_schedule(text, schedule or "")
        return cls(kind, name, prefix, step_cost=float(cost[1]) if cost else None, mode=mode, schedule=schedule)

    def __str__(self) -> str:
        draws = f":{self.rule}" if self.rule else "" if self.draws is None else f":{self.draws}"
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
        """False for references that try out or know hidden tokens; they are evaluated on the first images."""
        return not (self.kind == "reference" and self.name in _NO_RIVALS)

    @property
    def hindsight(self) -> bool:
        """Whether it reads the tokens that it ranks."""
        return self.kind == "reference" and self.name in HINDSIGHT

    @property
    def path(self) -> Path | None:
        """The checkpoint of a planner, one of the Hub downloaded; None of other policies."""
        if self.kind != "planner":
            return None
        return local_path(self.name) if self.name.startswith(HUB) else Path(self.name)

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


def _draws(text: str, argument: str) -> int:
    if not re.fullmatch(_COUNT, argument) or int(argument) < 1:
        raise ValueError(f"policy {text!r} must name a number of draws, for example lookahead:4")
    return int(argument)


def _rule(text: str, name: str, argument: str) -> str:
    """The rule of confidence behind the colon of a name."""
    if name in ("native", "oracle"):
        raise ValueError(f"policy {text!r}: {name} takes no argument; write {name}, or lookahead:4")
    try:
        rule = ConfidenceRule.parse(argument)
    except ValueError as error:
        raise ValueError(f"policy {text!r}: {error}") from None
    if not argument or (name == "hindsight_confidence" and rule != ConfidenceRule(distance=rule.distance)):
        raise ValueError(f"policy {text!r} must name a rule, for example {name}:near0.1")
    return argument


def _no_schedule(text: str, schedule: str) -> ValueError:
    return ValueError(
        f"policy {text!r}: {schedule!r} is no schedule; write @4, @1+1+2+4+8, or a threshold in nats: @<1.5 (mean "
        "entropy), @i<6 (summed entropy), @i<6/1,2,4,8 (other budgets), or @cosine:8 (MAR's, in 8 iterations); before "
        "it may stand a mode, @fast, @semifast:8 or @slow; a planner's step cost is written @cost0.5"
    )
