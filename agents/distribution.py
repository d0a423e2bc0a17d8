"""The distribution of actions: a budget, and a ranked list of blocks (Plackett-Luce)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from orderrl.planner import PlannerOutput
from orderrl.runtime.random import drawn_uniform

if TYPE_CHECKING:
    from tensordict import TensorDictBase

_LOWEST = -1e9  # finite, so that gradients of masked entries are zero and not NaN


class RankedBlocks(Distribution):
    """log pi = log p(budget) + Plackett-Luce log-probability of the first k blocks, over legal blocks only.

    The order of the k blocks matters (it changes the prefix); entries past k do not. With budgets == (1,)
    an action is a single block, otherwise a ranked list of K blocks and the index of the budget.

    With `repulsion` the choice is set-aware: a block that stands earlier in the list lowers the logits of those
    that it should not be revealed together with. Zero repulsion is plain Plackett-Luce.

    Args:
        logits: (M, B), block logits.
        action_mask: (M, B) bool, legal blocks.
        budget_logits: (M, n); not read for budgets == (1,).
        budget_mask: (M, n) bool, legal budgets; None is all.
        repulsion: (M, B, B), what block a, once listed, takes from the logit of block b; None is zero.
        entropy_samples: lists drawn for the entropy of places 2..K.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_enumerate_support = False

    def __init__(
        self,
        logits: Tensor,
        action_mask: Tensor,
        budget_logits: Tensor | None = None,
        budget_mask: Tensor | None = None,
        budgets: tuple[int, ...] = (1,),
        repulsion: Tensor | None = None,
        entropy_samples: int = 1,
    ) -> None:
        self.budgets = torch.tensor(budgets, device=logits.device)
        self.multi = tuple(budgets) != (1,)
        self.places = budgets[-1]
        self.repulsion, self.entropy_samples = repulsion, entropy_samples
        # a finished episode has no legal block: any block may be named, nothing depends on it
        self.action_mask = action_mask | ~action_mask.any(-1, keepdim=True)
        self.logits = logits.masked_fill(~self.action_mask, _LOWEST)
        self.legal = self.action_mask.sum(-1)
        if self.multi:
            if budget_logits is None:
                raise ValueError(f"budget_logits must be given for budgets={tuple(budgets)}")
            if budget_mask is not None:
                budget_logits = budget_logits.masked_fill(~budget_mask, _LOWEST)
            self.budget_log_probs = budget_logits.log_softmax(-1)
        event = torch.Size([self.places + 1]) if self.multi else torch.Size()
        super().__init__(batch_shape=logits.shape[:-1], event_shape=event, validate_args=False)

    # ------------------------------------------------------------------ acting

    def _without(self, logits: Tensor, block: Tensor) -> Tensor:
        """Logits (..., B) of the next place once a block (..., 1) is listed."""
        if self.repulsion is not None:
            rows = self.repulsion.expand(*logits.shape, -1)
            index = block[..., None].expand(*block.shape, logits.shape[-1])
            logits = logits - rows.gather(-2, index)[..., 0, :]
        return logits.scatter(-1, block, _LOWEST)

    def _rank(self, shape: torch.Size, noise: Callable[[Tensor], Tensor]) -> Tensor:
        """The block of every place in turn, the largest logit plus noise: (*shape, places)."""
        logits = self.logits.expand(*shape, -1)
        ranked = []
        for _ in range(self.places):
            ranked.append((logits + noise(logits)).argmax(-1, keepdim=True))
            logits = self._without(logits, ranked[-1])
        return torch.cat(ranked, dim=-1)

    def _action(self, shape: torch.Size, noise: Callable[[Tensor], Tensor]) -> Tensor:
        ranked = self._rank(shape, noise)
        if not self.multi:
            return ranked[..., 0]
        budget_log_probs = self.budget_log_probs.expand(*shape, -1)
        budget = (budget_log_probs + noise(budget_log_probs)).argmax(-1, keepdim=True)
        return torch.cat([ranked, budget], dim=-1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Gumbel-max for every place and for the budget; int64. The generator is one of the CPU; None is PyTorch's."""
        shape = torch.Size(sample_shape) + self.logits.shape[:-1]
        return self._action(shape, lambda logits: _gumbel(logits, generator))

    @property
    def mode(self) -> Tensor:
        """Blocks by descending logit, place by place, and the most likely budget."""
        return self._action(self.logits.shape[:-1], torch.zeros_like)

    @property
    def deterministic_sample(self) -> Tensor:
        """TorchRL's name for the deterministic action."""
        return self.mode

    # ------------------------------------------------------------------ probabilities

    def _place_log_probs(self, ranked: Tensor, places: int) -> tuple[Tensor, Tensor]:
        """Of each place: log-probability of its block and entropy of its choice, both (..., places)."""
        logits = self.logits.expand(*ranked.shape[:-1], -1)
        chosen, entropies = [], []
        for place in range(places):
            log_probs = logits.log_softmax(-1)
            block = ranked[..., place : place + 1]
            chosen.append(log_probs.gather(-1, block)[..., 0])
            entropies.append(-(log_probs.exp() * log_probs.clamp_min(-1e4)).sum(-1))
            logits = self._without(logits, block)
        return torch.stack(chosen, -1), torch.stack(entropies, -1)

    def log_prob(self, action: Tensor) -> Tensor:
        """(..., M) log-probability of actions, sampled ones too; -1e9 or lower for illegal blocks or budgets."""
        if not self.multi:
            log_probs = self.logits.log_softmax(-1)
            shape = torch.broadcast_shapes(action.shape, log_probs.shape[:-1])
            return log_probs.expand(*shape, -1).gather(-1, action.expand(shape)[..., None])[..., 0]
        ranked, budget = action[..., :-1], action[..., -1:]
        count = torch.minimum(self.budgets[budget[..., 0]], self.legal)
        chosen, _ = self._place_log_probs(ranked, self.places)
        counted = torch.arange(self.places, device=ranked.device) < count[..., None]
        blocks = torch.where(counted, chosen, 0.0).sum(-1)
        return blocks + self.budget_log_probs.expand(*budget.shape[:-1], -1).gather(-1, budget)[..., 0]

    def entropy(self) -> Tensor:
        """(M,) entropy in nats.

        Budget and first place are exact. A later place is the mean, over drawn lists, of the exact entropy
        of its choice given the blocks before it; a score-function term that is zero in value makes the
        gradient unbiased too. (A sampled -log pi has the right value and no gradient.)
        """
        if not self.multi:
            return _categorical_entropy(self.logits.log_softmax(-1))
        budget_probs = self.budget_log_probs.exp()
        total = _categorical_entropy(self.budget_log_probs)
        ranked = self.sample((self.entropy_samples,))[..., :-1]
        chosen, entropies = self._place_log_probs(ranked, self.places)
        before = chosen.cumsum(-1) - chosen  # log-probability of the places before each
        unbiased = entropies + entropies.detach() * (before - before.detach())
        for place in range(self.places):
            reaches = (torch.minimum(self.budgets, self.legal[..., None]) > place).float()
            total = total + (budget_probs * reaches).sum(-1) * unbiased[..., place].mean(0)
        return total


def planner_actions(output: PlannerOutput, observation: TensorDictBase, budgets: tuple[int, ...]) -> RankedBlocks:
    """A planner's actions in the states that it was asked about; the observation, batch (M,), gives the masks."""
    masks = observation["action_mask"], observation.get("budget_mask", None)
    return RankedBlocks(output.logits, masks[0], output.budget_logits, masks[1], budgets, output.repulsion)


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    uniform = drawn_uniform(like.shape, generator, like.device, torch.float64).clamp_min(1e-300)
    return -(-uniform.log()).log().to(like.dtype)


def _categorical_entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs.clamp_min(-1e4)).sum(-1)
