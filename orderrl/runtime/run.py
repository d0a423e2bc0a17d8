"""One run of a command: its folder, its log, and what it records of machine and versions."""

import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from omegaconf import OmegaConf

from orderrl.runtime import distributed
from orderrl.runtime.loggers import LOGGERS, Local, Log, Logger
from orderrl.runtime.storage import write_json

_PACKAGES = (
    *("orderrl", "torch", "torchvision", "torchrl", "tensordict", "gymnasium", "timm", "torch-fidelity"),
    *("hydra-core", "numpy", "scikit-learn", "safetensors"),
)


def git_revision() -> dict[str, Any] | None:
    """Commit and whether files differ from it, of the checkout that this package is imported from; else None."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(root), *arguments]
        return subprocess.run(call, capture_output=True, check=True, text=True, timeout=10).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository, whose revision would say nothing.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, Any]:
    """Versions of Python, the platform and the packages that results depend on, and the git revision."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if found["orderrl"] is None:  # imported from a checkout that is not installed
        from orderrl import __version__

        found["orderrl"] = __version__
    return {**found, "git": git_revision()}


class Run:
    """One folder that holds everything a command did; a context manager.

    The folder is ``<output_dir>/<command>/<date>_<time>`` (with ``-2``, ``-3`` ... if that exists) and holds
    ``config.yaml`` (resolved), ``versions.json`` and ``metrics.jsonl``: a JSON object a line, with ``step``, ``time``
    in seconds since the start and the metrics. The command adds what it makes. Of many processes the main one makes the
    folder and writes; `log` and `write_json` do nothing in the others.

    Args:
        command: the entry point, such as ``train``.
        config: its configuration. Used here: ``output_dir`` (default ``runs``) and ``logger``, the name and the
            settings of one in `loggers.LOGGERS`, which gets metrics and pictures too.

    Raises:
        ValueError: if the logger cannot be started (nobody is logged in); the folder is then removed.
    """

    def __init__(self, command: str, config: Mapping[str, Any]) -> None:
        self.command = command
        self.config: dict[str, Any] = _plain(config)
        parent = Path(self.config.get("output_dir", "runs")) / command
        self.folder = distributed.on_main(lambda: _new_folder(parent))
        self.logs: list[Log] = []
        if distributed.is_main():
            (self.folder / "config.yaml").write_text(OmegaConf.to_yaml(self.config), encoding="utf-8")
            self.write_json("versions.json", versions())
            try:
                for logger in _loggers(**(self.config.get("logger") or {})):
                    self.logs.append(logger.start(command, self.folder, self.config))
            except ValueError:
                self.close(failed=True)
                shutil.rmtree(self.folder)
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line of metrics (numbers or one-element tensors); what steps count is the command's choice."""
        if self.logs:
            values = {name: float(value) for name, value in metrics.items()}
            for log in self.logs:
                log.log(values, int(step))

    def write_json(self, name: str, value: Any) -> Path:
        """Write ``<folder>/<name>`` in one move and return its path; NaN and infinities become null."""
        if distributed.is_main():
            write_json(self.folder / name, value)
        return self.folder / name

    def log_figures(self, paths: Iterable[Path]) -> None:
        """Send pictures (PNG) to the logger, each under its file's name; the run's folder has them already."""
        figures = list(paths)
        for log in self.logs:
            log.log_figures(figures)

    def close(self, failed: bool = False) -> None:
        """Finish the logs; called by the context manager."""
        while self.logs:
            self.logs.pop().close(failed)


def _loggers(name: str = "local", **settings: Any) -> list[Logger]:
    """The run's own lines, and what the configuration names beside them."""
    return [Local()] if name == "local" else [Local(), LOGGERS.find(name, "logger")(**settings)]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    container = OmegaConf.to_container(OmegaConf.create(dict(config)), resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _new_folder(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    number = 1
    while True:
        folder = parent / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
