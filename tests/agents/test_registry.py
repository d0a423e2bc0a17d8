"""Names of schedules and of planners at one cost of a step."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from orderrl import compose
from orderrl.agents.play import act
from orderrl.agents.policies import RankingPolicy, ReferencePolicy, fixed_order
from orderrl.agents.registry import NamedPolicy, check_planner_name, make_policy, tell_apart
from orderrl.agents.spec import PolicySpec
from orderrl.backbones import OrderRobustTransformer, save_backbone
from orderrl.evaluation.policies import at_step_costs, chosen_policies
from orderrl.evaluation.settings import EvalConfig
from orderrl.factory import setup_of
from orderrl.planner import save_planner
from tests.agents.helpers import mid_episode, tiny_core, tiny_planner
from tests.helpers import tiny_backbone

RANGE = (0.05, 2.0)


@pytest.fixture(scope="module")
def backbone() -> OrderRobustTransformer:
    return tiny_backbone()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of planners: trained on a range of costs (two seeds), at one cost, and cloned."""
    home = tmp_path_factory.mktemp("registry")
    for name, seed, costs in (("ranged", 0, RANGE), ("again", 1, RANGE), ("fixed", 0, None), ("cloned", 0, None)):
        planner = tiny_planner(num_budgets=1 if name == "cloned" else 2, seed=seed, step_cost_range=costs)
        if planner.project_step_cost is not None:
            torch.nn.init.normal_(planner.project_step_cost.weight, std=3.0)
        agent = {"name": "bc", "target": "utility"} if name == "cloned" else {"name": "ppo"}
        known: dict[str, Any] = {"agent": agent, "seed": seed, "objective": "likelihood"}
        known["budgets"] = [1] if name == "cloned" else [1, 2]
        if name != "cloned":
            known["env"] = {"step_cost": 0.5 if costs is None else list(costs)}
        save_planner(home / f"{name}.safetensors", planner, known)
    return home


# ---------------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("spec", "budgets"),
    [
        ("random@<1.5", (1, 2, 4)),
        ("random@i<6", (1, 2, 4)),
        ("random@i<.5", (1, 2, 4)),
        ("spaced_random@<1.5/1,2,4,8", (1, 2, 4, 8)),
        ("multiscale@i<6/8,1,3", (1, 3, 8)),
        ("lookahead:2@i<3/2", (2,)),
    ],
)
def test_budgets_of_thresholds(spec: str, budgets: tuple[int, ...], backbone: OrderRobustTransformer) -> None:
    named = make_policy(spec, backbone)
    assert named.budgets == budgets and named.name == spec


def test_small_images_have_the_budgets_that_fit() -> None:
    assert make_policy("random@<1.5", tiny_backbone(2, 4, 2)).budgets == (1, 2)


@pytest.mark.parametrize(
    "schedule",
    [
        *("<", "i<", "i<a", "<1/", "<1/1+2", "j<3", "i6", "1,2", "1++2", "-1", "costs", "", "cost0.5"),
        *("٤", "9" * 5000, "<" + "9" * 400, "best_of:" + "9" * 30, "semifast:1٤"),  # other digits; more than can be
    ],
)
def test_what_is_no_schedule_is_refused(schedule: str, backbone: OrderRobustTransformer) -> None:
    with pytest.raises(ValueError, match=r"is no schedule; write @4.*@i<6/1,2,4,8"):
        make_policy(f"random@{schedule}", backbone)


@pytest.mark.parametrize("budgets", ["0,2", "1,10"])
def test_budgets_that_the_image_does_not_have_are_refused(budgets: str, backbone: OrderRobustTransformer) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and 9 blocks, got {budgets}"):
        make_policy(f"random@i<3/{budgets}", backbone)


def test_summed_entropies_need_token_probabilities() -> None:
    class Continuous:
        geometry, vocab_size = tiny_backbone().geometry, 0

    make_policy("random@<-1.5", Continuous())  # type: ignore[arg-type]  # a mean log-variance
    with pytest.raises(ValueError, match="sums entropies in nats, which a backbone of continuous tokens does not have"):
        make_policy("random@i<3", Continuous())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["low_entropy", "oracle"])
def test_every_step_stays_below_the_information_that_is_named(name: str, backbone: OrderRobustTransformer) -> None:
    """Played to the end; where even one block is above, one block is revealed."""
    threshold, sizes = 3.1, set()
    named = make_policy(f"{name}@i<{threshold}", backbone)
    core = tiny_core(named.budgets, num_envs=12)
    core.reset()
    while not core.visible.all():
        entropy, hidden, before = core.entropy.clone(), core.hidden_count, core.visible.clone()
        action = act(named.policy, core, torch.Generator().manual_seed(0))
        core.step(action)
        revealed = core.visible & ~before
        count, spent = revealed.sum(1), (entropy * revealed).sum(1)
        assert ((spent < threshold) | (count <= 1)).all()
        for row in (hidden > 0).nonzero().flatten().tolist():
            more = [k for k in named.budgets if count[row] < k <= hidden[row]]
            if more:  # the next budget would not have fitted
                assert entropy[row, action[row, : more[0]]].sum() >= threshold
        sizes |= set(count.tolist())
    assert {1, 2} <= sizes


# ---------------------------------------------------------------------- planners of a range of step costs


def test_a_planner_is_named_after_the_cost_at_which_it_acts(home: Path, backbone: OrderRobustTransformer) -> None:
    path = str(home / "ranged.safetensors")
    named = make_policy(f"{path}@cost0.50", backbone)
    assert (named.name, named.step_cost) == ("ppo_likelihood_conditioned_r0@cost0.5", 0.5)
    assert named.step_cost_range is None and named.budgets == (1, 2)
    untold = make_policy(path, backbone)
    assert (untold.name, untold.step_cost, untold.step_cost_range) == ("ppo_likelihood_conditioned_r0", None, RANGE)
    scheduled = make_policy(f"{path}@cost2@4", backbone)
    assert (scheduled.name, scheduled.step_cost) == ("ppo_likelihood_conditioned_r0@cost2@4", 2.0)
    assert isinstance(scheduled.policy, RankingPolicy) and scheduled.budgets == (4,)
    fixed = make_policy(str(home / "fixed.safetensors"), backbone)
    assert (fixed.name, fixed.step_cost, fixed.step_cost_range) == ("ppo_likelihood_r0", 0.5, None)


def test_it_acts_as_in_an_environment_of_that_cost(home: Path, backbone: OrderRobustTransformer) -> None:
    path = str(home / "ranged.safetensors")
    untold = make_policy(path, backbone)
    core = mid_episode(tiny_core((1, 2), num_envs=12, step_cost=RANGE))
    actions = act(untold.policy, core, torch.Generator())
    seen = set()
    for row, cost in enumerate(core.observation()["step_cost"][:, 0].tolist()):
        at_cost = make_policy(f"{path}@cost{cost}", backbone)
        plain = mid_episode(tiny_core((1, 2), num_envs=12))
        assert torch.equal(act(at_cost.policy, plain, torch.Generator())[row], actions[row])
        seen.add(tuple(act(at_cost.policy, plain, torch.Generator()).flatten().tolist()))
    assert len(seen) > 1  # costs make a difference
    with pytest.raises(ValueError, match=r"\(0.05, 2.0\) and needs one"):
        act(untold.policy, mid_episode(tiny_core((1, 2))), torch.Generator())


@pytest.mark.parametrize("cost", ["0.04", "3"])
def test_a_cost_outside_the_trained_range_is_refused(cost: str, home: Path, backbone: OrderRobustTransformer) -> None:
    with pytest.raises(ValueError, match=rf"@cost{cost}'.*outside the range .* 0.05 to 2 nats per image"):
        make_policy(f"{home / 'ranged.safetensors'}@cost{cost}", backbone)


def test_a_planner_of_one_cost_takes_no_other(home: Path, backbone: OrderRobustTransformer) -> None:
    with pytest.raises(ValueError, match="not trained on a range of step costs"):
        make_policy(f"{home / 'fixed.safetensors'}@cost0.5", backbone)


def test_seeds_of_one_cost_share_a_name_and_no_other_planner_does(home: Path, backbone: OrderRobustTransformer) -> None:
    specs = ["ranged.safetensors@cost0.5", "again.safetensors@cost0.5", "ranged.safetensors@cost1", "fixed.safetensors"]
    named = tell_apart([make_policy(str(home / spec), backbone) for spec in specs])
    conditioned = "ppo_likelihood_conditioned_r0"
    assert [n.name for n in named] == [*[f"{conditioned}@cost0.5"] * 2, f"{conditioned}@cost1", "ppo_likelihood_r0"]
    assert [n.seed for n in named] == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("costs", "expected"), [(None, ["0.05", "0.32", "2"]), ([0.1, 1], ["0.1", "1"]), ([2], ["2"])], ids=str
)
def test_an_evaluation_tells_a_list_of_costs(
    costs: list[float] | None, expected: list[str], home: Path, backbone: OrderRobustTransformer
) -> None:
    save_backbone(home / "tiny.safetensors", backbone, {})
    planners = [str(home / f"{name}.safetensors") for name in ("ranged", "fixed", "cloned")]
    settings = EvalConfig(planners=planners, policies=[], sweep=[2], step_costs=costs)
    config = compose("evaluate", ["backbone=digits", f"backbone.name={home / 'tiny.safetensors'}"])
    names = [named.name for named, _ in chosen_policies(settings, setup_of(config, backbone))]
    conditioned = [f"ppo_likelihood_conditioned_r0@cost{cost}" for cost in expected]
    assert names == [*conditioned, "ppo_likelihood_r0", "bc_utility_r0", "bc_utility_r0@2"]


def test_a_schedule_is_tried_at_the_same_costs(home: Path, backbone: OrderRobustTransformer) -> None:
    spec = PolicySpec.parse(f"{home / 'ranged.safetensors'}@4")
    found = at_step_costs(spec, make_policy(spec, backbone), [0.1, 1.0])
    assert list(map(str, found)) == [f"{home / 'ranged.safetensors'}@cost{cost}@4" for cost in ("0.1", "1")]


# ---------------------------------------------------------------------- users' own policies under a schedule


def last_hidden(observation: TensorDict, generator: torch.Generator) -> torch.Tensor:
    """One block: the last hidden one."""
    return ranked_last_first(observation, generator)[:, 0]


def ranked_last_first(observation: TensorDict, generator: torch.Generator) -> torch.Tensor:
    """All blocks, the last hidden one first."""
    places = torch.arange(observation["visible"].shape[-1])
    return torch.where(observation["action_mask"], places, -1).argsort(-1, descending=True)


def largest_budget(observation: TensorDict, generator: torch.Generator) -> torch.Tensor:
    """For budgets (1, 2): a ranked list, and always the second budget where it is legal."""
    place = observation["budget_mask"].sum(-1, keepdim=True) - 1
    return torch.cat([ranked_last_first(observation, generator)[:, :2], place], -1)


class LastFirst(ReferencePolicy):
    def scores(self, core: Any, rows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return torch.arange(core.geometry.num_blocks).float().expand(len(rows), -1)


class OwnWay(LastFirst):
    def act(self, core: Any) -> torch.Tensor:
        return torch.zeros(core.num_envs, dtype=torch.int64)


reference, own_way = LastFirst(), OwnWay()
ranking = RankingPolicy(fixed_order(torch.arange(8, -1, -1)), tiny_backbone().geometry)
HERE = "tests.agents.test_registry"


def sizes_of_steps(named: NamedPolicy) -> list[int]:
    """How many blocks each step reveals, last block first."""
    core = tiny_core(named.budgets, num_envs=3)
    core.reset()
    sizes: list[int] = []
    while not core.visible.all():
        before = core.hidden_count
        core.step(act(named.policy, core, torch.Generator()))
        (size,) = set((before - core.hidden_count).tolist())
        assert core.visible[:, len(core.visible[0]) - sum(sizes) - size :].all()
        sizes.append(size)
    return sizes


@pytest.mark.parametrize("name", ["ranked_last_first", "reference", "ranking"])
@pytest.mark.parametrize(
    ("schedule", "sizes"), [("4", [4, 4, 1]), ("1+2+2+4", [1, 2, 2, 4]), ("1", [1] * 9), ("<100/1,3", [3, 3, 3])]
)
def test_an_own_policy_reveals_what_its_schedule_says(
    name: str, schedule: str, sizes: list[int], backbone: OrderRobustTransformer
) -> None:
    named = make_policy(f"{HERE}:{name}@{schedule}", backbone, budgets=(1, 2))
    assert named.name == f"{HERE}:{name}@{schedule}" and named.family == f"{HERE}:{name}"
    assert sizes_of_steps(named) == sizes


def test_an_own_policys_own_budget_gives_way_to_the_schedule(backbone: OrderRobustTransformer) -> None:
    assert sizes_of_steps(make_policy(f"{HERE}:largest_budget", backbone, budgets=(1, 2))) == [2, 2, 2, 2, 1]
    assert sizes_of_steps(make_policy(f"{HERE}:largest_budget@2", backbone, budgets=(1, 2))) == [2, 2, 2, 2, 1]
    assert sizes_of_steps(make_policy(f"{HERE}:largest_budget@1+2+2+2+2", backbone)) == [1, 2, 2, 2, 2]


def test_an_own_policy_that_cannot_do_what_its_name_says_is_refused(backbone: OrderRobustTransformer) -> None:
    with pytest.raises(ValueError, match=r"last_hidden@4' is to reveal up to 4 blocks a step, .* \(batch, 4\)"):
        make_policy(f"{HERE}:last_hidden@4", backbone)
    assert sizes_of_steps(make_policy(f"{HERE}:last_hidden@1", backbone)) == [1] * 9
    with pytest.raises(ValueError, match=r"own_way@4' takes no schedule: OwnWay has an `act` of its own"):
        make_policy(f"{HERE}:own_way@4", backbone)
    with pytest.raises(ValueError, match="a step must reveal between 1 and 9 blocks"):
        make_policy(f"{HERE}:ranked_last_first@10", backbone)


# ---------------------------------------------------------------------- names that two planners share


def planner_of(home: Path, file: str, seed: int = 0, weights: int = 0, **known: Any) -> PolicySpec:
    agent = {"name": "bc", "target": "utility", "steps": known.pop("steps", 600)}
    described = {"agent": agent, "seed": seed, "objective": "context", "budgets": [1], **known}
    save_planner(home / f"{file}.safetensors", tiny_planner(seed=weights), described)
    return PolicySpec.parse(str(home / f"{file}.safetensors"))


def test_planners_of_other_settings_are_no_seeds_of_each_other(
    tmp_path: Path, backbone: OrderRobustTransformer
) -> None:
    short, long = planner_of(tmp_path, "short", steps=20), planner_of(tmp_path, "long", seed=1)
    again = planner_of(tmp_path, "again", seed=2)
    named = tell_apart([make_policy(spec, backbone) for spec in (short, long, again, replace(long, schedule="2"))])
    assert [policy.name for policy in named] == [
        "bc_utility_r0 (agent.steps=20)",
        *["bc_utility_r0 (agent.steps=600)"] * 2,
        "bc_utility_r0 (agent.steps=600)@2",
    ]
    assert [policy.family for policy in named[2:]] == ["bc_utility_r0 (agent.steps=600)"] * 2
    many = planner_of(tmp_path, "many", data="a", labels="b", backbone="c", planner={"dim": 16})
    names = [policy.name for policy in tell_apart([make_policy(spec, backbone) for spec in (long, many)])]
    assert all(re.fullmatch(r"bc_utility_r0 \(settings [0-9a-f]{6}\)", name) for name in names) and len(set(names)) == 2


def test_two_planners_of_one_seed_are_numbered(tmp_path: Path, backbone: OrderRobustTransformer) -> None:
    specs = [planner_of(tmp_path, f"p{weights}", weights=weights) for weights in range(2)]
    names = [policy.name for policy in tell_apart([make_policy(spec, backbone) for spec in specs])]
    assert names == ["bc_utility_r0", "bc_utility_r0 #2"]


@pytest.mark.parametrize("name", ["raster", "halton@4", "oracle", "lookahead:4", "spaced_random", "real images"])
def test_a_planner_is_not_called_what_another_policy_is(
    name: str, tmp_path: Path, backbone: OrderRobustTransformer
) -> None:
    with pytest.raises(ValueError, match="is the name of another policy"):
        check_planner_name(name)
    spec = planner_of(tmp_path, "named", name=name)
    assert make_policy(spec, backbone).name == f"planner_{name}"


@pytest.mark.parametrize("name", [None, "mine", "ppo@night - 2", "oracle_like", "a:b"])
def test_any_other_name_is_the_planners(name: str | None, tmp_path: Path, backbone: OrderRobustTransformer) -> None:
    check_planner_name(name)
    known: dict[str, Any] = {} if name is None else {"name": name}
    named = make_policy(replace(planner_of(tmp_path, "named", **known), schedule="4"), backbone)
    assert (named.name, named.family) == (f"{name or 'bc_utility_r0'}@4", name or "bc_utility_r0")
