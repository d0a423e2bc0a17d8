"""Policies by name, as the command line writes them: `orderrl.agents.spec` says how, `policy_names` lists the names."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orderrl.agents.confidence import Confidence, ConfidenceRule, HindsightConfidence
from orderrl.agents.orders import ORDERS, block_order
from orderrl.agents.policies import (
    POLICIES,
    SCORERS,
    Lookahead,
    Oracle,
    PairedPolicy,
    PlannerPolicy,
    Policy,
    RankingPolicy,
    ReferencePolicy,
    RescoringPolicy,
    Scorer,
    fixed_order,
    planner_scorer,
    with_schedule,
)
from orderrl.agents.schedules import Schedule, cosine_sizes, entropy_threshold, fixed, growing, information_threshold
from orderrl.agents.spec import COSINE, FITTED, MODE, PAIRED, REFERENCES, SPACED, THRESHOLD, PolicySpec, written_cost
from orderrl.agents.specialist import Native, ThroughStart, open_start, require_head
from orderrl.backbones.protocol import Backbone, backbone_device
from orderrl.envs.observation import observed
from orderrl.envs.reward import OBJECTIVES
from orderrl.planner import load_planner, require_described, require_reads
from orderrl.runtime.distributed import print_once
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.values import differing, flat

if TYPE_CHECKING:
    from tensordict import TensorDict

NEED_PROBABILITIES = ("lookahead",)
SPACING = 1.0
THRESHOLD_BUDGETS = (1, 2, 4)
_SETTINGS_IN_A_NAME = 3
_TRAINING = ("agent", "planner", "env", "data", "backbone", "labels")  # of a planner's description; no seed in them


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
        step_cost: nats per image that a step cost it in training, or at which it acts; None of other policies.
        step_cost_range: of a planner that still needs the cost of a step in its observation; else None.
        spec: what it was made of; None if it was made of no name.
        family: the name without schedule and step cost; None is the name.
        settings: what determined a planner's training, apart from its seed; nothing of other policies.
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
    spec: PolicySpec | None = None
    family: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def reference(self) -> bool:
        """Whether it looks at the state behind the observation."""
        return isinstance(self.policy, ReferencePolicy)


def policy_names() -> list[str]:
    """Names of all baselines, registered policies and references."""
    return [*ORDERS, *SCORERS, SPACED + "random", FITTED, *REFERENCES, *POLICIES]


@isolated_float32
def make_policy(
    spec: str | PolicySpec,
    backbone: Backbone,
    fitted: Callable[[], Tensor] | None = None,
    budgets: tuple[int, ...] = (1,),
) -> NamedPolicy:
    """Build a policy from its name.

    Args:
        spec: see the module's text.
        backbone: gives the block grid; planners must fit it.
        fitted: gives the fixed order (B,) fitted on planner labels; called for "fitted" alone, and not where the
            backbone is a specialist of such an order.
        budgets: of own policies (module:attribute, or registered) without a schedule.

    Raises:
        ValueError: if the name is unknown, or its schedule or checkpoint does not fit.
    """
    if not isinstance(spec, PolicySpec):
        spec = PolicySpec.parse(spec)
    if spec.kind == "newest":
        raise ValueError(f"policy '{spec}': there is no cache here to take the newest planner from; give its file")
    if spec.kind == "planner":
        return _planner_policy(spec, backbone)
    if spec.kind == "own":
        return _own_policy(spec, backbone, budgets)
    if spec.name in NEED_PROBABILITIES and not backbone.vocab_size:
        raise ValueError(
            f"policy '{spec}' needs token probabilities, which a backbone of continuous tokens does not have; "
            "choose another policy"
        )
    chosen, schedule = _schedule(spec, backbone)
    if spec.kind == "reference":
        return _named(spec, _reference(spec, backbone, chosen, schedule), chosen)
    scorer = _scorer(spec, backbone, fitted)
    return _named(spec, _ranking(spec, scorer, backbone, chosen, schedule), chosen, scorer)


def _ranking(
    spec: PolicySpec, scorer: Scorer, backbone: Backbone, budgets: tuple[int, ...], schedule: Schedule
) -> RankingPolicy:
    """A scorer's policy, scored as often as the mode of its name says."""
    spacing = SPACING if spec.prefix == SPACED else 0.0
    if spec.mode in ("", "slow") or spec.candidates > 1:
        return RankingPolicy(scorer, backbone.geometry, budgets, schedule, spacing)
    found, period = MODE.fullmatch(spec.mode), None
    if found is not None and found[1]:
        if THRESHOLD.fullmatch(spec.schedule):
            raise ValueError(f"policy '{spec}': a threshold does not say how many steps there are; use fast or slow")
        period = -(-_number_of_steps(spec, backbone) // int(found[1]))
    return RescoringPolicy(scorer, backbone.geometry, budgets, schedule, spacing, period)


def _number_of_steps(spec: PolicySpec, backbone: Backbone) -> int:
    sizes, blocks = _sizes(spec, backbone), backbone.geometry.num_blocks
    return len(sizes) if len(sizes) > 1 else -(-blocks // sizes[0])


def _sizes(spec: PolicySpec, backbone: Backbone) -> tuple[int, ...]:
    """Blocks of the steps; a single number is that of all."""
    cosine = COSINE.fullmatch(spec.schedule)
    if cosine is None:
        return tuple(int(size) for size in (spec.schedule or "1").split("+"))
    try:
        return cosine_sizes(int(cosine[1]), backbone.geometry.num_blocks)
    except ValueError as error:
        raise ValueError(f"policy '{spec}': {error}") from None


def _named(
    spec: PolicySpec, policy: Policy | ReferencePolicy, budgets: tuple[int, ...], scorer: Scorer | None = None
) -> NamedPolicy:
    """A policy that is called what it is made of."""
    return NamedPolicy(str(spec), policy, budgets, scorer, spec=spec, family=str(spec.family))


def _scorer(spec: PolicySpec, backbone: Backbone, fitted: Callable[[], Tensor] | None) -> Scorer:
    if spec.name in ORDERS:
        return fixed_order(block_order(spec.name, backbone.geometry))
    if spec.name in SCORERS:
        return SCORERS[spec.name]
    if spec.name == FITTED:
        origin = getattr(backbone, "origin", None)
        if origin is not None and origin.fitted is not None:  # what the backbone was trained in
            if len(origin.fitted) != backbone.geometry.num_blocks:
                raise ValueError(f"policy '{spec}': {origin.folder} names an order of {len(origin.fitted)} blocks")
            return fixed_order(torch.tensor(origin.fitted))
        if fitted is None:
            raise ValueError(f"policy '{spec}' is fitted on labels, and there are none here; choose another policy")
        return fixed_order(fitted())
    raise _unknown(spec)


def _unknown(spec: PolicySpec) -> ValueError:
    return ValueError(
        f"policy '{spec}' is unknown; choose one of {', '.join(policy_names())} (NAME@k reveals k blocks a step), "
        "a planner's .safetensors file or module:attribute"
    )


def _schedule(spec: PolicySpec, backbone: Backbone) -> tuple[tuple[int, ...], Schedule]:
    """Budgets and schedule of a name."""
    if not spec.schedule:
        return (1,), fixed(0)
    blocks = backbone.geometry.num_blocks
    if THRESHOLD.fullmatch(spec.schedule):
        return _threshold(spec, backbone)
    steps = _sizes(spec, backbone)
    if min(steps) < 1 or max(steps) > blocks:
        raise ValueError(f"policy '{spec}': a step must reveal between 1 and {blocks} blocks")
    if len(steps) == 1:
        return steps, fixed(0)
    if sum(steps) != blocks:
        raise ValueError(f"policy '{spec}': the steps must sum to the {blocks} blocks, they sum to {sum(steps)}")
    budgets = tuple(sorted(set(steps)))
    return budgets, growing(budgets, steps)


def _threshold(spec: PolicySpec, backbone: Backbone) -> tuple[tuple[int, ...], Schedule]:
    """Budgets and schedule of a threshold on entropies."""
    found = THRESHOLD.fullmatch(spec.schedule)
    assert found is not None
    information, nats, named = found.groups()
    blocks = backbone.geometry.num_blocks
    budgets = tuple(k for k in THRESHOLD_BUDGETS if k <= blocks)
    if named is not None:
        budgets = tuple(sorted({int(k) for k in named.split(",")}))
        if budgets[0] < 1 or budgets[-1] > blocks:
            raise ValueError(f"policy '{spec}': budgets must lie between 1 and {blocks} blocks, got {named}")
    if not information:
        return budgets, entropy_threshold(budgets, float(nats))
    if not backbone.vocab_size:
        raise ValueError(
            f"policy '{spec}' sums entropies in nats, which a backbone of continuous tokens does not have; choose "
            "another schedule"
        )
    return budgets, information_threshold(budgets, float(nats))


def _reference(spec: PolicySpec, backbone: Backbone, budgets: tuple[int, ...], schedule: Schedule) -> ReferencePolicy:
    if spec.name == "lookahead":
        return Lookahead(spec.draws or 1, budgets, schedule)
    if spec.name == "oracle":
        return Oracle(budgets, schedule)
    if spec.name == "native":
        require_head(backbone)
        return Native(budgets, schedule)
    rule = ConfidenceRule.parse(spec.rule)
    if spec.name == "hindsight_confidence":
        return HindsightConfidence(budgets, schedule, rule.distance)
    rule.require(backbone, str(spec))
    return Confidence(budgets, schedule, rule)


def _planner_policy(spec: PolicySpec, backbone: Backbone) -> NamedPolicy:
    """The planner of a file; it chooses its budgets itself, or its block scores act with a schedule."""
    assert spec.path is not None
    planner, description = load_planner(spec.path)
    start = open_start(backbone, description.get("backbone", ""))
    require_reads(spec.path, planner, description, backbone if start is None else start)
    require_described(spec.path, planner, description)
    if spec.prefix == PAIRED:
        planner.config.require_pairs(f"policy '{spec}'")
    objective: str | None = description["objective"]
    if refusal := OBJECTIVES.refusal(description["objective"]):
        print_once(f"{spec.path}: {refusal}; it has no column")
        objective = None
    elif OBJECTIVES.given(description["objective"]) is not None:  # of a user: its return becomes a metric
        OBJECTIVES.find(description["objective"])
    costs, cost = planner.config.step_cost_range, description.get("env", {}).get("step_cost")
    family = spec.prefix + _planner_name(description, planner.config.reasoning_steps, costs is not None)
    step_cost = None if isinstance(cost, list) else cost  # of a range the observation has it, or it knows no costs
    if spec.step_cost is not None:
        step_cost = spec.step_cost
        try:
            planner, costs = planner.at_step_cost(step_cost), None
        except ValueError as error:
            raise ValueError(f"policy '{spec}': {error}") from None
    at_cost = f"@{written_cost(spec.step_cost)}" if spec.step_cost is not None else ""
    budgets: tuple[int, ...] = tuple(description["budgets"])
    policy: Policy = PlannerPolicy(planner, budgets, deterministic=spec.candidates == 1)  # candidates differ in order
    family += f"@{spec.mode}" if spec.mode else ""
    if spec.schedule or spec.prefix or (spec.mode and spec.candidates == 1):
        budgets, schedule = _schedule(spec, backbone)
        if spec.prefix == PAIRED:
            policy = PairedPolicy(planner, budgets, schedule)
        else:
            policy = _ranking(spec, planner_scorer(planner), backbone, budgets, schedule)
    scorer: Scorer = planner_scorer(planner)
    acting: Policy | ReferencePolicy = policy
    if start is not None:
        acting = ThroughStart(policy, start, budgets, scorer)
    return NamedPolicy(
        f"{family}{at_cost}{'@' + spec.schedule if spec.schedule else ''}",
        acting,
        budgets,
        scorer,
        objective,
        planner.config.reasoning_steps,
        description["seed"],
        step_cost,
        costs,
        spec,
        family,
        {key: description[key] for key in _TRAINING if key in description},
    )


def _planner_name(description: Mapping[str, Any], reasoning_steps: int, conditioned: bool) -> str:
    """What tables call a planner: its own name, or one made of agent, target or objective, and R."""
    agent = description["agent"]
    what = agent.get("target", description["objective"])
    made = f"{agent['name']}_{what}{'_conditioned' if conditioned else ''}_r{reasoning_steps}"
    name = description.get("name", made)
    return f"planner_{name}" if _is_taken(name) else str(name)


def policy_source(spec: PolicySpec | None) -> Path | None:
    """The file that a policy is made of: a planner's checkpoint, or the user's module; None where there is none."""
    if spec is None or spec.path is not None:
        return spec.path if spec is not None else None
    return (POLICIES if spec.kind == "own" else ORDERS).source(spec.name)


def check_planner_name(name: str | None) -> None:
    """Refuse to call a planner as a baseline or reference is called in tables; None is fine."""
    if name is not None and _is_taken(name):
        raise ValueError(f"name={name!r} is the name of another policy in every table; choose another name")


def _is_taken(name: str) -> bool:
    try:
        return PolicySpec.parse(name).name in policy_names() or name in ("token_raster", "real images")
    except ValueError:
        return False


def tell_apart(policies: Sequence[NamedPolicy]) -> list[NamedPolicy]:
    """Planners of one name that are no training seeds of each other get names of their own.

    Trained at different step costs they are NAME@cost0.3, points of one curve; with other settings that differ they are
    "NAME (agent.steps=20)"; what is still alike in name and seed, such as another start, is "NAME #2".
    """
    families: dict[str, list[NamedPolicy]] = defaultdict(list)
    costs: dict[str, set[float | None]] = defaultdict(set)
    for policy in policies:
        families[policy.family or policy.name].append(policy)
        costs[policy.name].add(policy.step_cost)
    seen: dict[tuple[str, int | None], int] = defaultdict(int)
    found = []
    for policy in policies:
        old = policy.family or policy.name
        family = old + _what_differs(policy, families[old])
        name = family + policy.name.removeprefix(old)
        if len(costs[policy.name]) > 1 and policy.step_cost is not None:
            name = f"{name}@{written_cost(policy.step_cost)}"
        seen[name, policy.seed] += 1
        if (number := seen[name, policy.seed]) > 1:
            name, family = f"{name} #{number}", f"{family} #{number}"
        found.append(policy if name == policy.name else replace(policy, name=name, family=family))
    return found


def _what_differs(policy: NamedPolicy, family: Sequence[NamedPolicy]) -> str:
    """The settings in which planners of one name differ, in brackets; a hash of them if they are many."""
    settings = flat(policy.settings)
    keys = [key for key in differing(*(other.settings for other in family)) if key != "env.step_cost"]
    named = ", ".join(f"{key}={settings.get(key)}" for key in keys)
    if len(keys) > _SETTINGS_IN_A_NAME:
        named = f"settings {hashlib.sha256(named.encode()).hexdigest()[:6]}"
    return f" ({named})" if named else ""


def _own_policy(spec: PolicySpec, backbone: Backbone, budgets: tuple[int, ...]) -> NamedPolicy:
    if POLICIES.given(spec.name) is None:
        raise _unknown(spec)
    policy = POLICIES.find(spec.name)
    if not spec.schedule:
        return _named(spec, policy, tuple(budgets))
    budgets, schedule = _schedule(spec, backbone)
    scheduled = with_schedule(policy, budgets, schedule, f"policy '{spec}'")
    if not isinstance(scheduled, ReferencePolicy):  # what cannot follow its schedule is refused here, not when it acts
        if hasattr(scheduled, "reset"):
            scheduled.reset(torch.ones(1, dtype=torch.bool))
        scheduled(_first_observation(backbone, budgets), torch.Generator().manual_seed(0))
    return _named(spec, scheduled, budgets)


def _first_observation(backbone: Backbone, budgets: tuple[int, ...]) -> TensorDict:
    """What a policy sees of one image of which nothing is visible, without what the backbone says about it."""
    blocks, tokens, device = backbone.geometry.num_blocks, backbone.geometry.num_tokens, backbone_device(backbone)
    hidden = torch.zeros(1, blocks, backbone.hidden_size, device=device)
    observation = observed(
        hidden,
        hidden[..., 0],
        torch.zeros(1, blocks, dtype=torch.bool, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        None if budgets == (1,) else torch.ones(1, len(budgets), dtype=torch.bool, device=device),
    )
    discrete = torch.full((1, tokens), -1, device=device)
    observation["tokens"] = (
        discrete if backbone.vocab_size else hidden.new_zeros(1, tokens, getattr(backbone, "token_dim", 0))
    )
    return observation
