"""Settings of backbones: which one is loaded and how it runs, and the shape of one that is made."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from orderrl.backbones.llamagen import TransformerConfig
from orderrl.backbones.mar_backbone import MaskedConfig
from orderrl.backbones.registry import COMPILE_MODES, as_dtype, backbone_config
from orderrl.runtime.values import Settings, at_least, named, one_of, positive, setting


@dataclass(frozen=True, kw_only=True)
class BackboneName(Settings):
    """A backbone by name."""

    name: str = setting(
        MISSING, "Backbone: a registered or published name, or the path of a checkpoint that pretrain wrote"
    )


@dataclass(frozen=True, kw_only=True)
class UntrainedName(Settings):
    """A backbone that is still to be trained."""

    name: str | None = setting(None, "Checkpoint that pretrain wrote; null where there is none yet")


@dataclass(frozen=True, kw_only=True)
class PublishedBackbone(BackboneName):
    """A published model by name, with its weights."""

    path: str | None = setting(
        None,
        "Weights: .safetensors, .pt, .pth or hf://OWNER/NAME[@REVISION]/FILE; pretrain starts from them, or with null "
        "anew",
    )
    shape: dict[str, Any] | None = setting(
        None, "Values of the published shape to replace, such as {block_size: 2}; null replaces none"
    )


@dataclass(frozen=True, kw_only=True)
class RunningBackbone(Settings):
    """How a frozen backbone runs."""

    dtype: str | None = setting(
        "auto",
        "Type of the parameters: float32, bfloat16 or float16; null leaves them as they are, and makes published ones "
        "float32; auto is bfloat16 on GPUs that have it, elsewhere null",
    )
    memory_gb: float | None = setting(
        None, "Memory that the activations of one forward may take, 10^9 bytes; null is what is free", positive()
    )
    compile: str | None = setting(
        None,
        "Mode of torch.compile for the layers: default or max-autotune-no-cudagraphs; null is eager",
        one_of(COMPILE_MODES),
    )
    pack_weights: bool = setting(
        True, "On CPUs, keep a second copy of the weights in the layout that products read fastest"
    )
    cuda_graph: bool | None = setting(
        None,
        "On CUDA, draw a block as one recorded graph: null where shapes come again and it can, true always or not at "
        "all, false never",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in (None, "auto"):
            as_dtype(self.dtype)


@dataclass(frozen=True, kw_only=True)
class NewTransformer(Settings):
    """A transformer that pretrain makes; its grid and its token values are those of the data."""

    family: str = setting(
        "randar", "Family: randar (instruction tokens) or arpg (two passes)", one_of(("randar", "arpg"))
    )
    model: TransformerConfig = setting({"block_size": 2, "dropout": 0.1}, "Shape of the backbone")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shape(self.family, self.model, {"vocab_size": 1, "num_classes": 1})


@dataclass(frozen=True, kw_only=True)
class NewMasked(Settings):
    """A masked model of continuous tokens that pretrain makes; its grid and its tokens are those of the data."""

    family: str = setting("mar", "Family: mar, a masked model of continuous tokens", one_of(("mar",)))
    model: MaskedConfig = setting({}, "Shape of the backbone")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_shape(self.family, self.model, {"vae_embed_dim": 1})


@dataclass(frozen=True, kw_only=True)
class OrderRobustStart(Settings):
    """What pretrain makes of a raster model."""

    order_robust_block_size: int = setting(
        4, "Side of the blocks of the order-robust model that pretrain makes of it", at_least(1)
    )


def _check_shape(family: str, model: Any, tokens: Mapping[str, int]) -> None:
    """Refuse shapes that cannot be built, on the smallest grid that has blocks of this size."""
    side = model["block_size"]
    with named("model"):
        backbone_config(family, {**model, "height": side, "width": side, **tokens})
