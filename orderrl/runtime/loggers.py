"""Where a run's metrics and pictures go besides its folder.

A logger is a dataclass of settings, the keys of `logger=...`, with a method `start` that gives a `Log`:

    @register_logger("mine")
    @dataclass(frozen=True, kw_only=True)
    class Mine(Settings):
        address: str = setting("localhost", "Server that takes the metrics")

        def start(self, command, folder, config): ...
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from orderrl.runtime.registry import Registry
from orderrl.runtime.storage import finite_or_none, naming
from orderrl.runtime.terminal import one_line
from orderrl.runtime.values import Settings, one_of, setting


class Log(Protocol):
    """What a logger has started; only the main process has one."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take down one row of metrics."""

    def log_figures(self, paths: Sequence[Path]) -> None:
        """Take pictures (PNG), each under its file's name; the run's folder has them already."""

    def close(self, failed: bool) -> None:
        """Finish; `failed` says that the command ended with an error."""


class Logger(Protocol):
    """Settings, and how a log is started with them."""

    def start(self, command: str, folder: Path, config: Mapping[str, Any]) -> Log:
        """Start a log.

        Args:
            command: such as "train".
            folder: of the run.
            config: of the command, plain values.

        Raises:
            ValueError: if that is not possible; in one line with what to do.
        """


def _check(name: str, member: Any) -> None:
    if not callable(getattr(member, "start", None)):
        raise ValueError(f"logger {name!r} has no method start(command, folder, config); see orderrl.runtime.loggers")


LOGGERS: Registry[type[Logger]] = Registry(
    "logger",
    "orderrl.loggers",
    {name: f"orderrl.runtime.loggers:{name.capitalize()}" for name in ("local", "wandb", "tensorboard")},
    _check,
)
register_logger = LOGGERS.register


@dataclass(frozen=True, kw_only=True)
class Local(Settings):
    """Logger: files in the run's folder only."""

    def start(self, command: str, folder: Path, config: Mapping[str, Any]) -> Log:
        """Start `metrics.jsonl`; every run has it, whatever its logger."""
        return _Lines(folder)


class _Lines:
    """A JSON object a line: step, time in seconds since the start, and the metrics; readable while the run goes on."""

    def __init__(self, folder: Path) -> None:
        self._start = time.monotonic()
        self._path = folder / "metrics.jsonl"
        self._file = self._path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        line = {"step": step, "time": round(time.monotonic() - self._start, 3), **finite_or_none(dict(metrics))}
        with naming(self._path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()

    def log_figures(self, paths: Sequence[Path]) -> None:
        """Nothing to do: they are files of the run."""

    def close(self, failed: bool) -> None:
        self._file.close()


@dataclass(frozen=True, kw_only=True)
class Tensorboard(Settings):
    """Logger: the same metrics and figures for TensorBoard, in the run's folder; `tensorboard --logdir runs`."""

    def start(self, command: str, folder: Path, config: Mapping[str, Any]) -> Log:
        """Start an event file in the run's folder."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"logger=tensorboard needs the package tensorboard: pip install 'orderrl[tensorboard]' ({error})"
            ) from error
        return _Events(SummaryWriter(folder), config)


class _Events:
    def __init__(self, writer: Any, config: Mapping[str, Any]) -> None:
        self._writer = writer
        text = json.dumps(config, indent=2, default=str)
        self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_figures(self, paths: Sequence[Path]) -> None:
        import numpy as np
        from PIL import Image

        for path in paths:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._writer.add_image(f"figures/{path.stem}", pixels, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()


@dataclass(frozen=True, kw_only=True)
class Wandb(Settings):
    """Logger: the same metrics and figures for Weights & Biases.

    Where a setting is null, its own environment variables decide: WANDB_MODE, WANDB_DISABLED, WANDB_PROJECT; they also
    name the run (WANDB_NAME) and the folder of its files (WANDB_DIR), which is the run's otherwise.
    """

    project: str | None = setting(None, "Project of Weights & Biases; null takes WANDB_PROJECT, else orderrl")
    mode: str | None = setting(
        None,
        "Mode of Weights & Biases: online, offline (no network) or disabled; null takes WANDB_MODE or WANDB_DISABLED, "
        "else online",
        one_of(("online", "offline", "disabled")),
    )

    def start(self, command: str, folder: Path, config: Mapping[str, Any]) -> Log:
        """Start a run of Weights & Biases; a ValueError says so if nobody is logged in."""
        try:
            import wandb
        except ImportError as error:
            raise ValueError(f"logger=wandb needs the package wandb: pip install wandb ({error})") from error

        given = os.environ.get
        mode: Any = self.mode
        if mode is None and given("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
            mode = "disabled"  # wandb itself knows this variable no more, other trainers do
        try:
            return _Wandb(
                wandb.init(
                    project=self.project or given("WANDB_PROJECT") or "orderrl",
                    mode=mode,
                    name=given("WANDB_NAME") or f"{command}_{folder.name}",
                    dir=given("WANDB_DIR") or folder,
                    config=dict(config),
                )
            )
        except (wandb.Error, ValueError, OSError) as error:
            raise ValueError(
                f"logger=wandb cannot be started: {one_line(error, 300)}; log in with `wandb login`, or use "
                "logger.mode=offline"
            ) from error


class _Wandb:
    def __init__(self, run: Any) -> None:
        self.run = run

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def log_figures(self, paths: Sequence[Path]) -> None:
        import wandb

        self.run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in paths})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))
