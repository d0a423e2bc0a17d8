"""The vectorised Gymnasium environment: one batched core, no processes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from orderrl.envs.build import build_core, require_render_mode
from orderrl.envs.observation import MASKS
from orderrl.envs.render import frame
from orderrl.envs.spaces import action_space, flat_mask, observation_space, to_numpy
from orderrl.runtime.integers import as_int64, as_seed
from orderrl.runtime.isolation import isolated, isolated_float32


class NextBlockVectorEnv(VectorEnv[dict[str, Any], Any, np.ndarray]):
    """M environments in one batch; description, spaces and rewards as in `NextBlockEnv`.

    Sub-environment i of seed s behaves like a single environment of seed s + i.

    Args:
        num_envs: M.
        autoreset_mode: NEXT_STEP (default), SAME_STEP or DISABLED, as a value or its name.
        render_mode: None or "rgb_array".
        arguments: as for `NextBlockEnv`.
    """

    metadata: dict[str, Any] = {
        "render_modes": ["rgb_array"],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    @isolated_float32
    def __init__(
        self,
        num_envs: int = 1,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        **arguments: Any,
    ) -> None:
        require_render_mode(render_mode)
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = render_mode
        self.num_envs = num_envs
        self.core = build_core(num_envs, **arguments)
        budgets, costs = self.core.config.budgets, self.core.config.reward.step_cost_range
        self.single_observation_space = observation_space(self.core.backbone, budgets, costs)
        self.single_action_space = action_space(self.core.backbone, budgets)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._done = torch.zeros(num_envs, dtype=torch.bool)

    @isolated
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Begin episodes.

        Args:
            seed: s seeds sub-environment i with s + i; of a sequence, None leaves a sub-environment's history alone.
            options: "reset_mask" (M,) bool chooses sub-environments, which alone are seeded and begin anew; "index"
                chooses the images of those that begin, "step_cost" of a range what a step costs them, one for all or
                one for each.
        """
        options = options or {}
        rows = self._rows(options.get("reset_mask"))
        self._seed(seed, rows)
        super().reset(seed=int(seed) if isinstance(seed, int | np.integer) else None)
        self.core.reset(rows, options.get("index"), step_cost=options.get("step_cost"))
        self._done[rows] = False
        begun = np.zeros(self.num_envs, dtype=bool)
        begun[rows.numpy()] = True
        observation = to_numpy(self.core.observation())
        return observation, self._info(observation, torch.zeros(self.num_envs, dtype=torch.bool), begun)

    def _rows(self, mask: Any) -> torch.Tensor:
        """Sub-environments of a reset mask; all without one."""
        if mask is None:
            return torch.arange(self.num_envs)
        mask = np.asarray(mask)
        if mask.dtype != np.bool_ or mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"reset_mask must be bool of shape ({self.num_envs},) with at least one True, got {mask.tolist()}"
            )
        return torch.from_numpy(np.flatnonzero(mask))

    def _seed(self, seed: int | Sequence[int | None] | None, rows: torch.Tensor) -> None:
        """Start the histories of those sub-environments again that are given a seed."""
        if seed is None:
            return
        if isinstance(seed, np.ndarray):
            seed = seed.tolist()  # a list, or a single number
        if isinstance(seed, str) or not isinstance(seed, Sequence):
            self.core.seed(as_seed(seed), rows)
            return
        if len(seed) != self.num_envs:
            raise ValueError(f"seed must be one number or {self.num_envs}, got {len(seed)}")
        for row in rows.tolist():
            if seed[row] is not None:
                self.core.seed(torch.tensor([as_seed(seed[row])]), torch.tensor([row]))

    @isolated
    def step(self, actions: Any) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Reveal the blocks of every action; finished episodes begin anew as `autoreset_mode` says."""
        next_step = self.autoreset_mode is AutoresetMode.NEXT_STEP
        if self.autoreset_mode is AutoresetMode.DISABLED and self._done.any():
            raise ValueError(
                f"sub-environments {self._done.nonzero().flatten().tolist()} are finished; with autoreset_mode="
                "DISABLED call reset(options={'reset_mask': ...}) first"
            )
        restart = self._done.clone() if next_step else None
        reward, terminated, truncated, illegal = self.core.step(as_int64("action", actions), restart)
        self._done = (terminated | truncated).cpu()
        info: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP and self._done.any():
            info = self._final(to_numpy(self.core.observation()), illegal)
            self.core.reset(self._done.nonzero().flatten())
            illegal = illegal & ~self._done.to(illegal.device)  # what stands beside a new start is a reset's info
        observation = to_numpy(self.core.observation())
        info = self._info(observation, illegal) | info
        return observation, reward.double().cpu().numpy(), terminated.cpu().numpy(), truncated.cpu().numpy(), info

    def _final(self, observation: dict[str, np.ndarray], illegal: torch.Tensor) -> dict[str, Any]:
        """Last observations and infos of finished episodes, as Gymnasium's SAME_STEP convention has them."""
        finished = self._done.numpy()
        final = np.full(self.num_envs, None, dtype=object)
        for row in np.flatnonzero(finished):
            final[row] = {key: value[row] for key, value in observation.items()}
        return {
            "final_obs": final,
            "_final_obs": finished.copy(),
            "final_info": self._info(observation, illegal, finished),
            "_final_info": finished.copy(),
        }

    @isolated
    def action_masks(self) -> np.ndarray:
        """Flat bool masks of legal entries: (M, B), or (M, K * B + number of budgets)."""
        return flat_mask(self.core.observation(), self.core.largest_budget).cpu().numpy()

    @isolated
    def render(self) -> tuple[np.ndarray, ...] | None:
        """One frame for every sub-environment, as in `NextBlockEnv.render`."""
        if self.render_mode is None:
            return None
        core = self.core
        return tuple(
            frame(core.data, core.geometry, core.tokens[i], core.visible[i], core.reveal_step[i])
            for i in range(self.num_envs)
        )

    def _info(
        self, observation: dict[str, np.ndarray], illegal: torch.Tensor, rows: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Infos of some sub-environments, (M,) bool; the others' are zero, as Gymnasium has them."""
        present = np.ones(self.num_envs, dtype=bool) if rows is None else rows
        info: dict[str, Any] = {"illegal": illegal.cpu().numpy().copy()}
        info |= {key: observation[key].copy() for key in MASKS if key in observation}
        for key, value in list(info.items()):
            value[~present] = 0
            info[f"_{key}"] = present.copy()
        return info


def _autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    if isinstance(mode, AutoresetMode):
        return mode
    by_name = {m.name: m for m in AutoresetMode} | {m.value: m for m in AutoresetMode}
    if mode not in by_name:
        allowed = ", ".join(m.name for m in AutoresetMode)
        raise ValueError(f"autoreset_mode={mode!r} is unknown; choose one of {allowed}")
    return by_name[mode]
