"""The animation of orders: what is shown when, beside what the episodes say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from orderrl.data.pictures import HIDDEN_GREY, OUTLINE
from orderrl.evaluation.detail import Curve, Episode, Examples, PolicyDetail
from orderrl.report.animation import save_orders

IMAGES = torch.stack([torch.full((3, 64, 64), 40), torch.full((3, 64, 64), 220)]).to(torch.uint8)
FOUR_STEPS, TWO_STEPS = [[0], [1], [2], [3]], [[3, 0], [1, 2]]


def detail(name: str, steps: list[list[int]], episodes: int = 2) -> PolicyDetail:
    made = Episode(steps, [1.0] * (len(steps) + 1))
    return PolicyDetail(name, Curve([0, 1], [0, 1], [0, 1], [0, 1]), [[0, 0], [1, 1]], [made] * episodes)


def frames(path: Path, *details: PolicyDetail) -> list[np.ndarray]:
    save_orders(path, details, Examples(IMAGES, [0, 1], rows=2, columns=2))
    with Image.open(path) as animation:
        assert animation.info["loop"] == 0
        return [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(animation)]


def share(frame: np.ndarray, grey: int, rows: slice) -> float:
    """Share of pixels of about this grey in some rows."""
    return float((np.abs(frame[rows] - grey).max(-1) <= 3).mean())


def test_every_step_is_a_frame_and_hidden_blocks_are_grey(tmp_path: Path) -> None:
    found = frames(tmp_path / "orders.gif", detail("planner", TWO_STEPS), detail("raster", FOUR_STEPS))
    assert len(found) == 5
    upper, lower = slice(0, len(found[0]) // 2), slice(len(found[0]) // 2, None)
    for half, left in ((upper, [4, 3, 2, 1, 0]), (lower, [4, 2, 0, 0, 0])):  # raster above, the first policy below
        hidden = np.array([share(frame, HIDDEN_GREY, half) for frame in found])
        assert np.allclose(hidden / hidden[0], np.array(left) / 4, atol=0.02)
    assert share(found[-1], 40, upper) > 0.1 and share(found[-1], 220, upper) > 0.1


def test_the_blocks_of_a_step_are_outlined_and_no_others(tmp_path: Path) -> None:
    found = frames(tmp_path / "orders.gif", detail("planner", TWO_STEPS))
    orange = [(np.abs(frame - OUTLINE).max(-1) <= 8) for frame in found]
    assert not orange[0].any() and orange[1].sum() == pytest.approx(orange[2].sum(), rel=0.1)
    assert orange[1].any() and not (orange[1] & orange[2]).any()  # the two steps reveal different blocks


def test_policies_without_episodes_are_left_out(tmp_path: Path) -> None:
    assert len(frames(tmp_path / "one.gif", detail("oracle", TWO_STEPS, episodes=0), detail("halton", TWO_STEPS))) == 3
    save_orders(tmp_path / "none.gif", [], Examples(IMAGES, [0, 1], rows=2, columns=2))
    assert not (tmp_path / "none.gif").exists()
