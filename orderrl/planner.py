"""The latent planner ("OrderHead"): scores hidden blocks, chooses a budget, estimates the return.

Notable:
- Block tokens are the projected observation plus a learned position; a stem of timm blocks reads them.
- Latent reasoning: R passes of one weight-shared core over the block tokens and a few scratchpad latents,
  carried from pass to pass and never decoded (Chain of Continuous Thought, Hao et al., 2024). R = 0 is the
  one-shot planner; the same weights run with any R.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from orderrl.backbones.protocol import Backbone, backbone_device
from orderrl.checkpoint import load_checkpoint, load_state, save_checkpoint


@dataclass(frozen=True)
class PlannerConfig:
    """Shape of an `OrderHead`.

    Attributes:
        num_blocks: B.
        hidden_size: D, width of the backbone's hidden states.
        num_classes: class labels.
        num_budgets: budgets to choose from.
        dim: width.
        stem: timm blocks before the core.
        core: timm blocks of the weight-shared core.
        heads: attention heads.
        latents: scratchpad latents.
        reasoning_steps: R, passes of the core.
        content: read hidden states and entropies; without, the planner sees positions and masks alone.
        privileged: also read context losses (a critic in training).
        dropout: dropout rate in the blocks.
    """

    num_blocks: int
    hidden_size: int
    num_classes: int
    num_budgets: int = 1
    dim: int = 64
    stem: int = 2
    core: int = 1
    heads: int = 4
    latents: int = 4
    reasoning_steps: int = 0
    content: bool = True
    privileged: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_blocks", "hidden_size", "num_classes", "num_budgets", "dim", "core", "heads", "latents"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("stem", "reasoning_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"heads={self.heads} must divide dim={self.dim}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")

    @classmethod
    def for_backbone(cls, backbone: Backbone, **shape: Any) -> PlannerConfig:
        """The config that fits a backbone."""
        return cls(backbone.geometry.num_blocks, backbone.hidden_size, backbone.num_classes, **shape)


class OrderHead(nn.Module):
    """Planner over block tokens; reads an observation TensorDict, batch (M,).

    Args:
        config: its shape.
    """

    def __init__(self, config: PlannerConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.project_hidden = nn.Sequential(nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, dim))
        self.project_scalars = nn.Linear(3, dim)  # entropy, visible, fraction
        self.project_losses = nn.Linear(1, dim) if config.privileged else None
        self.position = nn.Parameter(0.02 * torch.randn(config.num_blocks, dim))
        self.label = nn.Embedding(config.num_classes, dim)
        self.scratchpad = nn.Parameter(0.02 * torch.randn(config.latents, dim))
        self.stem = nn.Sequential(*self._blocks(config.stem))
        self.core = nn.Sequential(*self._blocks(config.core))
        self.norm = nn.LayerNorm(dim)
        self.score_head = nn.Linear(dim, 1)
        self.budget_head = nn.Linear(dim, config.num_budgets)
        self.value_head = nn.Linear(dim, 1)
        for head in (self.score_head, self.budget_head, self.value_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        nn.init.normal_(self.label.weight, std=0.02)
        # what a listed block takes from the others' logits in the same step; planners of one block a step leave it zero
        self.repulsion = nn.Parameter(torch.zeros(config.num_blocks, config.num_blocks))
        self.sharpness = nn.Parameter(torch.zeros(()))  # log of the factor from scores to policy logits

    def _blocks(self, depth: int) -> list[nn.Module]:
        c = self.config
        return [Block(c.dim, c.heads, mlp_ratio=2.0, qkv_bias=True, proj_drop=c.dropout) for _ in range(depth)]

    def encode(self, observation: TensorDictBase, reasoning_steps: int | None = None) -> Tensor:
        """Block tokens after R passes: (M, B, dim)."""
        visible = observation["visible"].float()
        content = float(self.config.content)
        fraction = observation["fraction"].expand_as(visible)
        scalars = torch.stack([content * observation["entropy"], visible, fraction], dim=-1)
        x = self.project_scalars(scalars) + self.position + self.label(observation["label"])[:, None]
        if self.config.content:
            x = x + self.project_hidden(observation["hidden"])
        if self.project_losses is not None:
            x = x + self.project_losses(observation["context_loss"][..., None])
        x = self.stem(x)
        steps = self.config.reasoning_steps if reasoning_steps is None else reasoning_steps
        latents = self.scratchpad.expand(len(x), -1, -1)
        for _ in range(steps):
            both = self.core(torch.cat([x, latents], dim=1))
            x, latents = both[:, : self.config.num_blocks], both[:, self.config.num_blocks :]
        return self.norm(x)

    def forward(self, observation: TensorDictBase, reasoning_steps: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Block scores (M, B), budget logits (M, num_budgets), value (M, 1).

        Args:
            observation: keys as in the environment, batch (M,).
            reasoning_steps: R; None takes the config's.
        """
        x = self.encode(observation, reasoning_steps)
        pooled = x.mean(1)
        return self.score_head(x)[..., 0], self.budget_head(pooled), self.value_head(pooled)

    def block_logits(self, scores: Tensor) -> Tensor:
        """Policy logits of block scores: scaled by the learned sharpness."""
        return scores * self.sharpness.exp()

    def with_budgets(self, num_budgets: int) -> OrderHead:
        """A copy with another number of budgets; the budget head starts anew (uniform) if it changes."""
        other = OrderHead(replace(self.config, num_budgets=num_budgets)).train(self.training)
        same = num_budgets == self.config.num_budgets
        kept = {k: v for k, v in self.state_dict().items() if same or not k.startswith("budget_head.")}
        other.load_state_dict(kept, strict=same)
        return other.to(self.position.device)


def save_planner(path: Path, planner: OrderHead, description: dict[str, Any]) -> None:
    """Write a planner as safetensors with its config and a description (agent, budgets, backbone, data)."""
    tensors = {key: value.detach().cpu() for key, value in planner.state_dict().items()}
    save_checkpoint(path, tensors, {**description, "kind": "planner", "shape": asdict(planner.config)})


def load_planner(path: Path | str, backbone: Backbone | None = None) -> tuple[OrderHead, dict[str, Any]]:
    """Read a planner and its description.

    Raises:
        ValueError: if the file is no planner, its shape is none of this version's or does not fit the backbone.
    """
    tensors, description = load_checkpoint(Path(path), "planner")
    try:
        config = PlannerConfig(**description["shape"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its planner shape is none of this version's ({error}); train it anew") from error
    if backbone is not None:
        fitting = PlannerConfig.for_backbone(backbone)
        for name in ("num_blocks", "hidden_size", "num_classes"):
            have, want = getattr(config, name), getattr(fitting, name)
            if have != want:
                raise ValueError(
                    f"{path}: planner with {name}={have} does not fit the backbone's {name}={want}; train one for this "
                    "backbone with `python -m orderrl.train agent=bc`"
                )
    planner = OrderHead(config)
    load_state(planner, tensors, Path(path))
    if backbone is not None:
        planner.to(backbone_device(backbone))
    return planner.eval(), description
