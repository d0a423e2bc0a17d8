"""Orders by the model's own confidence: the rule of OAR (Rigo et al., 2025, arXiv:2504.17069) and its hindsight form.

Next is the hidden block of which the model is most confident, less what a long way from the last block costs:

    argmax over hidden b of  c_b(S) - distance * d(b, last)                      d: Euclidean, between centres in blocks

`Confidence` is a function of the visible tokens alone, as an order must be whose code length is one. The hindsight form
reads the tokens that it ranks: such an order carries information about them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orderrl.agents.policies import ReferencePolicy
from orderrl.agents.schedules import Schedule
from orderrl.backbones.protocol import Backbone
from orderrl.envs.core import NextBlockCore

_PART = re.compile(r"(highest)|(first)|near([0-9]{1,30}\.?[0-9]{0,30}|\.[0-9]{1,30})")
_PARTS = "highest, first and nearLAMBDA, joined by +, such as confidence:highest+near0.1"


@dataclass(frozen=True)
class ConfidenceRule:
    """What confidence is, as names have it: "" or "highest+first+near0.1".

    Attributes:
        highest: take the log-probability of the most likely token; False takes the expected log-probability, which is
            minus the entropy.
        first: look at the block's first token alone; False takes the mean over its tokens along its most likely chain.
        distance: nats per token that a block between the last block and the next one costs; OAR's lambda.
    """

    highest: bool = False
    first: bool = False
    distance: float = 0.0

    @classmethod
    def parse(cls, text: str) -> ConfidenceRule:
        """Read what stands behind the colon of a name; ValueError if it is no rule."""
        rule: dict[str, Any] = {}
        for part in text.split("+") if text else ():
            found = _PART.fullmatch(part)
            if found is None:
                raise ValueError(f"{part!r} is no part of a rule of confidence; write {_PARTS}")
            highest, first, near = found.groups()
            rule |= {"highest": True} if highest else {"first": True} if first else {"distance": float(near)}
        return cls(**rule)

    def require(self, backbone: Backbone, name: str) -> None:
        """Refuse, by the policy's name, a backbone that cannot say what the rule asks for."""
        if self.first and not self.highest:
            return  # the entropy, which every backbone gives
        if not backbone.vocab_size or not hasattr(backbone, "certainty"):
            raise ValueError(
                f"policy {name!r} needs token probabilities, which a backbone of type {type(backbone).__name__} does "
                "not give; use confidence:first, which reads its entropy"
            )


class Confidence(ReferencePolicy):
    """OAR: reveal the block of which the model is most confident, given what is visible."""

    def __init__(
        self,
        budgets: tuple[int, ...] = (1,),
        schedule: Schedule | None = None,
        rule: ConfidenceRule = ConfidenceRule(),
    ) -> None:
        super().__init__(budgets, schedule)
        self.rule = rule

    def scores(self, core: NextBlockCore, rows: Tensor, hidden: Tensor) -> Tensor:
        return ranked(core, rows, hidden, self._confidence(core, rows, hidden), self.rule.distance)

    def _confidence(self, core: NextBlockCore, rows: Tensor, hidden: Tensor) -> Tensor:
        """Log-probabilities (m, C), nats per token."""
        if self.rule.first and not self.rule.highest:
            return -core.entropy[rows].gather(1, hidden)
        certainty: Any = core.backbone
        expected, highest = certainty.certainty(core.prefix.select(rows), hidden, self.rule.first)
        return highest if self.rule.highest else expected


class HindsightConfidence(ReferencePolicy):
    """Reveal the block whose own tokens the model finds most likely: in teacher mode the true ones.

    In mode "generate" every hidden block is drawn, and the best draw is kept: its numbers are keyed, so that the block
    which the environment then draws is the one that was ranked. For study alone: the order carries information about
    the tokens, so its code length is none, and of several draws the likeliest favours tokens that are easy.
    """

    def __init__(
        self, budgets: tuple[int, ...] = (1,), schedule: Schedule | None = None, distance: float = 0.0
    ) -> None:
        super().__init__(budgets, schedule)
        self.distance = distance

    def scores(self, core: NextBlockCore, rows: Tensor, hidden: Tensor) -> Tensor:
        tokens = core.tokens[rows]
        if core.config.mode == "generate":
            tokens = core.geometry.write(tokens, hidden, core.propose(rows, hidden))
        losses, _ = core.backbone.context_loss(core.prefix.select(rows), tokens, hidden)
        return ranked(core, rows, hidden, -losses.loss / core.geometry.tokens_per_block, self.distance)


def ranked(core: NextBlockCore, rows: Tensor, hidden: Tensor, confidence: Tensor, distance: float) -> Tensor:
    """Scores (m, B) of hidden blocks (m, C): their confidence (m, C), less the way from the last revealed block."""
    if distance:
        last = core.reveal_moment[rows].argmax(1)
        way = core.geometry.distances.to(core.device)[last].gather(1, hidden)
        confidence = confidence - distance * way * core.visible[rows].any(1, keepdim=True)
    return torch.zeros_like(core.entropy[rows]).scatter(1, hidden, confidence.float())
