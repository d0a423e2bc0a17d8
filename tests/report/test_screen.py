"""Tables on screen: whatever the terminal's width, nothing is cut off."""

from __future__ import annotations

import pytest
from rich.table import Table

from orderrl.report.screen import print_tables

ROWS = [("my_module:a_policy_of_mine@1+1+2", "0.1927", "+0.0135 * [+0.0086 to +0.0181]"), ("raster", "0.1792", "")]


@pytest.mark.parametrize("width", [20, 60, 80, 100, 200])
def test_no_word_of_a_table_is_cut_or_broken(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes what is captured for a terminal
    monkeypatch.setenv("COLUMNS", str(width))
    table = Table("policy", "information-gain AUC ↑", title="held-out images")
    table.add_column("minus raster, paired", no_wrap=True)
    for row in ROWS:
        table.add_row(*row)
    print_tables(table)
    shown = capsys.readouterr().out
    longest = max(len(word) for row in ROWS for cell in row for word in cell.split())
    assert "…" not in shown
    if width > longest + len("  policy: "):
        assert all(word in shown for row in ROWS for cell in row for word in cell.split())
    assert ("│" in shown) == (width >= 100)
