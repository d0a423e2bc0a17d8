"""Things of one kind by name: the package's own, those that users register, and those of installed packages.

    ORDERS = Registry("order", "orderrl.orders", {"raster": raster})

    @ORDERS.register("mine")  # in a notebook or in a module that is imported
    def mine(geometry): ...

    [project.entry-points."orderrl.orders"]  # in the pyproject.toml of another package, for every process
    mine = "my_package.orders:mine"

`find` also takes "module:attribute", without any registration. What is given as a text is imported when it is needed.

That is for names that the user gives. A name that stands in a file (a checkpoint, a token set) is looked up where it is
registered, installed or named by the user already; nothing else is imported, or opening a file would run code.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, cached_property
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import Any, TypeVar

from orderrl.runtime.sources import source_identity

T = TypeVar("T")
_NAME = re.compile(r"[A-Za-z][\w.-]*")  # has no other meaning on a command line or in a policy's name
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


_trusted: set[str] = set()  # module:attribute that files may name


def is_reference(name: str) -> bool:
    """Whether a name is written as module:attribute."""
    return _REFERENCE.fullmatch(name) is not None


def trust(*names: str) -> None:
    """Let files name parts of the user's own, each module:attribute, in this process."""
    _trusted.update(names)


class Registry(Mapping[str, T]):
    """What is known of one kind, by name; listing names imports nothing.

    Args:
        kind: what it is called in messages.
        group: of the entry points.
        shipped: the package's own; texts "module:attribute" are imported when they are needed.
        check: refuses what is no member of the kind, by name and member, with a `ValueError`.
        taken: other names that mean something where these stand; a function gives them when a name is added.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        shipped: Mapping[str, T | str] | None = None,
        check: Callable[[str, Any], None] = lambda name, member: None,
        taken: Iterable[str] | Callable[[], Iterable[str]] = (),
    ) -> None:
        self.kind, self.group, self.check = kind, group, check
        self.members: dict[str, T | str] = dict(shipped or {})
        self.shipped, self._others = frozenset(self.members), taken

    @cached_property
    def taken(self) -> frozenset[str]:
        """Names that have a meaning here, which nothing else can have."""
        return self.shipped | frozenset(self._others() if callable(self._others) else self._others)

    def register(self, name: str, member: Any = None, *, overwrite: bool = False) -> Any:
        """Add a member, or "module:attribute", and return it; without one, give a decorator.

        Args:
            name: letters, digits, "_", "-" and ".".
            member: of the kind.
            overwrite: replace another one of the name, as when a notebook's cell runs again; never a shipped one.

        Raises:
            ValueError: if the name is taken or cannot be one, or it is no member of the kind.
        """
        if member is None:
            return lambda decorated: self.register(name, decorated, overwrite=overwrite)
        if not _NAME.fullmatch(name):
            allowed = "a letter, and then letters, digits, '_', '-' and '.'"
            raise ValueError(f"{self.kind} {name!r}: a name is {allowed}")
        if name in self.taken:
            raise ValueError(f"{self.kind} {name!r}: the package has a meaning for the name; choose another name")
        before: Any = self.members.get(name, member)
        if before is not member and before != member and not overwrite:
            raise ValueError(f"{self.kind} {name!r} is registered already; choose another name, or set overwrite=True")
        if not isinstance(member, str):
            self.check(name, member)
        self.members[name] = member
        return member

    def find(self, name: str, key: str = "") -> T:
        """The member of a name, or of "module:attribute", which is listed from then on.

        Args:
            name: as above.
            key: of the setting that holds it, for messages.

        Raises:
            ValueError: if there is none, it cannot be imported, or it is no member of the kind.
        """
        member: Any = self.given(name)
        if member is None:
            known = ", ".join([*self, "module:attribute"])
            raise ValueError(f"{key or self.kind}={name!r} is unknown; choose one of {known}")
        if isinstance(member, str):
            what = f"{self.kind} '{name}'" + ("" if member == name else f" ({member})")
            try:
                member = pkgutil.resolve_name(member)
            except (ImportError, AttributeError, ValueError) as error:
                raise ValueError(f"{what} cannot be imported: {error}; write module:attribute") from error
            self.check(name, member)
            self.members[name] = member
        found: T = member
        return found

    def given(self, name: str) -> T | str | None:
        """A member that is there, or the "module:attribute" of one that is imported later; None if it is unknown."""
        unlisted = name if is_reference(name) else None
        return self.members[name] if name in self.members else self.installed.get(name, unlisted)

    def refusal(self, name: str) -> str | None:
        """Why a name that stands in a file is not looked up, in words that follow the file's; None if it may be."""
        if not is_reference(name) or name in self or name in _trusted:
            return None
        return (
            f"names the {self.kind} {name!r}, and files run no code: if it is yours, set trust=[{name}], or in Python "
            f"orderrl.trust({name!r})"
        )

    def own(self) -> list[str]:
        """Names of what is not shipped."""
        return [name for name in self if name not in self.shipped]

    def version(self, name: str) -> str | None:
        """What stands in keys for the file of a user's member; None for the package's own."""
        file = self.source(name)
        return None if file is None else source_identity(file)

    def source(self, name: str) -> Path | None:
        """The file that a user's member is written in; None for the package's own, and where there is no file."""
        if name in self.taken or self.given(name) is None:
            return None
        member: Any = self.find(name)
        parts = [inspect.unwrap(member) if callable(member) else member]
        if type(member).__module__.startswith("orderrl."):  # such as an Agent: what it holds is the user's
            parts += vars(member).values()
        for part in (*parts, type(member)):
            try:
                return Path(inspect.getfile(part))
            except (TypeError, OSError):  # an instance, or a class of a notebook
                continue
        return None

    @cached_property
    def installed(self) -> dict[str, str]:
        """What other packages offer, as "module:attribute" by name; a name that is taken is left out with a warning."""
        found: dict[str, str] = {}
        for entry in _entry_points().get(self.group, ()):
            if entry.name in self.taken or not _NAME.fullmatch(entry.name):
                said = f"{self.kind} {entry.name!r} ({entry.value}) is left out: choose another name"
                warnings.warn(said, stacklevel=2)
            else:
                found.setdefault(entry.name, entry.value.partition("[")[0].strip())
        return found

    def __getitem__(self, name: str) -> T:
        if name not in self:
            raise KeyError(name)
        return self.find(name)

    def __contains__(self, name: object) -> bool:
        return name in self.members or name in self.installed

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.members, *self.installed]))

    def __len__(self) -> int:
        return len(self.members.keys() | self.installed.keys())


@cache
def _entry_points() -> dict[str, EntryPoints]:
    """The entry points of all installed packages by group, read once."""
    found = entry_points()
    return {group: found.select(group=group) for group in found.groups}
