"""Orders by confidence: what the rule says, computed slowly; blind to hidden tokens, unlike its hindsight form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orderrl.agents.confidence import Confidence, ConfidenceRule, HindsightConfidence
from orderrl.agents.play import act
from orderrl.agents.policies import all_scores
from orderrl.agents.registry import make_policy
from orderrl.backbones.chains import entropy
from orderrl.backbones.sampling import Sampling
from orderrl.distillation import chosen_orders
from orderrl.envs.core import NextBlockCore
from tests.agents.helpers import mid_episode, tiny_core
from tests.helpers import block_loss, tiny_backbone, tiny_images

RULES = ["", "highest", "first", "highest+first"]


def slow_confidence(core: NextBlockCore, row: int, block: int, rule: ConfidenceRule) -> float:
    """Confidence in one block from whole teacher-forced passes, one for every token of its most likely chain."""
    geometry = core.geometry
    visible = (core.reveal_step[row] * 9 + core.reveal_rank[row]).masked_fill(~core.visible[row], 99).argsort()
    shown = visible[: int(core.visible[row].sum())].tolist()
    rest = [b for b in range(9) if b not in shown and b != block]
    order = geometry.token_order(torch.tensor([[*shown, block, *rest]]))
    tokens, values = core.tokens[row : row + 1].clone(), []
    tokens[:, geometry.block_tokens[[block, *rest]].flatten()] = 0  # whatever is hidden
    for i, position in enumerate(geometry.block_tokens[block].tolist()[: 1 if rule.first else None]):
        logits = core.backbone.teacher_forced(tokens, core.labels[row : row + 1], order)  # type: ignore[attr-defined]
        log_probs = logits[0, 4 * len(shown) + i].log_softmax(-1)
        values.append(log_probs.max() if rule.highest else -entropy(log_probs))
        tokens[0, position] = log_probs.argmax()
    return torch.stack(values).mean().item()


@pytest.mark.parametrize("text", RULES)
def test_confidence_is_that_of_each_blocks_most_likely_chain(text: str) -> None:
    core, rule = mid_episode(tiny_core(num_envs=2), steps=3), ConfidenceRule.parse(text)
    scores = all_scores(Confidence(rule=rule), core)
    for row, block in (~core.visible).nonzero().tolist()[::2]:
        assert scores[row, block].item() == pytest.approx(slow_confidence(core, row, block, rule), abs=1e-4)


def test_distance_is_taken_from_the_block_revealed_last() -> None:
    core = mid_episode(tiny_core(num_envs=2), steps=3)
    near, far = (all_scores(Confidence(rule=ConfidenceRule.parse(rule)), core) for rule in ("near0.25", "near0"))
    for row, block in (~core.visible).nonzero().tolist():
        last = int((core.reveal_step[row] == 2).nonzero())
        way = core.geometry.distances[last, block].item()
        assert (far - near)[row, block].item() == pytest.approx(0.25 * way, abs=1e-5)


def test_the_greedy_path_of_a_case_computed_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four blocks of one token, (0, 1) above (2, 3), of which the model is -0.8, -0.2, -0.5, -0.6 sure."""
    backbone = tiny_backbone(2, 2, 1)
    sure = torch.tensor([-0.8, -0.2, -0.5, -0.6])

    def certainty(prefix: object, blocks: Tensor, first: bool) -> tuple[Tensor, Tensor]:
        return sure[blocks], sure[blocks]

    monkeypatch.setattr(type(backbone), "certainty", lambda self, *given: certainty(*given))
    images = tiny_images(backbone, 1)
    for name, order in (("confidence", [1, 2, 3, 0]), ("confidence:near1", [1, 3, 2, 0])):
        # from 1: 0 is 1 away (-1.8), 2 is sqrt(2) (-1.91), 3 is 1 (-1.6); from 3: 0 is sqrt(2) (-2.21), 2 is 1 (-1.5)
        found, seen = chosen_orders(backbone, images, make_policy(name, backbone), seed=0)
        assert found.tolist() == [order] and seen.tolist() == [[0, 1, 2, 3]]


def with_other_hidden_tokens(core: NextBlockCore) -> NextBlockCore:
    """The same states with every hidden token changed."""
    hidden = ~core.visible[:, core.geometry.token_block]
    core.tokens = torch.where(hidden, (core.tokens + 1) % core.backbone.vocab_size, core.tokens)
    return core


@pytest.mark.parametrize("text", [*RULES, "near0.3"])
def test_hidden_tokens_do_not_move_confidence(text: str) -> None:
    policy, core = Confidence(rule=ConfidenceRule.parse(text)), mid_episode(tiny_core(), steps=3)
    before = all_scores(policy, core)
    assert torch.equal(before, all_scores(policy, with_other_hidden_tokens(core)))


def test_hindsight_is_the_likelihood_of_the_true_block() -> None:
    core = mid_episode(tiny_core(num_envs=2), steps=3)
    scores = all_scores(HindsightConfidence(), core)
    for row, block in (~core.visible).nonzero().tolist()[::2]:
        shown = core.reveal_step[row].masked_fill(~core.visible[row], 99).argsort()[:3].tolist()
        loss = block_loss(tiny_backbone(), core.tokens[row], core.labels[row], shown, block)
        assert scores[row, block].item() == pytest.approx(-loss / 4, abs=1e-4)
    assert not torch.allclose(scores, all_scores(HindsightConfidence(), with_other_hidden_tokens(core)), atol=1e-2)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_best_proposal_is_the_very_draw_that_is_kept(guidance: float) -> None:
    core = mid_episode(tiny_core(mode="generate", sampling=Sampling(guidance=guidance)), steps=3)
    rows = torch.arange(core.num_envs)
    hidden = (~core.visible).nonzero()[:, 1].view(core.num_envs, -1)
    proposed = core.propose(rows, hidden)
    chosen = act(HindsightConfidence(), core, torch.Generator())
    core.step(chosen)
    place = (hidden == chosen[:, None]).long().argmax(1)
    drawn = core.tokens.gather(1, core.geometry.block_tokens[chosen])
    assert torch.equal(drawn, proposed[rows, place])


def test_what_has_no_probabilities_is_refused() -> None:
    backbone = tiny_backbone()

    class Bare:
        geometry, vocab_size = backbone.geometry, 0

    with pytest.raises(ValueError, match=r"'confidence:highest' needs token probabilities.*use confidence:first"):
        make_policy("confidence:highest", Bare())  # type: ignore[arg-type]
    assert make_policy("confidence:first", Bare()).reference  # type: ignore[arg-type]
