"""The TorchRL environment: tensors stay on the backbone's device."""

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, Composite, MultiCategorical, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from orderrl.envs.build import build_core
from orderrl.envs.core import NextBlockCore
from orderrl.envs.spaces import entropy_bounds, hidden_bound
from orderrl.runtime.isolation import isolated, isolated_float32


class NextBlockTorchRLEnv(EnvBase):
    """M environments as one batched TorchRL `EnvBase`; description and rewards as in `NextBlockEnv`.

    Observation keys are those of the core: hidden, entropy, visible, label, fraction, action_mask and, with
    several budgets, budget_mask (masks are bool), with a range of step costs step_cost. `illegal` says whether the
    last step was void.

    Args:
        num_envs: M.
        privileged: add the key `context_loss` (M, B) float32, nats: the losses of hidden blocks, which
            depend on hidden tokens. For a critic in training only; it stands in no Gymnasium space.
        core: an existing core to wrap instead of building one from `arguments`.
        arguments: as for `NextBlockEnv`.
    """

    batch_locked = True

    @isolated_float32
    def __init__(
        self, num_envs: int = 1, privileged: bool = False, core: NextBlockCore | None = None, **arguments: Any
    ) -> None:
        self.core = build_core(num_envs, **arguments) if core is None else core
        super().__init__(device=self.core.device, batch_size=[self.core.num_envs])
        self.privileged = privileged
        if privileged and not self.core._context_losses:
            raise ValueError("privileged=True needs context losses: use mode='teacher' and form='future_loss'")
        self._make_specs()

    def _make_specs(self) -> None:
        core, m, b = self.core, self.core.num_envs, self.core.geometry.num_blocks
        bound = torch.from_numpy(hidden_bound(core.backbone)).expand(m, b, -1)
        specs: dict[str, TensorSpec] = {
            "hidden": Bounded(-bound, bound, dtype=torch.float32),
            "entropy": Bounded(*entropy_bounds(core.backbone), (m, b), dtype=torch.float32),
            "visible": Binary(b, (m, b), dtype=torch.bool),
            "label": Categorical(core.backbone.num_classes, (m,)),
            "fraction": Bounded(0.0, 1.0, (m, 1), dtype=torch.float32),
            "action_mask": Binary(b, (m, b), dtype=torch.bool),
            "illegal": Binary(1, (m, 1), dtype=torch.bool),
        }
        if core.multi:
            n = len(core.config.budgets)
            specs["budget_mask"] = Binary(n, (m, n), dtype=torch.bool)
        if (costs := core.config.reward.step_cost_range) is not None:
            specs["step_cost"] = Bounded(*costs, (m, 1), dtype=torch.float32)
        if self.privileged:
            specs["context_loss"] = Unbounded((m, b), dtype=torch.float32)
        action: TensorSpec = Categorical(b, (m,))
        if core.multi:
            places = [b] * core.largest_budget + [len(core.config.budgets)]
            action = MultiCategorical(places, (m, len(places)))
        done = {key: Binary(1, (m, 1), dtype=torch.bool) for key in ("done", "terminated", "truncated")}
        # a Composite on a device refuses members that were made on another: all are made on the CPU and moved
        self.observation_spec = Composite(specs, shape=(m,)).to(core.device)
        self.action_spec = action.to(core.device)
        self.reward_spec = Unbounded((m, 1), dtype=torch.float32).to(core.device)
        self.done_spec = Composite(done, shape=(m,)).to(core.device)

    def _observe(self, illegal: Tensor) -> dict[str, Tensor]:
        parts = dict(self.core.observation().items())
        parts["illegal"] = illegal[:, None]
        if self.privileged:
            parts["context_loss"] = self.core.losses.clone()
        return parts

    @isolated
    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        rows = None
        if tensordict is not None and "_reset" in tensordict:
            rows = tensordict["_reset"].flatten().nonzero().flatten()
        self.core.reset(rows, kwargs.get("index"), step_cost=kwargs.get("step_cost"))
        falsehood = torch.zeros(self.core.num_envs, dtype=torch.bool, device=self.device)
        done = {key: falsehood[:, None].clone() for key in ("done", "terminated", "truncated")}
        return TensorDict(self._observe(falsehood) | done, batch_size=self.batch_size, device=self.device)

    @isolated
    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        reward, terminated, truncated, illegal = self.core.step(tensordict["action"])
        parts = self._observe(illegal) | {
            "reward": reward[:, None],
            "terminated": terminated[:, None],
            "truncated": truncated[:, None],
            "done": (terminated | truncated)[:, None],
        }
        return TensorDict(parts, batch_size=self.batch_size, device=self.device)

    @isolated
    def _set_seed(self, seed: int | None) -> None:
        self.core.seed(seed)
