"""The documentation's notebooks run from an empty folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest

from tests.registries import keep_registries

nbclient = pytest.importorskip("nbclient")
nbformat: Any = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))}
IN_A_KERNEL = "first_planner"
SMALLER = {
    r"steps=\d+": "steps=3",
    r"warmup=\d+": "warmup=1",
    r'"labels.contexts=\d+"': '"labels.contexts=16", "agent.steps=3"',
}


def small(name: str) -> Any:
    """A notebook whose trainings are short."""
    book = nbformat.read(NOTEBOOKS[name], 4)
    nbformat.validate(book)
    for cell in book.cells:
        for long, short in SMALLER.items():
            cell.source = re.sub(long, short, cell.source)
    return book


@pytest.mark.slow
def test_a_notebook_runs_in_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(small(IN_A_KERNEL), timeout=600, resources=resources).execute()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if name != IN_A_KERNEL])
def test_the_cells_of_a_notebook_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kernel, which would import everything anew for each notebook."""
    keep_registries(monkeypatch)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    scope: dict[str, Any] = {}
    for number, cell in enumerate(small(name).cells):
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{name}, cell {number}", "exec"), scope)
    plt.close("all")


def test_there_is_a_notebook_for_each_path_of_a_new_user() -> None:
    assert list(NOTEBOOKS) == ["first_planner", "own_images", "own_policy"]
