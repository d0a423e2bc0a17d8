"""The settings of the commands: wrong ones are refused in one line, before any work.

A setting's type is that of its default in the YAML files, and `KINDS` says what a default does not. Ranges stand in the
dataclasses that the groups become, and for the keys that stay keys in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from orderrl.runtime.values import Rule, at_least, between, one_of, positive, require, require_kind, zero_or_at_least

MISSING = "???"  # a value that the user must give
KINDS: dict[str, Any] = {
    "name": str | None,
    "label": int | None,
    "steps": int | None,
    "output": str | None,
    "minari": str | None,
    "headroom": dict | None,
    "agent.start": str | None,
    "agent.sharpness": float | None,
    "agent.spacing": float | None,
    "agent.pair_strength": float | None,
    "agent.passes": float | None,
    "backbone.name": str | None,
    "backbone.path": str | None,
    "backbone.dtype": str | None,
    "backbone.shape": dict | None,
    "backbone.memory_gb": float | None,
    "backbone.compile": str | None,
    "data.classes": str | None,
    "data.num_classes": int | None,
    "data.test_root": str | None,
    "env.step_cost": float | tuple[float, float],
    "eval.lookahead_states": int | None,
    "eval.classifier": str | None,
    "eval.features": str | None,
    "eval.feature_weights": str | None,
    "eval.reference": str | None,
    "eval.clip_model": str | None,
    "eval.step_costs": list[float] | None,
    "eval.sweep": list[int],
    "eval.token_raster": list[str],
    "tokenizer.path": str | None,
}
NOT_EMPTY = ("seeds", "runs", "injected", "budgets", "eval.budgets")
RULES: tuple[Rule, ...] = (
    at_least(0, "seed", "seeds", "tokenizer.sample_seed"),
    between("[0, 86400]", "checkpoint_seconds"),
    at_least(1, "n", "steps", "batch_size", "shard_size", "labels.shard_size", "budgets", "injected"),
    at_least(0, "label"),
    at_least(1, "headroom.steps", "headroom.draws", "headroom.lookahead_states", "backbone.order_robust_block_size"),
    at_least(2, "eval.images", "eval.reference_images", "eval.real_images"),  # the fewest that have an interval
    zero_or_at_least(2, "eval.samples", "eval.distance_resamples"),
    at_least(1, "eval.states", "eval.lookahead_states", "eval.lookahead_draws", "eval.resamples", "eval.kid_subsets"),
    at_least(1, "eval.sweep", "eval.budgets"),
    positive("eval.step_costs"),
    one_of(("planner", "test"), "split"),
    one_of(("local", "wandb"), "logger.name"),
    one_of(("online", "offline", "disabled"), "logger.mode"),
)


def check_settings(config: Mapping[str, Any], defaults: Mapping[str, Any], known: bool = True) -> None:
    """Refuse wrong values of a command's settings.

    Args:
        config: plain values.
        defaults: what they are if nothing is given, with the same choices of groups; interpolations resolved.
        known: whether this is a configuration of the package's own, whose keys have a meaning here.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    _check_kinds(config, defaults, "", known)
    if not known:
        return
    for key in NOT_EMPTY:
        if select(config, key) == []:
            raise ValueError(f"{key} must not be empty, got []")
    for rule in RULES:
        for key in rule.names:
            if (value := select(config, key)) != MISSING:
                require(rule, key, value)
    if "temperature" in config:  # of generate
        check_sampling(config)
    for group, build in _GROUPS.items():
        if (values := select(config, group)) is not None:
            with _named(group):
                build(values)
    if "device" in config:
        from orderrl.runtime.devices import checked_device

        checked_device(config["device"])


def select(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _check_kinds(config: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str, known: bool) -> None:
    for key, default in defaults.items():
        name = f"{prefix}{key}"
        if key not in config:
            raise ValueError(f"{name} is missing: it can be changed, not removed")
        value = config[key]
        kind = (KINDS.get(name) if known else None) or kind_of(default)
        if value == MISSING or kind is None:
            continue
        if default == MISSING and value is None:
            raise ValueError(f"{name} must be given, got null")
        require_kind(name, value, kind)
        if isinstance(default, Mapping) and default and value is not None:
            _check_kinds(value, default, f"{name}.", known)
    free = not defaults  # a mapping that is empty by default holds anything
    unknown = [str(key) for key in config if key not in defaults]
    if unknown and not free:
        raise ValueError(f"there is no key {prefix}{unknown[0]}; keys here: {', '.join(sorted(map(str, defaults)))}")


def kind_of(default: Any) -> Any:
    """The type that a default tells; None if it tells none."""
    if isinstance(default, Mapping):
        return dict
    if isinstance(default, list):
        inner = kind_of(default[0]) if default else None
        return list if inner is None else list[inner]  # type: ignore[valid-type]
    return None if default is None else str if default == MISSING else type(default)


# -- groups as dataclasses --------------------------------------------------------------------------------------------


@contextmanager
def _named(group: str) -> Iterator[None]:
    """Put a group's name before the key with which a message begins."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{group}.{error}") from error


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {str(key): value for key, value in values.items() if key not in names}


def _agent(values: Mapping[str, Any]) -> None:
    from orderrl.agents.agent import AGENTS, find_agent
    from orderrl.factory import typed

    require(one_of(AGENTS, "name"), "name", values["name"])
    typed(find_agent(values["name"]).config, _without(values, "name"))


def _env(values: Mapping[str, Any]) -> None:
    from orderrl.envs.config import CoreConfig
    from orderrl.envs.reward import RewardConfig

    require_kind("budgets", values["budgets"], list[int] | None)
    budgets = (1,) if values["budgets"] is None else tuple(values["budgets"])  # null: of a policy that is to come
    CoreConfig(budgets=budgets, reward=RewardConfig(**_without(values, "budgets")))


def _labels(values: Mapping[str, Any]) -> None:
    from orderrl.oracle import LabelConfig

    LabelConfig(**_without(values, "shard_size"))


def _planner(values: Mapping[str, Any]) -> None:
    from orderrl.planner import PlannerConfig

    PlannerConfig(num_blocks=1, hidden_size=1, num_classes=1, **values)


def _data(values: Mapping[str, Any]) -> None:
    from orderrl.data.folder import folder_config

    if values["name"] == "folder":
        folder_config(dict(values))


def _backbone(values: Mapping[str, Any]) -> None:
    from orderrl.backbones.memory import Packing
    from orderrl.backbones.pretraining import PretrainConfig
    from orderrl.backbones.registry import COMPILE_MODES, as_dtype, backbone_config

    Packing(values["memory_gb"])
    require(one_of(COMPILE_MODES, "compile"), "compile", values["compile"])
    if values["dtype"] is not None:
        as_dtype(values["dtype"])
    with _named("training"):
        PretrainConfig(**values["training"])
    if "model" in values:
        with _named("model"):
            side = values["model"]["block_size"]
            require(between("[1, 256]", "block_size"), "block_size", side)
            mar = values["family"] == "mar"
            tokens = {"vae_embed_dim": 1} if mar else {"vocab_size": 1, "num_classes": 1}
            backbone_config(values["family"], values["model"] | {"height": side, "width": side} | tokens)


def _tokenizer(values: Mapping[str, Any]) -> None:
    from orderrl.tokenizers.training import TokenizerTrainingConfig
    from orderrl.tokenizers.vq import VQConfig

    for part, kind in (("model", VQConfig), ("training", TokenizerTrainingConfig)):
        if part in values:
            with _named(part):
                kind(**values[part])


def _eval(values: Mapping[str, Any]) -> None:
    from orderrl.metrics.recognisability import check_fill

    check_fill(values["hidden_fill"])
    check_sampling(values)


def check_sampling(values: Mapping[str, Any]) -> None:
    """Refuse wrong ways of drawing tokens, from a group that holds their keys."""
    from orderrl.backbones.sampling import Sampling

    Sampling(**{name: values[name] for name in Sampling.__dataclass_fields__})


_GROUPS: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "labels": _labels,
    "env": _env,
    "planner": _planner,
    "agent": _agent,
    "data": _data,
    "backbone": _backbone,
    "tokenizer": _tokenizer,
    "eval": _eval,
}
