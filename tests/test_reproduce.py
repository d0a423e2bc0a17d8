"""Suites: what their planners are trained with."""

from __future__ import annotations

from importlib import resources

import pytest

from orderrl import compose
from orderrl.configs.schema import ADAPTIVE
from orderrl.reproduce import training_config

SUITES = sorted(
    part.name.removesuffix(".yaml") for part in resources.files("orderrl.configs").joinpath("suite").iterdir()
)


@pytest.mark.parametrize("suite", SUITES)
def test_every_planner_of_a_suite_is_trained_with_its_backbone_and_labels(suite: str) -> None:
    config = compose("reproduce", [f"suite={suite}"])
    for overrides in config.runs:
        wanted = training_config(config, overrides, seed=3)
        assert wanted.seed == 3 and wanted.backbone == config.backbone and wanted.data == config.data
        changed = {override.partition("=")[0] for override in overrides}
        needs_none = wanted.agent.name in ADAPTIVE
        assert wanted.labels == ({} if needs_none else config.labels) or changed & {"labels", "labels.contexts"}


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
