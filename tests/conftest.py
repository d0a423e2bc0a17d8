"""Shared fixtures."""

import pytest

from orderrl.backbones import OrderRobustTransformer
from orderrl.data import TokenSet
from tests.helpers import tiny_backbone, tiny_images

PICTURED = ("tests.report.", "tests.evaluation.test_runs", "tests.test_extend")
"""Tests that look at the figures of a report."""


@pytest.fixture(autouse=True)
def figures_in_one_format(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports draw eleven figures in three formats each; where nobody looks at them, one is enough."""
    if not request.module.__name__.startswith(PICTURED):
        monkeypatch.setattr("orderrl.report.page.PICTURES", ("svg",))
        monkeypatch.setattr("orderrl.report.page.IN_COLUMN", ())


@pytest.fixture
def backbone() -> OrderRobustTransformer:
    """6x6 tokens, 2x2 blocks (B = 9), 5 token values, 3 classes."""
    return tiny_backbone()


@pytest.fixture
def data(backbone: OrderRobustTransformer) -> TokenSet:
    """Twelve random images for the fixture `backbone`."""
    return tiny_images(backbone)
