"""Reports whose figures are made and not rendered, which is most of the work of a small evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from orderrl.report.style import Draw


def render_nothing(patch: pytest.MonkeyPatch) -> None:
    """Let reports leave empty files where their figures stand."""
    patch.setattr("orderrl.report.page.PICTURES", ("svg",))
    patch.setattr("orderrl.report.page.IN_COLUMN", ())
    patch.setattr("orderrl.report.style.save_figure", lambda figure, path: Path(path).touch())
    patch.setattr("orderrl.report.style.to_svg", _made)


def _made(draw: Draw, name: str, description: str) -> str:
    draw("black")
    return "<svg></svg>"
