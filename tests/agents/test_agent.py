"""Agents by name: a module from outside is trained, found again and continued like the package's own."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from orderrl import compose
from orderrl.agents.agent import AGENTS, find_agent, register_agent
from orderrl.backbones import save_backbone
from orderrl.factory import section, typed
from orderrl.planner import load_planner
from orderrl.train import train
from tests.helpers import tiny_backbone
from tests.jobs import Enough


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AGENTS, "members", dict(AGENTS.members))
    register_agent("toy", "tests.agents.toy_agent:AGENT")


def configure(home: Path, **agent: Any) -> DictConfig:
    path = home / "tiny.safetensors"
    if not path.exists():
        save_backbone(path, tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    places = [f"backbone.name={path}", f"output_dir={home / 'runs'}", f"cache_dir={home / 'cache'}"]
    small = ["labels.contexts=12", "planner.dim=16", "planner.stem=1", "checkpoint_seconds=0"]
    config = compose("train", ["backbone=digits", *small, *places])
    OmegaConf.set_struct(config, False)
    config.agent = {"name": "toy"} | agent
    return config


def losses(planner: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (planner.parent / "metrics.jsonl").read_text().splitlines()]


def test_a_module_of_ones_own_is_trained_and_found_again(
    toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(configure(tmp_path))
    assert load_planner(first)[1]["agent"] == {"name": "toy", "steps": 5, "favourite": 3}
    found = losses(first)
    assert len(found) == 5 and found == sorted(found, reverse=True)
    assert "learning: 5/5 steps" in capsys.readouterr().out
    assert train(configure(tmp_path)).read_bytes() == first.read_bytes()
    assert "cached; reuse=false trains again" in capsys.readouterr().out
    assert train(configure(tmp_path, favourite=4)).read_bytes() != first.read_bytes()


def test_it_continues_after_an_interruption_and_logs_the_whole_training(
    toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(configure(tmp_path / "whole"))
    step = torch.optim.SGD.step
    calls: list[int] = []

    def stop(self: torch.optim.SGD) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise Enough
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", stop)
    with pytest.raises(Enough):
        train(configure(tmp_path / "cut"))
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    resumed = train(configure(tmp_path / "cut"))
    one, other = (load_planner(path)[0].state_dict() for path in (whole, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert losses(resumed) == losses(whole)


def test_wrong_settings_and_names_are_refused(toy: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        train(configure(tmp_path, steps=0))
    with pytest.raises(ValueError, match=r"agent\.name='nobody' is unknown; choose one of bc, .*, toy"):
        train(configure(tmp_path, name="nobody"))
    register_agent("toy", AGENTS["toy"])  # the same again is the same agent
    with pytest.raises(ValueError, match="agent 'bc': the package has a meaning for the name; choose another name"):
        register_agent("bc", "tests.agents.toy_agent:AGENT")


@pytest.mark.parametrize("name", AGENTS)
def test_the_defaults_of_an_agent_are_those_of_its_config(name: str) -> None:
    """Of every key, nested ones too; none of them lacks a meaning."""
    agent = section(compose("train", [f"agent={name}"]), "agent", "name")
    kind = find_agent(name).config
    assert typed(kind, agent) == kind()
    assert {item.name for item in fields(kind)} == set(agent)
    assert all(item.metadata["meaning"] for item in fields(kind))


def test_a_wrong_value_of_a_nested_group_is_named_with_the_group() -> None:
    with pytest.raises(ValueError, match=r"search\.chains must be at least 1, got 0"):
        typed(find_agent("schedule").config, {"search": {"chains": 0}})
