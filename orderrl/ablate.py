"""Ablations of planners on held-out images: `python -m orderrl.ablate`.

Do their scores use content, do the blocks they choose help the rest, and how do their orders compare? What room has
content at all, and what do latents do?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from orderrl.agents.bc import Config as CloningConfig
from orderrl.agents.policies import PlannerPolicy
from orderrl.agents.registry import NamedPolicy
from orderrl.backbones import Backbone
from orderrl.evaluate import chosen_policies, describe, make_protocol, planner_specs
from orderrl.evaluation.ablations import (
    REMOVALS,
    Injection,
    ablated_observations,
    best_blocks,
    content_ablation,
    image_average,
    injection,
    order_agreements,
    quality_curves,
    random_injection,
)
from orderrl.evaluation.comparison import Pair, compare
from orderrl.evaluation.headroom import LEVELS, measure_room
from orderrl.evaluation.latents import latent_ablation, latent_probes
from orderrl.evaluation.protocol import Evaluated, Protocol, evaluate_policy, first_choices
from orderrl.evaluation.row_entries import image_means
from orderrl.factory import open_backbone, setup_of
from orderrl.labels import find_or_make_labels, open_labels
from orderrl.metrics.statistics import RULE, is_significant
from orderrl.oracle import utilities
from orderrl.planner import PlannerConfig
from orderrl.runtime.config import run_application
from orderrl.runtime.distributed import print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.progress import progress
from orderrl.runtime.run import Run


@isolated_float32
def ablate(config: DictConfig) -> Path:
    """Run all ablations and return the run folder with `ablations.json`.

    Raises:
        ValueError: if a policy or checkpoint is unknown or does not fit, or `injected` is no list of numbers of blocks
            that leaves some hidden.
    """
    backbone = open_backbone(config)
    setup_of(config, backbone).require_order_robust("ablate")
    counts = checked_counts(config.injected, backbone)
    chosen = [named for named, _ in chosen_policies(config, backbone, planner_specs(config, backbone))]
    policies = seeds_named(chosen)
    protocol = make_protocol(config, backbone)
    with Run("ablate", config) as run:
        with progress(len(policies), "evaluating", "policies") as advance:
            rows = []
            for named in policies:
                rows.append(evaluate_policy(protocol, named, sampled=False))
                advance(note=named.name)
        scores = {named.name: first_choices(protocol, named)[1] for named in policies}
        results = {
            "protocol": describe(config, backbone, protocol),
            "content": content(protocol, policies),
            "injection": injections(protocol, scores, counts),
            "orders": orders(protocol, rows),
            "curves": {row.row["policy"]: quality_curves(protocol, row.rollout) for row in rows if row.rollout},
            "room": None if config.room is None else room(config, protocol),
            "latents": latents(protocol, policies),
        }
        path = run.write_json("ablations.json", results)
        print_ablations(results)
        print_main(f"ablations: {path}")
    return run.folder


def seeds_named(policies: Sequence[NamedPolicy]) -> list[NamedPolicy]:
    """Every policy under a name of its own: training seeds of a planner share one in tables, here the seed is in it."""
    names = [named.name for named in policies]
    return [
        replace(named, name=f"{named.name} (seed {named.seed})") if names.count(named.name) > 1 else named
        for named in policies
    ]


def checked_counts(counts: Sequence[int], backbone: Backbone) -> list[int]:
    """Numbers of blocks to inject.

    Raises:
        ValueError: if one of them is not positive or leaves no block hidden.
    """
    blocks = backbone.geometry.num_blocks
    if not counts or min(counts) < 1 or max(counts) >= blocks:
        raise ValueError(f"injected must be numbers of blocks from 1 to {blocks - 1}, got {list(counts)}")
    return list(counts)


def oracle_utility(protocol: Protocol) -> Tensor:
    """U of every block in the shared states, (m, B), nats per image token."""
    assert protocol.states is not None
    gains = protocol.states["gains"]
    return utilities(gains, protocol.backbone.geometry)


def content(protocol: Protocol, policies: Sequence[NamedPolicy]) -> list[dict[str, Any]]:
    """One entry for each policy that scores observations, with and without their content.

    The family of comparisons, corrected by Holm, is all removals of all policies.
    """
    utility, observations = oracle_utility(protocol), ablated_observations(protocol)
    found: list[dict[str, Any]] = []
    pairs: list[Pair] = []
    for named in policies:
        if named.scorer is None:
            continue
        ablation = content_ablation(protocol, observations, named.scorer, utility)
        known = torch.stack(list(ablation.spearman.values())).isfinite().all(0)
        spearman = {name: values[known] for name, values in ablation.spearman.items()}
        if int(known.sum()) < 2:
            continue
        pairs += [
            Pair(f"{named.name}, {name}", "spearman", spearman["true"][None], spearman[name][None]) for name in REMOVALS
        ]
        found.append(
            {
                "policy": named.name,
                "spearman": image_means(spearman, protocol.resamples, protocol.seed),
                "r2": {name: asdict(interval) for name, interval in ablation.r2.items()},
                "r2_difference": {name: asdict(interval) for name, interval in ablation.r2_difference.items()},
            }
        )
    compared = iter(compare(pairs, protocol.resamples, protocol.seed))
    for row in found:
        row["spearman_difference"] = {name: next(compared) for name in REMOVALS}
    return found


def injections(protocol: Protocol, scores: Mapping[str, Tensor | None], counts: Sequence[int]) -> list[dict[str, Any]]:
    """One entry for each number of blocks and policy with scores, for the oracle's best and for random blocks.

    Drops are compared with those of random blocks; the family, corrected by Holm, is all of them.
    """
    states = protocol.states
    assert states is not None
    ranked = {name: values for name, values in scores.items() if values is not None and name != "random"}
    ranked["oracle"] = oracle_utility(protocol)
    found: list[dict[str, Any]] = []
    pairs: list[Pair] = []
    for count in counts:
        chosen = states[(~states["visible"]).sum(1) > count]
        rows = (~states["visible"]).sum(1) > count
        drops = {"random": random_injection(protocol, chosen, count)}
        for name, values in ranked.items():
            blocks = best_blocks(values[rows], chosen["visible"], count)
            drops[name] = injection(protocol.backbone, protocol.data, chosen, blocks)
        for name, drop in drops.items():
            entry = {"policy": name, "blocks": count, "states": len(chosen)}
            found.append(entry | _drop_entry(protocol, drop, chosen["image"]))
            if name != "random":
                mine, chance = (image_average(x.drop, chosen["image"])[None] for x in (drop, drops["random"]))
                pairs.append(Pair(f"{name}, {count} blocks", "drop", mine, chance))
    compared = iter(compare(pairs, protocol.resamples, protocol.seed))
    for entry in found:
        entry["against_random"] = None if entry["policy"] == "random" else next(compared)
    return found


def _drop_entry(protocol: Protocol, drop: Injection, image: Tensor) -> dict[str, Any]:
    values = {"loss_before": drop.before, "loss_after": drop.after, "drop": drop.drop}
    return image_means({name: image_average(x, image) for name, x in values.items()}, protocol.resamples, protocol.seed)


def orders(protocol: Protocol, rows: Sequence[Evaluated]) -> dict[str, Any]:
    """Rows of the table, paired differences from the first policy, and how alike the orders are."""
    first = rows[0]
    pairs = [
        Pair(
            f"{row.row['policy']} - {first.row['policy']}",
            metric,
            row.per_image[metric][None],
            first.per_image[metric][None],
        )
        for row in rows[1:]
        for metric in ("gain_auc", "decode_nll", "recognisability_auc")
        if metric in row.per_image
    ]
    return {
        "rows": [row.row for row in rows],
        "comparisons": compare(pairs, protocol.resamples, protocol.seed),
        "agreement": {
            "policies": [row.row["policy"] for row in rows],
            "spearman": order_agreements([row.rollout for row in rows if row.rollout is not None]),
        },
    }


def room(config: DictConfig, protocol: Protocol) -> list[dict[str, Any]]:
    """What explains the gains in the shared states; planners are cloned from the labels of the config."""
    backbone, settings = protocol.backbone, CloningConfig(target="pairs", steps=config.room.steps, passes=None)
    labels = open_labels(find_or_make_labels(setup_of(config, backbone)), backbone)
    draws = list(config.room.draws) if backbone.vocab_size else []  # lookahead needs token probabilities
    with progress(len(LEVELS) * settings.steps + len(draws), "room", "steps") as advance:
        shape = PlannerConfig.for_backbone(backbone)
        states = config.room.lookahead_states
        return measure_room(protocol, labels, shape, settings, draws, states, advance)


def latents(protocol: Protocol, policies: Sequence[NamedPolicy]) -> list[dict[str, Any]]:
    """One entry for each planner that reasons: its variants against the oracle, and probes of what its latents know.

    The family of comparisons, corrected by Holm, is all variants of all planners.
    """
    states, geometry = protocol.states, protocol.backbone.geometry
    assert states is not None
    found: list[dict[str, Any]] = []
    pairs: list[Pair] = []
    for named in policies:
        if not isinstance(named.policy, PlannerPolicy) or not named.reasoning_steps:
            continue
        planner = named.policy.planner
        variants = {name: variant._asdict() for name, variant in latent_ablation(planner, states, geometry).items()}
        known = torch.stack([variant["spearman"] for variant in variants.values()]).isfinite().all(0)
        for name, values in variants.items():
            values = {metric: x[known] for metric, x in values.items()}
            variants[name] = image_means(values, protocol.resamples, protocol.seed)
            if name == "trained":
                trained = values
                continue
            pairs += [
                Pair(f"{named.name}, {name} - trained", metric, x[None], trained[metric][None])
                for metric, x in values.items()
            ]
        probes = latent_probes(planner, states, geometry, protocol.resamples, protocol.seed)
        found.append({"policy": named.name, "variants": variants, "probes": probes})
    compared = iter(compare(pairs, protocol.resamples, protocol.seed))
    for entry in found:
        for name, variant in entry["variants"].items():
            for metric in ("spearman", "regret"):
                variant[f"{metric}_difference"] = None if name == "trained" else next(compared)
    return found


# ---------------------------------------------------------------------- on screen


def print_ablations(results: Mapping[str, Any]) -> None:
    """The tables."""
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    tables = [
        _content_table(results["content"]),
        _injection_table(results["injection"]),
        _order_table(results["orders"]),
        _curve_table(results["curves"]),
    ]
    if results["room"] is not None:
        tables.append(_room_table(results["room"]))
    if results["latents"]:
        tables += [_variant_table(results["latents"]), _probe_table(results["latents"])]
    for table in tables:
        console.print(table)
    print_main(f"* {RULE}")


def _shown(mean: float, interval: Sequence[float], digits: int = 3) -> str:
    low, high = interval
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _difference(entry: Mapping[str, Any], digits: int = 3) -> str:
    """A difference with its interval, a star where it is significant."""
    text = f"{entry['mean']:+.{digits}f} [{entry['low']:+.{digits}f}, {entry['high']:+.{digits}f}]"
    return text + (" *" if is_significant(entry) else "")


def _content_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("policy", title="Spearman of scores and oracle, mean over images (* significant)")
    for title in (
        "with content",
        *(f"with minus {name}" for name in REMOVALS),
        "R² with",
        *(f"R² {n}" for n in REMOVALS),
    ):
        table.add_column(title)
    for entry in entries:
        spearman, r2 = entry["spearman"], entry["r2"]
        table.add_row(
            entry["policy"],
            _shown(spearman["true"], spearman["true_ci"]),
            *(_difference(entry["spearman_difference"][name]) for name in REMOVALS),
            *(f"{r2[name]['mean']:.3f}" for name in ("true", *REMOVALS)),
        )
    return table


def _injection_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        "blocks", "policy", "drop", "against random", "share of loss",
        title="drop of the loss of the rest when the best-scored blocks are revealed, nats per token (* significant)",
    )  # fmt: skip
    for entry in entries:
        table.add_row(
            str(entry["blocks"]),
            entry["policy"],
            _shown(entry["drop"], entry["drop_ci"], digits=4),
            "–" if entry["against_random"] is None else _difference(entry["against_random"], 4),
            f"{entry['drop'] / entry['loss_before']:.3f}",
        )
    return table


def _order_table(found: Mapping[str, Any]) -> Table:
    columns = {"gain_auc": 4, "decode_nll": 2, "far_gain": 3, "consecutive_distance": 2, "visible_neighbours": 3}
    first = found["agreement"]["policies"][0]
    table = Table("policy", *columns, f"Spearman with {first}", title="orders, means over images")
    for row, agreement in zip(found["rows"], found["agreement"]["spearman"][0], strict=True):
        cells = [
            "–" if row[key] is None else _shown(row[key], row[f"{key}_ci"], digits) for key, digits in columns.items()
        ]
        table.add_row(row["policy"], *cells, f"{agreement:+.2f}")
    return table


def _curve_table(curves: Mapping[str, Any]) -> Table:
    names = list(next(iter(curves.values())))
    table = Table("policy", *names, title="areas under the curves against the revealed fraction, means over images")
    for policy, found in curves.items():
        table.add_row(policy, *(_shown(found[name]["area"][0], found[name]["area"][1:]) for name in names))
    return table


def _interval(entry: Mapping[str, float] | None, sign: str = "") -> str:
    if entry is None:
        return "–"
    mean, low, high = (format(entry[key], f"{sign}.3f") for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _room_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(
        "states", "predictor", "R² of U", "over", "R² of pairs", "over", "Spearman", "regret",
        title="what explains gains on held-out images (over: class minus positions, all others minus class)",
    )  # fmt: skip
    for entry in entries:
        cells = [
            text
            for key in ("utility", "dependence")
            for text in (_interval(entry[f"r2_{key}"]), _interval(entry[f"gain_{key}"], "+"))
        ]
        cells += [  # a predictor that ranks nothing has no correlation
            _shown(entry[key], entry[f"{key}_ci"], digits) if key in entry else "–"
            for key, digits in (("spearman", 3), ("regret", 4))
        ]
        table.add_row(str(entry["states"]), entry["predictor"], *cells)
    return table


def _variant_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("policy", "variant", title="latent reasoning without its passes or latents (* significant)")
    for title in ("Spearman", "minus trained", "regret", "minus trained"):
        table.add_column(title)
    for entry in entries:
        for name, variant in entry["variants"].items():
            cells = []
            for metric, digits in (("spearman", 3), ("regret", 4)):
                difference = variant[f"{metric}_difference"]
                cells += [
                    _shown(variant[metric], variant[f"{metric}_ci"], digits),
                    "–" if difference is None else _difference(difference, digits),
                ]
            table.add_row(entry["policy"], name, *cells)
    return table


def _probe_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("policy", "target", "measure", "pass", "mean block token", "latents", "latents minus blocks")
    table = Table(*columns, title="linear probes, cross-validated over images")
    for entry in entries:
        for found in entry["probes"]:
            scores = (_interval(found["blocks"]), _interval(found["latents"]), _interval(found["difference"], "+"))
            table.add_row(entry["policy"], found["target"], found["measure"], str(found["pass"]), *scores)
    return table


if __name__ == "__main__":
    run_application("ablate", ablate)
