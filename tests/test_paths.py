"""A path is no language: every command works in a folder whose name holds what means something elsewhere."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from safetensors.torch import save_file
from timm.models import save_for_hf

from orderrl import compose
from orderrl.agents.policies import RankingPolicy
from orderrl.agents.registry import make_policy
from orderrl.analyze import analyze
from orderrl.backbones import load_backbone, save_backbone
from orderrl.compare import main as compare_main
from orderrl.data import load_split
from orderrl.evaluate import evaluate
from orderrl.evaluation.runs import open_evaluations
from orderrl.generate import generate
from orderrl.metrics.images import save_images
from orderrl.reproduce import reproduce
from orderrl.rollouts import rollouts
from orderrl.runtime.config import quoted
from orderrl.tokenize import tokenize
from orderrl.train import train
from tests.backbones.families import CAUSAL, tiny
from tests.helpers import run_command, tiny_backbone
from tests.tokenizers.helpers import image_folder, save_tiny_vq

NASTY = "spaced_jane@example.org:a=b, c [d] {e} (f) 'g' \"h\" ünï字 %i $j #k?&|;!*~`^\\l.safetensors@4"
SMALL = ["labels.contexts=48"]
SHAPE = ["planner.dim=16", "planner.stem=1", "planner.heads=2"]
SMALL_PLANNER = [*SMALL, *SHAPE]
SMALL_EVAL = [
    *(*SMALL, "eval.images=4", "eval.samples=8", "eval.states=8", "eval.reference_images=2", "eval.resamples=20"),
    *("eval.token_raster=[]", "eval.lookahead_states=null", "eval.sampled=[]", "eval.real_images=8"),
    *("eval.classifier=null", "eval.distance_resamples=0", "eval.kid_subsets=1", "eval.policies=[raster]"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("paths") / NASTY
    home.mkdir()
    save_backbone(home / "tiny.safetensors", tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    return home


def configure(home: Path, command: str, *overrides: str, **paths: Path | str) -> DictConfig:
    """A config as the command line gives it, with all paths in the folder."""
    where = {"backbone.name": home / "tiny.safetensors", "output_dir": home / "runs", "cache_dir": home / "cache"}
    quotes = [f"{key}={quoted(str(path))}" for key, path in {**where, **paths}.items()]
    return compose(command, ["backbone=digits", *overrides, *quotes])


@pytest.fixture(scope="module")
def planner(home: Path) -> Path:
    return train(configure(home, "train", *SMALL_PLANNER, "agent=bc", "agent.steps=8", "agent.evaluate_every=4"))


def test_planners_are_trained_from_and_imitated_there(home: Path, planner: Path) -> None:
    small = [*SMALL_PLANNER, "agent.iterations=1", "agent.num_envs=8", "agent.epochs=1", "agent.group_size=4"]
    ppo = ["agent=ppo", "agent.frames_per_batch=128", "agent.minibatch_size=64", "agent.critic_warmup=0"]
    start: dict[str, Any] = {"agent.start": planner}
    assert train(configure(home, "train", *small, *ppo, **start)).is_file()
    imitation = [*SHAPE, "agent=imitation", "agent.imitation.steps=2", "agent.imitation.num_envs=4"]
    policy: dict[str, Any] = {"agent.policy": f"{planner}@4"}
    assert train(configure(home, "train", *imitation, **policy)).is_file()


@pytest.mark.parametrize(("prefix", "schedule", "budgets"), [("", "", (1,)), ("", "@4", (4,)), ("spaced_", "@2", (2,))])
def test_a_planner_there_is_a_policy_of_every_command(
    prefix: str, schedule: str, budgets: tuple[int, ...], home: Path, planner: Path
) -> None:
    spec = f"{prefix}{planner}{schedule}"
    named = make_policy(spec, load_backbone(str(home / "tiny.safetensors")))
    assert named.budgets == budgets and isinstance(named.policy, RankingPolicy) == bool(schedule)
    assert (generate(configure(home, "generate", *SMALL, "n=2", policy=spec)) / "images.png").is_file()
    assert rollouts(configure(home, "rollouts", *SMALL, "n=2", policy=spec)).is_dir()


def test_evaluations_there_are_made_analyzed_compared_and_ranked(home: Path, planner: Path) -> None:
    save_images(
        torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), home / "real images", torch.tensor([0, 0, 1, 1])
    )
    reference: dict[str, Any] = {"eval.reference": home / "real images"}
    config = configure(home, "evaluate", *SMALL_EVAL, **reference)
    config.eval.planners = ["newest", f"spaced_{planner}@4"]
    runs = [evaluate(config), evaluate(config)]
    rows = [row.row["policy"] for row in open_evaluations([str(runs[0])])[0].rows]
    assert {"raster", "bc_utility_r2", "spaced_bc_utility_r2@4"} <= set(rows)
    arguments = [f"a={runs[0]}", f"b=c={runs[1]}"]
    assert [run.name for run in open_evaluations(arguments)] == ["a", "b=c"]
    for options in ([], ["--rank", "gain_auc"]):
        assert compare_main([*arguments, *options, "--output-dir", str(home / "runs")]) == 0
    small = [*SMALL_EVAL, "injected=[1]", "headroom=null", "eval.samples=0", "eval.features=null"]
    config = configure(home, "analyze", *small)
    config.eval.planners = [str(planner)]
    assert (analyze(config) / "analysis.json").is_file()


def test_a_suite_is_trained_and_evaluated_there(home: Path) -> None:
    suite = configure(home, "reproduce", *SMALL_EVAL, "seeds=[0]", "eval.samples=0")
    suite.runs = [[*SMALL_PLANNER, "agent=bc", "agent.steps=2", "agent.evaluate_every=2"]]
    suite.eval.features = None
    assert (reproduce(suite) / "results.json").is_file()


def test_token_sets_and_tokenisers_lie_there(home: Path) -> None:
    weights = save_tiny_vq(home / "tokenizer.safetensors")
    paths: dict[str, Any] = {"data.root": image_folder(home / "images", per_class=10), "tokenizer.path": weights}
    quotes = [f"{key}={quoted(str(path))}" for key, path in {**paths, "output": home / "set"}.items()]
    tokenize(compose("tokenize", ["data=folder", "data.image_size=8", "tokenizer=small", *quotes]))
    config = compose("pretrain", ["data=tokens", f"data.path={quoted(str(home / 'set'))}"])
    data = load_split(config.data.name, "test")
    assert data.name == f"tokens:{home / 'set'}" and data.images(data.tokens).shape[1:] == (3, 8, 8)


def test_published_weights_and_their_shards_lie_there(home: Path) -> None:
    state = tiny("randar", 4, 4, 1).state_dict()
    save_file(state, home / "shard.safetensors")
    index = {"weight_map": dict.fromkeys(state, "shard.safetensors")}
    (home / "w.safetensors.index.json").write_text(json.dumps(index))
    shape = CAUSAL | {"height": 4, "width": 4, "block_size": 2, "multiple_of": 32}
    for name in ("shard.safetensors", "w.safetensors.index.json"):
        assert load_backbone("randar_l", home / name, shape=shape).geometry.num_blocks == 4


def test_feature_extractors_lie_there(home: Path, planner: Path) -> None:
    model: Any = timm.create_model("test_resnet", num_classes=10)
    torch.save({"state_dict_ema": model.state_dict()}, home / "own.pth")
    save_for_hf(model, str(home / "folder"))
    rows = {}
    for name in (f"timm:test_resnet:{home / 'own.pth'}", f"timm:local-dir:{home / 'folder'}"):
        named: dict[str, Any] = {"eval.features": name, "eval.classifier": name}
        config = configure(home, "evaluate", *SMALL_EVAL, "eval.planners=[]", **named)
        config.eval.sampled = ["raster"]
        rows[name] = open_evaluations([str(evaluate(config))])[0].rows[0].row
    assert all(row["features"] == name and row["frechet_distance"] is not None for name, row in rows.items())


def test_the_command_line_takes_it_in_quotes_and_says_so(
    home: Path, planner: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"cache_dir": home / "cache", "output_dir": home / "runs", "backbone.name": home / "tiny.safetensors"}
    given = ["backbone=digits", "n=2", *SMALL, *(f"{key}={quoted(str(value))}" for key, value in keys.items())]
    monkeypatch.chdir(home)
    quotes = quoted(f"{planner}@4")
    assert run_command("generate", [*given, f"policy={quotes}"], monkeypatch) == 0
    capsys.readouterr()
    assert run_command("generate", [*given, f"policy={planner}"], monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "special characters stands in quotes: 'policy='" in line


def test_what_is_quoted_is_read_back_as_it_was() -> None:
    source, parser = random.Random(0), OverridesParser.create()
    for _ in range(500):
        value = "".join(source.choices([*NASTY, "\\", "'", "\\'", "\n", "\t"], k=12))
        assert parser.parse_override(f"cache_dir={quoted(value)}").value() == value
    assert compose("generate", [f"cache_dir={quoted(NASTY)}"]).cache_dir == NASTY


def test_a_name_of_another_key_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"stands for another key of the configuration: no path can hold it"):
        compose("generate", [f"cache_dir={quoted('/a${b}')}"])
