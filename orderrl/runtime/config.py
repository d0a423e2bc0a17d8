"""The machinery shared by the commands: Hydra applications with a help page and one-line errors.

A command is a function and one line:

    if __name__ == "__main__":
        run_application("train", main)

Its configuration is the node ``train`` of the module ``schema`` in the package `CONFIGS`: a dataclass with the keys of
the command's own, and a defaults list that names the groups. Options of the groups are further nodes, or YAML files
that hold what differs from them. Every key has default, type, range and meaning in one of the dataclasses.
Nothing about Hydra itself is set there: Hydra neither changes the directory nor writes files, except a sweep's
``multirun.yaml`` in ``<output_dir>/multirun/<date>_<time>``.
"""

import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import hydra
import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, Node, OmegaConf, open_dict
from omegaconf.errors import (
    GrammarParseError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)
from rich.padding import Padding
from rich.table import Table

from orderrl.runtime import schema
from orderrl.runtime.renamed import with_new_names
from orderrl.runtime.schema import Nodes, Part
from orderrl.runtime.terminal import new_console, one_line, show_anything

CONFIGS = "orderrl.configs"
_FULL_ERROR = "HYDRA_FULL_ERROR"
_THREE_COLUMNS = 90  # characters: help pages of narrower terminals have the meaning of a key below it
_PLACES: dict[tuple[Any, ...], dict[str, str]] = {}  # of nodes, by what they depend on, see `_parts`
# Given to Hydra in front of the user's own arguments: stay in this directory, write nothing, show warnings alone.
_HYDRA_SETTINGS = {
    "hydra.job.chdir": "false",
    "hydra.output_subdir": "null",
    "hydra.run.dir": ".",
    "hydra.sweep.dir": "${output_dir}/multirun/${now:%Y-%m-%d_%H-%M-%S}",
    "hydra.sweep.subdir": ".",
    "hydra/job_logging": "stdout",
    "hydra.job_logging.root.level": "WARNING",
}


def compose(command: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The resolved and checked configuration that ``python -m orderrl.<command> <overrides>`` would run with.

    Args:
        command: the entry point, such as ``train``.
        overrides: as on the command line: ``key=value``, ``group=choice``.

    Raises:
        ValueError: in one line, for an unknown key or choice or a wrong value; it names what is allowed.
    """
    overrides = with_new_names(overrides)
    with _loader(command, overrides) as loader:
        config, _ = _load(loader, command, overrides)
        parts = _parts(loader, command, overrides)
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ValueError(f"{command}: {_line(error)}") from error
    schema.check(parts, _plain(config))
    return config


def parts_of(command: str, overrides: Sequence[str] = ()) -> list[Part]:
    """The dataclasses that a command's configuration is made of, under the groups that the overrides choose."""
    with _loader(command, overrides) as loader:
        return _parts(loader, command, overrides)


def _parts(loader: ConfigLoader, command: str, overrides: Sequence[str]) -> list[Part]:
    nodes = nodes_of(overrides)
    choices = tuple(item for item in overrides if _is_group(loader, item.partition("=")[0]))
    # where nodes stand takes half as long as the whole configuration, and only the choices of groups change it
    key = (CONFIGS, command, choices, *nodes)
    if key not in _PLACES:
        entries = loader.compute_defaults_list(command, list(choices), RunMode.RUN).defaults
        _PLACES[key] = {entry.config_path: (entry.package or "").removeprefix("_global_") for entry in entries}
    return [Part(place, nodes[path]) for path, place in _PLACES[key].items() if path in nodes]


def nodes_of(overrides: Sequence[str] = ()) -> Nodes:
    """What the configuration has as dataclasses, with those that overrides name by module:attribute."""
    nodes: Nodes = import_module(f"{CONFIGS}.schema").nodes(overrides)
    return nodes


def _plain(config: DictConfig) -> dict[str, Any]:
    """Plain values; what must be given, or is made of such a value, is "???"."""
    found: dict[str, Any] = {}
    for key in config:
        try:
            value = config[key]
        except OmegaConfBaseException:
            value = "???"
        if isinstance(value, DictConfig):
            value = _plain(value)
        elif isinstance(value, ListConfig):
            value = OmegaConf.to_container(value, resolve=True)
        found[str(key)] = value
    return found


class Help(NamedTuple):
    """What the help page of a command shows: choices of its groups; of every key, by dotted names, the rest."""

    groups: dict[str, list[str]]
    defaults: dict[str, Any]  # not resolved
    meanings: dict[str, str]


def help_of(command: str, overrides: Sequence[str] = ()) -> Help:
    """Groups and keys of a command under the groups that the overrides choose, in the order of its configuration."""
    with _loader(command, overrides) as loader:
        config, groups = _load(loader, command, overrides)
        settings = schema.settings_of(_parts(loader, command, overrides))
        choices = {group: _choices(loader, group.partition("@")[0]) for group in groups}
    # a section without keys says nothing
    defaults = {key: value for key, value in _leaves(config) if key in settings or value != {}}
    return Help(choices, defaults, {key: settings[key].meaning if key in settings else "" for key in defaults})


def run_application(command: str, main: Callable[[DictConfig], Any]) -> None:
    """Run an entry point with the configuration that the command line asks for.

    Everything that Hydra offers works: ``key=value``, ``group=choice``, ``--multirun``, ``--cfg job``,
    ``hydra/launcher=...``. ``--help`` lists the groups and explains every key. Wrong input ends the program with
    code 2 and one line, ``error: ...``; so do ``ValueError``, ``OSError`` (a missing file, a full disk) and too little
    memory in ``main``. With ``HYDRA_FULL_ERROR=1`` they show their traceback.

    Args:
        command: the name of the primary configuration, such as ``train``.
        main: called with the resolved configuration.
    """
    show_anything()
    arguments = with_new_names(sys.argv[1:])
    full_error = os.environ.get(_FULL_ERROR) == "1"
    try:
        if {"-h", "--help"} & set(arguments):
            _print_help(command, list(filter(_is_override, arguments)))
            return
        job = partial(_run_job, command, main, full_error)
        _run_hydra(command, lambda config: job(config), arguments)
    except Exception as error:
        if full_error or not _is_refusal(error):
            raise
        _refuse(_explain_anew(error, command, arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _run_hydra(command: str, job: Callable[[DictConfig], Any], arguments: list[str]) -> None:
    ours = [
        f"{key}={value}"
        for key, value in {**_HYDRA_SETTINGS, "hydra.job.name": command}.items()
        if not any(argument.startswith(f"{key}=") for argument in arguments)
    ]
    application = hydra.main(version_base="1.3", config_path=f"pkg://{CONFIGS}", config_name=command)(job)
    argv, setting = sys.argv, os.environ.get(_FULL_ERROR)
    # Hydra prints errors in its own way and exits, unless it is asked for the full error; we want the exception.
    os.environ[_FULL_ERROR] = "1"
    # Overrides come last and together: a flag between them would end them.
    overrides = list(filter(_is_override, arguments))
    sys.argv = [argv[0], *(item for item in arguments if not _is_override(item)), *ours, *overrides]
    try:
        with schema.registered(nodes_of(arguments)):
            application()
    finally:
        sys.argv = argv
        if setting is None:
            del os.environ[_FULL_ERROR]
        else:
            os.environ[_FULL_ERROR] = setting


def _run_job(command: str, main: Callable[[DictConfig], Any], full_error: bool, config: DictConfig) -> Any:
    try:
        missing = [key for key, value in _leaves(config) if value == "???"]  # also where another key is made of it
        if missing:
            raise ValueError(f"{command} needs {missing[0]}=...; see --help")
        OmegaConf.resolve(config)
        if str(config.get("device", "cpu")).startswith("cuda"):
            import torch

            torch.set_float32_matmul_precision("high")  # products in float32 on GPUs round their factors (TF32)
        schema.check(parts_of(command, HydraConfig.get().overrides.task), _plain(config))
        return main(config)
    except Exception as error:
        if full_error or not _is_refusal(error):
            raise
        _refuse(_line(error))


def _is_refusal(error: Exception) -> bool:
    """Whether an error is an answer to the user, and no fault of the program."""
    expected = (HydraException, OmegaConfBaseException, ValueError, OSError, MemoryError, RecursionError)
    return isinstance(error, expected) or _lacks_memory(error) or type(error).__name__ == "DecompressionBombError"


def _lacks_memory(error: Exception) -> bool:
    """Whether the machine or the device has too little memory; PyTorch says so in errors of several types."""
    said = ("out of memory", "can't allocate memory", "failed to allocate")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in said)
    )


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# -- composing and explaining what went wrong -------------------------------------------------------------------------


@contextmanager
def _loader(command: str, overrides: Sequence[str]) -> Iterator[ConfigLoader]:
    """Hydra's config loader; usable inside a running Hydra application too."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    bare = not any(item.lstrip("+~").startswith("hydra") for item in overrides)
    try:
        with (
            schema.registered(nodes_of(overrides), bare),
            hydra.initialize_config_module(CONFIGS, job_name=command, version_base="1.3"),
        ):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = outer


def _load(loader: ConfigLoader, command: str, overrides: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """A configuration, and the names of the command's groups; raises ValueError with the whole story in one line."""
    try:
        config = loader.load_configuration(command, list(overrides), RunMode.RUN, from_shell=False)
    except (HydraException, OmegaConfBaseException, RecursionError) as error:
        raise ValueError(_explain(error, loader, command, overrides)) from error
    groups = sorted(group for group in config.hydra.runtime.choices if not group.startswith("hydra/"))
    with open_dict(config):
        del config["hydra"]
    return config, groups


def _explain_anew(error: Exception, command: str, arguments: Sequence[str]) -> str:
    if not isinstance(error, HydraException):
        return _line(error)
    overrides = list(filter(_is_override, arguments))
    with _loader(command, overrides) as loader:
        return _explain(error, loader, command, overrides)


def _explain(error: Exception, loader: ConfigLoader, command: str, overrides: Sequence[str]) -> str:
    """One line for a configuration that cannot be composed: what is unknown, and what is allowed instead."""
    if isinstance(error, MissingConfigException):
        file = error.missing_cfg_file or ""
        if "/" not in file:
            return f"there is no command {command!r}; choose one of {', '.join(_choices(loader, ''))}"
        # the longest part that is a group: a path may have been given as the choice
        ends = [found.start() for found in re.finditer("/+", file)]
        end = next((place for place in reversed(ends) if _choices(loader, file[:place])), ends[0])
        group, choice = file[:end], file[end:].removeprefix("/")
        options = _choices(loader, group)
        paths = "; a path is a key's value: backbone.name=PATH, or data=tokens data.path=PATH" if "/" in choice else ""
        return f"{group}={choice} is unknown{_closest(choice, options)}; choose one of {', '.join(options)}{paths}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}; write key=value or group=choice{_in_quotes(error.override)}"
    if ambiguous := re.match(r"Ambiguous value for argument '(.+?)=(.*)'", str(error)):
        key, values = ambiguous.groups()
        return (
            f"{key}={values} gives several values; add --multirun to run with each, or write '{key}=[{values}]'"
            + _in_quotes(f"{key}={values}")
        )
    unknown = re.search(r"Could not override '([^'@]+)(@[^']*)?", str(error))
    if unknown is None:
        return _line(error)
    if unknown[2]:
        return f"{unknown[1]}{unknown[2]}=... cannot be moved to another place; write {unknown[1]}=CHOICE"
    parent, _, name = unknown[1].rpartition(".")
    choices = [item for item in overrides if not item.startswith("~") and _is_group(loader, item.split("=")[0])]
    config: Any = loader.load_configuration(
        command, [item.split(",")[0] for item in choices if item.split("=")[0] != name], RunMode.RUN, from_shell=False
    )
    while parent and not isinstance(OmegaConf.select(config, parent), DictConfig):
        parent, _, name = parent.rpartition(".")
    level = OmegaConf.select(config, parent) if parent else config
    keys = sorted(str(key) for key in level if key != "hydra")
    where = f"{parent}." if parent else ""
    if not keys:
        return f"{command} has no key {where}{name}: with these choices {parent} has none"
    known = f"keys {f'of {parent}' if parent else 'here'}: {', '.join(keys)}"
    return f"{command} has no key {where}{name}{_closest(name, keys)}; {known}"


def quoted(value: str) -> str:
    """A string as Hydra's command line takes it, whatever characters are in it (but `${`, which names another key)."""
    escaped = re.sub(r"(\\*)'", lambda found: 2 * found[1] + "\\'", value)
    escaped = re.sub(r"(\\+)$", lambda found: 2 * found[1], escaped)  # it would escape the closing quote
    return f"'{escaped}'"


def _in_quotes(override: str | None) -> str:
    """How to write an override whose value has characters that mean something to Hydra, in quotes for the shell too."""
    key, equals, value = (override or "").partition("=")
    if not equals or not value or value.startswith(("'", '"')):
        return ", special characters in quotes"  # there is no value to show
    text = f"{key}={quoted(value)}"
    return "; a path or text with special characters stands in quotes: " + (
        shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"'
    )


def _is_override(argument: str) -> bool:
    return argument.startswith(("+", "~")) or ("=" in argument and not argument.startswith("-"))


def _is_group(loader: ConfigLoader, name: str) -> bool:
    name = name.lstrip("+").split("@")[0]
    return "." not in name and any(source.is_group(name) for source in loader.get_sources())


def _choices(loader: ConfigLoader, group: str) -> list[str]:
    """What a group offers; files with a leading underscore are parts of others."""
    # the loader's own list would parse all overrides again
    sources = [source for source in loader.get_sources() if source.is_group(group)]
    found = {name for source in sources for name in source.list(group, ObjectType.CONFIG)}
    return sorted(name for name in found if not name.startswith("_"))


def _closest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "a value is nested too deeply"
    line = one_line(error)
    if _lacks_memory(error):
        return (
            f"too little memory ({one_line(error, 200)}); make batches smaller (batch_size, num_envs, "
            "backbone.memory_gb), use a smaller model, or fewer images"
        )
    if isinstance(error, InterpolationResolutionError | UnsupportedInterpolationType | GrammarParseError):
        line += " (${...} stands for another key of the configuration: no path can hold it)"
    return line


# -- help -------------------------------------------------------------------------------------------------------------


def _print_help(command: str, overrides: Sequence[str]) -> None:
    groups, defaults, meanings = help_of(command, overrides)
    console = new_console(120)
    module = f"{CONFIGS.rpartition('.')[0]}.{command}"
    console.print(f"usage: python -m {module} [group=choice ...] [key=value ...] [--multirun] [--cfg job] [--help]\n")
    if groups:
        console.print(_table(("group", "choices"), [(name, ", ".join(names)) for name, names in groups.items()]))
    shown = [(key, _shown(default), meanings[key]) for key, default in defaults.items()]
    if console.width >= _THREE_COLUMNS:
        console.print(_table(("key", "default", "meaning"), shown))
        return
    for key, default, meaning in shown:
        console.print(f"{key} = {default}", Padding(meaning, (0, 0, 0, 4)), overflow="fold")


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*titles, box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in table.columns:
        column.overflow = "fold"  # nothing is cut off
    for row in rows:
        table.add_row(*row)
    table.add_row()
    return table


def _leaves(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and unresolved values of everything that is not a non-empty mapping."""
    for key in config:
        node = config._get_node(key)
        assert isinstance(node, Node)
        name = f"{prefix}{key!s}"
        if isinstance(node, DictConfig) and len(node) > 0 and not node._is_interpolation():
            yield from _leaves(node, f"{name}.")
        else:
            plain = isinstance(node, DictConfig | ListConfig) and not node._is_interpolation()
            yield name, OmegaConf.to_container(node) if plain else node._value()


def _shown(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
    return text.removesuffix("...").strip()
