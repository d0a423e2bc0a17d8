"""What README, docs, examples and notebooks point to exists: files, headings, modules and their members."""

from __future__ import annotations

import json
import pkgutil
import re
from pathlib import Path

import pytest

from orderrl.runtime.renamed import COMMANDS, KEYS

ROOT = Path(__file__).parents[1]
FOUND = (path for glob in ("*.md", "docs/**/*.md", "docs/**/*.ipynb", "examples/*.md") for path in ROOT.glob(glob))
PAGES = {path.relative_to(ROOT).as_posix(): path for path in sorted(FOUND)}


def text_of(path: Path) -> str:
    """What a person reads: Markdown, without fences and what is no Markdown of a notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)


def headings_of(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "]", heading)) for heading in headings)
    return {heading.strip().lower().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", text_of(PAGES[page])):
        if "://" not in target:
            path = (PAGES[page].parent / target).resolve() if target else PAGES[page]
            assert path.exists(), target
            assert not anchor or anchor in headings_of(path), f"{target}#{anchor}"


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"CHANGELOG.md"}))  # which names what is gone
def test_modules_and_their_members_exist(page: str) -> None:
    for name in set(re.findall(r"`[^`\n]*?\b(orderrl(?:\.\w+)+)", text_of(PAGES[page]))):
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"CHANGELOG.md"}))
def test_nothing_is_called_by_its_old_name(page: str) -> None:
    """In code marks and fences: commands as `make NAME`, `orderrl NAME` or alone, and keys in front of "="."""
    text = PAGES[page].read_text(encoding="utf-8")
    commands, keys = (rf"(?:{'|'.join(map(re.escape, names))})" for names in (COMMANDS, KEYS))
    assert not re.findall(rf"`{commands}`|\b(?:make |orderrl[ .]){commands}\b|(?<![\w./]){keys}=", text)
