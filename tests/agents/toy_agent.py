"""An agent from outside the package, in one file: it learns which blocks a policy of its own would reveal first."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from orderrl.agents.agent import Agent
from orderrl.factory import Setup
from orderrl.labels import open_labels, random_label_sets
from orderrl.planner import OrderHead
from orderrl.runtime.job import Job
from orderrl.runtime.values import Settings, at_least, setting


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """How it learns."""

    steps: int = setting(5, "Optimiser steps", at_least(1))
    favourite: int = setting(3, "The block that goes first", at_least(0))


def train(setup: Setup, config: Config, job: Job) -> OrderHead:
    torch.manual_seed(setup.seed)
    planner = OrderHead(setup.planner).eval()
    labels = open_labels(setup.label_sets[0], setup.backbone)
    seen = labels.exclude("order", "length", "gains", "loss")[:8].clone()
    seen["action_mask"], seen["fraction"] = ~seen["visible"], seen["visible"].float().mean(-1, keepdim=True)
    optimizer = torch.optim.SGD(planner.parameters(), 0.1)
    for _ in job.steps(config.steps, "learning", "steps", "loss {loss:.3f}", planner=planner, optimizer=optimizer):
        loss = -planner(seen).scores[:, config.favourite].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        job.log(loss=loss.item())
    return planner


AGENT = Agent(Config, train, environment=False, label_sets=random_label_sets)
