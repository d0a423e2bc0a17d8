"""What published models keep in memory, counted: the table of docs/gpu.md.

python -m benchmarks.memory randar_xl llamagen_3b mar_h
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from orderrl.backbones import build_backbone
from orderrl.backbones.memory import SHARE_OF_FREE

MODELS = ("randar_xl", "llamagen_3b", "mar_h")
CARDS = {"80 GB": 80e9, "141 GB": 141e9}
HEAD = "| model | parameters | weights | an image's cache | chains kept by an environment | " + " | ".join(
    f"environments on {name}" for name in CARDS
)


@dataclass(frozen=True)
class Held:
    """What a backbone keeps in memory, bytes; a forward's activations come on top, bounded by `Packing`."""

    weights: int
    per_image: int  # of an image that is drawn or played: its prefix cache; guided twice
    kept_chains: int  # of an environment that looks: entries of all its chains, kept until the next step


def held(backbone: Any) -> Held:
    """Count what a backbone keeps; on the meta device nothing of it has to exist."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in backbone.parameters())
    grid, one = backbone.geometry, torch.zeros(1, dtype=torch.int64, device=backbone.block_tokens.device)
    if hasattr(backbone, "decode_steps"):  # raster order: a cache of its sampler alone
        cache = backbone.empty(1, grid.num_tokens)
        return Held(weights, cache.keys.nbytes + cache.values.nbytes, 0)
    if not hasattr(backbone, "entries_per_token"):  # masked models encode every state anew
        return Held(weights, grid.num_tokens * (backbone.token_dim * 4 + 1), 0)
    prefix = backbone.start(one)
    per_entry = 2 * prefix.keys[..., 0, :].nbytes
    chains = grid.num_blocks * (backbone.entries_per_token * grid.tokens_per_block - 1)
    return Held(weights, prefix.keys.nbytes + prefix.values.nbytes, chains * per_entry)


def row(name: str, dtype: str = "bfloat16") -> str:
    """One line of the table; nothing is allocated."""
    with torch.device("meta"):
        model: Any = build_backbone(name, dtype=dtype)
    count = held(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    each = [in_bytes(count.weights), in_bytes(count.per_image), in_bytes(count.kept_chains)]
    cached = count.per_image + count.kept_chains > 1e6  # else activations bound it
    fits = [f"{environments(count, size):,}" if cached else "–" for size in CARDS.values()]
    return f"| {name} | {parameters / 1e6:,.0f} M | " + " | ".join(each + fits) + " |"


def environments(count: Held, card: float) -> int:
    """How many images are played at once with all that is kept in 80 % of a card, weights aside."""
    return int((SHARE_OF_FREE * card - count.weights) / max(count.per_image + count.kept_chains, 1))


def in_bytes(number: float) -> str:
    """A size in words."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}" if number else "0"
        number /= 1000
    return f"{number:.3g} GB"


def table(names: tuple[str, ...] = MODELS) -> str:
    """The table in Markdown."""
    return "\n".join([f"{HEAD} |", "|---" * (5 + len(CARDS)) + "|", *map(row, names)])


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.memory", description=__doc__)
    parser.add_argument("names", nargs="*", default=MODELS, help="published models")
    print(table(tuple(parser.parse_args().names)))


if __name__ == "__main__":
    main()
