"""Shared fixtures."""

from collections.abc import Iterator

import pytest

from orderrl.backbones import OrderRobustTransformer
from orderrl.data import TokenSet
from tests.figures import render_nothing
from tests.helpers import tiny_backbone, tiny_images

PICTURED = ("tests.report.", "tests.evaluation.test_runs", "tests.test_extend")
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
