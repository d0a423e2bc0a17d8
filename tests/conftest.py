"""Shared fixtures."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orderrl.backbones import OrderRobustTransformer
from orderrl.data import TokenSet
from tests.figures import render_nothing
from tests.helpers import tiny_backbone, tiny_images

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "orderrl", "envs", "agents", "configs")  # of the wheel
PICTURED = ("tests.report.", "tests.evaluation.test_runs")
"""Tests that look at the figures of a report."""


@pytest.fixture(scope="module", autouse=True)
def figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where nobody looks at the figures of reports, they are not rendered."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.module.__name__.startswith(PICTURED):
            render_nothing(patch)
        yield


@pytest.fixture
def backbone() -> OrderRobustTransformer:
    """6x6 tokens, 2x2 blocks (B = 9), 5 token values, 3 classes."""
    return tiny_backbone()


@pytest.fixture
def data(backbone: OrderRobustTransformer) -> TokenSet:
    """Twelve random images for the fixture `backbone`."""
    return tiny_images(backbone)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel; from a copy, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / "source" / name)
    call = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*call, "--wheel-dir", str(folder), str(folder / "source")], check=True, capture_output=True)
    (built,) = folder.glob("orderrl-*.whl")
    return built
