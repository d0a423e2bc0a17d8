"""Shapes of the published models, by name."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A published model.

    Attributes:
        family: "llamagen", "randar", "arpg" or "mar".
        shape: arguments of the family's configuration; block_size is ours, the blocks that a planner orders.
        parameters: as published, for the reader.
        weights: where the authors keep them.
    """

    family: str
    shape: Mapping[str, int | float]
    parameters: str
    weights: str


_SIZES = {
    "b": {"layers": 12, "heads": 12, "dim": 768},
    "l": {"layers": 24, "heads": 16, "dim": 1024},
    "xl": {"layers": 36, "heads": 20, "dim": 1280},
    "xxl": {"layers": 48, "heads": 24, "dim": 1536},
    "3b": {"layers": 24, "heads": 32, "dim": 3200},
}
_IMAGENET = {"vocab_size": 16384, "num_classes": 1000, "multiple_of": 256}


def _grid(side: int, block_size: int) -> dict[str, int]:
    return {"height": side, "width": side, "block_size": block_size}


def _llamagen(size: str, side: int, parameters: str) -> Preset:
    pixels = 16 * side
    file = f"hf://FoundationVision/LlamaGen/c2i_{size.upper()}_{pixels}.pt"
    return Preset("llamagen", _SIZES[size] | _IMAGENET | _grid(side, side), parameters, file)


def _randar(size: str, billions: str) -> Preset:
    file = f"hf://ziqipang/RandAR/randar_{billions}_llamagen_360k_bs_1024_lr_0.0004.safetensors"
    return Preset("randar", _SIZES[size] | _IMAGENET | _grid(16, 4), f"{billions.upper()}", file)


def _arpg(size: str, parameters: str, file: str) -> Preset:
    return Preset("arpg", _SIZES[size] | _IMAGENET | _grid(16, 4), parameters, f"hf://hp-l33/ARPG/{file}")


def _mar(size: str, width: int, depth: int, heads: int, diffloss: tuple[int, int], parameters: str) -> Preset:
    """For 256 x 256 pixels: tokens of 16 channels (KL-16)."""
    shape = _grid(16, 4) | {"vae_embed_dim": 16, "diffloss_d": diffloss[0], "diffloss_w": diffloss[1]}
    for part in ("encoder", "decoder"):
        shape |= {f"{part}_embed_dim": width, f"{part}_depth": depth, f"{part}_num_heads": heads}
    return Preset("mar", shape, parameters, f"the links of github.com/LTH14/mar (MAR-{size}, checkpoint-last.pth)")


_LLAMAGEN_PARAMETERS = {"b": "111M", "l": "343M", "xl": "775M", "xxl": "1.4B", "3b": "3.1B"}
PRESETS: dict[str, Preset] = {
    **{f"llamagen_{size}": _llamagen(size, 16, count) for size, count in _LLAMAGEN_PARAMETERS.items()},
    **{f"llamagen_{size}_384": _llamagen(size, 24, count) for size, count in _LLAMAGEN_PARAMETERS.items()},
    "randar_l": _randar("l", "0.3b"),
    "randar_xl": _randar("xl", "0.7b"),
    "arpg_l": _arpg("l", "320M", "arpg_300m.pt"),
    "arpg_xl": _arpg("xl", "719M", "arpg_700m.pt"),
    "arpg_xxl": _arpg("xxl", "1.3B", "arpg_1b.pt"),
    "mar_b": _mar("B", 768, 12, 12, (6, 1024), "208M"),
    "mar_l": _mar("L", 1024, 16, 16, (8, 1280), "479M"),
    "mar_h": _mar("H", 1280, 20, 16, (12, 1536), "943M"),
}
