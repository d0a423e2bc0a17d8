"""Every key of every command refuses wrong values, in one line that names it, before any work."""

import copy
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from orderrl.runtime.config import compose, help_of, parts_of
from orderrl.runtime.devices import checked_device
from orderrl.runtime.schema import Part, check, select

AGENTS = help_of("train").groups["agent"]
CHOICES: dict[str, tuple[str, list[str]]] = {
    "label": ("label", []),
    "evaluate": ("evaluate", []),
    "generate": ("generate", []),
    "rollouts": ("rollouts", []),
    "analyze": ("analyze", []),
    "reproduce": ("reproduce", []),
    "pretrain": ("pretrain", []),
    "pretrain mar": ("pretrain", ["backbone=digits_mar", "data=digits_patches"]),
    "pretrain llamagen": ("pretrain", ["backbone=llamagen_b", "data=folder", "tokenizer=small", "data.root=images"]),
    "pretrain tokenizer": ("pretrain", ["backbone=none", "data=folder", "tokenizer=small", "data.root=images"]),
    "tokenize": ("tokenize", ["tokenizer=kl16", "data.root=images", "output=set", "tokenizer.path=kl16.ckpt"]),
    **{f"train {agent}": ("train", [f"agent={agent}"]) for agent in AGENTS},
}
# Numbers that may be 0, and the only one that may be negative.
ZERO = {
    *("seed", "split_seed", "sample_seed", "seeds", "checkpoint_seconds", "warmup", "weight_decay", "label_dropout"),
    *("augmentation", "ema", "anneal_from", "dropout", "attn_dropout", "proj_dropout", "restart_until", "codebook"),
    *("commitment", "workers", "test_share", "planner_share", "flips", "step_cost", "stem", "reasoning_steps"),
    *("temperature", "top_k", "guidance", "guidance_interval", "samples", "distance_resamples", "num_res_blocks"),
    *("dagger_rounds", "dagger_own_share", "own_share", "entropy_coeff", "kl_coeff", "spacing", "pair_strength"),
    *("gae_lambda", "critic_warmup", "refinements", "layers", "oh_coeff", "collapse", "explosion", "label"),
    *("gen_coeff", "oracle_coeff", "reinforce_coeff", "l2_coeff", "spread_coeff", "curriculum_steps"),
    *("rounds", "random_share", "locality", "position_weight"),
}
SIGNED = "guidance_interval"
NO_ZERO = ("agent.temperature", "agent.search.temperature", "labels.samples")  # others of these names may
CLOSED = {
    *("agent.name", "agent.target", "agent.weight", "env.objective", "env.form", "env.weight", "labels.kind", "split"),
    *("data.crop", "backbone.family", "backbone.dtype", "backbone.compile", "device"),
    *("tokenizer.training.reconstruction", "logger.name", "logger.mode", "guidance_schedule", "eval.guidance_schedule"),
    *("eval.hidden_fill", "agent.body", "labels.grouping", "planner.network"),
}


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def wrong_values(key: str, default: Any, meaning: str) -> Iterator[Any]:
    """What a value of the default's type is not."""
    name = key.rpartition(".")[2]
    yield from ({"a": 1}, [{}], [None])
    if isinstance(default, bool):
        yield from ("abc", 1, 0.0)
    elif isinstance(default, int | float):
        yield from ("abc", True, math.inf, -math.inf, math.nan, 10**30 if isinstance(default, int) else 1e300, 10**5000)
        yield from ([[1.0]], ["a"])
        if isinstance(default, int):
            yield from (1.5, 1e3, [1])
        if name != SIGNED:
            yield -1
        if name not in ZERO or key in NO_ZERO:
            yield 0
    elif isinstance(default, str):
        yield from (5, 1.5, True, ["a"])
    elif isinstance(default, list):
        yield from ("abc", 5, 1.5, True, [True], [[[1]]])
        if default:
            yield from (["a"], [math.inf], [-1], [10**400]) if not isinstance(default[0], str | list) else ([5], [1.5])
    else:
        yield from ([True] if key != "backbone.cuda_graph" else [])
        yield from (math.nan, [True], [5, "a"])
    if "null" not in meaning and key != "backbone.name":  # that of `small` is null until there is one
        yield None
    if key in CLOSED:
        yield "nonsense"


@cache
def composed(choice: str) -> tuple[dict[str, str], Any, list[Part]]:
    """Meanings of keys, plain values and dataclasses."""
    command, overrides = CHOICES[choice]
    values = OmegaConf.to_container(compose(command, overrides))
    return help_of(command, overrides).meanings, values, parts_of(command, overrides)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_key_refuses_wrong_values(choice: str) -> None:
    meanings, config, parts = composed(choice)
    check(parts, config)
    tried = 0
    for key, default in leaves(config):
        if key not in meanings or key in ("backbone.shape", "data.name"):  # no key; anything; made of another key
            continue
        for wrong in wrong_values(key, default, meanings[key]):
            changed = copy.deepcopy(config)
            group, _, name = key.rpartition(".")
            (select(changed, group) if group else changed)[name] = wrong
            with pytest.raises(ValueError) as caught:
                check(parts, changed)
                pytest.fail(f"{key}={wrong!r} was accepted")
            message = str(caught.value)
            assert name in message and "\n" not in message and len(message) < 400, message
            tried += 1
    assert tried > 50


@pytest.mark.parametrize("choice", CHOICES)
def test_null_is_allowed_exactly_where_the_help_says_what_it_means(choice: str) -> None:
    meanings, config, parts = composed(choice)
    for key, meaning in meanings.items():
        if "null" in meaning:
            changed = copy.deepcopy(config)
            group, _, name = key.rpartition(".")
            (select(changed, group) if group else changed)[name] = None
            check(parts, changed)


@pytest.mark.parametrize(
    ("command", "override", "expected"),
    [
        ("label", "labels.contexts=abc", "labels.contexts must be a whole number, got 'abc'"),
        ("label", "labels.contexts=1e3", "labels.contexts must be a whole number, got 1000.0; write 1000"),
        ("train", "planner.dim=abc", "planner.dim must be a whole number, got 'abc'"),
        ("train", "agent.name=ppo", "agent.name must be 'bc' here, got 'ppo'; choose another with agent=..."),
        ("label", "seed=1.5", "seed must be a whole number, got 1.5"),
        ("label", "seed=-1", "seed must be at least 0, got -1"),
        ("evaluate", "eval.samples=1", "eval.samples must be 0 or at least 2, got 1"),
        ("evaluate", "eval.guidance=inf", "eval.guidance must be a finite number, got inf"),
        ("generate", "temperature=1e-9", "temperature must be 0 (the most likely token) or at least 0.001"),
        ("generate", "guidance=1e9", "guidance must lie in [0, 1000]"),
        ("train", "env.step_cost=[2.0,1.0]", "env.step_cost must be"),
        ("train", "env.budgets=[1,1]", "env.budgets must be one or more ascending numbers of blocks"),
        ("train", "env.budgets=[]", "env.budgets must be one or more ascending numbers of blocks"),
        ("train", "agent.target=utilty", "agent.target='utilty' is unknown; choose one of"),
        ("train", "+agent.stepz=1", "there is no key agent.stepz; keys here: batch_size"),
        ("train", "~agent.steps", "agent.steps is missing: it can be changed, not removed"),
        ("reproduce", "seeds=[]", "seeds must not be empty"),
        ("pretrain", "backbone.model.heads=3", "backbone.model.heads=3 must divide dim=128"),
        ("train", "name=7", "name must be text or null, got 7; write it in two pairs of quotes"),
    ],
)
def test_a_refusal_says_what_is_allowed(command: str, override: str, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        compose(command, [override])
    assert str(caught.value).startswith(expected)


def test_commands_that_use_a_frozen_backbone_have_no_keys_of_its_making() -> None:
    of_pretrain = {key for key in help_of("pretrain").meanings if key.startswith(("training.", "backbone.model."))}
    assert len(of_pretrain) > 15
    for command in ("train", "label", "evaluate", "generate", "rollouts", "analyze", "reproduce"):
        assert not {*of_pretrain, "backbone.family"} & help_of(command).meanings.keys()
    assert not {"backbone.dtype", "backbone.memory_gb", "backbone.compile"} & help_of("pretrain").meanings.keys()
    alone = help_of("pretrain", ["backbone=none", "data=folder", "tokenizer=small"]).meanings
    assert not of_pretrain & alone.keys() and "tokenizer.training.steps" in alone


@pytest.mark.parametrize("agent", ["fitted_q", "schedule", "imitation"])
def test_agents_without_labels_have_no_keys_of_labels(agent: str) -> None:
    assert not compose("train", [f"agent={agent}"]).labels
    with pytest.raises(ValueError, match=r"train has no key labels.contexts"):
        compose("train", [f"agent={agent}", "labels.contexts=5"])


def test_the_old_name_of_a_key_is_answered_with_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert compose("pretrain", ["backbone.training.steps=7"]).training.steps == 7
    assert capsys.readouterr().err == "backbone.training is called training now\n"


@pytest.mark.parametrize("device", ["gpu", "mps", "CPU", "meta", "", "cuda:99", "cpu:1", "cuda:-1", "cuda:1e9"])
def test_a_device_that_is_not_there_is_refused_with_the_choices(device: str) -> None:
    with pytest.raises(ValueError, match=r"device='.*' is (unknown|not available here); .*cpu"):
        checked_device(device)


def test_devices_that_are_there_are_taken() -> None:
    assert checked_device("cpu") == torch.device("cpu")
    if torch.cuda.is_available():
        assert checked_device("cuda:0").index == 0
    else:
        with pytest.raises(ValueError, match="device='cuda' is not available here; use device=cpu"):
            checked_device("cuda")
