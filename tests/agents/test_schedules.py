"""Schedules: budgets by step, by what is left, by certainty."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tensordict import TensorDict

from orderrl.agents.schedules import Schedule, entropy_threshold, fixed, growing, information_threshold, legal_place

BUDGETS = (1, 2, 4)
ANY = torch.zeros(1, 4, dtype=torch.int64)  # ranked blocks, for schedules that do not read them


def observe(visible: Sequence[Sequence[bool]], entropy: Sequence[Sequence[float]] | None = None) -> TensorDict:
    """Observations with a visible mask and entropies."""
    shown = torch.tensor(visible)
    hidden = (~shown).sum(-1, keepdim=True)
    budget_mask = torch.tensor(BUDGETS) <= hidden
    budget_mask[:, 0] = True
    return TensorDict(
        {
            "visible": shown,
            "action_mask": ~shown,
            "budget_mask": budget_mask,
            "label": torch.zeros(len(shown), dtype=torch.int64),
            "entropy": torch.zeros(shown.shape) if entropy is None else torch.tensor(entropy) * ~shown,
        },
        batch_size=[len(shown)],
    )


def sizes_of(schedule: Schedule, budgets: tuple[int, ...], blocks: int) -> list[int]:
    """Step sizes until everything is visible, revealing in raster order."""
    visible = torch.zeros(1, blocks, dtype=torch.bool)
    sizes = []
    while not visible.all():
        size = budgets[int(schedule(observe(visible.tolist()), ANY))]
        left = int((~visible).sum())
        visible[0, blocks - left : blocks - left + size] = True
        sizes.append(size)
    return sizes


@pytest.mark.parametrize("place", [0, 2])
def test_fixed_names_one_budget(place: int) -> None:
    chosen = fixed(place)(observe([[False] * 5, [True] + [False] * 4]), ANY)
    assert chosen.dtype == torch.int64 and chosen.tolist() == [place, place]


@pytest.mark.parametrize("sizes", [(1, 2, 4, 4, 4, 1), (4, 4, 4, 4), (1,) * 16, (2, 1, 4, 4, 4, 1)])
def test_growing_covers_the_blocks_with_exactly_its_sizes(sizes: tuple[int, ...]) -> None:
    assert sizes_of(growing(BUDGETS, sizes), BUDGETS, 16) == list(sizes)


def test_growing_reads_each_rows_own_step() -> None:
    visible = [[True] * n + [False] * (16 - n) for n in (0, 1, 3, 7, 11, 15)]
    assert growing(BUDGETS, (1, 2, 4, 4, 4, 1))(observe(visible), ANY).tolist() == [0, 1, 2, 2, 2, 0]


def test_growing_refuses_sizes_that_are_no_budgets() -> None:
    with pytest.raises(ValueError, match=r"name \[3, 5\], which are not among budgets=\(1, 2, 4\)"):
        growing(BUDGETS, (1, 3, 5, 4))


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 4, 4, 4, 4), ()])
def test_growing_refuses_sizes_that_do_not_sum_to_the_blocks(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"sum to {sum(sizes)}, the image has 16 blocks"):
        growing(BUDGETS, sizes)(observe([[False] * 16]), ANY)


def test_entropy_threshold_takes_the_largest_certain_set() -> None:
    """The most certain blocks are 0.1, 0.2, 0.3 and 0.8: means 0.1, 0.15 and 0.35 for budgets 1, 2 and 4."""
    observation = observe([[False, False, True, False, False]], [[0.8, 0.1, 0.0, 0.3, 0.2]])
    for threshold, place in [(0.05, 0), (0.12, 0), (0.16, 1), (0.3, 1), (0.36, 2), (torch.inf, 2)]:
        assert entropy_threshold(BUDGETS, threshold)(observation, ANY).tolist() == [place]


def test_entropy_threshold_is_monotone_and_never_exceeds_what_is_hidden() -> None:
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(64, 8, generator=generator) < 0.5
    observation = observe(visible.tolist(), torch.rand(64, 8, generator=generator).tolist())
    thresholds = torch.linspace(0, 1.5, 16).tolist()
    chosen = torch.stack([entropy_threshold(BUDGETS, t)(observation, ANY) for t in thresholds])
    assert (chosen.diff(dim=0) >= 0).all()
    assert chosen.max() == 2 and chosen.min() == 0
    assert observation["budget_mask"].expand(16, -1, -1).gather(-1, chosen[..., None]).all()


def test_information_threshold_takes_the_largest_set_of_first_choices() -> None:
    """Against enumeration of all budgets, legal ones only; the smallest where none fits."""
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(64, 8, generator=generator) < 0.5
    visible[:, 0] = False
    entropy = torch.rand(64, 8, generator=generator).masked_fill(visible, 0.0)
    ranked = (torch.rand(64, 8, generator=generator) - 2 * visible.float()).argsort(1, descending=True)[:, :4]
    observation = observe(visible.tolist(), entropy.tolist())
    places = set()
    for threshold in (0.0, 0.3, 0.6, 1.0, 1.7, 9.0):
        found = legal_place(information_threshold(BUDGETS, threshold), observation, ranked)
        for row, place in enumerate(found.tolist()):
            fitting = [
                i
                for i, budget in enumerate(BUDGETS)
                if budget <= (~visible[row]).sum() and sum(entropy[row, ranked[row, :budget]].tolist()) < threshold
            ]
            assert place == max(fitting, default=0)
            places.add(place)
    assert places == {0, 1, 2}


def test_information_threshold_reads_the_ranking() -> None:
    """The same state, ranked from certain to uncertain and the other way round."""
    observation = observe([[False] * 5], [[0.1, 0.2, 0.3, 0.8, 1.5]])
    schedule = information_threshold(BUDGETS, 1.45)
    assert schedule(observation, torch.tensor([[0, 1, 2, 3]])).tolist() == [2]  # 0.1, 0.3, 1.4
    assert schedule(observation, torch.tensor([[4, 3, 2, 1]])).tolist() == [0]  # 1.5
    assert schedule(observation, torch.tensor([[3, 2, 1, 4]])).tolist() == [1]  # 0.8, 1.1, 2.8
