"""Tiny backbones and images, and slow but obvious forms of what the package computes fast."""

from __future__ import annotations

import random
import runpy
import sys
from collections.abc import Iterable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.singleton import Singleton
from torch import Tensor

from orderrl.backbones import OrderRobustTransformer, TransformerConfig
from orderrl.backbones.randar import cross_entropy
from orderrl.data import TokenSet
from orderrl.metrics.references import Reference


def tiny_backbone(
    height: int = 6, width: int = 6, block_size: int = 2, vocab_size: int = 5, num_classes: int = 3
) -> OrderRobustTransformer:
    """A frozen backbone with large random weights, so that every token in sight changes its losses; nobody else's."""
    return deepcopy(_tiny_backbone(height, width, block_size, vocab_size, num_classes))


@cache
def _tiny_backbone(
    height: int, width: int, block_size: int, vocab_size: int, num_classes: int
) -> OrderRobustTransformer:
    config = TransformerConfig(height, width, block_size, vocab_size, num_classes, dim=32, layers=2, heads=2)
    backbone = OrderRobustTransformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=generator)
    return backbone.requires_grad_(False).eval()


def tiny_images(backbone: OrderRobustTransformer, count: int = 12, seed: int = 0) -> TokenSet:
    """Random images that fit a backbone."""
    generator = torch.Generator().manual_seed(seed)
    c = backbone.config
    tokens = torch.randint(c.vocab_size, (count, c.height * c.width), generator=generator)
    labels = torch.randint(c.num_classes, (count,), generator=generator)
    return TokenSet("tiny", "test", tokens, labels, c.height, c.width, c.vocab_size, c.num_classes)


def block_loss(
    backbone: OrderRobustTransformer, tokens: Tensor, label: Tensor, visible: Iterable[int], block: int
) -> float:
    """l_b(S) of one image (N,) from one teacher-forced pass over the whole image, with no cache and no chains."""
    geometry, revealed = backbone.geometry, [int(b) for b in visible]
    rest = [b for b in range(geometry.num_blocks) if b not in revealed and b != block]
    order = geometry.token_order(torch.tensor([[*revealed, block, *rest]]))
    logits = backbone.teacher_forced(tokens[None], label.view(1), order)
    start = len(revealed) * geometry.tokens_per_block
    losses = cross_entropy(logits, tokens[None], order)[0]
    return losses[start : start + geometry.tokens_per_block].sum().item()


def random_steps(num_blocks: int, budgets: tuple[int, ...], seed: int) -> list[list[int]]:
    """A random order of all blocks cut into steps of random legal budgets; the last may be cut short."""
    source = random.Random(seed)
    order = source.sample(range(num_blocks), num_blocks)
    steps = []
    while order:
        legal = [k for k in budgets if k <= len(order)] or [budgets[0]]
        size = source.choice(legal)
        steps.append(order[:size])
        order = order[size:]
    return steps


def as_action(step: list[int], budgets: tuple[int, ...], num_blocks: int) -> Tensor:
    """The action that reveals some blocks: () for budgets (1,), else (K + 1,), filled up with any entries."""
    if budgets == (1,):
        return torch.tensor(step[0])
    chosen = next(i for i, k in enumerate(budgets) if k >= len(step))
    filler = [num_blocks - 1] * (budgets[-1] - len(step))
    return torch.tensor([*step, *filler, chosen])


def random_orders(backbone: OrderRobustTransformer, count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, backbone.geometry.num_blocks, generator=generator).argsort(1)


def run_command(command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `python -m orderrl.COMMAND ARGUMENTS`, run in this process."""
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    state = Singleton.get_state()
    try:
        runpy.run_module(f"orderrl.{command}", run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        Singleton.set_state(state)
    return 0


def save_reference(path: Path, reference: Reference) -> None:
    """Write statistics as a `.npz` with the keys of ADM's evaluator, and the name of their features."""
    values: dict[str, Any] = {"mu": reference.pooled.mean, "sigma": reference.pooled.covariance}
    if reference.spatial is not None:
        values |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    np.savez(path, features=np.array(reference.features), **values)
