"""Backbones that do not fit on one device: their weights are split over all processes (FSDP2)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from orderrl.backbones.cpu_linear import pack_weights
from orderrl.backbones.graphs import BlockGraphs
from orderrl.backbones.memory import Packing
from orderrl.backbones.protocol import Backbone, backbone_device
from orderrl.runtime import distributed

if TYPE_CHECKING:
    from orderrl.backbones.registry import TrainableBackbone

# What is called on a backbone and uses its own weights; FSDP by itself gathers weights for `forward` alone.
_BACKBONE_METHODS = ("start", "context_loss", "observe", "extend", "decode", "expected_gain", "teacher_forced")
_LAYER_METHODS = ("chain",)


def split_weights(backbone: Backbone, device: str) -> None:
    """Split a backbone's weights over all processes, in place: every layer on its own, and the rest.

    From then on all processes must make the same calls of it at the same time.

    Args:
        backbone: of the LlamaGen family (RandAR, LlamaGen), the same in every process; best on the CPU, so that no
            device ever holds all of it.
        device: of this process.

    Raises:
        ValueError: if there is one process only, or the backbone has no layers to split.
    """
    from torch.distributed.device_mesh import init_device_mesh  # these take long to import
    from torch.distributed.fsdp import fully_shard

    # whose weights are used by `forward` and `chain` alone
    layers = getattr(backbone, "layers", None)
    if not isinstance(backbone, nn.Module) or not isinstance(layers, nn.ModuleList):
        raise ValueError("fsdp=true needs a backbone of the LlamaGen family: RandAR or LlamaGen")
    if distributed.size() == 1:
        raise ValueError("fsdp=true splits a backbone over processes; start several with torchrun --nproc-per-node=K")
    if is_split(backbone):
        return
    pack_weights(backbone, False)  # packed copies would be whole again
    graphs = getattr(backbone, "graphs", BlockGraphs())
    if graphs.wanted:
        raise ValueError("cuda_graph=true cannot record a backbone whose weights are split; use cuda_graph=null")
    graphs.wanted = False
    mesh = init_device_mesh(torch.device(device).type, (distributed.size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
        _register(layer, _LAYER_METHODS)
    fully_shard(backbone, mesh=mesh)
    _register(backbone, _BACKBONE_METHODS)


def fix_memory(backbone: Any) -> None:
    """Let forwards take in every process what the process with the least free memory has.

    How many forwards a call takes depends on the memory that they may take, and all processes must make as many.
    """
    budget = backbone.packing.budget(backbone_device(backbone))
    backbone.packing = Packing(min(distributed.gather(budget)) / 1e9)


def _register(module: nn.Module, methods: tuple[str, ...]) -> None:
    from torch.distributed.fsdp import register_fsdp_forward_method

    for method in methods:
        if hasattr(module, method):
            register_fsdp_forward_method(module, method)


def is_split(module: nn.Module) -> bool:
    """Whether its weights are split over processes."""
    if "torch.distributed.fsdp" not in sys.modules:  # nobody has split any
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def whole_copy(backbone: TrainableBackbone) -> TrainableBackbone:
    """The weights of a backbone that are split, in a whole backbone on the CPU, to be saved.

    All processes must call it; only the main one gets the weights.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FSDPModule

    whole_options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(cast(nn.Module, backbone), options=whole_options)
    family: Any = next(kind for kind in type(backbone).__mro__ if not issubclass(kind, FSDPModule))
    whole: TrainableBackbone = family(backbone.config)
    if weights:
        whole.load_state_dict(weights)
    return whole.eval()


class WholeTraining:
    """Model, averaged model and optimizer of a split training as whole tensors on the CPU, for a state that lasts."""

    def __init__(self, model: nn.Module, averaged: AveragedModel, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.averaged, self.optimizer = model, averaged, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors, in the main process alone."""
        from torch.distributed.checkpoint import state_dict as states

        whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        return {
            "model": states.get_model_state_dict(self.model, options=whole),
            "mean": states.get_model_state_dict(self.averaged.module, options=whole),
            "averaged": self.averaged.n_averaged.cpu(),
            "optimizer": states.get_optimizer_state_dict(self.model, self.optimizer, options=whole),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take whole tensors, which every process has read."""
        from torch.distributed.checkpoint import state_dict as states

        options = states.StateDictOptions(full_state_dict=True)
        states.set_model_state_dict(self.model, state["model"], options=options)
        states.set_model_state_dict(self.averaged.module, state["mean"], options=options)
        self.averaged.n_averaged.copy_(state["averaged"])
        states.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)
