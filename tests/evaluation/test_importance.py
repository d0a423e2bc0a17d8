"""Orders and scores against the classifier's importance, and the alternatives that are cloned."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from orderrl import compose
from orderrl.agents.bc import Config, score_targets, teacher_ranks
from orderrl.agents.play import roll_out
from orderrl.agents.registry import make_policy
from orderrl.backbones import load_backbone
from orderrl.data import load_split
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.evaluation.importance import content_agreement, early_agreement
from orderrl.evaluation.rows import first_choices
from orderrl.factory import Setup
from orderrl.geometry import BlockGrid
from orderrl.planner import PlannerConfig, new_planner, save_planner
from orderrl.reproduce import taught
from tests.agents.helpers import tiny_labels
from tests.backbones.families import images, tiny


def test_an_order_by_importance_agrees_with_it_whatever_the_image() -> None:
    backbone = tiny("mar", block_size=1)
    worth = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    for sign in (1, -1):
        core = NextBlockCore(backbone, images(backbone), 3, CoreConfig(strict=True))

        def by_worth(observation, generator, sign=sign):  # type: ignore[no-untyped-def]
            return (sign * worth).masked_fill(observation["visible"], -9).argmax(-1)

        rollout = roll_out(core, by_worth, torch.Generator(), torch.arange(3))
        assert early_agreement(rollout, worth).tolist() == pytest.approx([sign] * 3)


def test_a_head_that_reads_places_alone_owes_nothing_to_content() -> None:
    backbone = tiny("mar", block_size=1)
    shape = {"network": "orderhead", "dim": 16, "stem": 1, "heads": 2, "dropout": 0.0, "visible_states": True}
    torch.manual_seed(0)
    head, worth = new_planner(PlannerConfig.for_backbone(backbone, **shape)).eval(), torch.rand(6, 16)
    found = content_agreement(head, backbone, images(backbone, 6), worth)
    assert found["content_match"].abs().max() < 1  # random weights read the states
    with torch.no_grad():
        for part in head.input.parameters():  # type: ignore[union-attr]
            part.zero_()
        head.position.normal_()
    blind = content_agreement(head, backbone, images(backbone, 6), worth)
    assert blind["content_match"].tolist() == pytest.approx([1.0] * 6)


def test_what_was_scored_once_stands_in_every_shared_state(tmp_path: Path) -> None:
    backbone: Any = tiny("mar", block_size=1)
    shape = {"network": "orderhead", "dim": 16, "stem": 1, "heads": 2, "dropout": 0.0, "visible_states": True}
    torch.manual_seed(0)
    path, data = tmp_path / "head.safetensors", images(backbone, 4)
    head = new_planner(PlannerConfig.for_backbone(backbone, **shape))
    save_planner(path, head, {"agent": {"name": "ste"}, "budgets": [1], "objective": "context", "seed": 0})
    order = torch.arange(16).repeat(4, 1)
    found = {}
    for mode, length in {"@fast": 5, "": 5, "@fast, empty": 0}.items():
        states = {
            "image": torch.arange(4),
            "order": order,
            "length": torch.full((4,), length),
            "visible": order < length,
        }
        protocol: Any = SimpleNamespace(
            states=TensorDict(states, [4]), backbone=backbone, data=data, seed=0, device="cpu"
        )
        named = make_policy(f"{path}{mode.partition(',')[0]}", backbone)
        found[mode] = first_choices(protocol, named)[1]
    assert torch.equal(found["@fast"], found["@fast, empty"])  # type: ignore[arg-type]
    assert not torch.allclose(found["@fast"], found[""])  # type: ignore[arg-type]


def test_entropy_and_ranks_are_centred_targets_in_standard_deviations() -> None:
    labels = tiny_labels()
    geometry, hidden = BlockGrid(6, 6, 2), ~labels["visible"]
    entropy, spread = score_targets(labels, geometry, Config(target="entropy"))
    assert torch.allclose(entropy[hidden] * spread + labels["entropy"][hidden].mean(), labels["entropy"][hidden])
    config = Config(target="ranks", teacher="raster")
    worth = -torch.arange(9.0).expand(len(labels), -1)
    ranks, _ = score_targets(labels, geometry, config, worth)
    assert ranks[hidden].mean().abs() < 1e-5 and ranks[hidden].std() == pytest.approx(1, rel=1e-4)
    assert (ranks.diff(dim=1) < 0).all()
    for wrong in ({"target": "ranks"}, {"teacher": "raster"}):
        with pytest.raises(ValueError, match="target ranks, and no other, has one"):
            Config(**wrong)  # type: ignore[arg-type]


def test_a_teacher_ranks_the_blocks_in_the_order_of_its_own_play() -> None:
    backbone = load_backbone("digits")
    setup = Setup(backbone=backbone, backbone_name="digits", backbone_path=None, data="digits",
                  planner=PlannerConfig.for_backbone(backbone))  # fmt: skip
    first = replace(load_split("digits", "planner").first(8), identity=None)
    named = make_policy("high_entropy", backbone)
    rollout = roll_out(
        NextBlockCore(backbone, first, 8, CoreConfig()), named.policy, torch.Generator(), torch.arange(8)
    )
    ranks = teacher_ranks(setup, "high_entropy", images=8)
    assert torch.equal(ranks.long(), rollout.order.argsort(1))


def test_a_suite_hands_on_what_it_trained(tmp_path: Path) -> None:
    given = ["agent=bc", "agent.target=ranks", "agent.teacher='trained:mine'"]
    training = compose("train", given)
    assert taught(training, {"mine": "a.safetensors"}).agent.teacher == "a.safetensors"
    assert taught(compose("train", ["agent=bc"]), {}).agent.teacher is None
    with pytest.raises(ValueError, match="no run before it has name=mine; there are yours"):
        taught(training, {"yours": "b.safetensors"})


def test_the_suite_composes_with_every_row() -> None:
    suite = compose("reproduce", ["suite=orderhead", "backbone.name=a.safetensors"])
    names = [row[0] for row in suite.runs]
    assert len(set(names)) == len(names) and suite.labels.kind == "classifier"
    for row in suite.runs:
        compose("train", list(row))
