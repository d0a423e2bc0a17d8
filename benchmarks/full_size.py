"""Published models at full size with random weights: one context loss and one generated image each.

    python -m benchmarks.full_size llamagen_b randar_l arpg_l mar_b

Every model runs in a process of its own, so that the peak memory is its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from orderrl.backbones import Sampling, build_backbone
from orderrl.backbones.check import random_tokens


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


@torch.no_grad()
def measure(name: str) -> str:
    """One line: parameters, seconds of building, of a context loss and of an image, peak memory."""
    building, model = timed(lambda: build_backbone(name))
    backbone: Any = model.eval().requires_grad_(False)
    grid = backbone.geometry
    generator = torch.Generator().manual_seed(0)
    tokens, labels = random_tokens(backbone, 1, generator), torch.tensor([0])
    order = torch.randperm(grid.num_blocks, generator=generator)[None]
    half = grid.num_blocks // 2
    prefix = backbone.extend(backbone.start(labels), tokens, order[:, :half], torch.tensor([half]))
    scoring, _ = timed(lambda: backbone.context_loss(prefix, tokens, order[:, half:]))

    def image() -> None:
        state, one, drawn = backbone.start(labels), torch.ones_like(labels), torch.zeros_like(tokens)
        for step in range(grid.num_blocks):
            block = order[:, step : step + 1]
            uniforms = torch.rand(1, 1, grid.tokens_per_block, generator=generator, dtype=torch.float64)
            drawn = grid.write(drawn, block, backbone.decode(state, block, uniforms, Sampling()).tokens)
            if step + 1 < grid.num_blocks:
                state = backbone.extend(state, drawn, block, one)

    drawing, _ = timed(image)
    count = sum(parameter.numel() for parameter in backbone.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return (
        f"{name:12} {count / 1e6:7.1f} M parameters  built in {building:5.1f} s  image {drawing:6.1f} s  "
        f"context loss of {grid.num_blocks - half} blocks {scoring:6.2f} s  peak {peak:5.2f} GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="+", help="published models")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in options.names:
        if options.here:
            print(measure(name), flush=True)
        else:
            subprocess.run([sys.executable, "-m", "benchmarks.full_size", "--here", name], check=True)


if __name__ == "__main__":
    main()
