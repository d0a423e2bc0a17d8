"""The fitted order recovers what positions alone say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orderrl.agents.fitted import fit_order


def contexts(blocks: int, count: int = 400) -> Tensor:
    return torch.rand(count, blocks, generator=torch.Generator().manual_seed(0)) < 0.5


@pytest.mark.parametrize("seed", range(3))
def test_recovers_an_order_by_position(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(9, generator=generator)
    value = torch.empty(9)
    value[order] = torch.linspace(1, 0, 9)
    visible = contexts(9)
    noise = 0.02 * torch.randn(visible.shape, generator=generator)
    assert torch.equal(fit_order(visible, value + noise), order)


def test_recovers_the_greedy_order_of_utilities_that_depend_on_the_mask() -> None:
    """Block 0 is best at first; once it is visible its neighbour 1 is worth less than every other block."""
    base = torch.tensor([1.0, 0.9, 0.5, 0.4])
    visible = contexts(4)
    utility = base.expand(len(visible), -1).clone()
    utility[:, 1] -= 0.8 * visible[:, 0].float()
    assert fit_order(visible, utility).tolist() == [0, 2, 3, 1]
    assert fit_order(visible, base.expand(len(visible), -1)).tolist() == [0, 1, 2, 3]


def test_ignores_what_stands_in_the_place_of_visible_blocks() -> None:
    visible = contexts(6)
    utility = torch.linspace(1, 0, 6).expand(visible.shape)
    assert torch.equal(fit_order(visible, utility.masked_fill(visible, 100.0)), fit_order(visible, utility))


def test_a_block_that_is_never_hidden_is_named() -> None:
    visible = contexts(5)
    visible[:, 3] = True
    with pytest.raises(ValueError, match=r"blocks \[3\] are never hidden"):
        fit_order(visible, torch.zeros(visible.shape))
