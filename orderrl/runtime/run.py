"""One run of a command: its folder, its log, and what it records of machine and versions."""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self, TextIO

from omegaconf import OmegaConf

from orderrl.runtime import distributed
from orderrl.runtime.storage import finite_or_none, write_json
from orderrl.runtime.values import Settings, one_of, setting

_PACKAGES = (
    *("orderrl", "torch", "torchvision", "torchrl", "tensordict", "gymnasium", "timm", "torch-fidelity"),
    *("hydra-core", "numpy", "scikit-learn", "safetensors"),
)


@dataclass(frozen=True, kw_only=True)
class LocalLogger:
    """Logger: files in the run's folder only."""


@dataclass(frozen=True, kw_only=True)
class WandbLogger(Settings):
    """Logger: the same metrics to Weights & Biases too."""

    project: str | None = setting(None, "Project of Weights & Biases; null takes WANDB_PROJECT, else orderrl")
    mode: str | None = setting(
        None,
        "Mode of Weights & Biases: online, offline (no network) or disabled; null takes WANDB_MODE or WANDB_DISABLED, "
        "else online",
        one_of(("online", "offline", "disabled")),
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
        config: its configuration. Used here: ``output_dir`` (default ``runs``) and ``logger``; with
            ``logger.name=wandb`` the same metrics go to Weights & Biases, under ``logger.project`` and
            ``logger.mode`` (online, offline or disabled), with its files in the run's folder. Where these are null
            its own environment variables decide: WANDB_MODE, WANDB_DISABLED, WANDB_PROJECT, WANDB_NAME, WANDB_DIR.

    Raises:
        ValueError: if Weights & Biases cannot be started (nobody is logged in); the folder is then removed.
    """

    def __init__(self, command: str, config: Mapping[str, Any]) -> None:
        self.command = command
        self.config: dict[str, Any] = _plain(config)
        self._logger: dict[str, Any] = self.config.get("logger") or {}
        parent = Path(self.config.get("output_dir", "runs")) / command
        self.folder = distributed.on_main(lambda: _new_folder(parent))
        self._start = time.monotonic()
        self._metrics: TextIO | None = None
        self._wandb: Any = None
        if distributed.is_main():
            (self.folder / "config.yaml").write_text(OmegaConf.to_yaml(self.config), encoding="utf-8")
            self.write_json("versions.json", versions())
            self._metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
            if self._logger.get("name") == "wandb":
                try:
                    self._wandb = self._start_wandb()
                except ValueError:
                    self._metrics.close()
                    shutil.rmtree(self.folder)
                    raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line of metrics (numbers or one-element tensors); what steps count is the command's choice."""
        if self._metrics is None:
            return
        values = {name: float(value) for name, value in metrics.items()}
        line = {"step": int(step), "time": round(time.monotonic() - self._start, 3), **finite_or_none(values)}
        self._metrics.write(json.dumps(line, allow_nan=False) + "\n")
        self._metrics.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=int(step))

    def write_json(self, name: str, value: Any) -> Path:
        """Write ``<folder>/<name>`` in one move and return its path; NaN and infinities become null."""
        if distributed.is_main():
            write_json(self.folder / name, value)
        return self.folder / name

    def log_figures(self, paths: Iterable[Path]) -> None:
        """Send pictures (PNG) to the logger, each under its file's name; the run's folder has them already."""
        if self._wandb is not None:
            import wandb

            self._wandb.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in paths})

    def close(self, failed: bool = False) -> None:
        """Finish the logs; called by the context manager."""
        if self._metrics is not None:
            self._metrics.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))
            self._wandb = None

    def _start_wandb(self) -> Any:
        """Start logging to Weights & Biases; what the config leaves open its environment variables decide."""
        try:
            import wandb
        except ImportError as error:
            raise ValueError(f"logger=wandb needs the package wandb: pip install wandb ({error})") from error

        given, mode = os.environ.get, self._logger.get("mode")
        if mode is None and given("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
            mode = "disabled"  # wandb itself knows this variable no more, other trainers do
        try:
            return wandb.init(
                project=self._logger.get("project") or given("WANDB_PROJECT") or "orderrl",
                mode=mode,
                name=given("WANDB_NAME") or f"{self.command}_{self.folder.name}",
                dir=given("WANDB_DIR") or self.folder,
                config=self.config,
            )
        except (wandb.Error, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"logger=wandb cannot be started: {reason}; log in with `wandb login`, or use logger.mode=offline"
            ) from error


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
