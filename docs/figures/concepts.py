"""The figures of the page on concepts: the shipped canvas backbone and planner; `python docs/figures/concepts.py`."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from orderrl import load_backbone
from orderrl.agents.play import Rollout, roll_out
from orderrl.agents.registry import make_policy
from orderrl.data import load_split
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.render import partial_images
from orderrl.evaluation.policies import shipped_planner

HERE = Path(__file__).parent
IMAGES, SHOWN, STEP = 16, 3, 1  # images of the curves, the one that is drawn, and the step that is looked at
BACKBONE, DATA = load_backbone("canvas"), load_split("canvas", "test")
GRID = BACKBONE.geometry


def rollout(policy: str) -> Rollout:
    """The first test images as a policy reveals them."""
    core = NextBlockCore(BACKBONE, DATA, IMAGES, CoreConfig())
    named = make_policy(policy, BACKBONE)
    return roll_out(core, named.policy, torch.Generator().manual_seed(0), torch.arange(IMAGES))


def show(axes: Any, found: Rollout, steps: int, title: str) -> None:
    """The image after so many steps, with the grid of blocks."""
    visible = found.reveal_step[SHOWN : SHOWN + 1] < steps
    picture = partial_images(DATA, GRID, DATA.tokens[SHOWN : SHOWN + 1], visible)[0]
    axes.imshow(picture.permute(1, 2, 0), extent=(0, GRID.columns, GRID.rows, 0))
    axes.set_title(title, fontsize=8)
    axes.set_xticks(range(GRID.columns + 1), [])
    axes.set_yticks(range(GRID.rows + 1), [])
    axes.grid(color="#999999", linewidth=0.6)
    axes.tick_params(length=0)


def numbers(axes: Any, values: np.ndarray, form: str) -> None:
    """A number in the middle of every block that has one."""
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            text = format(value, form)
            box = {"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 1.2}
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, bbox=box)


def blocks(planner: Rollout, raster: Rollout) -> Figure:
    """An image in blocks, and two orders of them."""
    figure = Figure(figsize=(6, 2.2), layout="constrained")
    whole, first, second = figure.subplots(1, 3)
    show(whole, raster, GRID.num_blocks, "16 blocks of 3×3 tokens")
    for axes, found, name in ((first, raster, "raster order"), (second, planner, "a planner's order")):
        show(axes, found, GRID.num_blocks, name)
        numbers(axes, found.reveal_step[SHOWN].view(GRID.rows, GRID.columns).numpy() + 1.0, ".0f")
    return figure


def gain(planner: Rollout) -> Figure:
    """Context losses before and after a step, and what the step was worth."""
    before, after = (planner.losses[step, SHOWN] for step in (STEP, STEP + 1))
    hidden = planner.reveal_step[SHOWN] > STEP
    figure = Figure(figsize=(6, 2.2), layout="constrained")
    panels = figure.subplots(1, 3)
    still = planner.reveal_step[SHOWN] >= STEP
    worth = (before - after)[hidden].sum() / GRID.num_tokens
    shown = (
        (STEP, before.where(still, torch.nan), "losses of hidden blocks, nats"),
        (STEP + 1, after.where(hidden, torch.nan), "after one more block"),
        (STEP + 1, (before - after).where(hidden, torch.nan), f"gain: {worth:.3f} nats per token"),
    )
    for axes, (steps, values, title) in zip(panels, shown, strict=True):
        show(axes, planner, steps, title)
        numbers(axes, values.view(GRID.rows, GRID.columns).numpy(), "+.1f" if "gain" in title else ".1f")
    return figure


def objectives(planner: Rollout, raster: Rollout) -> Figure:
    """The area that one objective asks for, and the sum that the other does."""
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    fraction = torch.linspace(0, 1, GRID.num_blocks + 1)
    for found, name, colour in ((raster, "raster", "#1f2328"), (planner, "planner for context", "#0077bb")):
        curve = found.gain_curve(fraction).mean(1)
        left.plot(fraction, curve, color=colour, label=name)
        left.fill_between(fraction, curve, color=colour, alpha=0.12, linewidth=0)
        charged = [0.0]
        for step in range(GRID.num_blocks):
            taken = found.reveal_step == step
            charged.append(charged[-1] + (found.losses[step] * taken).sum(-1).mean().item())
        right.plot(fraction, charged, color=colour, label=name)
    left.set(xlabel="revealed fraction", ylabel="gain so far, nats per token", title="context: the area")
    right.set(xlabel="revealed fraction", ylabel="nats paid so far", title="likelihood: the end, low is good")
    for axes in (left, right):
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
            text.set_fontsize(8)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8)
    return figure


def step(planner: Rollout) -> Figure:
    """One step of the environment: what the policy sees, what it does, and what it gets."""
    figure = Figure(figsize=(6.2, 2.1), layout="constrained")
    seen, act, then = figure.subplots(1, 3, width_ratios=(1, 0.9, 1))
    show(seen, planner, STEP, "observation: the visible tokens")
    block = int((planner.reveal_step[SHOWN] == STEP).nonzero()[0])
    show(then, planner, STEP + 1, "next observation, and the reward")
    row, column = divmod(block, GRID.columns)
    then.add_patch(Rectangle((column, row), 1, 1, fill=False, color="#ee7733", lw=2))
    text = f"policy\n\nhidden (B, D), entropy (B,)\nvisible, label, masks\n↓\naction = block {block}\n\nno hidden token"
    act.text(0.5, 0.5, text, ha="center", va="center", fontsize=8)
    act.annotate("", (1.0, 0.5), (0.86, 0.5), arrowprops={"arrowstyle": "->"}, annotation_clip=False)
    act.annotate("", (0.14, 0.5), (0.0, 0.5), arrowprops={"arrowstyle": "->"}, annotation_clip=False)
    act.set_axis_off()
    return figure


def main() -> None:
    """Write the figures beside this file."""
    planner, raster = rollout(str(shipped_planner(BACKBONE))), rollout("raster")
    made = {
        "blocks": blocks(planner, raster),
        "gain": gain(planner),
        "objectives": objectives(planner, raster),
        "step": step(planner),
    }
    for name, figure in made.items():
        figure.savefig(HERE / f"concepts_{name}.png", dpi=150, facecolor="white")


if __name__ == "__main__":
    main()
