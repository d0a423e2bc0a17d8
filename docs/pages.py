"""Pages of the site that stand elsewhere in the repository, or in the code: made when MkDocs builds it.

README, CONTRIBUTING, CHANGELOG and the examples are taken as they are; every key of the configuration comes from the
dataclasses of settings.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from orderrl.runtime.config import help_of, nodes_of, parts_of
from orderrl.runtime.schema import Part, defaults_of, settings_of

ROOT = Path(__file__).parents[1]
_TAKEN = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_HREF = re.compile(r'(href=")([^":#]+)((?:#[^"]*)?")')
_OUTSIDE = {"LICENSE", "pyproject.toml"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    made = {page: (ROOT / source).read_text(encoding="utf-8") for page, source in _TAKEN.items()}
    for path in sorted((ROOT / "examples").iterdir()):
        if path.suffix == ".md":
            made[f"examples/{path.name}"] = path.read_text(encoding="utf-8")
        elif path.suffix == ".py":
            text = path.read_text(encoding="utf-8")
            made[f"examples/{path.stem}.md"] = f"# {path.name}\n\n```python\n{text}```\n"
    made["reference/configuration.md"] = configuration()
    for page, text in made.items():
        files.append(File.generated(config, page, content=_relinked(page, text)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let the pages of docs/ link to those that are made."""
    return markdown if page.file.generated_by else _relinked(f"docs/{page.file.src_uri}", markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Let notebooks, whose links MkDocs leaves as they are, link to the site's pages."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    linked = _relinked(f"docs/{page.file.src_uri}", html, _HREF)
    return re.sub(r'(href="[^":#]+)\.md(["#])', r"\1.html\2", linked)


def _relinked(page: str, text: str, pattern: re.Pattern[str] = _LINK) -> str:
    """Links to files of the repository as links to the site's pages."""
    source = _TAKEN.get(page, page)
    folder, here = (ROOT / source).parent, Path(page.removeprefix("docs/")).parent

    def link(found: re.Match[str]) -> str:
        target = (folder / found[2]).resolve()
        if "://" in found[2] or not target.exists():
            return found[0]
        name = target.relative_to(ROOT).as_posix()
        taken = {there: made for made, there in _TAKEN.items()}
        if name.startswith("docs/"):
            name = name.removeprefix("docs/")
        elif name.startswith("examples/"):
            name = f"examples/{Path(name).stem}.md"
        elif name in taken:
            name = taken[name]
        else:  # stays in the repository
            return "](#)" if name in _OUTSIDE else found[0]
        up = "../" * len(here.parts)
        return f"{found[1]}{up}{name}{found[3]}"

    return pattern.sub(link, text)


def configuration() -> str:
    """Every key of every command and group: default and meaning."""
    lines = ["# Configuration\n", "Made of the dataclasses that check it; `orderrl COMMAND --help` shows the same.\n"]
    nodes = nodes_of()
    for command in sorted(path for path in nodes if "/" not in path and not path.startswith("_")):
        lines += [f"## {command}\n", "| group | choices |\n|---|---|"]
        lines += [f"| `{group}` | {', '.join(names)} |" for group, names in help_of(command).groups.items()]
        lines += _table([part for part in parts_of(command) if part.place == ""])
    lines += ["## Groups\n"]
    for path, node in sorted(nodes.items()):
        group, _, name = path.partition("/")
        if (name and not name.startswith("_")) or path.endswith("/_base"):
            table = _table([Part(group, node)])
            lines += [f"### {group}{'' if name == '_base' else '=' + name}\n", *table] if len(table) > 2 else []
    return "\n".join(lines)


def _table(parts: list[Part]) -> list[str]:
    """A table of the keys of some parts."""
    lines = ["\n| key | default | meaning |\n|---|---|---|"]
    for part in parts:
        defaults = defaults_of(part.node.settings)
        for key, found in settings_of([part]).items():
            value: Any = defaults
            for name in key.removeprefix(f"{part.place}.").split("."):
                value = value.get(name) if isinstance(value, dict) else None
            if not found.nested and not key.endswith(".name"):
                cells = (f"`{key}`", f"`{value}`", found.meaning)
                lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return [*lines, ""]
