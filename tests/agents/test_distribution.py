"""RankedBlocks against the list of all its actions."""

from __future__ import annotations

from itertools import permutations
from typing import NamedTuple

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


REPULSION = 1.5 * torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Made(NamedTuple):
    """A distribution over five blocks, float64, and what it was made from."""

    distribution: RankedBlocks
    logits: Tensor
    budget_logits: Tensor
    repulsion: Tensor


def make(
    budgets: tuple[int, ...],
    mask: str,
    rows: int = 1,
    repels: bool = False,
    entropy_samples: int = 1,
    leaf: bool = False,
) -> Made:
    generator = torch.Generator().manual_seed(1)
    logits = 1.5 * torch.randn(5, generator=generator, dtype=torch.float64)
    budget_logits = torch.randn(len(budgets), generator=generator, dtype=torch.float64)
    parts = [part.clone().requires_grad_(leaf) for part in (logits, budget_logits, float(repels) * REPULSION)]
    legal = torch.tensor(MASKS[mask]).expand(rows, -1)
    distribution = RankedBlocks(
        parts[0].expand(rows, -1),
        legal,
        parts[1].expand(rows, -1),
        legal_budgets(budgets, legal),
        budgets,
        repulsion=parts[2].expand(rows, -1, -1) if repels else None,
        entropy_samples=entropy_samples,
    )
    return Made(distribution, *parts)


def legal_budgets(budgets: tuple[int, ...], mask: Tensor) -> Tensor:
    """As in the environment: up to what is hidden; the smallest always."""
    allowed = torch.tensor(budgets) <= mask.sum(-1, keepdim=True)
    allowed[..., 0] = True
    return allowed


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


@pytest.mark.parametrize("repels", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("budgets", BUDGETS)
def test_probabilities_of_all_actions_sum_to_one(budgets: tuple[int, ...], mask: str, repels: bool) -> None:
    distribution = make(budgets, mask, repels=repels).distribution
    probabilities = distribution.log_prob(all_actions(budgets, mask)).exp()
    assert (probabilities > 0).all()
    assert torch.allclose(probabilities.sum(), torch.ones((), dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("repels", [False, True])
@pytest.mark.parametrize("mask", ["all", "some"])
def test_log_prob_is_budget_plus_plackett_luce(mask: str, repels: bool) -> None:
    """Place by place from the definition; with repulsion every listed block lowers the logits of the later places."""
    made = make((1, 2, 4), mask, repels=repels)
    place_probs = made.budget_logits.exp() * torch.tensor([k <= sum(MASKS[mask]) for k in (1, 2, 4)])
    for action in all_actions((1, 2, 4), mask):
        *blocks, place = action.tolist()
        probability, weights = place_probs[place] / place_probs.sum(), made.logits.exp() * torch.tensor(MASKS[mask])
        for block in blocks[: (1, 2, 4)[place]]:
            probability = probability * weights[block] / weights.sum()
            weights = weights * (-made.repulsion[block]).exp()
            weights[block] = 0
        assert torch.allclose(made.distribution.log_prob(action[None]).exp(), probability, atol=1e-12)


@pytest.mark.parametrize("mask", ["all", "some"])
def test_every_state_has_a_repulsion_of_its_own(mask: str) -> None:
    """Probabilities, modes and entropies of three states are those of each alone, and the states differ."""
    budgets, made = (1, 2, 4), make((1, 2, 4), mask, rows=3)
    repulsion = 1.5 * torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def of(rows: slice) -> RankedBlocks:
        legal = torch.tensor(MASKS[mask]).expand(3, -1)[rows]
        logits, budget_logits = (part.expand(3, -1)[rows] for part in (made.logits, made.budget_logits))
        fits = legal_budgets(budgets, legal)
        return RankedBlocks(logits, legal, budget_logits, fits, budgets, repulsion[rows], entropy_samples=20_000)

    actions = all_actions(budgets, mask)[:, None]
    log_probs = of(slice(None)).log_prob(actions.expand(-1, 3, -1))
    assert torch.allclose(log_probs.exp().sum(0), torch.ones(3, dtype=torch.float64))
    torch.manual_seed(0)
    entropy = of(slice(None)).entropy()
    assert torch.allclose(entropy, -(log_probs.exp() * log_probs).sum(0), atol=0.02)
    assert not torch.allclose(log_probs[:, 0], log_probs[:, 1], atol=0.1)
    for row in range(3):
        alone = of(slice(row, row + 1))
        assert torch.equal(log_probs[:, row], alone.log_prob(actions)[:, 0])
        assert torch.equal(of(slice(None)).mode[row], alone.mode[0])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("budgets", BUDGETS[1:])
def test_entries_past_the_budget_are_ignored(budgets: tuple[int, ...], mask: str) -> None:
    distribution = make(budgets, mask, repels=True).distribution
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
    distribution = make((1, 2, 4), mask).distribution
    assert distribution.log_prob(torch.tensor([action])).item() <= -1e8


@pytest.mark.parametrize("repels", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("budgets", BUDGETS)
def test_samples_follow_log_prob(budgets: tuple[int, ...], mask: str, repels: bool) -> None:
    draws = 20_000
    distribution = make(budgets, mask, repels=repels).distribution
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


@pytest.mark.parametrize("repels", [False, True])
@pytest.mark.parametrize("budgets", BUDGETS)
def test_mode_is_the_best_block_place_by_place_and_the_likeliest_legal_budget(
    budgets: tuple[int, ...], repels: bool
) -> None:
    made = make(budgets, "some", repels=repels)
    left, ranked = made.logits.masked_fill(~torch.tensor(MASKS["some"]), -torch.inf), []
    for _ in range(min(budgets[-1], 3)):
        ranked.append(int(left.argmax()))
        left = left - made.repulsion[ranked[-1]]
        left[ranked[-1]] = -torch.inf
    mode = made.distribution.mode
    assert torch.equal(mode, made.distribution.deterministic_sample)
    if budgets == (1,):
        assert mode.tolist() == ranked
        return
    assert mode[0, : len(ranked)].tolist() == ranked
    fits = legal_budgets(budgets, torch.tensor(MASKS["some"]))
    assert mode[0, -1] == made.budget_logits.masked_fill(~fits, -torch.inf).argmax()


def test_without_repulsion_the_mode_sorts_the_scores() -> None:
    made = make((1, 2, 4), "all")
    assert made.distribution.mode[0, :4].tolist() == made.logits.topk(4).indices.tolist()
    none = RankedBlocks(made.logits[None], torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 3), None, (1, 2, 4))
    zero = RankedBlocks(
        made.logits[None], torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 3), None, (1, 2, 4), torch.zeros(1, 5, 5)
    )
    actions = all_actions((1, 2, 4), "all")
    assert torch.equal(none.log_prob(actions), zero.log_prob(actions))


def gradient_of(value: Tensor, made: Made) -> Tensor:
    """A value (,) and its gradient in all that the distribution was made from, flat."""
    gradients = torch.autograd.grad(value, made[1:], allow_unused=True, materialize_grads=True)
    return torch.cat([value.detach()[None], *(gradient.flatten() for gradient in gradients)])


@pytest.mark.parametrize("repels", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("budgets", [(1,), (1, 2), (1, 2, 4)])
def test_entropy_and_its_gradient_agree_with_enumeration(budgets: tuple[int, ...], mask: str, repels: bool) -> None:
    """Exact for one place; for more, the mean over many drawn lists lies within five standard errors."""
    made = make(budgets, mask, repels=repels, leaf=True)
    log_probs = made.distribution.log_prob(all_actions(budgets, mask))
    expected = gradient_of(-(log_probs.exp() * log_probs).sum(), made)
    groups, each = (1, 1) if budgets == (1,) else (40, 500)
    torch.manual_seed(0)
    found = []
    for _ in range(groups):
        made = make(budgets, mask, repels=repels, entropy_samples=each, leaf=True)
        found.append(gradient_of(made.distribution.entropy()[0], made))
    estimates = torch.stack(found)
    if budgets == (1,):
        assert torch.allclose(estimates[0], expected, atol=1e-12)
        return
    spread = estimates.std(0) / groups**0.5
    assert ((estimates.mean(0) - expected).abs() <= 5 * spread + 1e-9).all()
    assert spread.max() < 0.02  # so the comparison above means something


@pytest.mark.parametrize("budgets", BUDGETS)
def test_gradients_are_finite_under_masks(budgets: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 5, generator=generator).requires_grad_()
    repulsion = torch.randn(5, 5, 5, generator=generator).requires_grad_()
    budget_logits = torch.zeros(5, len(budgets), requires_grad=True)
    mask = torch.tensor([*MASKS.values(), [False] * 5])  # the last row has finished
    distribution = RankedBlocks(logits, mask, budget_logits, legal_budgets(budgets, mask), budgets, repulsion)
    action = distribution.sample(generator=generator)
    log_prob, entropy = distribution.log_prob(action), distribution.entropy()
    assert log_prob.shape == entropy.shape == (5,)
    assert (log_prob > -1e3).all() and torch.isfinite(entropy).all()
    gradients = torch.autograd.grad(
        (log_prob + entropy).sum(), [logits, budget_logits, repulsion], allow_unused=True, materialize_grads=True
    )
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert (gradients[0][:-1][~mask[:-1]] == 0).all()  # illegal blocks are not learnt from


@pytest.mark.parametrize("budgets", BUDGETS)
def test_sampling_follows_its_generator(budgets: tuple[int, ...]) -> None:
    distribution = make(budgets, "all", rows=32, repels=True).distribution
    first, second, other = (distribution.sample(generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("leading", [(3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("budgets", BUDGETS)
def test_any_leading_dimensions(budgets: tuple[int, ...], leading: tuple[int, ...]) -> None:
    """TorchRL passes (M, T): the same numbers as flat, and shapes of samples as every distribution of PyTorch."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(*leading, 5, generator=generator) < 0.8
    mask[..., 0] = True
    logits, budget_logits = (torch.randn(*leading, n, generator=generator) for n in (5, len(budgets)))
    repulsion = torch.randn(*leading, 5, 5, generator=generator)
    allowed = legal_budgets(budgets, mask)
    whole = RankedBlocks(logits, mask, budget_logits, allowed, budgets, repulsion)

    def flatten(part: Tensor) -> Tensor:
        return part.flatten(0, len(leading) - 1)

    flat = RankedBlocks(
        flatten(logits), flatten(mask), flatten(budget_logits), flatten(allowed), budgets, flatten(repulsion)
    )
    event = () if budgets == (1,) else (budgets[-1] + 1,)
    action = whole.sample(generator=generator)
    assert action.shape == (*leading, *event) == whole.mode.shape
    assert torch.equal(whole.log_prob(action).flatten(), flat.log_prob(action.reshape(-1, *event)))
    assert torch.equal(flatten(whole.mode), flat.mode)
    assert whole.entropy().shape == leading
    draws = whole.sample((7,))
    assert draws.shape == (7, *leading, *event)
    assert torch.equal(whole.log_prob(draws)[3], whole.log_prob(draws[3]))


def test_missing_budget_logits_are_named() -> None:
    with pytest.raises(ValueError, match="budget_logits must be given"):
        RankedBlocks(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), budgets=(1, 2))
