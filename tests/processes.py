"""Processes that start in milliseconds, and several that meet as those of `torchrun` do."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orderrl.runtime.distributed import processes
from tests.figures import render_nothing

PROCESSES = multiprocessing.get_context("forkserver")
"""Processes are forked from a server that has imported everything that they need."""
PROCESSES.set_forkserver_preload(
    [
        *("orderrl.reproduce", "orderrl.label", "orderrl.tokenize", "orderrl.pretrain", "orderrl.agents.ppo"),
        *("orderrl.report.output", "orderrl.metrics.extractors", "timm.models.vision_transformer", "scipy.stats"),
        *("sklearn.datasets", "sklearn.linear_model", "torch.distributed.fsdp", "pytest"),
    ]
)
_LONGEST = 300  # seconds


def _work(
    function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, size: int, port: int, folder: Path
) -> None:
    render_nothing(pytest.MonkeyPatch())
    sys.stdout = (folder / f"out-{rank}.txt").open("w", buffering=1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with processes("cpu"):
            result = function(*arguments)
        (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        raise


def run_processes(size: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function returns in each of several processes, by rank.

    Args:
        size: how many.
        folder: for their output; made if need be.
        function: of a module, so that it can be sent.
        arguments: of the function.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        PROCESSES.Process(target=_work, args=(function, arguments, rank, size, port, folder)) for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + _LONGEST
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
        if any(worker.exitcode for worker in workers):  # as torchrun does
            break
    for worker in workers:
        if worker.is_alive():
            worker.kill()
        worker.join()
    errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
    assert not errors and all(worker.exitcode == 0 for worker in workers), "\n".join(errors) or "too slow"
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(size)]
