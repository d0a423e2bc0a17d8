"""The binary-split straight-through estimator: its forward by hand, its gradient by its formula, what it trains."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orderrl.agents import ste
from orderrl.agents.body import merge_adapters, trained_part, tunable_copy
from orderrl.agents.play import seen_by
from orderrl.agents.policies import PlannerPolicy
from orderrl.agents.ste import (
    Config,
    SplitTraining,
    generation_loss,
    list_log_probs,
    policy_gradient,
    split_mask,
    standardised,
    states_of,
)
from orderrl.backbones import load_backbone, save_backbone
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.planner import PlannerConfig, TokenOrderHead, new_planner
from orderrl.runtime.job import Job
from tests.backbones.families import images, tiny
from tests.jobs import Enough, Seen, logged

FAMILIES = ("randar", "mar")
SHAPE = {"network": "orderhead", "dim": 16, "stem": 1, "heads": 2, "latents": 2, "dropout": 0.0, "visible_states": True}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def head_for(backbone: Any) -> TokenOrderHead:
    torch.manual_seed(0)
    made = new_planner(PlannerConfig.for_backbone(backbone, **SHAPE))
    assert isinstance(made, TokenOrderHead)
    return made.eval()


def training(family: str = "mar", **settings: Any) -> SplitTraining:
    backbone = tunable_copy(tiny(family, block_size=1))
    torch.manual_seed(0)
    config = Config(**{"steps": 3, "batch_size": 8, "evaluate_every": 2} | settings)
    body = trained_part(backbone, config.body, config.layers, config.rank)
    return SplitTraining(head_for(backbone), backbone, body, images(backbone, 20), config)


# ---------------------------------------------------------------------- the mask


def test_the_mask_is_exactly_the_hard_split() -> None:
    scores = torch.randn(5, 16, generator=generator())
    mask = split_mask(scores, 4, 0.3)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    for row, chosen in zip(scores, mask == 0, strict=True):
        assert set(chosen.nonzero().flatten().tolist()) == set(row.topk(4).indices.tolist())


@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_the_gradient_of_the_mask_is_that_of_its_formula(tau: float) -> None:
    """sum_i g_i d sigmoid((theta - s~_i) / tau) / d s_j with theta fixed, every derivative written out."""
    scores = torch.randn(3, 16, generator=generator(), dtype=torch.float64).mul_(5).requires_grad_(True)
    upstream = torch.randn(3, 16, generator=generator(1), dtype=torch.float64)
    (split_mask(scores, 4, tau) * upstream).sum().backward()
    assert scores.grad is not None
    for row, g, found in zip(scores.detach(), upstream, scores.grad, strict=True):
        n, spread = len(row), row.std(correction=0)
        z = (row - row.mean()) / spread
        soft = ((z.sort(descending=True).values[3] - z) / tau).sigmoid()
        slope = -soft * (1 - soft) / tau
        jacobian = (torch.eye(n) - 1 / n - z[:, None] * z[None] / n) / spread  # of s~_i with respect to s_j
        assert torch.allclose(found, (g * slope) @ jacobian, atol=1e-12)


def test_no_gradient_of_the_split_holds_the_mean_or_the_spread_of_scores() -> None:
    scores = torch.randn(4, 9, generator=generator(), dtype=torch.float64).requires_grad_(True)
    (split_mask(scores, 3, 0.5) * torch.randn(4, 9, dtype=torch.float64)).sum().backward()
    centred = scores.detach() - scores.detach().mean(-1, keepdim=True)
    assert scores.grad is not None
    assert torch.allclose(scores.grad.sum(-1), torch.zeros(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose((scores.grad * centred).sum(-1), torch.zeros(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(standardised(3 * scores + 7), standardised(scores))


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize("block_size", [1, 2])
def test_the_hard_forward_of_a_causal_backbone_is_its_loss_block_by_block(block_size: int) -> None:
    backbone = tiny("randar", block_size=block_size)
    data, blocks = images(backbone, 3), backbone.geometry.num_blocks
    scores = torch.randn(3, blocks, generator=generator())
    visible = blocks // 4
    found = generation_loss(backbone, data.tokens, data.labels, split_mask(scores, visible, 1.0), generator())
    total = 0.0
    for row in range(3):
        first = sorted(scores[row].topk(visible).indices.tolist())
        tokens, prefix = data.tokens[row : row + 1], backbone.start(data.labels[row : row + 1])
        for place, block in enumerate([*first, *sorted(set(range(blocks)) - set(first))]):
            one = torch.tensor([[block]])
            if place >= visible:
                total += backbone.context_loss(prefix, tokens, one)[0].loss.item()
            prefix = backbone.extend(prefix, tokens, one, torch.ones(1, dtype=torch.int64))
    hidden_tokens = 3 * (blocks - visible) * block_size**2
    assert found.item() == pytest.approx(total / hidden_tokens, rel=1e-4)


def test_the_hard_forward_of_a_masked_backbone_is_its_loss_token_by_token() -> None:
    backbone = tiny("mar", block_size=1)
    data, scores = images(backbone, 2), torch.randn(2, 16, generator=generator())
    found = generation_loss(backbone, data.tokens, data.labels, split_mask(scores, 4, 1.0), generator(3))
    source, total = generator(3), 0.0
    t = torch.randint(1000, (2, 12, 4), generator=source)
    noise = torch.randn(2, 12, 4, 3, generator=source)
    for row in range(2):
        shown = torch.zeros(1, 16, dtype=torch.bool)
        shown[0, scores[row].topk(4).indices] = True
        z = backbone.conditions(data.tokens[row : row + 1], shown, data.labels[row : row + 1])[0]
        for place, position in enumerate((~shown[0]).nonzero().flatten().tolist()):
            for draw in range(4):
                step, drawn = t[row, place, draw], noise[row, place, draw]
                total += backbone.token_losses(z[position], data.tokens[row, position], step, drawn).item()
    assert found.item() == pytest.approx(total / (2 * 12 * 4), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_reaches_the_mask_of_hidden_and_of_visible_blocks(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden: its own share of the loss. Visible: what scaling its embedding changes, by finite differences."""
    backbone = tiny(family, block_size=1)
    if family == "mar":  # the other part of its loss holds its mean fixed, so that its gradient is none
        monkeypatch.setattr(backbone, "token_losses", lambda *arguments: backbone.diffloss.losses(*arguments)[0])
    data = images(backbone, 1)
    mask = split_mask(torch.randn(1, 16, generator=generator()), 4, 1.0).requires_grad_(True)

    def loss(mask: Tensor) -> Tensor:
        return generation_loss(backbone, data.tokens, data.labels, mask, generator(1))

    loss(mask).backward()
    assert mask.grad is not None
    where = mask.detach() > 0.5
    assert mask.grad[where].sum().item() == pytest.approx(loss(mask).item(), rel=1e-4)  # weights of a mean
    for block in (~where[0]).nonzero().flatten().tolist():
        step = torch.zeros_like(mask).index_fill(1, torch.tensor([block]), 1e-3)
        slope = (loss(mask.detach() + step) - loss(mask.detach() - step)).item() / 2e-3
        assert mask.grad[0, block].item() == pytest.approx(slope, rel=0.05, abs=2e-4)


# ---------------------------------------------------------------------- what the head reads


@pytest.mark.parametrize("family", FAMILIES)
def test_training_scores_the_states_that_policies_see(family: str) -> None:
    backbone = tiny(family)
    data, head = images(backbone, 4), head_for(backbone)
    order = torch.rand(4, 4, generator=generator()).argsort(1)
    length = torch.tensor([0, 1, 2, 3])
    core = NextBlockCore(backbone, data, 4, CoreConfig())
    core.reset(index=torch.arange(4))
    core.show(order, length)
    seen = seen_by(PlannerPolicy(head), core)["hidden"]
    states = states_of(backbone, data.tokens, data.labels, order, length)
    assert torch.allclose(states, seen, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_tokens_change_no_score_that_is_trained_on(family: str) -> None:
    backbone = tiny(family, block_size=1)
    data, head = images(backbone, 2), head_for(backbone)
    order, length = torch.arange(16).expand(2, -1), torch.tensor([3, 3])
    other = data.tokens.clone()
    other[:, 3:] = data.tokens.flip(0)[:, 3:]
    scores, same = (
        head.score(states_of(backbone, tokens, data.labels, order, length)) for tokens in (data.tokens, other)
    )
    assert torch.equal(scores, same)


def test_true_tokens_fade_out_and_the_temperature_falls() -> None:
    config = Config(steps=100, anneal_steps=50, curriculum_steps=10)
    assert [config.routed_at(step) for step in (0, 5, 10, 99)] == [1.0, 0.5, 0.0, 0.0]
    assert [config.tau_at(step) for step in (0, 25, 50, 99)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert Config().routed_at(0) == 0.0


# ---------------------------------------------------------------------- the policy gradient


def test_log_probabilities_are_those_of_enumeration() -> None:
    """Over all lists of k blocks probabilities sum to 1, and each is the product of its softmaxes."""
    scores = torch.randn(1, 5, generator=generator(), dtype=torch.float64)
    ranked = torch.tensor(list(permutations(range(5))))[:, None]  # (120, 1, 5)
    found = list_log_probs(scores, ranked)[:, 0]
    for k in range(1, 6):
        lists = {tuple(row[:k].tolist()): value[k - 1] for row, value in zip(ranked[:, 0], found, strict=True)}
        assert torch.stack(list(lists.values())).exp().sum().item() == pytest.approx(1.0)
    left = scores[0].clone()
    expected = []
    for block in (3, 0, 4, 1, 2):
        expected.append(left.log_softmax(0)[block])
        left[block] = -torch.inf
    row = list_log_probs(scores, torch.tensor([[3, 0, 4, 1, 2]]))[0]
    assert torch.allclose(row, torch.stack(expected).cumsum(0))


def test_the_policy_gradient_is_that_of_the_expected_reward() -> None:
    """With the standard deviation of rewards known, its mean is the gradient of the enumerated expectation."""
    scores = torch.randn(1, 4, generator=generator(), dtype=torch.float64).requires_grad_(True)
    worth = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    ranked = torch.tensor(list(permutations(range(4))))[:, None]
    pairs = {tuple(row[:2].tolist()): i for i, row in enumerate(ranked[:, 0])}
    rows = torch.tensor(list(pairs.values()))
    probability = list_log_probs(scores, ranked)[rows, 0, 1].exp()
    reward = worth[ranked[rows, 0, :2]].sum(-1)
    (expected,) = torch.autograd.grad((probability * reward).sum(), scores)
    spread = ((probability * reward.square()).sum() - (probability * reward).sum().square()).sqrt()
    loss = policy_gradient(scores, 2, 40_000, lambda blocks: worth[blocks].sum(-1), generator())
    (found,) = torch.autograd.grad(loss, scores)
    assert torch.allclose(-found * spread.detach(), expected, atol=0.01)


def test_splits_of_equal_reward_teach_nothing() -> None:
    scores = torch.randn(3, 6, generator=generator()).requires_grad_(True)
    policy_gradient(scores, 2, 4, lambda blocks: torch.ones(blocks.shape[:2]), generator()).backward()
    assert scores.grad is not None and not scores.grad.any()


# ---------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("body", ["frozen", "top", "lora", "all"])
def test_a_body_changes_as_far_as_it_is_trained(family: str, body: str, tmp_path: Path) -> None:
    made = training(family, body=body, rank=2, body_learning_rate=1e-2, augmentation=0.0, curriculum_steps=2)
    before = tiny(family, block_size=1).state_dict()
    head = {key: value.clone() for key, value in made.head.state_dict().items()}
    rows = logged(made.train)
    merge_adapters(made.backbone)
    after = made.backbone.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    stacks = ("layers.", "encoder_blocks.", "decoder_blocks.")
    top = ("layers.1.", "norm.", "output.", "decoder_blocks.1.", "decoder_norm.", "diffloss.")
    assert before.keys() == after.keys() and any(not torch.equal(head[k], v) for k, v in made.head.state_dict().items())
    assert len(rows) == 4 and {"loss", "loss_gen", "score_std", "loss_split"} <= rows[-1].keys()
    if body == "frozen":
        assert not changed
    elif body == "top":
        assert changed and all(key.startswith(top) for key in changed)
    elif body == "lora":
        assert changed and all(key.startswith(stacks) and key.endswith("weight") for key in changed)
        for key in changed:
            assert torch.linalg.matrix_rank(after[key] - before[key], rtol=1e-3) <= 2
    else:
        assert any("emb" in key for key in changed) and any(key.startswith(stacks) for key in changed)
    save_backbone(tmp_path / "tuned.safetensors", made.backbone, {})
    assert type(load_backbone(tmp_path / "tuned.safetensors")) is type(made.backbone)


def test_adapters_change_nothing_at_the_start() -> None:
    backbone: Any = tunable_copy(tiny("mar", block_size=1))
    data = images(backbone, 2)
    shown = torch.rand(2, 16, generator=generator()) < 0.5
    z = backbone.conditions(data.tokens, shown, data.labels)
    part = trained_part(backbone, "lora", rank=3)
    assert len(part) and torch.equal(backbone.conditions(data.tokens, shown, data.labels), z)


def test_the_heads_gradient_is_clipped_by_itself() -> None:
    made = training(head_clip=1e-3, body="all")
    norms: list[Tensor] = []
    optimizer = torch.optim.SGD([*made.head.parameters(), *made.body.parameters()], 0.0)
    optimizer.register_step_pre_hook(
        lambda *_: norms.extend(
            nn.utils.get_total_norm([p.grad for p in part.parameters() if p.grad is not None])
            for part in (made.head, made.body)
        )
    )
    made._step(optimizer, 0)
    assert norms[0] <= 1.001e-3 < norms[1] <= 1.001


def test_the_terms_are_their_formulas() -> None:
    target = torch.rand(8, 16, generator=generator())
    held: dict[str, Any] = {"l2_coeff": 0.5, "spread_coeff": 0.7, "entropy_coeff": 0.3}
    made = training(oracle_coeff=2.0, aligned=True, gen_coeff=0.0, label_dropout=0.0, **held)
    made.importance = lambda tokens, labels, scores, generator: target
    seen: list[Tensor] = []
    original = made.head.score
    made.head.score = lambda *arguments: seen.append(original(*arguments)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    row = made._step(torch.optim.SGD(made.head.parameters(), 0.0), 0)
    scores = seen[0].detach()
    oracle = ((1 / (1 + (-scores).exp()) - target) ** 2).mean()
    assert row["loss_oracle"] == pytest.approx(oracle.item(), rel=1e-5)
    spread = (-scores.std(-1, correction=0)).exp().mean()
    entropy = torch.distributions.Categorical(logits=scores).entropy().mean()
    expected = 2 * oracle + 0.5 * (scores**2).mean() + 0.7 * spread - 0.3 * entropy
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_reward_draws_scores_to_what_it_rewards() -> None:
    made = training(steps=40, gen_coeff=0.0, reinforce_coeff=1.0, aligned=True, augmentation=0.0, learning_rate=1e-2)
    made.reward = lambda tokens, labels, blocks: (blocks == 5).any(-1).float()
    made.train()
    tokens, labels = made.watched.tokens[:], made.watched.labels[:]
    order, length = torch.arange(16).expand(len(labels), -1), torch.zeros(len(labels), dtype=torch.int64)
    scores = made.head.score(states_of(made.backbone, tokens, labels, order, length))
    assert (scores.argmax(-1) == 5).all()


@pytest.mark.parametrize(("factor", "said"), [(0.0, "collapsed at step 2: score_std"), (1e4, "exploded at step 2")])
def test_collapse_and_explosion_are_said_once_and_training_goes_on(factor: float, said: str) -> None:
    made = training(steps=6, learning_rate=1e-9, augmentation=0.0)
    with torch.no_grad():
        made.head.head[-1].weight.mul_(factor)  # type: ignore[operator]
    rows = logged(made.train)
    assert rows[-1]["step"] == 6
    assert len(made.outcome["warnings"]) == 1 and said in made.outcome["warnings"][0]


def test_a_resumed_training_is_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = training(steps=4, body="lora")
    whole.train()
    first, second = training(steps=4, body="lora"), training(steps=4, body="lora")
    with pytest.raises(Enough), Seen(lambda row: None, 2, tmp_path, "key", 0.0) as job:
        first.train(job)
    with Job(tmp_path, "key", 0.0) as job:
        second.train(job)
    for made, expected in zip((second.head, second.body), (whole.head, whole.body), strict=True):
        assert all(torch.equal(made.state_dict()[key], value) for key, value in expected.state_dict().items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gen_coeff": 0.0}, "leave nothing to learn"),
        ({"gen_coeff": 0.0, "oracle_coeff": 1.0, "body": "all"}, "body='all' learns from the generation loss"),
        ({"body": "middle"}, "body='middle' is unknown; choose one of frozen, top, lora, all"),
        ({"visible_share": 1.0}, r"visible_share must lie in \(0, 1\)"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**wrong)


def test_what_it_cannot_train_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Given:
        backbone, planner, data = tiny("arpg"), PlannerConfig.for_backbone(tiny("mar")), "few"

    few = images(tiny("mar")).first(1)
    monkeypatch.setattr(ste, "load_split", lambda *names: few)

    with pytest.raises(ValueError, match="agent=ste tunes backbones of type OrderRobustTransformer, MaskedTransformer"):
        ste.AGENT.check(Given, Config())  # type: ignore[arg-type]
    Given.backbone = tiny("mar")
    with pytest.raises(ValueError, match=r"agent=ste trains planner=orderhead, got planner\.network=latent"):
        ste.AGENT.check(Given, Config())  # type: ignore[arg-type]
    Given.planner = replace(Given.planner, network="orderhead")
    with pytest.raises(ValueError, match="layers=9 exceed the backbone's; use 0 to 2"):
        ste.AGENT.check(Given, Config(body="top", layers=9))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs at least 2 planner images, of which it keeps some back; got 1"):
        ste.AGENT.check(Given, Config())  # type: ignore[arg-type]
    Given.backbone = tiny("mar", block_size=4)
    with pytest.raises(ValueError, match="needs at least 2 blocks, which it splits; got 1"):
        ste.AGENT.check(Given, Config())  # type: ignore[arg-type]
