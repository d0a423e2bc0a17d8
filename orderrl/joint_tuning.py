"""The step of the main job that changes a backbone: a planner and a copy of its backbone, tuned together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from orderrl.agents.joint import JointConfig, JointTuning, copy_to_tune
from orderrl.backbones import Backbone, backbone_fingerprint, save_backbone
from orderrl.backbones.registry import weights_fingerprint
from orderrl.data import AUGMENTATIONS, load_split
from orderrl.pipeline import (
    FORMAT,
    announce,
    find_or_make_labels,
    follow,
    open_labels,
    require_order_robust,
    section,
)
from orderrl.planner import OrderHead, load_planner, require_described, save_planner
from orderrl.planners import find_or_train_planner, planner_to_start_from
from orderrl.runtime.job import Unfinished
from orderrl.runtime.progress import progress
from orderrl.runtime.run import Run
from orderrl.runtime.storage import write_json


def find_or_train_joint(config: DictConfig, backbone: Backbone, run: Run | None = None, reuse: bool = True) -> Path:
    """Checkpoint of the planner that `agent=joint` trains.

    Beside it are `backbone.safetensors`, the copy of the backbone that was tuned with it, and `results.json`, what was
    measured before and after.
    """
    require_order_robust(config, backbone, "agent=joint")
    settings = JointConfig(**section(config, "agent", "name", "start"), seed=config.seed)
    tuned = copy_to_tune(backbone, settings.layers)
    start = planner_to_start_from(config, backbone)
    planner, started = load_planner(start, backbone)
    require_described(start, planner, started)
    labels = find_or_make_labels(config, backbone)
    description = {
        "format": FORMAT,
        "agent": section(config, "agent", "start"),
        "planner": section(config, "planner"),
        "start": weights_fingerprint(planner),
        "labels": labels.name,
        "seed": config.seed,
        "backbone": backbone_fingerprint(backbone),
        "data": config.data.name,
        "budgets": started["budgets"],
        "objective": "context",
    }
    outcome: dict[str, Any] = {}

    def train(work: Unfinished) -> OrderHead:
        torch.manual_seed(config.seed)
        labelled, images = (load_split(config.data.name, split) for split in ("planner", "backbone"))
        augment = AUGMENTATIONS.get(config.data.name)
        tuning = JointTuning(planner, tuned, open_labels(labels, backbone), labelled, images, settings, augment)
        what = f"the top {settings.layers} layers" if settings.layers else "a frozen backbone"
        with progress(settings.steps, f"tuning planner and {what}", "steps") as advance:

            def report(row: dict[str, float]) -> None:
                if row["step"]:  # the first row is what was measured before the first step
                    advance(row["new"], f"loss {row['loss']:.3f}")

            follow(tuning.train(work), work, run, report, stops_itself=True)
        outcome.update(tuning.outcome)
        announce(f"joint: {outcome['stopped'] or 'no collapse, no explosion'}; kept step {outcome['kept_step']}")
        return tuning.planner

    def save(folder: Path, planner: OrderHead) -> None:
        made = {"tuned_from": description["backbone"], "agent": description["agent"], "data": config.data.name}
        fitting = description | {"backbone": backbone_fingerprint(tuned)}
        save_planner(folder / "planner.safetensors", planner, fitting)
        save_backbone(folder / "backbone.safetensors", tuned, made)
        write_json(folder / "results.json", outcome)

    return find_or_train_planner(config, description, train, reuse, run, save)
