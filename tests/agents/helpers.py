"""Tiny environments and planners for the tests of agents; nothing here is trained."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from orderrl.backbones.randar import OrderRobustTransformer
from orderrl.backbones.sampling import Sampling
from orderrl.data import TokenSet
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.reward import RewardConfig
from orderrl.envs.torchrl import NextBlockTorchRLEnv
from orderrl.planner import OrderHead, PlannerConfig
from tests.helpers import tiny_backbone, tiny_images


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
    """A core on a tiny backbone, strict by default; `reward` are values of `RewardConfig`."""
    backbone = backbone or tiny_backbone()
    config = CoreConfig(mode, budgets, RewardConfig(**reward), sampling or Sampling(), strict)
    return NextBlockCore(backbone, data or tiny_images(backbone), num_envs, config, seed)


def tiny_env(privileged: bool = False, **arguments: Any) -> NextBlockTorchRLEnv:
    """The TorchRL face of `tiny_core`."""
    return NextBlockTorchRLEnv(core=tiny_core(**arguments), privileged=privileged)


def tiny_planner(
    backbone: OrderRobustTransformer | None = None, seed: int = 0, noisy: bool = True, **shape: Any
) -> OrderHead:
    """A small planner; `noisy` draws its heads too, which start at zero, so that its choices depend on what it sees."""
    shape = {"dim": 16, "stem": 1, "heads": 2, "latents": 2, "dropout": 0.0} | shape
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        planner = OrderHead(PlannerConfig.for_backbone(backbone or tiny_backbone(), **shape))
        if noisy:
            heads = [planner.score_head, planner.budget_head, planner.value_head]
            for head in heads + ([planner.pair_head.right] if planner.pair_head else []):
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


def tiny_labels(images: int = 60, each: int = 8, seed: int = 0) -> TensorDict:
    """Contexts stored as `label_contexts` does, with utilities that a planner can see.

    U of a hidden block is a known function of its entropy, its position and how much is visible; its loss is
    another one.
    """
    generator = torch.Generator().manual_seed(seed)
    count, blocks = images * each, 9
    visible = torch.rand(count, blocks, generator=generator) < 0.4
    visible[:, :2] = False  # two candidates at least
    entropy = torch.rand(count, blocks, generator=generator).masked_fill(visible, 0.0)
    utility = 2 * entropy - torch.linspace(0, 1, blocks) * visible.float().mean(-1, keepdim=True)
    gains = torch.zeros(count, blocks, blocks)
    gains[:, range(blocks), [(b + 1) % blocks for b in range(blocks)]] = 36 * utility.masked_fill(visible, 0.0)
    hidden = 0.1 * torch.randn(count, blocks, 32, generator=generator)
    return TensorDict(
        {
            "image": torch.arange(count) % images,
            "order": torch.rand(count, blocks, generator=generator).argsort(1),
            "length": visible.sum(1),
            "label": torch.randint(3, (count,), generator=generator),
            "hidden": hidden.masked_fill(visible[..., None], 0.0),
            "entropy": entropy,
            "visible": visible,
            "loss": (entropy + torch.linspace(1, 2, blocks)).masked_fill(visible, 0.0),
            "gains": gains,
        },
        batch_size=[count],
    )
