"""What a setting may hold: its type and its range, wrong ones refused in one line.

A dataclass of settings holds, for each of them, type, default, meaning and range in one line, and checks them:

    @dataclass(frozen=True, kw_only=True)
    class Config(Settings):
        steps: int = setting(600, "Optimiser steps", at_least(1))
        dropout: float = setting(0.1, "Dropout rate in training", between("[0, 1)"))

Numbers must be finite.
"""

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from orderrl.runtime.registry import Registry

LARGEST_INTEGER = 2**32 - 1  # counts and seeds; products of a few of them still fit into 64 bits
LARGEST_NUMBER = 3.4e38  # of float32
_SHOWN = 60  # characters of a wrong value


class Rule(NamedTuple):
    """What some settings must fulfil besides their type.

    Attributes:
        names: of the settings; None fulfils every rule, and of a list each element must fulfil it.
        holds: whether a value does.
        refusal: what is said of one that does not, behind its name; {} stands for the value. A function gives it later.
    """

    names: tuple[str, ...]
    holds: Callable[[Any], bool]
    refusal: str | Callable[[], str]


def setting(default: Any, meaning: str, *rules: Rule, **more: Any) -> Any:
    """A field of a dataclass of settings.

    Args:
        default: its value if none is given; lists and mappings are copied.
        meaning: a line for help pages: a noun phrase, with the unit or the choices.
        rules: what values must fulfil besides the annotated type, such as `at_least(1)`.
        more: what else readers of the field's metadata look for.
    """
    described: dict[str, Any] = {"meaning": meaning, "rules": rules, **more}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=described)
    return field(default=default, metadata=described)


def added_setting(default: Any, meaning: str, *rules: Rule, **more: Any) -> Any:
    """A setting that came later: left out of the dataclass's text, from which fingerprints of older files were made.

    Whatever has another value than the default must differ in something else that is fingerprinted, such as weights.
    """
    made = setting(default, meaning, *rules, **more)
    made.repr = False
    return made


def redefault(settings: type[Any], name: str, default: Any) -> Any:
    """A setting of a base class with another default."""
    (found,) = (item for item in fields(settings) if item.name == name)
    return field(default=default, metadata=found.metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A dataclass of settings that checks its fields; those that check more extend `__post_init__`."""

    def __post_init__(self) -> None:
        """Refuse wrong values."""
        check_fields(self)


def at_least(least: float, *names: str) -> Rule:
    """Numbers that are not smaller than `least`."""
    return Rule(names, lambda value: value >= least, f" must be at least {least}, got {{}}")


def positive(*names: str) -> Rule:
    """Numbers greater than 0."""
    return Rule(names, lambda value: value > 0, " must be positive, got {}")


def between(interval: str, *names: str) -> Rule:
    """Numbers in an interval, written as in mathematics: "[0, 1)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def holds(value: float) -> bool:
        above = low <= value if interval[0] == "[" else low < value
        return above and (value <= high if interval[-1] == "]" else value < high)

    return Rule(names, holds, f" must lie in {interval}, got {{}}")


def zero_or_at_least(least: int, *names: str) -> Rule:
    """Counts of which a few are too few, and 0 means none."""
    return Rule(names, lambda value: value == 0 or value >= least, f" must be 0 or at least {least}, got {{}}")


def one_of(choices: Iterable[str], *names: str) -> Rule:
    """Texts of a list."""
    known = tuple(choices)
    return Rule(names, lambda value: value in known, f"={{}} is unknown; choose one of {', '.join(known)}")


def member_of(registry: Registry[Any], *names: str) -> Rule:
    """Names of a registry, later ones included, and module:attribute, which is imported."""

    def holds(value: str) -> bool:
        return registry.given(value) is not None and registry.find(value) is not None

    return Rule(names, holds, lambda: f"={{}} is unknown; choose one of {', '.join(registry)}, or module:attribute")


def check_fields(settings: Any, *rules: Rule) -> None:
    """Refuse wrong values of a dataclass, by the annotations of its fields, their own rules and those given here."""
    for name, kind in kinds(settings.__class__).items():
        require_kind(name, getattr(settings, name), kind)
    for item in fields(settings):
        for rule in item.metadata.get("rules", ()):
            require(rule, item.name, getattr(settings, item.name))
    for rule in rules:
        for name in rule.names:
            require(rule, name, getattr(settings, name))


@contextmanager
def named(group: str) -> Iterator[None]:
    """Put a group's name before the key with which a refusal begins."""
    try:
        yield
    except ValueError as error:
        if group:
            raise ValueError(f"{group}.{error}") from error
        raise


@cache
def kinds(settings: Any) -> dict[str, Any]:
    """The annotated type of every field of a dataclass."""
    hints = get_type_hints(settings)
    return {field.name: hints[field.name] for field in fields(settings)}


def require(rule: Rule, name: str, value: Any) -> None:
    """Refuse a value that does not fulfil a rule, which need not name it."""
    for part in value if isinstance(value, list | tuple) else [value]:
        if part is not None and not rule.holds(part):
            refusal = rule.refusal if isinstance(rule.refusal, str) else rule.refusal()
            raise ValueError(name + refusal.format(shown(value)))


def require_kind(name: str, value: Any, kind: Any) -> None:
    """Refuse a value of another type than an annotation's, or a number that is not finite or too large."""
    if not fits(value, kind):
        raise ValueError(f"{name} must be {described(kind)}, got {shown(value)}{_hint(value, kind)}")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type; lists and tuples stand for each other, as in YAML."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is None or kind is type(None):
        return value is None
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin in (list, tuple):
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            return False
        if origin is list or parts[-1] is Ellipsis:
            return all(fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(fits, value, parts))
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) <= LARGEST_INTEGER
    if kind is float:
        number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        return bool(abs(number) <= LARGEST_NUMBER)  # never true of NaN
    if kind is str:
        return isinstance(value, str | os.PathLike)
    if origin is dict or kind is dict:
        return isinstance(value, Mapping)
    return not isinstance(kind, type) or isinstance(value, kind | Mapping)  # a dataclass comes as a mapping from YAML


def described(kind: Any, plural: bool = False) -> str:
    """An annotated type in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(described(part, plural) for part in parts)
    if origin in (list, tuple):
        number = "" if origin is list or parts[-1] is Ellipsis else f"{len(parts)} "
        return f"{'lists' if plural else 'a list'} of {number}{described(parts[0], True)}"
    words = {
        int: ("a whole number", "whole numbers"),
        float: ("a finite number", "finite numbers"),
        bool: ("true or false", "true or false"),
        str: ("text", "texts"),
        type(None): ("null", "null"),
    }
    return words.get(kind, ("a mapping", "mappings"))[plural]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def differing(*values: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values are not the same in all of some nested values; a missing one is None."""
    parts = [flat(part) for part in values]
    keys = dict.fromkeys(key for part in parts for key in part)
    return [key for key in keys if any(part.get(key) != parts[0].get(key) for part in parts)]


def _hint(value: Any, kind: Any) -> str:
    """What to write instead, where that is plain."""
    kinds = set(get_args(kind)) or {kind}
    if int in kinds and isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_INTEGER:
        return f"; write {int(value)}"
    if int in kinds and isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        return f"; the largest is {LARGEST_INTEGER}"
    if float in kinds and isinstance(value, int | float) and LARGEST_NUMBER < abs(value) < math.inf:
        return f"; the largest is {LARGEST_NUMBER}"
    if str in kinds and isinstance(value, int | float):
        return f"""; write it in two pairs of quotes: "'{value}'" """.rstrip()
    return ""


def shown(value: Any) -> str:
    """A wrong value in a message, cut where it is long."""
    try:
        text = repr(value).replace("\n", " ")
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
