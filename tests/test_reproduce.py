"""Suites: what their planners are trained with."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from orderrl import compose
from orderrl.backbones.recipe import BackboneRecipe
from orderrl.configs.schema import ADAPTIVE
from orderrl.factory import with_values
from orderrl.reproduce import reproduce, specialist_configs, training_config
from orderrl.training import BODY

SUITES = sorted(
    part.name.removesuffix(".yaml") for part in resources.files("orderrl.configs").joinpath("suite").iterdir()
)


@pytest.mark.parametrize("suite", SUITES)
def test_every_planner_of_a_suite_is_trained_with_its_backbone_and_labels(suite: str) -> None:
    config = compose("reproduce", [f"suite={suite}"])
    for overrides in config.runs:
        wanted = training_config(config, overrides, seed=3)
        assert wanted.seed == 3 and wanted.backbone == config.backbone and wanted.data == config.data
        changed = {override.partition("=")[0].partition(".")[0] for override in overrides}
        needs_none = wanted.agent.name in ADAPTIVE
        assert wanted.labels == ({} if needs_none else config.labels) or "labels" in changed


@pytest.mark.parametrize(
    ("overrides", "kind", "contexts", "samples"),
    [
        ([], "pointwise", 6000, 1),
        (["labels=kl"], "kl", 6000, 1),
        (["labels.kind=expected", "labels.samples=2"], "expected", 6000, 2),
        (["labels.contexts=9"], "pointwise", 9, 1),
    ],
    ids=str,
)
def test_a_row_changes_only_the_labels_that_it_names(
    overrides: list[str], kind: str, contexts: int, samples: int
) -> None:
    labels = training_config(compose("reproduce", ["suite=canvas"]), overrides, seed=0).labels
    assert (labels.kind, labels.contexts, labels.samples) == (kind, contexts, samples)


def test_specialists_learn_the_orders_of_their_own_seeds_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planners come first; `{0}` is the first one of the same seed, and all of them are evaluated together."""
    asked: list[tuple[int, str]] = []
    names: list[str] = []
    seen: list[DictConfig] = []

    def train(config: DictConfig) -> Path:
        return Path(f"runs/{config.seed}.safetensors")

    def find_or_train(recipe: BackboneRecipe, *given: Any) -> Path:
        asked.append((recipe.seed, recipe.config.order))
        names.append(given[2])
        return Path(f"specialist{len(asked)}.safetensors")

    def evaluate(config: DictConfig) -> Path:
        seen.append(config)
        return Path()

    monkeypatch.setattr("orderrl.reproduce.train", train)
    monkeypatch.setattr("orderrl.reproduce.evaluate", evaluate)
    monkeypatch.setattr(BackboneRecipe, "find_or_train", find_or_train)
    further = ["backbone=digits", "training=further", "training.start=digits"]
    rows = [[*further, f"training.order={order}"] for order in ("raster", "'spaced_{0}@4'")]
    config = compose("reproduce", ["suite=orders", "seeds=[0,4]", "runs=[['agent=bc']]"])
    reproduce(with_values(config, {"specialists": rows}))
    planners = [f"runs/{seed}.safetensors" for seed in (0, 4)]
    assert asked == [(0, "raster"), (0, f"spaced_{planners[0]}@4"), (4, "raster"), (4, f"spaced_{planners[1]}@4")]
    assert names == ["raster", "spaced_0.safetensors@4", "raster", "spaced_4.safetensors@4"]  # in keys, without folders
    assert list(seen[0].eval.planners) == planners
    assert list(seen[0].eval.specialists) == [f"specialist{i}.safetensors" for i in range(1, 5)]


def test_a_planner_with_a_body_of_its_own_is_evaluated_with_that_body(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[DictConfig] = []

    def train(config: DictConfig) -> Path:
        folder = tmp_path / str(config.agent.name)
        folder.mkdir()
        if config.agent.name == "joint":
            (folder / BODY).touch()
        return folder / "planner.safetensors"

    monkeypatch.setattr("orderrl.reproduce.train", train)

    def evaluate(config: DictConfig) -> Path:
        seen.append(config)
        return Path()

    monkeypatch.setattr("orderrl.reproduce.evaluate", evaluate)
    reproduce(compose("reproduce", ["suite=orders", "specialists=[]", "runs=[['agent=bc'],['agent=joint']]"]))
    assert list(seen[0].eval.planners) == [str(tmp_path / "bc" / "planner.safetensors")]
    assert list(seen[0].eval.specialists) == [str(tmp_path / "joint" / BODY)]


def test_a_specialist_is_fine_tuned_from_the_backbone_of_the_suite() -> None:
    config = compose("reproduce", ["suite=orders", "backbone=canvas", "data=canvas"])
    for made in specialist_configs(config, 0, ["planner.safetensors"] * len(config.runs)):
        assert (made.backbone.name, made.training.start, made.data.name) == ("canvas",) * 3


def test_a_specialist_of_a_run_that_is_not_there_is_refused() -> None:
    rows = [["backbone=digits", "training.order='{1}'"]]
    config = with_values(compose("reproduce", ["suite=orders"]), {"specialists": rows})
    with pytest.raises(ValueError, match="name a run that the suite lacks"):
        list(specialist_configs(config, 0, ["planner.safetensors"]))
    with pytest.raises(ValueError, match="runs and specialists must not both be empty"):
        compose("reproduce", ["suite=orders", "runs=[]", "specialists=[]"])
