"""How much of a call is spent inside the models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.limits import timed, wait
from orderrl.agents.ppo import PPO
from orderrl.planner import OrderHead


class Stopwatch:
    """Seconds inside some calls; a call inside another one counts once."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.inside = device, 0.0, False

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, watched."""

        def watched(*arguments: Any, **named: Any) -> Any:
            if self.inside:
                return function(*arguments, **named)
            self.inside = True
            wait(self.device)
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                wait(self.device)
                self.seconds += time.perf_counter() - start
                self.inside = False

        return watched


@contextmanager
def watching(watch: Stopwatch, target: Any, *names: str) -> Iterator[None]:
    """Watch methods of an object."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(target, name, watch.around(getattr(target, name))))
        yield


def share_inside(backbone: Any, agent: PPO, call: Callable[[], Any]) -> dict[str, float]:
    """Shares of a call's time: the backbone's methods, the planner's and the critic's forward, and all backwards."""
    device = agent.env.core.device
    of_backbone, of_planner = Stopwatch(device), Stopwatch(device)
    with (
        watching(of_backbone, backbone, "start", "context_loss", "extend", "observe"),
        watching(of_planner, agent.planner, "forward"),
        watching(of_planner, agent.critic, "forward"),
        watching(of_planner, torch.Tensor, "backward"),
    ):
        seconds = timed(call, device)
    return {"backbone_share": of_backbone.seconds / seconds, "planner_share": of_planner.seconds / seconds}


def planner_share(planner: OrderHead, call: Callable[[], Any]) -> dict[str, float]:
    """Share of a call's time that a planner's forward takes."""
    device = planner.position.device
    watch = Stopwatch(device)
    with watching(watch, planner, "forward"):
        seconds = timed(call, device)
    return {"planner_share": watch.seconds / seconds}
