"""RankedBlocks against the list of all its actions."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from orderrl.agents.distribution import RankedBlocks

BUDGETS = [(1,), (2,), (1, 2), (1, 2, 4)]
MASKS = {
    "all": [True, True, True, True, True],
    "some": [True, False, True, True, False],
    "two": [False, True, False, True, False],
    "one": [False, False, False, True, False],
}


def make(
    budgets: tuple[int, ...], mask: str, rows: int = 1, entropy_samples: int = 1, leaf: bool = False
) -> tuple[RankedBlocks, Tensor, Tensor]:
    """A distribution over five blocks, float64, with its block and budget logits."""
    generator = torch.Generator().manual_seed(1)
    logits = 1.5 * torch.randn(5, generator=generator, dtype=torch.float64)
    budget_logits = torch.randn(len(budgets), generator=generator, dtype=torch.float64)
    logits, budget_logits = logits.requires_grad_(leaf), budget_logits.requires_grad_(leaf)
    legal = torch.tensor(MASKS[mask]).expand(rows, -1)
    budget_mask = torch.tensor(budgets) <= legal.sum(-1, keepdim=True)
    budget_mask[:, 0] = True
    distribution = RankedBlocks(
        logits.expand(rows, -1), legal, budget_logits.expand(rows, -1), budget_mask, budgets, entropy_samples
    )
    return distribution, logits, budget_logits


def all_actions(budgets: tuple[int, ...], mask: str) -> Tensor:
    """Every distinct action; entries past k are zeros, which are illegal in some masks and must not matter."""
    legal = [block for block, allowed in enumerate(MASKS[mask]) if allowed]
    if budgets == (1,):
        return torch.tensor(legal)
    actions = []
    for place, budget in enumerate(budgets):
        if budget > len(legal) and place > 0:
            continue
        for chosen in permutations(legal, min(budget, len(legal))):
            actions.append([*chosen, *[0] * (budgets[-1] - len(chosen)), place])
    return torch.tensor(actions)


def key(action: Tensor, budgets: tuple[int, ...], mask: str) -> tuple[int, ...]:
    """What of an action counts."""
    if budgets == (1,):
        return (int(action),)
    *blocks, place = action.tolist()
    return (*blocks[: min(budgets[place], sum(MASKS[mask]))], -place)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("budgets", BUDGETS)
def test_probabilities_of_all_actions_sum_to_one(budgets: tuple[int, ...], mask: str) -> None:
    distribution, _, _ = make(budgets, mask)
    probabilities = distribution.log_prob(all_actions(budgets, mask)).exp()
    assert (probabilities > 0).all()
    assert torch.allclose(probabilities.sum(), torch.ones((), dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("mask", ["all", "some"])
def test_log_prob_is_budget_plus_plackett_luce(mask: str) -> None:
    distribution, logits, budget_logits = make((1, 2, 4), mask)
    weights = logits.exp() * torch.tensor(MASKS[mask])
    place_probs = budget_logits.exp() * torch.tensor([k <= sum(MASKS[mask]) for k in (1, 2, 4)])
    for action in all_actions((1, 2, 4), mask):
        *blocks, place = action.tolist()
        probability, left = place_probs[place] / place_probs.sum(), weights.clone()
        for block in blocks[: (1, 2, 4)[place]]:
            probability = probability * left[block] / left.sum()
            left[block] = 0
        assert torch.allclose(distribution.log_prob(action[None]).exp(), probability, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("budgets", BUDGETS)
def test_entries_past_the_budget_are_ignored(budgets: tuple[int, ...], mask: str) -> None:
    if budgets == (1,):
        pytest.skip("single blocks have no such entries")
    distribution, _, _ = make(budgets, mask)
    actions = all_actions(budgets, mask)
    changed = actions.clone()
    for row in changed:
        row[min(budgets[int(row[-1])], sum(MASKS[mask])) : -1] = 4
    assert torch.equal(distribution.log_prob(actions), distribution.log_prob(changed))


@pytest.mark.parametrize(
    ("action", "mask"),
    [([1, 0, 0, 0, 0], "some"), ([0, 0, 0, 0, 1], "all"), ([0, 2, 3, 0, 2], "some")],
    ids=["illegal block", "repeated block", "illegal budget"],
)
def test_illegal_actions_have_no_probability(action: list[int], mask: str) -> None:
    distribution, _, _ = make((1, 2, 4), mask)
    assert distribution.log_prob(torch.tensor([action])).item() <= -1e8


@pytest.mark.parametrize("mask", ["all", "some", "two", "one"])
@pytest.mark.parametrize("budgets", BUDGETS)
def test_samples_follow_log_prob(budgets: tuple[int, ...], mask: str) -> None:
    draws = 20_000
    distribution, _, _ = make(budgets, mask)
    samples = distribution.sample((draws,), generator=torch.Generator().manual_seed(0))[:, 0]
    assert samples.dtype == torch.int64
    actions = all_actions(budgets, mask)
    place = {key(action, budgets, mask): i for i, action in enumerate(actions)}
    counts = torch.zeros(len(actions), dtype=torch.float64)
    distinct, repeats = samples.reshape(draws, -1).unique(dim=0, return_counts=True)
    for sample, times in zip(distinct, repeats, strict=True):
        counts[place[key(sample if budgets != (1,) else sample[0], budgets, mask)]] += times
    expected = draws * distribution.log_prob(actions).exp()
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    freedom = max(len(actions) - 1, 1)
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("budgets", BUDGETS)
def test_mode_is_sorted_logits_and_the_likeliest_legal_budget(budgets: tuple[int, ...]) -> None:
    distribution, logits, budget_logits = make(budgets, "some")
    legal = torch.tensor(MASKS["some"])
    ranked = logits.masked_fill(~legal, -torch.inf).argsort(descending=True)
    if budgets == (1,):
        assert distribution.mode.tolist() == ranked[:1].tolist()
        return
    fits = torch.tensor(budgets) <= 3
    reached = min(budgets[-1], 3)
    assert distribution.mode[0, :reached].tolist() == ranked[:reached].tolist()
    assert distribution.mode[0, -1] == budget_logits.masked_fill(~fits, -torch.inf).argmax()
    assert torch.equal(distribution.mode, distribution.deterministic_sample)


def enumerated_entropy(budgets: tuple[int, ...], mask: str) -> tuple[Tensor, Tensor, Tensor]:
    """-sum p log p over all actions, with its gradients."""
    distribution, logits, budget_logits = make(budgets, mask, leaf=True)
    log_probs = distribution.log_prob(all_actions(budgets, mask))
    entropy = -(log_probs.exp() * log_probs).sum()
    entropy.backward()
    assert logits.grad is not None
    gradient = torch.zeros_like(budget_logits) if budget_logits.grad is None else budget_logits.grad
    return entropy.detach(), logits.grad, gradient


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("budgets", [(1,), (1, 2), (1, 2, 4)])
def test_entropy_and_its_gradient_agree_with_enumeration(budgets: tuple[int, ...], mask: str) -> None:
    """Exact for one place; for more, the mean over many drawn lists lies within five standard errors."""
    value, gradient, budget_gradient = enumerated_entropy(budgets, mask)
    groups, each = 40, 500
    torch.manual_seed(0)
    found = []
    for _ in range(1 if budgets == (1,) else groups):
        distribution, logits, budget_logits = make(budgets, mask, entropy_samples=each, leaf=True)
        entropy = distribution.entropy()[0]
        entropy.backward()
        assert logits.grad is not None
        budget_part = torch.zeros_like(budget_logits) if budget_logits.grad is None else budget_logits.grad
        found.append(torch.cat([entropy.detach()[None], logits.grad, budget_part]))
    estimates, expected = torch.stack(found), torch.cat([value[None], gradient, budget_gradient])
    if budgets == (1,):
        assert torch.allclose(estimates[0], expected, atol=1e-12)
        return
    error = (estimates.mean(0) - expected).abs()
    assert (error <= 5 * estimates.std(0) / groups**0.5 + 1e-9).all()
    assert estimates.std(0).max() / groups**0.5 < 0.02  # the comparison above means something


@pytest.mark.parametrize("budgets", BUDGETS)
def test_gradients_are_finite_under_masks(budgets: tuple[int, ...]) -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    budget_logits = torch.zeros(5, len(budgets), requires_grad=True)
    mask = torch.tensor([*MASKS.values(), [False] * 5])  # the last row has finished
    budget_mask = torch.tensor(budgets) <= mask.sum(-1, keepdim=True)
    budget_mask[:, 0] = True
    distribution = RankedBlocks(logits, mask, budget_logits, budget_mask, budgets)
    action = distribution.sample(generator=torch.Generator().manual_seed(0))
    log_prob, entropy = distribution.log_prob(action), distribution.entropy()
    assert log_prob.shape == entropy.shape == (5,)
    assert (log_prob > -1e3).all() and torch.isfinite(entropy).all()
    (log_prob + entropy).sum().backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    illegal = ~mask[:-1]
    assert (logits.grad[:-1][illegal] == 0).all()
    if budgets != (1,):
        assert budget_logits.grad is not None and torch.isfinite(budget_logits.grad).all()


@pytest.mark.parametrize("budgets", BUDGETS)
def test_sampling_follows_its_generator(budgets: tuple[int, ...]) -> None:
    distribution, _, _ = make(budgets, "all", rows=32)
    first, second, other = (distribution.sample(generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("leading", [(3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("budgets", BUDGETS)
def test_any_leading_dimensions(budgets: tuple[int, ...], leading: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*leading, 5, generator=generator)
    mask = torch.rand(*leading, 5, generator=generator) < 0.8
    mask[..., 0] = True
    budget_logits = torch.randn(*leading, len(budgets), generator=generator)
    budget_mask = torch.tensor(budgets) <= mask.sum(-1, keepdim=True)
    budget_mask[..., 0] = True
    whole = RankedBlocks(logits, mask, budget_logits, budget_mask, budgets)
    flat = RankedBlocks(
        logits.view(-1, 5), mask.view(-1, 5), budget_logits.flatten(0, -2), budget_mask.flatten(0, -2), budgets
    )
    action = whole.sample(generator=generator)
    event = () if budgets == (1,) else (budgets[-1] + 1,)
    assert action.shape == (*leading, *event) == whole.mode.shape
    assert whole.sample((7,)).shape == (7, *leading, *event)
    flat_action = action.reshape(-1, *event)
    assert torch.equal(whole.log_prob(action).flatten(), flat.log_prob(flat_action))
    assert whole.entropy().shape == leading
    first_place = RankedBlocks(logits, mask)  # one place: exact, so it can be compared
    assert torch.allclose(first_place.entropy().flatten(), RankedBlocks(logits.view(-1, 5), mask.view(-1, 5)).entropy())


def test_missing_budget_logits_are_named() -> None:
    with pytest.raises(ValueError, match="budget_logits must be given"):
        RankedBlocks(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), budgets=(1, 2))
