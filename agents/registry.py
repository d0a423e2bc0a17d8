"""Policies by name, as the command line writes them.

    raster              one block a step
    multiscale@4        four blocks a step
    halton@1+1+2+4+8    a growing schedule
    random@<1.5         1, 2 or 4 blocks, by the mean entropy of the most certain ones, in nats
    random@i<6          1, 2 or 4 blocks, by the summed entropy of the first ranked ones, in nats
    random@i<6/1,2,4,8  thresholds with other budgets
    spaced_random@4     blocks of one step keep apart
    lookahead:4         a reference with four draws
    PATH.safetensors    a planner with its own budget; PATH@4 its block scores with four blocks a step
    PATH@cost0.5        a planner trained on a range of step costs, told 0.5 nats a step; PATH@cost0.5@4
    paired_PATH@4       a planner with `pairs`: blocks of one step depend little on each other, as it predicts
    my_module:my_policy any callable of the policy interface

`policy_names` lists the names.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from orderrl.agents.orders import ORDERS
from orderrl.agents.policies import (
    SCORERS,
    Confidence,
    Lookahead,
    Oracle,
    PairedPolicy,
    PlannerPolicy,
    Policy,
    RankingPolicy,
    ReferencePolicy,
    Scorer,
    fixed_order,
    planner_scorer,
)
from orderrl.agents.schedules import Schedule, entropy_threshold, fixed, growing, information_threshold
from orderrl.backbones.protocol import Backbone
from orderrl.isolation import isolated_float32
from orderrl.planner import load_planner

REFERENCES = ("confidence", "lookahead", "oracle")
NEED_PROBABILITIES = ("lookahead", "confidence")
SPACED = "spaced_"
SPACING = 1.0
PAIRED = "paired_"
THRESHOLD_BUDGETS = (1, 2, 4)
_THRESHOLD = re.compile(r"(i?)<(-?\d*\.?\d+)(?:/(\d+(?:,\d+)*))?")  # kind, nats, budgets
_STEPS = re.compile(r"\d+(?:\+\d+)*")
_COST = re.compile(r"cost(\d*\.?\d+(?:e-?\d+)?)(?:@(.*))?")  # nats per image, schedule


@dataclass(frozen=True)
class NamedPolicy:
    """A policy with what a table says about it.

    Attributes:
        name: as given, or "<agent>_<target or objective>_r<R>" for a planner, "..._conditioned_r<R>" if it was trained
            on a range of step costs.
        policy: the policy.
        budgets: of the environment that it acts in.
        scorer: its block scores, where it has them.
        objective: what a planner was trained for, else None.
        reasoning_steps: R of a planner, else None.
        seed: training seed of a planner, else None.
        step_cost: nats per image that a step cost it in training, or that it is told; None of other policies.
        step_cost_range: of a planner that still must be told what a step costs, by the observation; else None.
    """

    name: str
    policy: Policy | ReferencePolicy
    budgets: tuple[int, ...]
    scorer: Scorer | None = None
    objective: str | None = None
    reasoning_steps: int | None = None
    seed: int | None = None
    step_cost: float | None = None
    step_cost_range: tuple[float, float] | None = None

    @property
    def reference(self) -> bool:
        """Whether it looks at the state behind the observation."""
        return isinstance(self.policy, ReferencePolicy)


def policy_names() -> list[str]:
    """Names of all baselines and references."""
    return [*ORDERS, *SCORERS, SPACED + "random", "fitted", *REFERENCES]


@isolated_float32
def make_policy(
    spec: str, backbone: Backbone, fitted: Callable[[], Tensor] | None = None, budgets: tuple[int, ...] = (1,)
) -> NamedPolicy:
    """Build a policy from its name.

    Args:
        spec: see the module's text.
        backbone: gives the block grid; planners must fit it.
        fitted: gives the fixed order (B,) fitted on planner labels; called for "fitted" alone.
        budgets: of own policies (module:attribute).

    Raises:
        ValueError: if the name is unknown, or its schedule or checkpoint does not fit.
    """
    base, _, sizes = spec.partition("@")
    if base.endswith(".safetensors"):
        return _planner_policy(base, sizes, backbone)
    if ":" in base and not base.startswith(REFERENCES):
        return _own_policy(base, budgets)
    if base.partition(":")[0] in NEED_PROBABILITIES and not backbone.vocab_size:
        raise ValueError(
            f"policy {spec!r} needs token probabilities, which a backbone of continuous tokens does not have; "
            "choose another policy"
        )
    chosen, schedule = _schedule(spec, sizes, backbone)
    name, _, argument = base.partition(":")
    if name in REFERENCES:
        return NamedPolicy(spec, _reference(name, argument, chosen, schedule), chosen)
    spaced, plain = base.startswith(SPACED), base.removeprefix(SPACED)
    scorer = _scorer(plain, spec, backbone, fitted)
    policy = RankingPolicy(scorer, backbone.geometry, chosen, schedule, SPACING if spaced else 0.0)
    return NamedPolicy(spec, policy, chosen, scorer)


def _scorer(name: str, spec: str, backbone: Backbone, fitted: Callable[[], Tensor] | None) -> Scorer:
    if name in ORDERS:
        return fixed_order(ORDERS[name](backbone.geometry))
    if name in SCORERS:
        return SCORERS[name]
    if name == "fitted":
        if fitted is None:
            raise ValueError(f"policy {spec!r} is fitted on labels, and there are none here; choose another policy")
        return fixed_order(fitted())
    raise ValueError(
        f"policy {spec!r} is unknown; choose one of {', '.join(policy_names())} (NAME@k reveals k blocks a step), "
        "a planner's .safetensors file or module:attribute"
    )


def _schedule(spec: str, sizes: str, backbone: Backbone) -> tuple[tuple[int, ...], Schedule]:
    """Budgets and schedule of the part behind '@'."""
    if not sizes:
        return (1,), fixed(0)
    blocks = backbone.geometry.num_blocks
    if threshold := _THRESHOLD.fullmatch(sizes):
        return _threshold(spec, threshold, backbone)
    if not _STEPS.fullmatch(sizes):
        raise ValueError(
            f"policy {spec!r}: {sizes!r} is no schedule; write @4, @1+1+2+4+8, or a threshold in nats: @<1.5 (mean "
            "entropy), @i<6 (summed entropy), @i<6/1,2,4,8 (other budgets); a planner's step cost is written @cost0.5"
        )
    steps = tuple(int(size) for size in sizes.split("+"))
    if min(steps) < 1 or max(steps) > blocks:
        raise ValueError(f"policy {spec!r}: a step must reveal between 1 and {blocks} blocks")
    if len(steps) == 1:
        return steps, fixed(0)
    if sum(steps) != blocks:
        raise ValueError(f"policy {spec!r}: the steps must sum to the {blocks} blocks, they sum to {sum(steps)}")
    budgets = tuple(sorted(set(steps)))
    return budgets, growing(budgets, steps)


def _threshold(spec: str, threshold: re.Match[str], backbone: Backbone) -> tuple[tuple[int, ...], Schedule]:
    """Budgets and schedule of a threshold on entropies."""
    information, nats, named = threshold.groups()
    blocks = backbone.geometry.num_blocks
    budgets = tuple(k for k in THRESHOLD_BUDGETS if k <= blocks)
    if named is not None:
        budgets = tuple(sorted({int(k) for k in named.split(",")}))
        if budgets[0] < 1 or budgets[-1] > blocks:
            raise ValueError(f"policy {spec!r}: budgets must lie between 1 and {blocks} blocks, got {named}")
    if not information:
        return budgets, entropy_threshold(budgets, float(nats))
    if not backbone.vocab_size:
        raise ValueError(
            f"policy {spec!r} sums entropies in nats, which a backbone of continuous tokens does not have; choose "
            "another schedule"
        )
    return budgets, information_threshold(budgets, float(nats))


def _reference(name: str, argument: str, budgets: tuple[int, ...], schedule: Schedule) -> ReferencePolicy:
    if name == "lookahead":
        if argument and not argument.isdigit():
            raise ValueError(f"lookahead:{argument} must name a number of draws, for example lookahead:4")
        return Lookahead(int(argument or 1), budgets, schedule)
    return {"oracle": Oracle, "confidence": Confidence}[name](budgets, schedule)


def _planner_policy(path: str, rest: str, backbone: Backbone) -> NamedPolicy:
    """The planner of a file; `rest` of its name is a step cost, a schedule, both ("cost0.5@4") or nothing."""
    how = next((prefix for prefix in (SPACED, PAIRED) if path.startswith(prefix)), "")
    planner, description = load_planner(Path(path.removeprefix(how)), backbone)
    if how == PAIRED:
        planner.config.require_pairs(f"policy {path!r}")
    agent = description["agent"]
    what = agent.get("target", description["objective"])
    reasoning, costs = planner.config.reasoning_steps, planner.config.step_cost_range
    made = f"{agent['name']}_{what}{'_conditioned' if costs else ''}_r{reasoning}"
    name = description.get("name", made)
    cost, sizes = description.get("env", {}).get("step_cost"), rest
    step_cost = None if isinstance(cost, list) else cost  # a range: it is told, or what it imitates knows no costs
    if told := _COST.fullmatch(rest):
        step_cost, sizes = float(told[1]), told[2] or ""
        try:
            planner, costs = planner.at_step_cost(step_cost), None
        except ValueError as error:
            raise ValueError(f"policy '{path}@{rest}': {error}") from None
        name = f"{name}@cost{step_cost:g}"
    named = NamedPolicy(
        name,
        PlannerPolicy(planner, tuple(description["budgets"])),
        tuple(description["budgets"]),
        planner_scorer(planner),
        description["objective"],
        reasoning,
        description["seed"],
        step_cost,
        costs,
    )
    if not sizes and not how:
        return named
    budgets, schedule = _schedule(path, sizes, backbone)
    policy: Policy
    if how == PAIRED:
        policy = PairedPolicy(planner, budgets, schedule)
    else:
        spacing = SPACING if how == SPACED else 0.0
        policy = RankingPolicy(planner_scorer(planner), backbone.geometry, budgets, schedule, spacing)
    name = f"{how}{named.name}{'@' + sizes if sizes else ''}"
    return replace(named, name=name, policy=policy, budgets=budgets)


def planner_file(spec: str) -> Path | None:
    """The checkpoint that a policy's name means; None if it means none."""
    path = spec.partition("@")[0].removeprefix(SPACED).removeprefix(PAIRED)
    return Path(path) if path.endswith(".safetensors") else None


def policy_source(spec: str) -> Path | None:
    """The file that defines a user's policy (module:attribute); None for other policies, and where there is no file."""
    module, colon, _ = spec.partition("@")[0].partition(":")
    if not colon or module.startswith(REFERENCES):
        return None
    try:
        return Path(inspect.getfile(importlib.import_module(module)))
    except (ImportError, TypeError):  # no module, or one without a file
        return None


def tell_step_costs_apart(policies: Sequence[NamedPolicy]) -> list[NamedPolicy]:
    """Planners of one name that were trained at different step costs are no seeds of each other: NAME@cost0.3."""
    costs: dict[str, set[float | None]] = defaultdict(set)
    for policy in policies:
        costs[policy.name].add(policy.step_cost)
    return [
        replace(policy, name=f"{policy.name}@cost{policy.step_cost:g}")
        if len(costs[policy.name]) > 1 and policy.step_cost is not None
        else policy
        for policy in policies
    ]


def _own_policy(spec: str, budgets: tuple[int, ...]) -> NamedPolicy:
    module, _, attribute = spec.partition(":")
    try:
        policy = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"policy {spec!r} cannot be imported: {error}; write module:attribute") from None
    if not callable(policy):
        raise ValueError(
            f"policy {spec!r} must be callable as policy(observation, generator), got {type(policy).__name__}"
        )
    return NamedPolicy(spec, policy, tuple(budgets))
