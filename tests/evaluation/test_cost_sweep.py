"""`eval=cost`: one command evaluates every policy at several budgets, and planners of several step costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orderrl import compose
from orderrl.agents.registry import make_policy, tell_apart
from orderrl.agents.spec import PolicySpec
from orderrl.backbones import load_backbone, save_backbone
from orderrl.evaluate import evaluate
from orderrl.evaluation.policies import chosen_policies, schedules
from orderrl.evaluation.settings import eval_config
from orderrl.factory import section, setup_of
from orderrl.planner import OrderHead, PlannerConfig, save_planner
from orderrl.report.cost import cost_panels
from tests.helpers import tiny_backbone


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("cost")
    backbone = tiny_backbone(8, 8, vocab_size=17, num_classes=10)
    save_backbone(home / "tiny.safetensors", backbone, {})
    for name, step_cost, budgets in (("one", 0.0, [1]), ("cheap", 0.1, [1, 2, 4]), ("dear", 1.0, [1, 2, 4])):
        planner = OrderHead(PlannerConfig(16, 32, 10, len(budgets), dim=32, stem=1))
        agent = {"name": "bc", "target": "utility"} if name == "one" else {"name": "ppo"}
        known = {"agent": agent, "objective": "likelihood", "budgets": budgets, "seed": 0}
        save_planner(home / f"{name}.safetensors", planner, known | {"env": {"step_cost": step_cost}})
    return home


@pytest.mark.parametrize(
    ("spec", "budgets", "expected"),
    [
        ("raster", (1,), ["raster", "raster@2", "raster@4"]),
        ("raster@3", (3,), ["raster@3"]),
        ("oracle", (1,), ["oracle"]),
        ("lookahead:4", (1,), ["lookahead:4"]),
        ("my.module:policy", (1,), ["my.module:policy"]),
        ("C:/planner.safetensors", (1,), [f"C:/planner.safetensors{end}" for end in ("", "@2", "@4")]),
        ("planner.safetensors", (1, 2, 4), ["planner.safetensors"]),
    ],
)
def test_schedules_of_a_sweep(spec: str, budgets: tuple[int, ...], expected: list[str]) -> None:
    assert list(map(str, schedules(PolicySpec.parse(spec), budgets, [1, 2, 4]))) == expected
    assert list(map(str, schedules(PolicySpec.parse(spec), budgets, []))) == [spec]


def test_a_swept_policy_stands_once_and_is_sampled_at_every_budget(home: Path) -> None:
    overrides = [
        "eval.policies=[raster,raster@2,oracle,random]",
        "eval.planners=[]",
        "eval.sweep=[1,2]",
        "eval.sampled=[raster,random@2]",
    ]
    config = compose("evaluate", [*overrides, "backbone=digits", f"backbone.name={home / 'tiny.safetensors'}"])
    backbone = load_backbone(config.backbone.name)
    found = chosen_policies(eval_config(section(config, "eval"), "digits"), setup_of(config, backbone))
    sampled = {"raster": True, "raster@2": True, "oracle": False, "random": False, "random@2": True}
    assert {named.name: scored for named, scored in found} == sampled and len(found) == len(sampled)


def test_only_planners_of_several_step_costs_are_told_apart(home: Path) -> None:
    backbone = load_backbone(str(home / "tiny.safetensors"))
    cheap, dear = (make_policy(str(home / f"{name}.safetensors"), backbone) for name in ("cheap", "dear"))
    assert [p.step_cost for p in (cheap, dear)] == [0.1, 1.0]
    assert [p.name for p in tell_apart([cheap, dear])] == [
        "ppo_likelihood_r0@cost0.1",
        "ppo_likelihood_r0@cost1",
    ]
    seeds = [cheap, replace(cheap, seed=1)]
    assert tell_apart(seeds) == seeds


def test_one_command_gives_curves_of_every_policy(home: Path) -> None:
    planners = ",".join(str(home / f"{name}.safetensors") for name in ("one", "cheap", "dear"))
    small = ["eval.images=6", "eval.samples=12", "eval.states=8", "eval.resamples=100", "labels.contexts=16"]
    small += ["eval.kid_subsets=2", "eval.distance_resamples=5"]
    policies = ["eval.policies=[raster]", f"eval.planners=[{planners}]", "eval.sweep=[1,2]"]
    folders = [f"output_dir={home / 'runs'}", f"cache_dir={home / 'cache'}"]
    config = compose(
        "evaluate",
        ["eval=cost", *small, *policies, *folders, "backbone=digits", f"backbone.name={home / 'tiny.safetensors'}"],
    )
    folder = evaluate(config)
    rows = json.loads((folder / "results.json").read_text())["rows"]
    names = {row["policy"] for row in rows}
    orders = {f"{name}{end}" for name in ("raster", "bc_utility_r0") for end in ("", "@2")}
    assert names == orders | {"ppo_likelihood_r0@cost0.1", "ppo_likelihood_r0@cost1", "real images"}
    assert all(row["frechet_distance"] is not None for row in rows)
    for cost in ("steps", "seconds_per_image"):
        panels = cost_panels(rows, cost)
        assert set(panels) == {"decode_nll", "frechet_distance", "accuracy"}
        for points in panels.values():
            assert {point.family for point in points} == {"raster", "bc_utility_r0", "ppo_likelihood_r0"}
    assert (folder / "figures" / "quality_steps.svg").is_file()


def test_the_config_sweeps_all_of_its_policies_at_1_2_and_4() -> None:
    config = compose("evaluate", ["eval=cost"])
    assert list(config.eval.sweep) == [1, 2, 4] and list(config.eval.sampled) == list(config.eval.policies)
