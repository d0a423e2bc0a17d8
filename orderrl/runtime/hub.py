"""Trained planners and backbones on the Hugging Face Hub: a checkpoint and a card, made of what the file says.

A repository holds `planner.safetensors` or `backbone.safetensors`, as `train` and `pretrain` write them, and a README;
of a specialist also what lies beside its checkpoint: its planner, and the backbone that this reads.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orderrl.runtime.checkpoint import load_checkpoint
from orderrl.runtime.storage import is_intact
from orderrl.runtime.values import flat
from orderrl.runtime.weights import HUB, local_path

KINDS = ("planner", "backbone")
PLANNER, START = "planner.safetensors", "start.safetensors"  # beside a specialist's checkpoint
_CARD = """\
---
library_name: orderrl
tags: [orderrl, generation-order, image-generation, reinforcement-learning]
---
# {title}

{what} Made with OrderRL (`pip install orderrl`).

## How to load it

```python
{load}
```

## What it was trained on

{described}
{results}"""
_LOAD = {
    "planner": "from orderrl import load_backbone\nfrom orderrl.planner import OrderHead\n\n"
    'planner = OrderHead.from_pretrained("{repository}", load_backbone("{backbone}"))  # refuses another shape',
    "backbone": 'from orderrl import load_backbone\n\nbackbone = load_backbone("hf://{repository}")',
}
_WHAT = {
    "planner": "A planner: it says in which order a frozen, order-robust image generator draws its blocks.",
    "backbone": "An image generator that draws its blocks in any order.",
}


def hub_file(source: Path | str, kind: str) -> Path:
    """The checkpoint of a kind on this machine; from the Hub it is downloaded, or found in the Hub's cache.

    Args:
        source: a file, a folder that holds `<kind>.safetensors`, `OWNER/NAME[@REVISION]` or `hf://...` of the Hub.

    Raises:
        ValueError: if it cannot be downloaded or found.
        FileNotFoundError: if there is no such file.
    """
    text, path = str(source), Path(source)
    if path.is_dir():
        return local_path(path / f"{kind}.safetensors")
    if path.is_file() or text.endswith(".safetensors"):
        return local_path(source)
    if not text.startswith(HUB):
        text = HUB + text
    return local_path(f"{text}/{kind}.safetensors")


def files_beside(origin: Mapping[str, Any]) -> list[str]:
    """Names of the files that belong to a checkpoint and lie beside it, by what it says of its origin."""
    return [PLANNER] * bool(origin.get("planner")) + [START] * (origin.get("start") == START)


def planner_beside(folder: Path, recorded: str | None, name: str = PLANNER) -> Path:
    """The planner of the specialist in a folder; ValueError if it is not there, or not the one that was recorded."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path}: is missing; the planner of a specialist lies beside its checkpoint")
    if recorded is not None and not is_intact(path, recorded):
        raise ValueError(f"{path}: is not the planner that the specialist in this folder was made for; bring it back")
    return path


def push_to_hub(path: Path | str, repository: str, results: str = "", private: bool = False) -> str:
    """Upload a planner or a backbone with what belongs to it and a model card; return the address of the commit.

    Args:
        path: a checkpoint that `train` or `pretrain` wrote.
        repository: OWNER/NAME, made if need be.
        results: Markdown for the card, such as an evaluation's `results.md`.
        private: of a repository that is made.

    Raises:
        ValueError: if the file is no such checkpoint, or what belongs to it is missing or damaged.
    """
    from huggingface_hub import HfApi

    path = Path(path)
    kind, description = _described(path)
    origin = (description.get("origin") or {}) if kind == "backbone" else {}
    beside = files_beside(origin)
    if PLANNER in beside:
        planner_beside(path.parent, origin["planner"])
    if START in beside:
        load_checkpoint(path.with_name(START), "backbone")  # refused if it is damaged
    api = HfApi()
    with TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / f"{kind}.safetensors")
        for name in beside:
            shutil.copyfile(path.with_name(name), Path(folder) / name)
        (Path(folder) / "README.md").write_text(model_card(kind, description, repository, results), encoding="utf-8")
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder))


def model_card(kind: str, description: Mapping[str, Any], repository: str, results: str = "") -> str:
    """A card from a checkpoint's description: how to load it, what it was trained on, and results if there are any."""
    return _CARD.format(
        title=repository.partition("/")[2] or repository,
        what=_WHAT[kind],
        load=_LOAD[kind].format(repository=repository, backbone=description.get("data", "BACKBONE")),
        described="\n".join(
            f"- `{key}`: {value}"
            for key, value in flat(description).items()
            if value is not None and key.rpartition(".")[2] != "kind"
        ),
        results=f"\n## Results\n\n{results.strip()}\n" if results else "",
    )


def _described(path: Path) -> tuple[str, dict[str, Any]]:
    """The kind and the description of a checkpoint."""
    for kind in KINDS:
        try:
            return kind, load_checkpoint(path, kind)[1]
        except ValueError as error:
            refusal = error
    raise refusal
