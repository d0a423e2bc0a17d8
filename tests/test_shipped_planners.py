"""The planners that ship with the package, and planners and backbones on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orderrl import compose
from orderrl.agents.play import roll_out
from orderrl.agents.registry import make_policy
from orderrl.agents.spec import PolicySpec
from orderrl.backbones import load_backbone, save_backbone, with_block_size
from orderrl.data import load_split
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.evaluation.policies import found_policy, shipped_planner
from orderrl.factory import setup_of
from orderrl.planner import OrderHead, load_planner
from orderrl.runtime import hub
from tests.helpers import tiny_backbone
from tests.hub import put_in_place_of_the_hub

IMAGES = 16


@pytest.mark.parametrize("name", ["digits", "canvas"])
def test_a_shipped_planner_puts_useful_context_first(name: str) -> None:
    backbone, data = load_backbone(name), load_split(name, "test")
    path = shipped_planner(backbone)
    assert path is not None and path.stat().st_size < 2**20

    def gains(policy: str) -> torch.Tensor:
        named = make_policy(policy, backbone)
        core = NextBlockCore(backbone, data, IMAGES, CoreConfig(strict=True), 0)
        return roll_out(core, named.policy, torch.Generator().manual_seed(0), torch.arange(IMAGES)).gain_auc

    assert gains(str(path)).mean() > gains("raster").mean()  # held-out images: the planner learned from others


def test_a_shipped_planner_is_for_its_own_backbone_alone() -> None:
    assert shipped_planner(load_backbone("digits_raster")) is None
    assert shipped_planner(tiny_backbone()) is None
    digits: Any = load_backbone("digits")
    assert shipped_planner(with_block_size(digits, 4)) is None
    with torch.no_grad():
        next(digits.parameters()).add_(1e-3)  # fine-tuned: the same shape
    assert shipped_planner(digits) is None


def test_commands_take_the_shipped_planner_where_none_was_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose("generate", ["backbone=digits", "data=digits", f"cache_dir={tmp_path}"])
    setup = setup_of(config, load_backbone("digits"))
    assert found_policy("newest", setup).path == shipped_planner(setup.backbone)
    assert "taking the one that ships with it" in capsys.readouterr().out


# ---------------------------------------------------------------------- the Hub


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    put_in_place_of_the_hub(root := tmp_path / "hub", monkeypatch)
    return root


def test_a_planner_returns_from_the_hub_as_it_was(online: Path) -> None:
    backbone = load_backbone("digits")
    planner, description = load_planner(str(shipped_planner(backbone)))
    address = planner.push_to_hub("me/digits-order", description, "| policy | gain |\n|---|---|\n| planner | 0.09 |")
    assert address == "https://hub/me/digits-order"
    for source in ("me/digits-order", "hf://me/digits-order", online / "me" / "digits-order"):
        found = OrderHead.from_pretrained(source, backbone)
        assert not found.training
        assert all(torch.equal(value, found.state_dict()[key]) for key, value in planner.state_dict().items())
    spec = PolicySpec.parse("hf://me/digits-order/planner.safetensors@4")
    assert make_policy(spec, backbone).name == "ppo_context_r2@4"
    card = (online / "me" / "digits-order" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: orderrl\n") and "| planner | 0.09 |" in card
    assert "- `data`: digits" in card and "- `agent.name`: ppo" in card
    assert 'OrderHead.from_pretrained("me/digits-order", load_backbone("digits"))' in card
    with pytest.raises(ValueError, match=r"a planner for a backbone of digits \(\w+\) cannot read one of canvas"):
        OrderHead.from_pretrained("me/digits-order", load_backbone("canvas"))  # of the same shape


def test_a_backbone_returns_from_the_hub_as_it_was(online: Path, tmp_path: Path) -> None:
    made = tiny_backbone()
    save_backbone(tmp_path / "backbone.safetensors", made, {"data": "mine", "training": {"steps": 3}})
    hub.push_to_hub(tmp_path / "backbone.safetensors", "me/tiny")
    found: Any = load_backbone("hf://me/tiny")
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in made.state_dict().items())
    card = (online / "me" / "tiny" / "README.md").read_text()
    assert 'load_backbone("hf://me/tiny")' in card and "- `training.steps`: 3" in card and "Results" not in card
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_backbone("hf://me/other")
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a safetensors file"):
        hub.push_to_hub(tmp_path / "x.safetensors", "me/x")
