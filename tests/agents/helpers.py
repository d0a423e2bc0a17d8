"""Tiny backbones, images and environments for the tests of agents; nothing here is trained."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from orderrl.backbones.sampling import Sampling
from orderrl.backbones.transformer import OrderRobustTransformer, TransformerConfig
from orderrl.data import TokenSet
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.reward import RewardConfig
from orderrl.envs.torchrl import NextBlockTorchRLEnv
from orderrl.planner import OrderHead, PlannerConfig


@cache
def tiny_backbone(height: int = 6, width: int = 6, block_size: int = 2) -> OrderRobustTransformer:
    """A backbone with large random weights, so that what is visible changes its losses."""
    backbone = OrderRobustTransformer(
        TransformerConfig(height, width, block_size, vocab_size=5, num_classes=3, dim=32, layers=2, heads=2)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=generator)
    return backbone.requires_grad_(False).eval()


def tiny_images(backbone: OrderRobustTransformer, count: int = 12, seed: int = 0) -> TokenSet:
    """Random images that fit a backbone."""
    generator = torch.Generator().manual_seed(seed)
    c, n = backbone.config, backbone.geometry.num_tokens
    tokens = torch.randint(c.vocab_size, (count, n), generator=generator)
    labels = torch.randint(c.num_classes, (count,), generator=generator)
    return TokenSet("tiny", "test", tokens, labels, c.height, c.width, c.vocab_size, c.num_classes)


def tiny_core(
    budgets: tuple[int, ...] = (1,),
    num_envs: int = 4,
    mode: str = "teacher",
    seed: int = 0,
    backbone: OrderRobustTransformer | None = None,
    data: TokenSet | None = None,
    strict: bool = True,
    sampling: Sampling | None = None,
    **reward: Any,
) -> NextBlockCore:
    """A core on a tiny backbone, strict unless told otherwise; `reward` are values of `RewardConfig`."""
    backbone = backbone or tiny_backbone()
    config = CoreConfig(mode, budgets, RewardConfig(**reward), sampling or Sampling(), strict)
    return NextBlockCore(backbone, data or tiny_images(backbone), num_envs, config, seed)


def tiny_env(privileged: bool = False, **arguments: Any) -> NextBlockTorchRLEnv:
    """The TorchRL face of `tiny_core`."""
    return NextBlockTorchRLEnv(core=tiny_core(**arguments), privileged=privileged)


def tiny_planner(backbone: OrderRobustTransformer | None = None, seed: int = 0, noisy: bool = True, **shape: Any) -> OrderHead:
    """A small planner; `noisy` draws its heads too, which start at zero, so that its choices depend on what it sees."""
    shape = {"dim": 16, "stem": 1, "heads": 2, "latents": 2} | shape
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        planner = OrderHead(PlannerConfig.for_backbone(backbone or tiny_backbone(), **shape))
        if noisy:
            for head in (planner.score_head, planner.budget_head, planner.value_head):
                torch.nn.init.normal_(head.weight)
    return planner.eval()


def mid_episode(core: NextBlockCore, steps: int = 2, seed: int = 0) -> NextBlockCore:
    """The core after some random legal steps of one block each, every row in a state of its own."""
    generator = torch.Generator().manual_seed(seed)
    core.reset()
    for _ in range(steps):
        core.step(random_actions(core.observation(), core.config.budgets, generator))
    return core


def random_actions(observation: TensorDict, budgets: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Legal actions drawn without any code under test; the budget is the smallest."""
    keys = torch.rand(observation["visible"].shape, generator=generator) - 2.0 * observation["visible"].float()
    if budgets == (1,):
        return keys.argmax(-1)
    ranked = keys.argsort(-1, descending=True)[:, : budgets[-1]]
    return torch.cat([ranked, torch.zeros_like(ranked[:, :1])], -1)
