"""Keyed random numbers: a function of their key alone, and as good as random."""

import torch

from orderrl.runtime.random import Stream, keyed_index, keyed_uniform


def test_a_draw_depends_on_its_key_and_not_on_its_batch() -> None:
    seeds, steps = torch.arange(40), torch.arange(7)
    together = keyed_uniform((Stream.TOKEN, seeds[:, None], steps))
    assert together.shape == (40, 7) and together.dtype == torch.float64
    for seed in (0, 13, 39):
        for step in (0, 6):
            assert keyed_uniform((Stream.TOKEN, seed, step)) == together[seed, step]
    assert torch.equal(keyed_uniform((Stream.TOKEN, seeds.flip(0)[:, None], steps)), together.flip(0))


def test_streams_and_places_of_a_key_differ() -> None:
    number = torch.arange(2000)
    one = keyed_uniform((Stream.TOKEN, number, 3))
    others: list[tuple[torch.Tensor | int, ...]] = [
        (Stream.LABEL, number, 3),
        (Stream.TOKEN, 3, number),
        (Stream.TOKEN, number, 4),
        (Stream.TOKEN, number),
    ]
    for key in others:
        other = keyed_uniform(key)
        assert (one == other).sum() <= 1
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.1


def test_draws_are_uniform_and_neighbours_independent() -> None:
    draws = keyed_uniform((Stream.IMAGE, torch.arange(300)[:, None], torch.arange(100)))
    assert draws.min() >= 0 and draws.max() < 1
    counts = torch.histc(draws.flatten(), 20, 0, 1)
    expected = draws.numel() / 20
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-squared, 19 degrees of freedom, p = 0.0007
    for shifted in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        pair = torch.stack([part.flatten() for part in shifted])
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.025


def test_negative_and_large_keys_are_distinct() -> None:
    keys = torch.tensor([-1, 0, 1, 2**31, 2**62, -(2**63)])
    assert len(keyed_uniform((Stream.TOKEN, keys)).unique()) == len(keys)


def test_index_covers_its_range() -> None:
    index = keyed_index((Stream.IMAGE, torch.arange(5000)), 7)
    assert index.dtype == torch.int64
    assert index.bincount(minlength=7).min() > 600 and len(index.bincount()) == 7
    assert keyed_index((Stream.IMAGE, torch.arange(5)), 1).tolist() == [0] * 5
