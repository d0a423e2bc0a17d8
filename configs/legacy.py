"""Groups that are not written as dataclasses yet."""

from __future__ import annotations

import re
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import yaml

from orderrl.runtime.schema import Node
from orderrl.runtime.values import at_least, positive, setting, zero_or_at_least

HOME = Path(__file__).parent
KINDS: dict[str, Any] = {
    "agent.start": str | None,
    "agent.sharpness": float | None,
    "agent.spacing": float | None,
    "agent.pair_strength": float | None,
    "agent.passes": float | None,
    "eval.lookahead_states": int | None,
    "eval.classifier": str | None,
    "eval.features": str | None,
    "eval.feature_weights": str | None,
    "eval.reference": str | None,
    "eval.clip_model": str | None,
    "eval.step_costs": list[float] | None,
    "eval.sweep": list[int],
    "eval.token_raster": list[str],
}
RULES = {
    **dict.fromkeys(("eval.images", "eval.reference_images", "eval.real_images"), at_least(2)),
    **dict.fromkeys(("eval.samples", "eval.distance_resamples"), zero_or_at_least(2)),
    **dict.fromkeys(
        (
            "eval.states",
            "eval.lookahead_states",
            "eval.lookahead_draws",
            "eval.resamples",
            "eval.kid_subsets",
            "eval.sweep",
            "eval.budgets",
        ),
        at_least(1),
    ),
    "eval.step_costs": positive(),
}


def comments(text):
    lines = text.splitlines()
    found = {}

    def visit(node, prefix):
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            row = key.start_mark.line
            end = value.end_mark if value.end_mark.line == row else key.end_mark
            comment = re.search(r"(?:^|\s)#\s*(.*)$", lines[row][end.column :])
            found[name] = comment.group(1).strip() if comment else ""
            visit(value, f"{name}.")

    visit(yaml.compose(text), "")
    return found


def kind_of(default):
    if isinstance(default, list):
        return list[kind_of(default[0])] if default else list
    return type(default)


def made(group, values, notes, prefix, build=None):
    fields = []
    for key, value in values.items():
        if key == "defaults":
            continue
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            cls = made(group, value, notes, f"{name}.")
            fields.append((key, cls, setting({}, notes[name])))
            continue
        if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value):
            value = float(value)
        kind = KINDS.get(f"{group}.{name}") or kind_of(value)
        rules = [RULES[f"{group}.{name}"]] if f"{group}.{name}" in RULES else []
        fields.append((key, kind, setting(value, notes[name], *rules)))
    space = {}
    if build is not None:
        space["__post_init__"] = lambda self: build({key: getattr(self, key) for key in self.__dataclass_fields__})
    return make_dataclass("Legacy", fields, kw_only=True, namespace=space)


def check_eval(values):
    from orderrl.backbones.sampling import Sampling
    from orderrl.metrics.recognisability import check_fill

    check_fill(values["hidden_fill"])
    Sampling(**{name: values[name] for name in Sampling.__dataclass_fields__})


def legacy_nodes():
    found = {}
    text = (HOME / "eval/main.yaml").read_text()
    globals()["eval_main"] = made("eval", yaml.safe_load(text), comments(text), "", check_eval)
    found["eval/main"] = Node("orderrl.configs.legacy:eval_main")
    return found
