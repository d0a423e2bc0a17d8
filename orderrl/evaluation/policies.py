"""The policies that a command names: those of a table, or the one that draws or plays; planners may be in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from orderrl.agents.agent import AGENTS
from orderrl.agents.fitted import fit_order
from orderrl.agents.policies import POLICIES
from orderrl.agents.registry import NamedPolicy, make_policy, tell_apart
from orderrl.agents.spec import PolicySpec
from orderrl.backbones import Backbone, backbone_fingerprint
from orderrl.backbones.pretraining import TOKEN_RASTER
from orderrl.backbones.registry import WEIGHTS
from orderrl.evaluation.settings import EvalConfig
from orderrl.factory import Setup
from orderrl.labels import find_or_make_labels, open_labels
from orderrl.oracle import utilities
from orderrl.planner import load_planner
from orderrl.runtime.distributed import print_main
from orderrl.runtime.hub import planner_beside
from orderrl.training import newest_planner

if TYPE_CHECKING:
    from tensordict import TensorDict

NEWEST = ("bc", "fitted_q", "ppo", "grpo")  # agents whose newest planners are evaluated; the last one draws


def gain_labels(setup: Setup) -> TensorDict:
    """Gain labels of random contexts of planner images, batch (contexts,), found in the cache or made."""
    return open_labels(find_or_make_labels(setup), setup.backbone)


def fitted_order(setup: Setup) -> Tensor:
    """The fixed order fitted on gain labels, (B,) int64."""
    labels = gain_labels(setup)
    return fit_order(labels["visible"], utilities(labels["gains"], setup.backbone.geometry))


def newest_planners(setup: Setup) -> list[Path]:
    """The newest checkpoint of every agent for the backbone and the data; without any, the planner that ships with it.

    ValueError if there is none.
    """
    agents = [*AGENTS.own(), *NEWEST]
    found = [path for agent in agents if (path := newest_planner(setup, agent)) is not None]
    if not found and (path := shipped_planner(setup.backbone)) is not None:
        print_main(f"no planner in {setup.cache_dir} for this backbone: taking the one that ships with it")
        found = [path]
    if not found:
        raise ValueError(
            f"no planner for backbone {setup.backbone_name!r} in {setup.cache_dir}; train one with "
            "`python -m orderrl.train agent=bc`"
        )
    return found


def own_order(backbone: Backbone) -> PolicySpec | None:
    """The order that a specialist was made for; None of other backbones, and of one made for plain raster tokens.

    Raises:
        ValueError: if its checkpoint names no policy, one that files may not name, or a planner that does not lie
            beside it.
    """
    origin = getattr(backbone, "origin", None)
    if origin is None or origin.order == TOKEN_RASTER:
        return None
    spec = PolicySpec.parse(origin.order)
    if spec.kind == "own" and (refusal := POLICIES.refusal(spec.name)):
        raise ValueError(f"{origin.folder}: the checkpoint {refusal}")
    if spec.kind != "planner":
        return spec
    return spec.at(planner_beside(origin.folder, origin.planner, Path(spec.name).name))


def shipped_planner(backbone: Backbone) -> Path | None:
    """The planner that ships with the package for exactly this backbone, block grid and weights; None for others.

    The quick start's: cloned, then PPO for useful context first.
    """
    wanted = backbone_fingerprint(backbone)
    shipped = sorted(WEIGHTS.glob("*_planner.safetensors"))
    return next((path for path in shipped if load_planner(path)[1]["backbone"] == wanted), None)


def found_policy(name: str, setup: Setup) -> PolicySpec:
    """The policy of a command that has one; "newest" is a specialist's own order, or the last of the newest planners.

    ValueError if it is no policy's name, or there is no planner.
    """
    spec = PolicySpec.parse(name)
    if spec.kind != "newest":
        return spec
    if (own := own_order(setup.backbone)) is not None:
        print_main(f"policy: {own} (the order that this backbone was trained for)")
        return own
    spec = spec.at(newest_planners(setup)[-1])
    print_main(f"policy: {spec}")
    return spec


def chosen_policies(config: EvalConfig, setup: Setup) -> list[tuple[NamedPolicy, bool]]:
    """Policies of the table, each with whether its samples are scored; all names are checked before any work.

    ValueError if a policy or checkpoint is unknown or does not fit, or an entry of `planners` is no planner.
    """
    backbone = setup.backbone
    if not backbone.order_robust:
        print_main(
            f"{setup.backbone_name} draws in raster order only: no policy to compare, its raster row stands alone"
        )
        return []
    own = own_order(backbone)
    planners = planner_specs(config.planners, lambda: newest_planners(setup) if own is None else [])
    for planner in planners:
        print_main(f"planner: {planner}")
    fitted = cache(lambda: fitted_order(setup))

    def build(spec: PolicySpec) -> NamedPolicy:
        return make_policy(spec, backbone, fitted, tuple(config.budgets))

    # every policy at its schedules, planners also at their step costs
    listed = [*([] if own is None or own in planners else [own]), *(PolicySpec.parse(text) for text in config.policies)]
    baselines = dict.fromkeys(swept for spec in listed for swept in schedules(spec, (1,), config.sweep))
    given = [spec for planner in planners for spec in at_step_costs(planner, build(planner), config.step_costs)]
    given = [replace(spec, mode=spec.mode or mode) for spec in given for mode in config.modes or ("",)]
    learned = dict.fromkeys(swept for spec in given for swept in schedules(spec, build(spec).budgets, config.sweep))
    # planners, own policies and the named ones are sampled
    sampled = {own, *(PolicySpec.parse(text) for text in config.sampled)}

    def is_sampled(spec: PolicySpec) -> bool:
        return spec in sampled or bool(config.sweep and spec.family in sampled) or spec.kind in ("own", "planner")

    chosen = [(build(spec), is_sampled(spec)) for spec in baselines]
    return chosen + [(named, True) for named in tell_apart([build(spec) for spec in learned])]


def planner_specs(entries: Sequence[str], newest: Callable[[], Sequence[Path]]) -> list[PolicySpec]:
    """Planners by their files, and `newest` for all that `newest()` gives; ValueError if an entry is no planner."""
    specs: list[PolicySpec] = []
    for entry in entries:
        spec = PolicySpec.parse(entry)
        if spec.kind not in ("planner", "newest"):
            raise ValueError(f"eval.planners: {entry!r} is no planner; give a .safetensors file or newest")
        specs += [spec.at(path) for path in newest()] if spec.kind == "newest" else [spec]
    return specs


def at_step_costs(spec: PolicySpec, named: NamedPolicy, step_costs: Sequence[float] | None) -> list[PolicySpec]:
    """A planner that must be given a step cost, once for every cost of a list; others stay as they are.

    Args:
        spec: what it was made of.
        step_costs: nats per image; None takes the ends of the range that the planner was trained on and their geometric
            mean, to two digits.
    """
    if named.step_cost_range is None:
        return [spec]
    low, high = named.step_cost_range
    between = min(max(float(f"{(low * high) ** 0.5:.2g}"), low), high)
    return [replace(spec, step_cost=float(cost)) for cost in step_costs or (low, between, high)]


def schedules(spec: PolicySpec, budgets: tuple[int, ...], sweep: Sequence[int]) -> list[PolicySpec]:
    """A policy, and if it reveals one block a step by no schedule of its own the same at every budget of a sweep.

    Own policies and references, which are evaluated on the first images only, stay as they are.
    """
    if spec.schedule or budgets != (1,) or spec.kind == "own" or not spec.rival:
        return [spec]
    return [spec, *(replace(spec, schedule=str(budget)) for budget in sweep if budget != 1)]


def seeds_named(policies: Sequence[NamedPolicy]) -> list[NamedPolicy]:
    """Every policy under a name of its own: training seeds of a planner share one in tables, here the seed is in it."""
    names = [named.name for named in policies]
    return [
        replace(named, name=f"{named.name} (seed {named.seed})") if names.count(named.name) > 1 else named
        for named in policies
    ]
