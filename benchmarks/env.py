"""Environment speed with context losses on: prefix cache against recomputing everything at every step.

    python -m benchmarks.env

Prints legal reveals per second of both, over several alternating runs, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from orderrl.backbones import Backbone, load_backbone
from orderrl.data import TokenSet, load_split
from orderrl.envs.core import CoreConfig, NextBlockCore


@torch.no_grad()
def cached_episode(backbone: Backbone, data: TokenSet, orders: Tensor) -> float:
    """Seconds of one episode of all images through the environment."""
    core = NextBlockCore(backbone, data, len(orders), CoreConfig(strict=True))
    start = time.perf_counter()
    core.reset(index=torch.arange(len(orders)) % len(data))
    for step in range(orders.shape[1]):
        core.step(orders[:, step])
    return time.perf_counter() - start


@torch.no_grad()
def naive_episode(backbone: Backbone, data: TokenSet, orders: Tensor) -> float:
    """Seconds of the same losses when every step encodes its whole prefix again, in the same batch."""
    index = torch.arange(len(orders)) % len(data)
    tokens, labels = data.tokens[index], data.labels[index]
    start = time.perf_counter()
    for step in range(orders.shape[1]):
        prefix = backbone.start(labels)
        if step:
            prefix = backbone.extend(prefix, tokens, orders[:, :step], torch.full_like(labels, step))
        backbone.context_loss(prefix, tokens, orders[:, step:].sort(1).values)
    return time.perf_counter() - start


def main() -> None:
    """Run both alternately and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="images at once")
    parser.add_argument("--runs", type=int, default=5, help="runs of each form, after one warm-up")
    arguments = parser.parse_args()
    backbone, data = load_backbone("digits"), load_split("digits", "planner")
    blocks = backbone.geometry.num_blocks
    orders = torch.rand(arguments.batch, blocks, generator=torch.Generator().manual_seed(0)).argsort(1)
    seconds: dict[str, list[float]] = {"cached": [], "naive": []}
    for run in range(arguments.runs + 1):
        pair = {"cached": cached_episode(backbone, data, orders), "naive": naive_episode(backbone, data, orders)}
        if run:
            for name, value in pair.items():
                seconds[name].append(value)
    reveals = arguments.batch * blocks
    for name, values in seconds.items():
        rates = sorted(reveals / value for value in values)
        print(f"{name}: {statistics.median(rates):.0f} reveals/s (min {rates[0]:.0f}, max {rates[-1]:.0f})")
    ratios = sorted(n / c for n, c in zip(seconds["naive"], seconds["cached"], strict=True))
    print(f"cached over naive: {statistics.median(ratios):.2f} x (min {ratios[0]:.2f}, max {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
