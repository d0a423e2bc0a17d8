"""Every long command, killed with SIGKILL at random moments, ends with the result that an uninterrupted run gives.

`make test` kills one command of every kind of work twice, `make test-slow` every command twenty times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orderrl import compose
from orderrl.backbones import save_backbone
from orderrl.train import train
from tests.helpers import tiny_backbone
from tests.killing import Case, contents, kill_and_compare, metrics, table, weights
from tests.tokenizers.helpers import image_folder, save_tiny_vq

OFTEN = "checkpoint_seconds=0.05"
LABELS = ["labels.contexts=64", "labels.shard_size=8", "labels.batch_size=8"]
PLANNER = ["planner.dim=32", "planner.stem=1"]
BC = [*LABELS, *PLANNER, "agent=bc", "agent.steps=30", "agent.evaluate_every=10", OFTEN]
PPO = [
    *(*PLANNER, "agent=ppo", "env=likelihood", "agent.iterations=4", "agent.num_envs=8", "agent.frames_per_batch=128"),
    *("agent.minibatch_size=64", "agent.epochs=1", "agent.critic_warmup=1", OFTEN),
]
SCHEDULE = [
    *(*PLANNER, "agent=schedule", "agent.search.episodes=140", "agent.search.moves=20", "agent.search.epochs=1"),
    *("agent.search.refinements=2", "agent.imitation.steps=12", "agent.imitation.num_envs=8", OFTEN),
]
FITTED_Q = [
    *(*PLANNER, "agent=fitted_q", "agent.order=schedule", "agent.search.episodes=140", "agent.search.moves=20"),
    *("agent.search.epochs=1", "agent.search.refinements=1", "agent.images=300", "agent.steps=12", OFTEN),
]
PRETRAIN = [
    *("backbone.model.dim=32", "backbone.model.layers=1", "backbone.model.heads=2", "training.steps=40"),
    *("training.evaluate_every=40", "training.anneal_from=0.4", OFTEN),
]
SPECIALIST = [
    *("backbone.model.dim=32", "backbone.model.layers=2", "backbone.model.heads=2", "backbone.model.dropout=0"),
    *("training.steps=20", "training.evaluate_every=20", "training.views=2", "training.augmentation=1"),
    *("training.rounds=2", OFTEN),
]
STE = [
    *("labels=classifier", "labels.classifier.steps=12", "labels.classifier.dim=16", "labels.classifier.depth=1"),
    *("planner=orderhead_small", "planner.dim=32", "planner.stem=1", "agent=ste", "agent.oracle_coeff=1"),
    *("agent.steps=12", "agent.evaluate_every=6", "agent.batch_size=8", OFTEN),
]
TOKENIZER = [
    *("backbone=none", "data=folder", "tokenizer=small"),
    *("data.image_size=8", "tokenizer.training.steps=30", "tokenizer.training.batch_size=4", OFTEN),
    *("tokenizer.training.evaluate_every=15", "tokenizer.model.codebook_size=16", "tokenizer.model.z_channels=32"),
]
TOKENS = ["data.image_size=8", "data.flips=true", "tokenizer=small", "batch_size=4", "shard_size=4"]
EVALUATION = [
    *("labels.contexts=32", "labels.shard_size=16", "eval.images=12", "eval.samples=20", "eval.states=16"),
    *("eval.reference_images=4", "eval.resamples=50", "eval.kid_subsets=2", "eval.distance_resamples=5"),
    "eval.policies=[raster,random,multiscale@4,fitted]",
    *("eval.sampled=[raster]", "eval.token_raster=[self]", "eval.keep_samples=true"),
]


def plain(overrides: list[str]) -> str:
    """A run of the full table: a list of overrides inside an override."""
    return "[" + ",".join(f"'{part}'" for part in overrides if part not in (*LABELS, OFTEN)) + "]"


def label_files(folder: Path) -> Any:
    return contents(folder / "contexts", "*")


def planner(path: Path) -> Any:
    return weights(path, "planner"), metrics(path.parent)


def backbones(path: Path) -> Any:
    found = [weights(path.parent / name, "backbone") for name in ("backbone.safetensors", "backbone_final.safetensors")]
    return found, metrics(path.parent), contents(path.parent, "results.json")


def backbone(path: Path) -> Any:
    return weights(path, "backbone"), metrics(path.parent), contents(path.parent, "results.json")


def tokenizer(path: Path) -> Any:
    return weights(path, "tokenizer"), metrics(path.parent), contents(path.parent, "results.json")


def token_set(folder: Path) -> Any:
    return contents(folder, "*")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands start from: a backbone, a clone, images, a tokeniser."""
    home = tmp_path_factory.mktemp("inputs")
    save_backbone(home / "tiny.safetensors", tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    places = [f"output_dir={home / 'runs'}", f"cache_dir={home / 'cache'}"]
    clone = train(compose("train", ["backbone=digits", f"backbone.name={home / 'tiny.safetensors'}", *BC, *places]))
    (home / "clone.safetensors").write_bytes(clone.read_bytes())
    image_folder(home / "images", per_class=10)
    save_tiny_vq(home / "vq.safetensors")
    return home


def case(name: str, inputs: Path) -> Case:
    """A command in miniature: a second or three."""
    tiny = ["backbone=digits", f"backbone.name={inputs / 'tiny.safetensors'}"]
    clone, images = inputs / "clone.safetensors", f"data.root={inputs / 'images'}"
    further = [*SPECIALIST, f"training.start={inputs / 'tiny.safetensors'}"]
    ppo = [*PPO, f"agent.start={clone}"]
    suite = [
        *(*tiny, *EVALUATION, OFTEN, "seeds=[0]", f"runs=[{plain(BC)},{plain(ppo)}]"),
        *("eval.policies=[raster,fitted]", "eval.samples=0", "eval.features=null", "eval.token_raster=[]"),
    ]
    return {
        "label": Case("label", "orderrl.label:label", [*tiny, *LABELS, "labels.contexts=160"], label_files),
        "bc": Case("train", "orderrl.train:train", [*tiny, *BC], planner),
        "ppo": Case("train", "orderrl.train:train", [*tiny, *ppo], planner),
        "schedule": Case("train", "orderrl.train:train", [*tiny, *SCHEDULE], planner),
        "fitted_q": Case("train", "orderrl.train:train", [*tiny, *FITTED_Q], planner),
        "pretrain": Case("pretrain", "orderrl.pretrain:pretrain", PRETRAIN, backbones),
        "specialist": Case(
            "pretrain", "orderrl.pretrain:pretrain", [*further, "training.order=confidence:first"], backbone
        ),
        "planner's specialist": Case(
            "pretrain", "orderrl.pretrain:pretrain", [*further, f"training.order={clone}"], backbone
        ),
        "ste": Case("train", "orderrl.train:train", [*tiny, *STE], planner),
        "tokenizer": Case("pretrain", "orderrl.pretrain:pretrain", [images, *TOKENIZER], tokenizer),
        "tokenize": Case(
            "tokenize",
            "orderrl.tokenize:tokenize",
            [images, *TOKENS, f"tokenizer.path={inputs / 'vq.safetensors'}"],
            token_set,
        ),
        "evaluate": Case(
            "evaluate", "orderrl.evaluate:evaluate", [*tiny, *EVALUATION, f"eval.planners=[{clone}]"], table
        ),
        "reproduce": Case("reproduce", "orderrl.reproduce:reproduce", suite, table),
    }[name]


COMMANDS = [
    "label",
    "bc",
    "ppo",
    "schedule",
    "fitted_q",
    "pretrain",
    "specialist",
    "planner's specialist",
    "ste",
    "tokenizer",
    "tokenize",
    "evaluate",
    "reproduce",
]


OFTEN_RUN = ["label", "ppo", "tokenize", "evaluate"]
"""One of every kind of work: pieces, steps, files, rows."""


@pytest.mark.parametrize("name", OFTEN_RUN)
def test_a_command_that_is_killed_twice_ends_with_the_same_result(name: str, inputs: Path, tmp_path: Path) -> None:
    kill_and_compare(case(name, inputs), tmp_path, kills=2, seed=0)


@pytest.mark.very_slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_killed_twenty_times_ends_with_the_same_result(
    name: str, inputs: Path, tmp_path: Path
) -> None:
    kill_and_compare(case(name, inputs), tmp_path, kills=20, seed=1)
