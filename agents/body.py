"""What of a backbone is trained beside a planner: nothing, its top layers, low-rank adapters, or all of it."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from orderrl.backbones import Backbone, OrderRobustTransformer
from orderrl.backbones.cpu_linear import pack_weights
from orderrl.backbones.mar_backbone import MaskedTransformer
from orderrl.backbones.registry import with_block_size
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.learning_rate import one_cycle

BODIES = ("frozen", "top", "lora", "all")
TunableBackbone = OrderRobustTransformer | MaskedTransformer
B = TypeVar("B", bound=TunableBackbone)


def require_tunable(
    backbone: Backbone, layers: int, agent: str, families: tuple[type, ...] = (OrderRobustTransformer,)
) -> None:
    """Refuse a backbone of no family that the agent tunes, not in float32, or with fewer layers."""
    if type(backbone) not in families:
        raise ValueError(
            f"agent={agent} tunes backbones of type {', '.join(kind.__name__ for kind in families)} (digits, canvas, "
            f"small, RandAR{', MAR' if len(families) > 1 else ''}), got {type(backbone).__name__}; use agent=bc or "
            "agent=ppo, which leave the backbone as it is"
        )
    assert isinstance(backbone, TunableBackbone)
    dtype = next(backbone.parameters()).dtype
    if dtype != torch.float32:
        raise ValueError(f"agent={agent} makes steps too small for {dtype}; use backbone.dtype=float32")
    if layers > (depth := len(_blocks(backbone)[-1])):
        raise ValueError(f"layers={layers} exceed the backbone's; use 0 to {depth}")


@isolated_float32
def tunable_copy(backbone: B) -> B:
    """A copy of a backbone, to be tuned while the original stays as it is."""
    tuned = with_block_size(backbone, backbone.config.block_size)
    tuned.packing = backbone.packing
    return tuned


def _blocks(backbone: TunableBackbone) -> list[nn.ModuleList]:
    """Stacks of transformer blocks, the last one being that of the top."""
    if isinstance(backbone, MaskedTransformer):
        return [backbone.encoder_blocks, backbone.decoder_blocks]
    return [backbone.layers]


def top_of(backbone: TunableBackbone, layers: int) -> nn.ModuleList:
    """The last layers, the final norm and what makes tokens of its outputs; nothing for layers=0."""
    if not layers:
        return nn.ModuleList()
    if isinstance(backbone, MaskedTransformer):
        return nn.ModuleList([*backbone.decoder_blocks[-layers:], backbone.decoder_norm, backbone.diffloss])
    return nn.ModuleList([*backbone.layers[-layers:], backbone.norm, backbone.output])


class LowRank(nn.Module):
    """A matrix plus a product of two thin ones (LoRA, Hu et al., 2021), which is zero at the start."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


@isolated_float32
def trained_part(backbone: TunableBackbone, body: str, layers: int = 1, rank: int = 4) -> nn.ModuleList:
    """The part of a frozen backbone that is trained, with gradients switched on.

    Args:
        backbone: changed in place: for "lora" every matrix of its transformer blocks gets an adapter.
        body: "frozen", "top", "lora" or "all".
        layers: of "top".
        rank: of "lora".
    """
    pack_weights(backbone, False)  # weights that change are never only read
    if body == "lora":
        part = nn.ModuleList()
        for matrix in _matrices(backbone):
            part.append(LowRank(matrix.weight, rank).to(matrix.weight.device))
            parametrize.register_parametrization(matrix, "weight", part[-1])
        return part.requires_grad_(True)
    chosen = {"frozen": nn.ModuleList(), "top": top_of(backbone, layers), "all": nn.ModuleList([backbone])}[body]
    return chosen.requires_grad_(True)


def optimiser_of(
    planner: nn.Module, body: nn.Module, weight_decay: float, rates: tuple[float, float], steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR]:
    """AdamW of a planner and of a part of a backbone, which is to stay near its start and not near 0; its schedule."""
    groups = [
        {"params": list(planner.parameters()), "weight_decay": weight_decay},
        {"params": list(body.parameters()), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    return optimizer, one_cycle(optimizer, steps, list(rates))


@isolated_float32
def merge_adapters(backbone: TunableBackbone) -> None:
    """Add low-rank adapters to their matrices, so that the backbone is again what can be saved."""
    for matrix in _matrices(backbone):
        if parametrize.is_parametrized(matrix, "weight"):
            parametrize.remove_parametrizations(matrix, "weight", leave_parametrized=True)
    backbone.eval().requires_grad_(False)
    pack_weights(backbone, True)


def _matrices(backbone: TunableBackbone) -> list[nn.Linear]:
    return [part for stack in _blocks(backbone) for part in stack.modules() if isinstance(part, nn.Linear)]
