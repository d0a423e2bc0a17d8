"""What runs on a GPU runs on the simulated one, so that a machine without any finds mistakes with devices."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.simulated_cuda import MISSING

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING) and not torch.cuda.is_available(), reason=MISSING)
def test_everything_runs_on_cuda() -> None:
    """In a process of its own: what a process believes of its devices cannot be taken back."""
    files = sorted(str(path) for path in ROOT.glob("tests/on_cuda*.py"))
    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *files]
    answer = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout[-20_000:]
