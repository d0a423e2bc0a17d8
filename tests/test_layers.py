"""One way down: a module imports from its own layer's folder and from the layers below it, never from above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import orderrl

ROOT = Path(orderrl.__file__).parent
COMMANDS = "train evaluate generate label pretrain tokenize compare verify analyze rollouts"
LAYERS = [
    ["runtime"],
    ["geometry"],
    ["tokenizers"],
    ["data"],
    ["backbones", "partial_classifier"],
    ["oracle", "planner", "verification"],
    ["envs"],
    ["factory"],
    ["labels"],
    ["agents"],
    ["training", "distillation"],
    ["metrics"],
    ["evaluation"],
    ["report"],
    COMMANDS.split(),
    ["reproduce"],
]
"""Parts of the package, the lowest first; parts of one layer do not know each other."""
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}


def modules() -> dict[str, Path]:
    """Dotted names inside the package, such as `agents.ppo`, of all modules."""
    found = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in ROOT.rglob("*.py")}
    return {
        name.removesuffix(".__init__"): path for name, path in found.items() if name not in ("__init__", "__main__")
    }


def imports(path: Path, known: set[str]) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, in functions too, but not for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "orderrl":
            module = (node.module or "").removeprefix("orderrl").removeprefix(".")
            for alias in node.names:
                full = f"{module}.{alias.name}".removeprefix(".")
                if full in known or module:
                    yield full if full in known else module


MODULES = modules()
EDGES = {name: set(imports(path, set(MODULES))) for name, path in MODULES.items()}


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.split(".")[0] != "configs"))
def test_imports_point_down(name: str) -> None:
    part = name.split(".")[0]
    assert part in HEIGHT, "give the part a layer"
    others = {other for other in EDGES[name] if other.split(".")[0] != part}
    assert [other for other in sorted(others) if HEIGHT[other.split(".")[0]] >= HEIGHT[part]] == []


def test_no_module_imports_itself_in_a_circle() -> None:
    assert list(TopologicalSorter(EDGES).static_order())  # raises CycleError
