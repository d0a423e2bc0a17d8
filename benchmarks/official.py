"""The published samplers beside ours: the same random weights, the same machine, the same run.

    python -m benchmarks.official FOLDER --batch 1 8 --json official.json

FOLDER holds checkouts of the public repositories under their own names, those that are to be compared: LlamaGen
(FoundationVision/LlamaGen), RandAR (ziqipang/RandAR), ARPG (hp-l33/ARPG). Nothing is fetched. Every variant runs in
turn, after a warm-up that also compares what both draw greedily; ratios are of the seconds in the same turn.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.limits import processor, timed
from benchmarks.shapes import GRID, LLAMAGEN_B, frozen
from orderrl.agents.policies import RankingPolicy, fixed_order
from orderrl.agents.schedules import fixed
from orderrl.backbones import ARPG, OrderRobustTransformer, RasterTransformer, Sampling
from orderrl.backbones.check import random_tokens
from orderrl.backbones.llamagen import TransformerConfig
from orderrl.backbones.published import arpg_sampler, llamagen_sampler, randar_sampler
from orderrl.data import TokenSet
from orderrl.evaluation.drawing import generate_images

RANDAR_STEPS, ARPG_STEPS = 88, 64  # as published
Draw = Callable[[Tensor, bool], Any]
"""(labels, greedy) -> tokens (M, N) in raster order."""


@dataclass
class Contender:
    """One way to draw images; `against` names the official one that it is held against."""

    name: str
    draw: Draw
    against: str | None = None
    seconds: list[float] = field(default_factory=list)


@contextmanager
def _importing(folder: Path, *names: str) -> Iterator[None]:
    """Let top-level modules of a checkout be imported, and forget their names afterwards: two have the same."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] in names]:
            del sys.modules[name]


def _given_weights(official: nn.Module, ours: nn.Module) -> Any:
    """The official model with our weights; it must take every one of them."""
    missing, unexpected = official.load_state_dict(ours.state_dict(), strict=False)
    if missing or unexpected:
        raise ValueError(f"{type(official).__name__} does not take our weights: {missing=} {unexpected=}")
    return official.to(next(ours.parameters())).eval().requires_grad_(False)


def official_llamagen(folder: Path, ours: RasterTransformer) -> Draw:
    """LlamaGen's own sampler."""
    with _importing(folder, "autoregressive", "utils"):
        gpt = importlib.import_module("autoregressive.models.gpt")
        generate = importlib.import_module("autoregressive.models.generate").generate
        c = ours.config
        arguments = gpt.ModelArgs(
            dim=c.dim, n_layer=c.layers, n_head=c.heads, multiple_of=c.multiple_of, num_classes=c.num_classes,
            vocab_size=c.vocab_size, block_size=c.height * c.width,
        )  # fmt: skip
        model = _given_weights(gpt.Transformer(arguments), ours)

    def draw(labels: Tensor, greedy: bool) -> Tensor:
        drawn: Tensor = generate(model, labels, c.height * c.width, sample_logits=not greedy)
        return drawn

    return draw


def official_randar(folder: Path, ours: OrderRobustTransformer, order: Tensor, steps: int) -> Draw:
    """RandAR's own sampler, in a given order (N,)."""
    with _importing(folder, "RandAR"):
        randar = importlib.import_module("RandAR.model.randar_gpt")
        c = ours.config
        model = randar.RandARTransformer(
            dim=c.dim, n_layer=c.layers, n_head=c.heads, multiple_of=c.multiple_of, num_classes=c.num_classes,
            vocab_size=c.vocab_size, block_size=c.height * c.width,
        )  # fmt: skip
        model = _given_weights(model, ours)

    def draw(labels: Tensor, greedy: bool) -> Tensor:
        orders = order.expand(len(labels), -1).contiguous()
        drawn: Tensor = model.generate(labels, orders, (1.0, 1.0), steps, top_k=int(greedy))
        return drawn

    return draw


def official_arpg(folder: Path, ours: ARPG, steps: int) -> Draw:
    """ARPG's own sampler, in the order that PyTorch's generator gives after `manual_seed(0)`."""
    try:
        importlib.import_module("transformers.configuration_utils")
    except ImportError:  # of which it takes a class of settings alone
        stand_in = types.ModuleType("transformers.configuration_utils")
        stand_in.PretrainedConfig = object  # type: ignore[attr-defined]
        sys.modules.setdefault("transformers", types.ModuleType("transformers"))
        sys.modules["transformers.configuration_utils"] = stand_in
    with _importing(folder, "models"):
        arpg = importlib.import_module("models.arpg")
        c = ours.config
        arguments = arpg.ModelArgs(
            dim=c.dim, n_layer=c.layers, n_head=c.heads, multiple_of=c.multiple_of, num_classes=c.num_classes,
            vocab_size=c.vocab_size, block_size=c.height * c.width,
        )  # fmt: skip
        model = _given_weights(arpg.Transformer(arguments), ours)

    @torch.no_grad()
    def draw(labels: Tensor, greedy: bool) -> Tensor:
        torch.manual_seed(0)
        drawn: Tensor = model.generate(labels, 1.0, top_k=int(greedy), seq_len=c.height * c.width, num_iter=steps)
        return drawn

    return draw


def arpg_order(labels: Tensor, total: int) -> Tensor:
    """The order (total,) in which ARPG's own sampler draws after `manual_seed(0)`."""
    torch.manual_seed(0)
    torch.rand(len(labels), device=labels.device)  # it draws which labels are dropped first
    return torch.rand(total, device=labels.device).argsort()


def our_model(kind: type[Any], layers: int, dtype: str, device: torch.device, **shape: Any) -> Any:
    """One of our models of LlamaGen-B's width with random weights, its output matrix too."""
    torch.manual_seed(0)
    model: Any = kind(TransformerConfig(**(GRID | LLAMAGEN_B | {"layers": layers} | shape)))
    nn.init.normal_(getattr(model, model.OUTPUT).weight, std=0.02)
    return frozen(model, dtype).to(device)


def contenders(folder: Path, layers: int, dtype: str, device: torch.device, **shape: Any) -> list[Contender]:
    """All samplers of the models whose checkouts are there."""
    side = shape.get("height", GRID["height"])
    steps = [min(most, side * side) for most in (RANDAR_STEPS, ARPG_STEPS)]
    make = partial(our_model, layers=layers, dtype=dtype, device=device)
    found = []

    def sampling(greedy: bool) -> Sampling:
        return Sampling(temperature=0.0 if greedy else 1.0)

    def uniforms(labels: Tensor) -> Tensor:
        return torch.rand(len(labels), side * side, generator=torch.Generator().manual_seed(0)).to(device)

    randar: Any = make(OrderRobustTransformer, **shape)
    if (folder / "LlamaGen").is_dir():
        raster = make(RasterTransformer, **(shape | {"block_size": side}))
        found += [
            Contender("official LlamaGen", official_llamagen(folder / "LlamaGen", raster)),
            Contender(
                "ours, LlamaGen's sampler",
                lambda labels, greedy: llamagen_sampler(raster, labels, uniforms(labels), sampling(greedy)).tokens,
                "official LlamaGen",
            ),
        ]
    if (folder / "RandAR").is_dir():
        order = torch.randperm(side * side, generator=torch.Generator().manual_seed(0)).to(device)
        found += [
            Contender(
                f"official RandAR, {steps[0]} steps", official_randar(folder / "RandAR", randar, order, steps[0])
            ),
            Contender(
                f"ours, RandAR's sampler, {steps[0]} steps",
                lambda labels, greedy: randar_sampler(
                    randar, labels, order.expand(len(labels), -1), uniforms(labels), steps[0],
                    sampling=sampling(greedy),
                ).tokens,
                f"official RandAR, {steps[0]} steps",
            ),
        ]  # fmt: skip
    if (folder / "ARPG").is_dir():
        arpg = make(ARPG, **shape)
        found += [
            Contender(f"official ARPG, {steps[1]} iterations", official_arpg(folder / "ARPG", arpg, steps[1])),
            Contender(
                f"ours, ARPG's sampler, {steps[1]} iterations",
                lambda labels, greedy: (
                    arpg_sampler(
                        arpg,
                        labels,
                        arpg_order(labels, side * side),
                        uniforms(labels),
                        steps[1],
                        sampling=sampling(greedy),
                    ).tokens
                ),
                f"official ARPG, {steps[1]} iterations",
            ),
        ]
    if not found:
        raise ValueError(f"{folder}: holds none of LlamaGen, RandAR, ARPG; check out the public repositories there")
    for budget in (1, 4):
        found.append(
            Contender(
                f"ours, {budget} block{'s' * (budget > 1)} a step", partial(_by_blocks, randar, budget),
                found[0].name,
            )
        )  # fmt: skip
    return found


def _by_blocks(model: OrderRobustTransformer, budget: int, labels: Tensor, greedy: bool) -> Tensor:
    """Images in a fixed random order of blocks, `budget` blocks a step."""
    grid = model.geometry
    order = torch.randperm(grid.num_blocks, generator=torch.Generator().manual_seed(0))
    sizes = grid.height, grid.width, model.vocab_size, model.num_classes
    data = TokenSet("official", "random", random_tokens(model, 1, torch.Generator()), torch.zeros(1).long(), *sizes)
    policy = RankingPolicy(fixed_order(order), grid, (budget,), fixed(0))
    sampling = Sampling(temperature=0.0 if greedy else 1.0)
    return generate_images(model, data, policy, (budget,), labels.cpu(), sampling).tokens


def compare(
    folder: Path, batch: int, runs: int, dtype: str, device: torch.device, layers: int = 6, **shape: Any
) -> Iterator[dict[str, Any]]:
    """Rows for one batch size: seconds, images per second, and how many times as fast as the official sampler.

    Greedy drawing warms up; `equal` is the share of equal tokens there. Rounding may part two samplers that are right.
    """
    found = contenders(folder, layers, dtype, device, **shape)
    labels = torch.arange(batch).to(device) % shape.get("num_classes", LLAMAGEN_B["num_classes"])
    greedy = {contender.name: contender.draw(labels, True).cpu().long() for contender in found}
    for _ in range(runs):
        for contender in found:
            contender.seconds.append(_seconds(partial(contender.draw, labels, False), device))
    seconds = {contender.name: contender.seconds for contender in found}
    for contender in found:
        row: dict[str, Any] = {"batch": batch, "variant": contender.name, "dtype": dtype}
        row |= {"seconds": statistics.median(contender.seconds), "images_per_second": 0.0}
        row["images_per_second"] = batch / row["seconds"]
        if contender.against is not None:
            ratios = sorted(o / s for o, s in zip(seconds[contender.against], contender.seconds, strict=True))
            row |= {"against": contender.against, "times_official": statistics.median(ratios)}
            row |= {"times_low": ratios[0], "times_high": ratios[-1]}
            if "sampler" in contender.name:
                row["equal"] = float((greedy[contender.name] == greedy[contender.against]).float().mean())
        yield row


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call; of one thread of a CPU its own, to which other work on the machine does not add."""
    if device.type != "cpu" or torch.get_num_threads() > 1:
        return timed(call, device)
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.official", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="holds the checkouts LlamaGen, RandAR, ARPG; those that are there")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="images at once")
    parser.add_argument("--runs", type=int, default=3, help="of every variant, in turn")
    parser.add_argument("--layers", type=int, default=6, help="of LlamaGen-B's twelve; even for ARPG")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="where the rows are written")
    options = parser.parse_args()
    name = processor(options.device)
    print(f"{name}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    rows: list[dict[str, Any]] = []
    for batch in options.batch:
        for row in compare(options.folder, batch, options.runs, options.dtype, options.device, options.layers):
            rows.append(row | {"processor": name})
            beside = ""
            if "against" in row:
                times = "{times_official:.2f} ({times_low:.2f} to {times_high:.2f})".format_map(row)
                beside = f"  {times} times as fast as {row['against']}"
            same = f", greedy tokens {row['equal']:.1%} equal" if "equal" in row else ""
            print(f"batch {batch}  {row['variant']:34} {row['seconds']:7.2f} s{beside}{same}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
