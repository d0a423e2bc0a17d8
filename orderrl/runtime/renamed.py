"""Names that commands and keys had before: they are answered with the new one, in one line."""

import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from typing import Any

COMMANDS = {
    "ablate": "analyze",
    "results": "reproduce",
    "leaderboard": "compare --rank gain_auc",
    "pretrain_tokenizer": "pretrain backbone=none",
}
KEYS = {"grid": "suite", "room": "headroom", "shard": "fsdp", "backbone.training": "training"}


class RenamedModules(MetaPathFinder):
    """First of Python's finders: says what the old module of a command is called now."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Find nothing; ModuleNotFoundError for the old name of a command."""
        package, _, old = name.rpartition(".")
        if package == "orderrl" and old in COMMANDS:
            raise ModuleNotFoundError(f"{name} is called {COMMANDS[old]} now: python -m orderrl.{COMMANDS[old]}")


def install() -> None:
    """Let imports and `python -m` of old names answer."""
    if not any(isinstance(finder, RenamedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, RenamedModules())


def with_new_names(overrides: Sequence[str]) -> list[str]:
    """Overrides of a command line, old keys by their new names, which are printed."""
    found = []
    for override in overrides:
        key = re.match(rf"[+~]*({'|'.join(map(re.escape, KEYS))})(?=[=.]|$)", override)
        if key is not None:
            new = KEYS[key[1]]
            print(f"{key[1]} is called {new} now", file=sys.stderr, flush=True)
            override = f"{override[: key.start(1)]}{new}{override[key.end(1) :]}"
        found.append(override)
    return found
