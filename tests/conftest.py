"""Shared fixtures."""

import pytest

from orderrl.backbones import OrderRobustTransformer
from orderrl.data import TokenSet
from tests.helpers import tiny_backbone, tiny_images


@pytest.fixture
def backbone() -> OrderRobustTransformer:
    """6x6 tokens, 2x2 blocks (B = 9), 5 token values, 3 classes."""
    return tiny_backbone()


@pytest.fixture
def data(backbone: OrderRobustTransformer) -> TokenSet:
    """Twelve random images for the fixture `backbone`."""
    return tiny_images(backbone)
