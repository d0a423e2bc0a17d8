"""Dataclasses of settings as the nodes of a Hydra configuration: their defaults, meanings and checks.

A package of configuration has a module `schema` with a function `nodes()`: paths in it, such as `planner/_base` or
`train`, and the dataclass that stands there. Each is registered with Hydra's ConfigStore, so YAML files hold what
differs and nothing else. They are registered as plain values: OmegaConf's typed nodes would turn 7 into "7" and "yes"
into true without a word, and refuse in several lines. `check` compares with the annotations instead.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache, cached_property
from pkgutil import resolve_name
from typing import Any, NamedTuple, get_args

from hydra.conf import HydraConf
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from orderrl.runtime.values import Rule, kinds, named, require, require_kind

MISSING = "???"  # a value that the user must give


@dataclass(frozen=True)
class Node:
    """A dataclass at a place of the configuration.

    Attributes:
        kind: the dataclass, or "module:Class", imported when the node is used; its fields made by `setting` are keys.
        name: of an option, which stands in the key `name` and cannot be changed there; None for none.
        values: what differs from the dataclass's defaults; parts of other groups too.
        defaults: Hydra's defaults list, whose entries come before `values` where it does not say "_self_"; a function
            gives it when the node is used.
        build: makes the dataclass of its keys' values, which checks them together, as "module:function"; None is
            `kind`.
    """

    kind: str | type[Any]
    name: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    defaults: Sequence[Any] | Callable[[], Sequence[Any]] = ()
    build: str | None = None

    @property
    def settings(self) -> Any:
        """The dataclass."""
        return _imported(self.kind)

    def contents(self) -> dict[str, Any]:
        """Plain values, as a YAML file at this place would have them."""
        own = {} if self.name is None else {"name": self.name}
        values = _merged(own | defaults_of(self.settings), self.values)
        defaults = self.defaults() if callable(self.defaults) else self.defaults
        if defaults:
            values["defaults"] = [*defaults, *(["_self_"] if "_self_" not in defaults else [])]
        return values

    @cached_property
    def config(self) -> DictConfig:
        """The same for Hydra, which copies it."""
        return OmegaConf.create(self.contents())


Nodes = Mapping[str, Node]


@dataclass(frozen=True)
class Nothing:
    """No keys."""


def _imported(name: str | type[Any]) -> Any:
    try:
        return resolve_name(name) if isinstance(name, str) else name
    except (ImportError, AttributeError) as error:  # of a user
        raise ValueError(f"{name} cannot be imported: {error}; write module:attribute") from error


class _StoredNode(ConfigNode):
    """A node in Hydra's store; its values are made when they are asked for."""

    own: Any = None

    def __init__(self, name: str, group: str | None, made: Node) -> None:
        self.name, self.group, self.package, self.provider, self.made = name, group, None, "orderrl", made

    @property
    def node(self) -> Any:
        if self.own is None:
            return self.made.config
        return self.own

    @node.setter
    def node(self, value: Any) -> None:
        self.own = value

    def __deepcopy__(self, _: dict[int, Any]) -> "_StoredNode":
        """The node itself: Hydra copies its whole store for every configuration, and a node again when it loads it."""
        return self


class Part(NamedTuple):
    """A node of a composed configuration, and the dotted place where it stands, "" for the top."""

    place: str
    node: Node


class Setting(NamedTuple):
    """A key: its annotated type, rules and meaning, and whether it holds keys of its own."""

    kind: Any
    rules: tuple[Rule, ...]
    meaning: str
    nested: bool


# Hydra's own settings without their groups (launchers, loggers), which are half of the work of composing.
_BARE_HYDRA = ConfigNode("config.yaml", OmegaConf.structured(HydraConf(defaults=[])), "hydra", None, "hydra")


@contextmanager
def registered(nodes: Nodes, bare: bool = False) -> Iterator[None]:
    """Register nodes with Hydra's ConfigStore; at the end of the block it is as before.

    Args:
        nodes: by their paths.
        bare: leave out what only a run of Hydra needs.
    """
    Plugins.instance()  # they register launchers and sweepers, once
    store = ConfigStore.instance()
    before = store.repo
    store.repo = dict(before)
    if bare:
        store.repo["hydra"] = {**before["hydra"], "config.yaml": _BARE_HYDRA}
    try:
        for path, node in nodes.items():
            group, _, name = path.rpartition("/")
            where = store.repo
            if group:
                where = store.repo[group] = dict(store.repo.get(group, {}))
            where[f"{name}.yaml"] = _StoredNode(f"{name}.yaml", group or None, node)
        yield
    finally:
        store.repo = before


@cache
def _settings(kind: Any) -> list[tuple[str, Any, Any, Any]]:
    """Name, field, annotated type and nested dataclass (or None) of every setting of a dataclass."""
    annotated, found = kinds(kind), []
    for item in fields(kind):
        if "meaning" in item.metadata:
            hint = annotated[item.name]
            nested = next((part for part in (hint, *get_args(hint)) if is_dataclass(part)), None)
            found.append((item.name, item, hint, nested))
    return found


def defaults_of(kind: Any) -> dict[str, Any]:
    """Defaults of a dataclass's settings as plain values, "???" for what must be given."""
    values: dict[str, Any] = {}
    for name, item, _, nested in _settings(kind):
        default: Any = MISSING if item.default is NO_DEFAULT else item.default
        if item.default_factory is not NO_DEFAULT:
            default = item.default_factory()
        if nested is not None and default is not None:
            below = defaults_of(nested)
            given = {key: getattr(default, key) for key in below} if is_dataclass(default) else default
            default = _merged(below, given)
        values[name] = default
    return values


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    values = deepcopy(dict(below))
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(values.get(key), Mapping)
        values[key] = _merged(values[key], value) if both else deepcopy(value)
    return values


def settings_of(parts: Sequence[Part]) -> dict[str, Setting]:
    """Every key of a configuration by its dotted name; of a key that several parts have, the last."""
    found: dict[str, Setting] = {}

    def add(kind: Any, prefix: str) -> None:
        for name, item, hint, nested in _settings(kind):
            described = item.metadata
            found[prefix + name] = Setting(hint, described["rules"], described["meaning"], nested is not None)
            if nested is not None:
                add(nested, f"{prefix}{name}.")

    for place, node in parts:
        if node.name is not None:
            meaning = (node.settings.__doc__ or "").partition("\n")[0].rstrip(".")
            found[f"{place}.name"] = Setting(str, (_chosen(node.name, place),), meaning, False)
        add(node.settings, f"{place}." if place else "")
    return found


def _chosen(name: str, group: str) -> Rule:
    refusal = f" must be {name!r} here, got {{}}; choose another with {group}=..."
    return Rule((), lambda value: value == name, refusal)


def check(parts: Sequence[Part], config: Mapping[str, Any]) -> None:
    """Refuse wrong values of a composed configuration.

    Args:
        config: plain values, "???" where a value must still be given.

    Raises:
        ValueError: naming the key, its value and what is allowed; or a key that is missing or unknown.
    """
    known = settings_of(parts)
    # every key by itself
    for key, setting in known.items():
        place, _, name = key.rpartition(".")
        above = select(config, place) if place else config
        if above is None and place in known:  # a section that may be null
            continue
        if not isinstance(above, Mapping) or name not in above:
            raise ValueError(f"{key} is missing: it can be changed, not removed")
        if above[name] != MISSING:
            require_kind(key, above[name], setting.kind)
            for rule in setting.rules:
                require(rule, key, above[name])
    places = {part.place for part in parts} | {key for key, setting in known.items() if setting.nested}
    _check_known(config, known, places)
    # the keys of a part together
    for place, node in parts:
        values = select(config, place) if place else config
        given = {name: values[name] for name, *_ in _settings(node.settings)}
        if MISSING not in given.values():
            with named(place):
                _imported(node.build or node.kind)(**given)


def _check_known(config: Mapping[str, Any], known: Mapping[str, Setting], places: set[str], prefix: str = "") -> None:
    """Refuse keys that no part has, in the section whose keys begin with `prefix`."""
    below = {place[len(prefix) :].partition(".")[0] for place in places if place.startswith(prefix)} - {""}
    here = {key[len(prefix) :] for key in known if key.startswith(prefix) and "." not in key[len(prefix) :]}
    for name, value in config.items():
        if name in below and isinstance(value, Mapping):
            _check_known(value, known, places, f"{prefix}{name}.")
        elif name not in here:
            raise ValueError(f"there is no key {prefix}{name}; keys here: {', '.join(sorted(here | below))}")


def select(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
