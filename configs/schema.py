"""What the configuration is made of: a dataclass at every place, and the defaults lists of the commands.

YAML files beside this module are presets, which hold what differs from a dataclass, and suites of experiments. A node
is named by its path, and its dataclass by `module:Class`, so that a help page imports no more than it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from orderrl.agents.agent import AGENTS, find_agent
from orderrl.backbones.presets import PRESETS
from orderrl.backbones.registry import BACKBONES
from orderrl.data import DATA
from orderrl.runtime.loggers import LOGGERS
from orderrl.runtime.registry import Registry, is_reference
from orderrl.runtime.schema import Node
from orderrl.tokenizers.registry import PATCHES, TOKENIZERS

ADAPTIVE = ("fitted_q", "schedule", "imitation")  # agents that choose how many blocks a step reveals
NOTHING = "orderrl.runtime.schema:Nothing"  # no keys


def nodes(overrides: Sequence[str] = ()) -> dict[str, Node]:
    """Every dataclass of the configuration by its path, with what users have registered or name in the overrides."""
    found = COMMANDS | GROUPS | _backbones() | {f"agent/{name}": _agent(name) for name in AGENTS.shipped}
    chosen = dict(item.replace("\\:", ":").split("=", 1) for item in overrides if "=" in item)  # sweeps escape it
    for group, (registry, node) in _REGISTRIES.items():
        named = filter(is_reference, chosen.get(group, "").split(","))  # several in a sweep
        found |= {f"{group}/{name}": node(name) for name in (*registry.own(), *named)}
    return found


def _agent(name: str) -> Node:
    """An agent's settings; it is imported when they are looked at."""
    given = AGENTS.given(name)
    kind = f"{given}.config" if isinstance(given, str) else find_agent(name).config
    return Node(kind, name, defaults=partial(_other_groups, name))


def _other_groups(name: str) -> list[dict[str, str]]:
    """What an agent chooses of other groups, unless they are given."""
    chosen = {} if find_agent(name).reads_labels else {"labels": "_none"}
    chosen |= {"planner": "orderhead"} if name == "ste" else {"env": "likelihood"} if name in ADAPTIVE else {}
    return [{f"override /{group}@_global_.{group}": option} for group, option in chosen.items()]


def _logger(name: str) -> Node:
    given = LOGGERS.given(name)
    return Node(given if isinstance(given, str) else LOGGERS.find(name), name)


_REGISTRIES: dict[str, tuple[Registry[Any], Callable[[str], Node]]] = {
    "agent": (AGENTS, _agent),
    "backbone": (BACKBONES, lambda name: Node("orderrl.backbones.config:BackboneName", values={"name": name})),
    "data": (DATA, lambda name: Node("orderrl.data.config:DataName", values={"name": name})),
    "logger": (LOGGERS, _logger),
    "tokenizer": (TOKENIZERS, lambda name: Node("orderrl.tokenizers.config:OwnTokenizer", name)),
}


def _command(name: str, *defaults: Any) -> Node:
    return Node(f"orderrl.configs.commands:{name}", defaults=defaults)


def _planned(data: str = "canvas", backbone: str = "canvas") -> list[Any]:
    """What commands need that work with a frozen backbone."""
    return ["backbone/_running@backbone", {"data": data}, {"backbone": backbone}]


_LABELS, _LOGGER = {"labels": "pointwise"}, {"logger": "local"}
COMMANDS = {
    "label": _command("Label", *_planned(), _LABELS, _LOGGER),
    "train": _command(
        "Train", *_planned(), {"env": "context"}, _LABELS, {"planner": "latent"}, {"agent": "bc"}, _LOGGER
    ),
    "evaluate": _command("Evaluate", *_planned(), _LABELS, {"eval": "main"}, _LOGGER),
    "generate": _command("Generate", "_sampling@_global_", *_planned(), {"tokenizer": "none"}, _LABELS, _LOGGER),
    "rollouts": _command("Rollouts", *_planned(), {"env": "context"}, _LABELS, _LOGGER),
    "analyze": Node(
        "orderrl.configs.analysis:Analyze",
        defaults=[*_planned(), _LABELS, {"eval": "planning"}, _LOGGER],
        values={
            "labels": {"contexts": 3000},
            "eval": {"policies": ["raster", "random", "multiscale", "centre", "high_entropy", "fitted", "oracle"]},
        },
    ),
    "reproduce": _command(
        "Reproduce", *_planned("digits", "digits"), _LABELS, {"eval": "full"}, _LOGGER, "_self_", {"suite": "digits"}
    ),
    "pretrain": _command(
        "Pretrain",
        {"data": "digits"},
        {"backbone": "digits"},
        {"model@backbone": "${backbone}"},
        {"training": "${backbone}"},
        {"tokenizer": "none"},
        {"optional new_tokenizer@tokenizer": "${tokenizer}"},
        _LOGGER,
    ),
    "tokenize": _command("Tokenize", {"data": "folder"}, {"tokenizer": "vq16"}),
}
GROUPS = {
    "_sampling": Node("orderrl.backbones.sampling:Sampling"),
    "data/digits": Node("orderrl.data.config:DataName", values={"name": "digits"}),
    "data/digits_patches": Node("orderrl.data.config:DataName", values={"name": "digits_patches"}),
    "data/canvas": Node("orderrl.data.config:DataName", values={"name": "canvas"}),
    "data/tokens": Node("orderrl.data.config:TokensData"),
    "data/folder": Node("orderrl.data.folder:FolderConfig", "folder"),
    "eval/main": Node("orderrl.evaluation.settings:EvalConfig"),
    "env/_base": Node("orderrl.envs.config:EnvConfig", build="orderrl.envs.config:checked_env"),
    "labels/_base": Node("orderrl.oracle:LabelSetConfig"),
    "labels/_none": Node(NOTHING),
    "planner/_base": Node("orderrl.planner:PlannerConfig", build="orderrl.planner:checked_shape"),
    **{f"logger/{name}": _logger(name) for name in LOGGERS.shipped},
    "training/_base": Node("orderrl.backbones.pretraining:PretrainConfig"),
    "tokenizer/none": Node("orderrl.tokenizers.config:NoTokenizer", "none"),
    "tokenizer/vq16": Node("orderrl.tokenizers.config:PublishedTokenizer", "vq16"),
    "tokenizer/vq8": Node("orderrl.tokenizers.config:PublishedTokenizer", "vq8"),
    "tokenizer/kl16": Node("orderrl.tokenizers.config:ContinuousTokenizer", "kl16"),
    **{f"tokenizer/{name}": Node("orderrl.tokenizers.config:Patches", name) for name in PATCHES},
    "tokenizer/small": Node("orderrl.tokenizers.config:SmallTokenizer", "small"),
    "new_tokenizer/_base": Node("orderrl.tokenizers.config:NewTokenizer"),
}


def _backbones() -> dict[str, Node]:
    """Backbones by name; for pretrain also what is made of each, and its training."""
    module = "orderrl.backbones.config"
    found = {
        "backbone/_running": Node(f"{module}:RunningBackbone"),
        "backbone/_own": Node(f"{module}:BackboneName"),
        **{f"backbone/{name}": Node(f"{module}:UntrainedName") for name in ("_untrained", "small", "none")},
        "model/_transformer": Node(f"{module}:NewTransformer"),
        "model/_masked": Node(f"{module}:NewMasked"),
    }
    for name in ("digits", "digits_raster", "small"):
        found[f"model/{name}"] = found["model/_transformer"]
    found["training/small"] = GROUPS["training/_base"]
    found |= {f"{group}/none": Node(NOTHING) for group in ("model", "training")}
    for name, preset in PRESETS.items():
        found[f"backbone/{name}"] = Node(f"{module}:PublishedBackbone", values={"name": name})
        raster = preset.family == "llamagen"
        found[f"model/{name}"] = Node(f"{module}:OrderRobustStart" if raster else NOTHING)
        found[f"training/{name}"] = Node(NOTHING, defaults=["_published"])
    return found
