"""Policies of specialists, backbones that were fine-tuned on the orders of a policy.

A planner reads hidden states of the backbone that it was trained with, and fine-tuning moves them: `ThroughStart` lets
it see an image through that backbone, while the specialist draws. `Native` needs no planner: a head of the specialist
itself says which block comes next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orderrl.agents.policies import Policy, ReferencePolicy, Scorer, take_attributes
from orderrl.backbones import load_backbone
from orderrl.backbones.protocol import Backbone, backbone_device
from orderrl.backbones.registry import BACKBONES, backbone_fingerprint
from orderrl.envs.core import NextBlockCore
from orderrl.envs.observation import observed
from orderrl.runtime.hub import START

if TYPE_CHECKING:
    from tensordict import TensorDict


class ThroughStart(ReferencePolicy):
    """A policy that sees images through another backbone than the one that draws them.

    Args:
        policy: acts on the other backbone's hidden states and entropies.
        reader: that backbone, frozen.
        scorer: the policy's block scores.
    """

    def __init__(self, policy: Policy, reader: Backbone, budgets: tuple[int, ...], scorer: Scorer | None) -> None:
        super().__init__(budgets)
        self.policy, self.reader, self.scorer = policy, reader, scorer
        take_attributes(self, policy, True)

    def act(self, core: NextBlockCore) -> Tensor:
        return self.policy(self.observation(core), torch.Generator())

    def scores(self, core: NextBlockCore, rows: Tensor, hidden: Tensor) -> Tensor:
        if self.scorer is None:
            return super().scores(core, rows, hidden)
        return self.scorer(self.observation(core)[rows], torch.Generator())

    @torch.no_grad()
    def observation(self, core: NextBlockCore) -> TensorDict:
        """What the core would show if its backbone were the reader: batch (M,)."""
        blocks, visible = core.geometry.num_blocks, core.visible
        # what is visible, in the order in which it was revealed
        moment = core.reveal_moment.masked_fill(~visible, blocks**3)
        count = visible.sum(1)
        shown = moment.argsort(1)[:, : max(1, int(count.max()))]
        prefix = self.reader.extend(self.reader.start(core.labels), core.tokens, shown, count)
        # and its hidden states of what is not
        every = torch.arange(blocks, device=core.device).expand_as(visible)
        hidden, entropy = self.reader.observe(prefix, every)
        entropy = entropy.masked_fill(visible, 0.0)
        if not getattr(self.policy, "reads_visible_states", False):
            hidden = hidden.masked_fill(visible[..., None], 0.0)
        mask = core.budget_mask() if core.multi else None
        return observed(hidden, entropy, visible, core.labels, mask, core.step_cost)


def open_start(backbone: Backbone, fingerprint: str) -> Backbone | None:
    """The backbone that a specialist was fine-tuned from, if that has the fingerprint of a planner's; else None.

    ValueError if it is no longer there, or another backbone is in its place.
    """
    origin = getattr(backbone, "origin", None)
    if origin is None or origin.start is None or origin.start_fingerprint != fingerprint:
        return None
    where = f"specialist {origin.label!r} of {origin.folder}"
    if refusal := BACKBONES.refusal(origin.start):
        raise ValueError(f"{where}: the checkpoint {refusal}")
    name = origin.folder / START if origin.start == START else origin.start
    try:
        start = load_backbone(name, device=backbone_device(backbone))
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: its planner reads the backbone that it was fine-tuned from: {error}") from error
    if backbone_fingerprint(start) != fingerprint:
        raise ValueError(
            f"{where}: its planner reads the backbone that it was fine-tuned from, {str(name)!r}, and there is "
            "another backbone under this name now; bring the former one back"
        )
    return start


class Native(ReferencePolicy):
    """The order that the backbone's own position head says, without looking at every hidden block."""

    reads_content = False

    def scores(self, core: NextBlockCore, rows: Tensor, hidden: Tensor) -> Tensor:
        model: Any = core.backbone
        last = torch.where(core.visible[rows].any(1), core.reveal_moment[rows].argmax(1), -1)
        return model.next_block(core.prefix.select(rows), core.tokens[rows], core.labels[rows], last)


def require_head(backbone: Backbone) -> None:
    """Refuse policy=native for a backbone without a position head, naming the setting that gives it one."""
    if not getattr(getattr(backbone, "config", None), "position_head", False):
        raise ValueError(
            "policy 'native' is what a backbone's position head says, and this backbone has none; train one with "
            "`python -m orderrl.pretrain backbone.model.position_head=true training.order=...`"
        )
