"""What a planner starts from: which clone is taken, which is passed over, and why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orderrl import training
from orderrl.backbones import save_backbone
from orderrl.runtime.config import compose
from orderrl.train import train
from tests.helpers import tiny_backbone

SMALL = ["backbone=digits", "labels.contexts=48", "planner.dim=16", "planner.stem=1", "planner.heads=2"]
AGENTS = {
    "ppo": [
        "agent.iterations=1",
        "agent.num_envs=8",
        "agent.frames_per_batch=128",
        "agent.epochs=1",
        "agent.critic_warmup=0",
        "agent.group_size=1",
    ],
    "grpo": ["agent.iterations=1", "agent.num_envs=8", "agent.episodes=8", "agent.epochs=1"],
    "joint": [
        *("agent.steps=2", "agent.batch_size=4", "agent.contexts=8", "agent.evaluate_every=2"),
        *("agent.held_out_images=2", "agent.held_out_contexts=4"),
    ],
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a backbone; clones that other agents ask for are trained for 4 steps."""
    start_of = training._start_of

    def short(config: Any) -> tuple[str, Any, str]:
        name, clone, what = start_of(config)
        return name, replace(clone, steps=4, evaluate_every=4), what

    monkeypatch.setattr(training, "_start_of", short)
    save_backbone(tmp_path / "tiny.safetensors", tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    return tmp_path


def run(home: Path, agent: str, *overrides: str) -> Path:
    """Train one; the names of its files are those of the cache."""
    where = [f"backbone.name={home / 'tiny.safetensors'}", f"output_dir={home / 'runs'}", f"cache_dir={home / 'cache'}"]
    return train(compose("train", [f"agent={agent}", *SMALL, *AGENTS.get(agent, []), *overrides, *where]))


def cached(home: Path) -> set[Path]:
    return set((home / "cache" / "planners").glob("*/planner.safetensors"))


@pytest.mark.parametrize("agent", AGENTS)
def test_the_start_and_what_was_passed_over_are_printed(
    agent: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(home, "bc", "agent.steps=3", "agent.evaluate_every=3", "planner.dim=32", "labels.contexts=40")
    (mine,) = cached(home)
    capsys.readouterr()
    run(home, agent, "agent.start=newest", "planner.dim=32")
    said = capsys.readouterr().out
    assert f"{agent}: starts from the newest clone, {mine}" in said and "passes over" not in said
    assert len(cached(home)) == 2

    capsys.readouterr()
    run(home, agent, f"agent.start={mine}", "planner.dim=32", "seed=1")
    assert f"{agent}: starts from {mine}" in capsys.readouterr().out


def test_every_setting_that_differs_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(home, "bc", "agent.steps=3", "agent.evaluate_every=3", "labels.contexts=40", "name=mine")
    (mine,) = cached(home)
    capsys.readouterr()
    run(home, "ppo")
    said = capsys.readouterr().out
    (passed,) = [line for line in said.splitlines() if "passes over" in line]
    assert passed.startswith(f"ppo: passes over the newest in the cache, {mine} (")
    for part in ("agent.steps=3 there, 4 here", "labels.contexts=40 there, 48 here", "name=mine there, null here"):
        assert part in passed
    assert passed.endswith("agent.start=newest takes it")
    (start,) = [line for line in said.splitlines() if "starts from the clone of this config" in line]
    assert "target utility, trained now: " in start
    path = Path(start.rpartition("now: ")[2])
    assert path in cached(home) and path != mine

    run(home, "ppo", "seed=0", "agent.iterations=2")
    said = capsys.readouterr().out
    assert f"target utility, cached: {path}" in said and "passes over" not in said


def test_no_clone_at_all_is_refused(home: Path) -> None:
    with pytest.raises(
        ValueError, match=r"agent.start=newest: no clone .* train one with `python -m orderrl.train agent=bc`"
    ):
        run(home, "ppo", "agent.start=newest")
