"""The research notes' OrderHead: its size, what it reads, and what it must never see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orderrl import compose
from orderrl.agents.play import play, roll_out, seen_by
from orderrl.agents.policies import PlannerPolicy, RankingPolicy, planner_scorer
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.oracle import LabelConfig, label_contexts, random_contexts
from orderrl.planner import PlannerConfig, TokenOrderHead, load_planner, new_planner, save_planner
from orderrl.train import train
from tests.backbones.families import images, tiny

FAMILIES = ("randar", "arpg", "mar")
SHAPE = {"network": "orderhead", "dim": 16, "stem": 1, "heads": 2, "latents": 2, "dropout": 0.0, "visible_states": True}


def planner(backbone: Any, **shape: Any) -> TokenOrderHead:
    torch.manual_seed(0)
    made = new_planner(PlannerConfig.for_backbone(backbone, **SHAPE | shape))
    assert isinstance(made, TokenOrderHead)
    return made.eval()


def core_at(backbone: Any, shown: list[int], tokens: Tensor | None = None) -> NextBlockCore:
    """Two episodes in which some blocks are visible; other tokens than the images' if given."""
    core = NextBlockCore(backbone, images(backbone), 2, CoreConfig(strict=True))
    core.reset(index=torch.arange(2))
    if tokens is not None:
        core.tokens = tokens
    for block in shown:
        core.step(torch.full((2,), block))
    return core


@pytest.mark.parametrize(("dim", "channels", "parameters"), [(256, 8, 3_459_841), (512, 16, 13_280_769)])
def test_it_has_exactly_the_parameters_of_the_notes(dim: int, channels: int, parameters: int) -> None:
    shape: dict[str, Any] = {"num_blocks": 256, "hidden_size": 768, "num_classes": 1000, "token_dim": channels}
    preset = compose("train", ["planner=orderhead", f"planner.dim={dim}"]).planner
    with torch.device("meta"):
        head = TokenOrderHead(PlannerConfig(**shape, **preset))
    assert sum(p.numel() for p in head.parameters()) == parameters


def test_every_position_counts_and_registers_are_discarded() -> None:
    backbone = tiny("mar", block_size=1)
    head, states = planner(backbone), torch.randn(1, 16, backbone.hidden_size, requires_grad=True)
    scores = head.score(states)
    assert scores.shape == (1, 16)
    scores[0, 3].backward()
    assert states.grad is not None and (states.grad.abs().sum(-1) > 0).all()


def test_true_tokens_are_read_only_where_they_are_routed() -> None:
    backbone = tiny("mar", block_size=1)
    head, states, true = planner(backbone), torch.randn(2, 16, 32), torch.randn(2, 16, 3)
    routed = head.score(states, true, torch.tensor([True, False]))
    assert torch.allclose(routed[1], head.score(states)[1], atol=1e-6)
    assert torch.allclose(routed[0], head.score(states, true)[0], atol=1e-6)
    assert torch.equal(head.score(2 * states, true), head.score(states, true))
    with pytest.raises(ValueError, match="true tokens can't be read"):
        new = TokenOrderHead(PlannerConfig(16, 32, 3, network="orderhead", heads=4))
        new.score(states, true)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_tokens_never_reach_it_and_visible_ones_do(family: str) -> None:
    backbone = tiny(family)
    policy, first = PlannerPolicy(planner(backbone)), core_at(backbone, [2])
    tokens = first.tokens
    other = tokens.flip(0)  # the other image's tokens: wherever hidden, then also where visible
    shown = first.geometry.token_block == 2
    where = shown[:, None] if tokens.ndim == 3 else shown
    hidden_changed = core_at(backbone, [2], torch.where(where, tokens, other))
    visible_changed = core_at(backbone, [2], torch.where(where, other, tokens))
    scores, same, different = (
        policy.planner(seen_by(policy, core)).scores for core in (first, hidden_changed, visible_changed)
    )
    assert torch.equal(scores, same)
    assert not torch.allclose(scores, different, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_policies_are_shown_the_states_of_visible_blocks_and_nothing_else_changes(family: str) -> None:
    backbone = tiny(family)
    core, policy = core_at(backbone, [1, 3]), PlannerPolicy(planner(backbone))
    plain, seen = core.observation(), seen_by(policy, core)
    every = torch.arange(core.geometry.num_blocks).expand(2, -1)
    assert torch.equal(seen["hidden"][core.visible], backbone.observe(core.prefix, every)[0][core.visible])
    assert torch.equal(seen["hidden"][~core.visible], plain["hidden"][~core.visible])
    for key in set(plain.keys()) - {"hidden"}:
        assert torch.equal(plain[key], seen[key])


def test_states_that_are_missing_are_noticed() -> None:
    backbone = tiny("mar")
    core = core_at(backbone, [0])
    with pytest.raises(ValueError, match="reads the states of visible blocks too, and they are zero here"):
        planner(backbone)(core.observation())
    assert planner(backbone, visible_states=False)(core.observation()).scores.shape == (2, 4)


@pytest.mark.parametrize("block_size", [1, 2])
def test_it_plays_whole_episodes_by_its_scores(block_size: int) -> None:
    backbone = tiny("mar", block_size=block_size)
    head = planner(backbone)
    core = NextBlockCore(backbone, images(backbone), 3, CoreConfig(strict=True))
    own = roll_out(core, PlannerPolicy(head), torch.Generator(), torch.arange(3))
    ranking = RankingPolicy(planner_scorer(head), backbone.geometry)
    assert torch.equal(own.order, roll_out(core, ranking, torch.Generator(), torch.arange(3)).order)
    core.reset(index=torch.arange(3))
    play(core, PlannerPolicy(head), steps=1)
    first = planner_scorer(head)(core_at(backbone, []).observation(), torch.Generator()).argmax(-1)
    assert torch.equal(own.order[:2, 0], first)


def test_labels_store_the_states_of_visible_blocks_where_planners_read_them() -> None:
    backbone = tiny("mar")
    data, config = images(backbone), LabelConfig(contexts=6)
    contexts = random_contexts(config, len(data), 4)
    plain, whole = (
        list(label_contexts(backbone, data.tokens, data.labels, LabelConfig(contexts=6, visible_states=v), contexts))
        for v in (False, True)
    )
    for without, with_states in zip(plain, whole, strict=True):
        visible = without["visible"]
        assert torch.equal(without["gains"], with_states["gains"])
        assert torch.allclose(without["hidden"][~visible], with_states["hidden"][~visible], atol=1e-6)
        assert (without["hidden"][visible] == 0).all()
        assert not (with_states["hidden"][visible] == 0).all(-1).any()


def test_it_is_cloned_from_labels_and_saved_and_refused_where_heads_are_missing(tmp_path: Path) -> None:
    where = [f"cache_dir={tmp_path / 'cache'}", f"output_dir={tmp_path}", "backbone=digits", "planner=orderhead"]
    small = ["labels.contexts=24", "planner.dim=16", "planner.stem=1", "planner.heads=2"]
    path = train(compose("train", [*where, *small, "agent.steps=2", "agent.evaluate_every=1", "agent.batch_size=8"]))
    head, description = load_planner(path)
    assert isinstance(head, TokenOrderHead) and head.config.visible_states
    save_planner(tmp_path / "again.safetensors", head, description)
    for agent in ("joint", "fitted_q"):
        with pytest.raises(ValueError, match=f"agent={agent} needs a planner with heads for budgets"):
            own = [entry for entry in small if agent == "joint" or not entry.startswith("labels.")]
            train(compose("train", [*where, *own, f"agent={agent}"]))


@pytest.mark.parametrize("wrong", [{"reasoning_steps": 1}, {"content": False}, {"pairs": True}, {"num_budgets": 2}])
def test_what_it_has_no_part_for_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.* is for network=latent"):
        PlannerConfig(16, 32, 3, network="orderhead", **wrong)
