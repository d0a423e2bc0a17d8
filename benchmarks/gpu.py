"""A GPU in one go: what runs on it, and how near it comes to what the chip can do.

    python -m benchmarks.gpu --json gpu.json      (or: make gpu)

First the tests of `tests/on_cuda*.py`, then the suites of `python -m benchmarks` at digits, LlamaGen-B and RandAR-XL
shapes, each beside its naive twin, drawing beside plain cached decoding; shares are of the matrix rate that is measured
in the same run. What has not begun when the minutes are over is left out and named. docs/gpu.md explains the rows.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.__main__ import show
from benchmarks.limits import processor
from benchmarks.shapes import SHAPES
from benchmarks.suites import SUITES, Settings
from orderrl.runtime.devices import checked_device

ROOT = Path(__file__).resolve().parents[1]


class Piece(NamedTuple):
    """One suite at one shape."""

    suite: str
    shape: str
    batch: int
    dtypes: tuple[str, ...] = ("bfloat16",)


PLAN = (  # what issue and page ask for first
    Piece("context", "randar-xl", 64),
    Piece("generation", "randar-xl", 64),
    Piece("env", "digits", 4096, ("float32", "bfloat16")),
    Piece("context", "llamagen-b", 256),
    Piece("generation", "llamagen-b", 64),
    Piece("ppo", "llamagen-b", 64),
    Piece("env", "randar-xl", 64),
    Piece("labels", "llamagen-b", 64),
)


def run_tests() -> dict[str, Any]:
    """How many of the tests on CUDA pass; what fails in full."""
    files = sorted(str(path) for path in ROOT.glob("tests/on_cuda*.py"))
    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    answer = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    said = answer.stdout.strip().splitlines()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", said[-1])}
    return {"counts": counts, "ok": answer.returncode == 0, "output": "" if answer.returncode == 0 else answer.stdout}


def measure(
    plan: tuple[Piece, ...], device: torch.device, runs: int, until: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of all pieces that begin before `until` (seconds of `time.monotonic`), and the names of the others."""
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    for piece in plan:
        name = f"{piece.suite} at {piece.shape}"
        if time.monotonic() > until:
            left.append(name)
            continue
        settings = Settings(SHAPES[piece.shape], piece.dtypes, runs, piece.batch, device)
        start = time.monotonic()
        rows += [row | {"batch": piece.batch} for row in SUITES[piece.suite](settings)]
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return rows, left


def limits(device: torch.device) -> dict[str, dict[str, float]]:
    """The measured roofs: operations and bytes a second."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        roof = Settings(SHAPES["digits"], (dtype,), 1, None, device).limits(dtype)
        found[dtype] = {"matrix_rate": roof.matrix_rate, "bandwidth": roof.bandwidth}
    return found


def main(plan: tuple[Piece, ...] = PLAN) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--runs", type=int, default=2, help="of every variant, in turn, after a warm-up")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which nothing new is begun")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="where everything is written")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    try:
        device = checked_device(options.device)
    except ValueError as error:
        parser.error(str(error))
    torch.set_float32_matmul_precision("high")  # as the commands do on CUDA
    found: dict[str, Any] = {"device": processor(device), "torch": torch.__version__, "cuda": torch.version.cuda}
    found["tests"] = None if options.no_tests else run_tests()
    print(f"{found['device']}, PyTorch {torch.__version__}; tests: {(found['tests'] or {}).get('counts', 'left out')}")
    found["limits"] = limits(device)
    for dtype, roof in found["limits"].items():
        print(f"{dtype}: {roof['matrix_rate'] / 1e12:.3g} TFLOP/s, memory {roof['bandwidth'] / 1e12:.3g} TB/s")
    found["rows"], found["left_out"] = measure(plan, device, options.runs, until)
    options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    show(found["rows"])
    if found["left_out"]:
        print(f"left out for want of time: {', '.join(found['left_out'])}; use --minutes")
    if found["tests"] is not None and not found["tests"]["ok"]:
        sys.exit(f"tests failed:\n{found['tests']['output'][-5000:]}")


if __name__ == "__main__":
    main()
