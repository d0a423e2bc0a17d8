"""One planner for a range of step costs, from training to the curve of the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from tensordict import TensorDict

from orderrl import compose
from orderrl.backbones import save_backbone
from orderrl.evaluate import evaluate
from orderrl.planner import load_planner
from orderrl.report.cost import cost_panels
from orderrl.rollouts import rollouts
from orderrl.runtime.cache import Cache
from orderrl.train import train
from tests.helpers import tiny_backbone

SHAPE = ["planner.dim=16", "planner.stem=1", "planner.heads=2"]
RANGE = "env.step_cost=[0.5,2.0]"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("range")
    save_backbone(home / "tiny.safetensors", tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    return home


def configure(home: Path, command: str, *overrides: str) -> DictConfig:
    places = [
        f"output_dir={home / 'runs'}",
        f"cache_dir={home / 'cache'}",
        f"backbone.name={home / 'tiny.safetensors'}",
    ]
    labels = [] if "agent=schedule" in overrides else ["labels.contexts=16"]
    return compose(command, ["backbone=digits", *overrides, *places, *labels])


@pytest.fixture(scope="module")
def schedule(home: Path) -> Path:
    search = [f"agent.search.{value}" for value in ("episodes=8", "refinements=0", "moves=10", "epochs=1")]
    return train(configure(home, "train", "agent=schedule", *SHAPE, *search, "agent.imitation.steps=3", RANGE))


@pytest.fixture(scope="module")
def planner(home: Path, schedule: Path) -> Path:
    small = ["agent.iterations=2", "agent.num_envs=8", "agent.frames_per_batch=128", "agent.epochs=1"]
    return train(
        configure(home, "train", "agent=ppo", "env=likelihood", *SHAPE, *small, RANGE, f"agent.start={schedule}")
    )


def test_a_schedule_is_searched_at_the_geometric_mean(schedule: Path) -> None:
    head, description = load_planner(schedule)
    assert description["env"]["step_cost"] == 1.0 and head.config.step_cost_range is None


def test_ppo_makes_a_planner_that_sees_the_cost(home: Path, planner: Path) -> None:
    head, description = load_planner(planner)
    assert head.config.step_cost_range == (0.5, 2.0) and description["env"]["step_cost"] == [0.5, 2.0]
    found = Cache(home / "cache").newest("planners", lambda known: known["env"]["step_cost"] == [0.5, 2.0])
    assert found is not None and (found / "planner.safetensors").read_bytes() == planner.read_bytes()


def test_an_evaluation_draws_one_curve_of_it(home: Path, planner: Path) -> None:
    small = ["eval.images=6", "eval.samples=0", "eval.features=null", "eval.states=8", "eval.resamples=100"]
    policies = ["eval.policies=[raster,'random@i<9/1,2,8']", f"eval.planners=[{planner}]"]
    folder = evaluate(configure(home, "evaluate", *small, *policies, "eval.token_raster=[]"))
    rows = {row["policy"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}
    names = [f"ppo_likelihood_conditioned_r2@cost{cost}" for cost in ("0.5", "1", "2")]
    assert list(rows) == [*names, "raster", "random@i<9/1,2,8"]
    assert [row["step_cost"] for row in rows.values()] == [0.5, 1.0, 2.0, None, None]
    assert [row["family"] for row in rows.values()] == [*["ppo_likelihood_conditioned_r2"] * 3, "raster", "random"]
    points = cost_panels([*rows.values(), rows["raster"] | {"policy": "raster@2", "steps": 8.0}], "steps")["decode_nll"]
    assert [point.family for point in points if "conditioned" in point.policy] == ["ppo_likelihood_conditioned_r2"] * 3


def test_its_episodes_can_be_recorded(home: Path, planner: Path) -> None:
    """It acts at every episode's own cost, which stands in the transitions."""
    settings = [f"policy={planner}", "n=6", "env=likelihood", RANGE, f"output={home / 'transitions'}"]
    found = TensorDict.load_memmap(rollouts(configure(home, "rollouts", *settings)))
    costs = [found["step_cost"][found["episode"] == episode].unique() for episode in range(6)]
    assert all(len(cost) == 1 for cost in costs) and len(torch.cat(costs).unique()) == 6
    assert torch.equal(found["next", "step_cost"], found["step_cost"])
    with pytest.raises(ValueError, match=r"\(0.1, 2.0\) reaches beyond the range .* \(0.5, 2.0\)"):
        rollouts(configure(home, "rollouts", *settings[:3], "env.step_cost=[0.1,2.0]"))


@pytest.mark.parametrize(("limits", "message"), [("[0,1]", "0 < low < high"), ("[2,1]", "0 < low < high")])
def test_impossible_ranges_are_refused_by_the_command(home: Path, limits: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(configure(home, "train", "agent=schedule", *SHAPE, f"env.step_cost={limits}"))


def test_minari_keeps_the_costs(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The space of the recovered environment holds them, and an episode can be played again at its own."""
    minari = pytest.importorskip("minari", reason="Minari is not installed (pip install -e '.[minari]')")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    settings = ["policy=random", "n=3", "env=likelihood", "env.budgets=[1]", RANGE, "minari=tiny/costs-v0"]
    rollouts(configure(home, "rollouts", *settings))
    dataset = minari.load_dataset("tiny/costs-v0")
    environment = dataset.recover_environment()
    assert dataset.observation_space == environment.observation_space
    for number, episode in enumerate(dataset.iterate_episodes()):
        environment.reset(options={"index": number, "step_cost": episode.observations["step_cost"][0]})
        rewards = [float(environment.step(action)[1]) for action in episode.actions]
        assert episode.rewards == pytest.approx(rewards, abs=1e-5)
