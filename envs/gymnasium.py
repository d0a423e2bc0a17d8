"""The single Gymnasium environment."""

from typing import Any

import gymnasium as gym
import numpy as np

from orderrl.envs.build import build_core, require_render_mode
from orderrl.envs.observation import MASKS
from orderrl.envs.render import frame
from orderrl.envs.spaces import action_space, flat_mask, observation_space, to_numpy
from orderrl.runtime.integers import as_int64, as_seed
from orderrl.runtime.isolation import isolated, isolated_float32


class NextBlockEnv(gym.Env[dict[str, Any], Any]):
    """Choose the order in which a frozen image generator reveals the blocks of an image.

    ## Description
    An image is a grid of tokens cut into B square blocks, all hidden at first. Every step reveals one or
    several blocks: their true tokens (mode "teacher") or tokens that the backbone draws (mode "generate").
    A good order makes what is still hidden easy to predict.

    ## Action Space
    `Discrete(B)` if `budgets == (1,)`: the block to reveal. Otherwise `MultiDiscrete([B] * K + [n])` with K the
    largest budget and n their number: a ranked list of blocks and the index of the budget k; entries past k
    are ignored. A budget is legal if it does not exceed the hidden blocks; if none is, the smallest is legal
    and cut short. Masks: `info["action_mask"]` (int8); flat and bool `env.get_wrapper_attr("action_masks")()` or
    `env.unwrapped.action_masks()` (wrappers of Gymnasium 1 pass no attributes on).

    ## Observation Space
    A `Dict`: `hidden` (B, D) float32, the backbone's hidden state at the first query of each hidden block (zero
    where visible); `entropy` (B,) float32, entropy of that query's prediction, nats; `visible` (B,) int8; `label`;
    `fraction` (1,) float32, revealed share; `action_mask` (B,) int8; with several budgets `budget_mask` (n,) int8;
    with a range of step costs `step_cost` (1,) float32, the episode's own. No hidden token influences any of them.

    ## Rewards
    Nats per image token. Objective "likelihood": U(a|S) = 1/N sum over still hidden blocks of the drop of their
    loss. Objective "context": U(a|S) * (1 - revealed share after the step). Minus `step_cost` / N for every step.
    Mode "generate": 0 until the last step, which returns the whole return in hindsight. An illegal action
    reveals nothing and costs 0.1; with `strict=True` it raises `ValueError`.

    ## Starting State
    Everything hidden; the image (or label) is drawn from (seed, episode). `reset(options={"index": i})` takes
    image i of the data set. If `step_cost` is a range, the episode's cost is drawn from it log-uniformly, from
    (seed, episode) too, or chosen: `options={"step_cost": c}`.

    ## Episode End
    Terminated when all blocks are visible, truncated after 2 * B steps.

    ## Arguments
    - `backbone`: name, path or `Backbone` object ("digits").
    - `data`, `split`: data set by name or a `TokenSet` ("digits", "planner").
    - `mode`: "teacher" or "generate".
    - `budgets`: numbers of blocks that a step may reveal, ascending ((1,)).
    - `objective`: "context" or "likelihood"; `form`: "future_loss" or "charged"; `weight`: "uniform" or "far" with
      `sigma` in blocks; `step_cost` in nats per image, a number or a range (low, high).
    - `sampling`: a `Sampling` for mode "generate".
    - `strict`: raise on illegal actions.
    - `seed`: used by resets without a seed; None draws one that `torch.manual_seed` determines within a process. Forked
      processes draw their own, also for an environment that was made before the fork.
    - `device`: where a backbone given by name runs; None is the CPU. An object stays where it is.
    - `render_mode`: None or "rgb_array": the partial image beside the order as a heat map.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    @isolated_float32
    def __init__(self, render_mode: str | None = None, **arguments: Any) -> None:
        require_render_mode(render_mode)
        self.render_mode = render_mode
        self.core = build_core(1, **arguments)
        budgets, costs = self.core.config.budgets, self.core.config.reward.step_cost_range
        self.observation_space = observation_space(self.core.backbone, budgets, costs)
        self.action_space = action_space(self.core.backbone, budgets)

    @isolated
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: starts the history of episodes again.
            options: "index" chooses the image; "step_cost", if the environment's is a range, what a step costs.
        """
        if seed is not None:
            seed = as_seed(seed)
            self.core.seed(seed)
        super().reset(seed=seed)
        options = options or {}
        self.core.reset(index=options.get("index"), step_cost=options.get("step_cost"))
        return self._seen(False)

    @isolated
    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Reveal the blocks of an action."""
        reward, terminated, truncated, illegal = self.core.step(as_int64("action", action)[None])
        observation, info = self._seen(bool(illegal))
        return observation, float(reward), bool(terminated), bool(truncated), info

    @isolated
    def action_masks(self) -> np.ndarray:
        """Flat bool mask of legal entries: (B,), or (K * B + number of budgets,)."""
        return flat_mask(self.core.observation(), self.core.largest_budget)[0].cpu().numpy()

    @isolated
    def render(self) -> np.ndarray | None:
        """(h, w, 3) uint8: the partial image with hidden blocks grey, beside the order as a heat map."""
        if self.render_mode is None:
            return None
        core = self.core
        return frame(core.data, core.geometry, core.tokens[0], core.visible[0], core.reveal_step[0])

    def _seen(self, illegal: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Observation and info."""
        parts = {key: value[0] for key, value in to_numpy(self.core.observation()).items()}
        parts["label"] = np.int64(parts["label"])
        return parts, {key: parts[key].copy() for key in MASKS if key in parts} | {"illegal": illegal}
