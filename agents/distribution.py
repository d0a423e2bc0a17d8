"""The distribution of actions: a budget, and a ranked list of blocks (Plackett-Luce)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

_LOWEST = -1e9  # finite, so that gradients of masked entries are zero and not NaN


class RankedBlocks(Distribution):
    """log pi = log p(budget) + Plackett-Luce log-probability of the first k blocks, over legal blocks only.

    The order of the k blocks matters (it changes the prefix); entries past k do not. With budgets == (1,)
    an action is a single block, otherwise a ranked list of K blocks and the index of the budget.

    Args:
        logits: (M, B), block logits.
        action_mask: (M, B) bool, legal blocks.
        budget_logits: (M, n); not read for budgets == (1,).
        budget_mask: (M, n) bool, legal budgets; None is all.
        budgets: numbers of blocks, ascending.
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
        entropy_samples: int = 1,
    ) -> None:
        self.budgets = torch.tensor(budgets, device=logits.device)
        self.multi = tuple(budgets) != (1,)
        self.places = budgets[-1]
        self.entropy_samples = entropy_samples
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

    def _action(self, keys: Tensor, budget: Tensor | None) -> Tensor:
        if not self.multi:
            return keys.argmax(-1)
        ranked = keys.topk(self.places, dim=-1).indices
        assert budget is not None
        return torch.cat([ranked, budget[..., None]], dim=-1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = (), generator: torch.Generator | None = None) -> Tensor:
        """Gumbel top-k for the blocks (Kool et al., 2019), categorical for the budget; int64."""
        shape = torch.Size(sample_shape) + self.logits.shape
        keys = self.logits + _gumbel(shape, self.logits, generator)
        if not self.multi:
            return self._action(keys, None)
        noise = _gumbel(torch.Size(sample_shape) + self.budget_log_probs.shape, self.logits, generator)
        return self._action(keys, (self.budget_log_probs + noise).argmax(-1))

    @property
    def mode(self) -> Tensor:
        """Blocks by descending logit, the most likely budget."""
        return self._action(self.logits, self.budget_log_probs.argmax(-1) if self.multi else None)

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
            logits = logits.scatter(-1, block, _LOWEST)
        return torch.stack(chosen, -1), torch.stack(entropies, -1)

    def log_prob(self, action: Tensor) -> Tensor:
        """(M,) log-probability of actions; -1e9 or lower for illegal blocks or budgets."""
        if not self.multi:
            return self.logits.log_softmax(-1).gather(-1, action[..., None])[..., 0]
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


def _gumbel(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    uniform = torch.rand(shape, generator=generator, device=like.device, dtype=torch.float64).clamp_min(1e-300)
    return -(-uniform.log()).log().to(like.dtype)


def _categorical_entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs.clamp_min(-1e4)).sum(-1)
