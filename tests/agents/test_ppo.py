"""PPO: advantages by hand, a ratio that starts at 1, who sees what, learning, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orderrl.agents.play import roll_out
from orderrl.agents.policies import PlannerPolicy
from orderrl.agents.ppo import PPO, leave_one_out_mean
from orderrl.agents.ppo import Config as PPOConfig
from orderrl.planner import OrderHead
from tests.agents.helpers import tiny_core, tiny_env, tiny_planner
from tests.helpers import tiny_backbone
from tests.jobs import Enough, Seen, logged

SMALL: dict[str, Any] = {"num_envs": 8, "frames_per_batch": 144, "minibatch_size": 48, "group_size": 1}
WIDE: dict[str, Any] = {"num_envs": 16}  # as many frames in half as many steps


def make_ppo(
    planner: OrderHead | None = None,
    budgets: tuple[int, ...] = (1, 2),
    step_cost: float = 1.0,
    seed: int = 0,
    **config: Any,
) -> PPO:
    """PPO on a tiny environment with objective "likelihood"; 18 steps of 8 images a round."""
    settings = PPOConfig(**(SMALL | {"iterations": 4, "critic_warmup": 0} | config))
    env = tiny_env(
        privileged=settings.privileged_critic,
        budgets=budgets,
        num_envs=settings.num_envs,
        objective="likelihood",
        step_cost=step_cost,
    )
    return PPO(planner or tiny_planner(noisy=False), env, settings, seed)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two state dictionaries are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


def copy_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


# ---------------------------------------------------------------------- one round, by hand


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_advantages_with_gamma_and_lambda_one_are_returns(offset: float) -> None:
    """Episodes of different lengths; one cut by the end of the round goes on with the critic's estimate, a constant."""
    ppo = make_ppo(budgets=(1, 2, 4), gae_lambda=1.0)
    with torch.no_grad():
        ppo.critic.value_head.bias.fill_(offset)
    data = ppo._collect()
    with torch.no_grad():
        ppo.advantage(data)
    reward, done = data["next", "reward"][..., 0], data["next", "done"][..., 0]
    lengths = {int(part) for row in done for part in row.nonzero().flatten().diff()}
    assert len(lengths) > 1 and not done[:, -1].all()
    expected = torch.zeros_like(reward)
    for row in range(8):
        rest = offset
        for step in reversed(range(18)):
            rest = reward[row, step].item() + (0.0 if done[row, step] else rest)
            expected[row, step] = rest
    assert torch.allclose(data["value_target"][..., 0], expected, atol=1e-4)
    assert torch.allclose(data["advantage"][..., 0], expected - offset, atol=1e-4)


def test_rewards_are_nats_per_image_and_metrics_are_of_first_episodes() -> None:
    """The likelihood return of an image: loss given nothing - code length - step cost * steps."""
    ppo = make_ppo(budgets=(1, 2, 4), step_cost=1.5)
    data = ppo._collect()
    with torch.no_grad():
        ppo.advantage(data)
    row = ppo._summary(data)
    returns, steps = [], []
    for env in range(8):
        length = int(data["next", "done"][env, :, 0].nonzero()[0]) + 1
        losses = data["context_loss"][env, :length]
        shown = data["next", "visible"][env, :length] & ~data["visible"][env, :length]
        code_length = losses[shown].sum().item()
        returns.append(losses[0].sum().item() - code_length - 1.5 * length)
        steps.append(length)
    assert row["return"] == pytest.approx(sum(returns) / 8, abs=1e-3)
    assert row["planner_steps"] == pytest.approx(sum(steps) / 8)
    assert row["illegal"] == 0


@pytest.mark.parametrize("budgets", [(1,), (1, 2, 4)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_ratio_starts_at_one(budgets: tuple[int, ...], dropout: float) -> None:
    planner = tiny_planner(dropout=dropout).train()
    ppo = make_ppo(planner, budgets)
    data = ppo._collect()
    with torch.no_grad():
        ppo.advantage(data)
    frames = data.reshape(-1)
    parts = ppo.loss(frames)
    assert parts["clip_fraction"] == 0
    assert parts["kl_approx"].abs() < 1e-5
    assert parts["ESS"].item() == pytest.approx(1, abs=1e-4)  # effective sample size, as a share
    again = ppo.actor.get_dist(frames).log_prob(frames["action"])
    assert torch.allclose(again, frames["action_log_prob"], atol=1e-4)


def test_the_entropy_bonus_and_the_rates_are_annealed() -> None:
    ppo = make_ppo(entropy_coeff=0.1, learning_rate=1e-3, critic_learning_rate=1e-2)
    data = ppo._collect()
    with torch.no_grad():
        ppo.advantage(data)
    for progress, coefficient in ((0.0, 0.1), (0.5, 0.05), (0.75, 0.025)):
        ppo._anneal(progress)
        parts = ppo.loss(data.reshape(-1))
        assert parts["loss_entropy"].item() == pytest.approx(-coefficient * parts["entropy"].item(), rel=1e-4)
        rates = [group["lr"] for group in ppo.optimizer.param_groups]
        assert rates == pytest.approx([1e-3 * (1 - 0.9 * progress), 1e-2 * (1 - 0.9 * progress)])


def test_every_round_has_images_of_its_own() -> None:
    """No sub-environment's seed comes back in another round or under another seed of the run."""
    seeds: list[int] = []
    for seed in (0, 1):
        ppo = make_ppo(iterations=2, seed=seed, epochs=1)
        rounds: list[tuple[list[int], bool]] = []

        def see(row: dict[str, float], core: Any = ppo.env.core, rounds: list[Any] = rounds) -> None:
            rounds.append((core.seeds.tolist(), bool((core.episode >= 1).all())))

        logged(ppo.train, see=see)
        assert all(went_on for _, went_on in rounds), "episodes went on after their end"
        seeds += [value for found, _ in rounds for value in found]
    assert len(set(seeds)) == len(seeds) == 4 * 8


# ---------------------------------------------------------------------- who sees what


def test_only_the_critic_sees_context_losses() -> None:
    ppo = make_ppo(budgets=(1, 2, 4))
    torch.nn.init.normal_(ppo.critic.value_head.weight)
    data = ppo._collect()
    changed = data.clone()
    changed["context_loss"] = data["context_loss"] + 1
    assert "context_loss" not in ppo.actor.in_keys and "context_loss" in ppo.value.in_keys
    assert not torch.allclose(ppo.value(data.clone())["state_value"], ppo.value(changed.clone())["state_value"])
    for key in ("logits", "budget_logits"):
        assert torch.equal(
            ppo.actor.get_dist_params(data.clone())[key], ppo.actor.get_dist_params(changed.clone())[key]
        )
    assert ppo.critic.config.privileged and not ppo.planner.config.privileged


def test_without_privilege_the_critic_sees_what_the_actor_sees() -> None:
    ppo = make_ppo(privileged_critic=False)
    assert "context_loss" not in ppo.value.in_keys and "context_loss" not in ppo._collect()
    assert len(logged(ppo.train, until=1)) == 1


def test_an_environment_without_context_losses_is_refused_for_a_privileged_critic() -> None:
    with pytest.raises(ValueError, match="privileged_critic=True needs an environment made with privileged=True"):
        PPO(tiny_planner(), tiny_env(num_envs=8), PPOConfig(**SMALL))


def test_an_environment_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="num_envs=8 needs as many environments, this one has 4"):
        PPO(tiny_planner(), tiny_env(num_envs=4, privileged=True), PPOConfig(**SMALL))


def test_backbone_and_start_stay_as_they_are() -> None:
    backbone, planner = copy_of(tiny_backbone()), tiny_planner()
    start = copy_of(planner)
    ppo = make_ppo(planner)
    logged(ppo.train, until=2)
    assert same(tiny_backbone().state_dict(), backbone) and same(planner.state_dict(), start)
    assert not torch.equal(ppo.planner.score_head.weight, planner.score_head.weight)


def test_the_start_ranks_as_the_cloned_planner_does() -> None:
    """New budgets and the sharpness leave the first block of the clone where it was."""
    planner = tiny_planner()
    ppo = make_ppo(planner, sharpness=2.5)
    assert ppo.planner.sharpness.exp().item() == pytest.approx(2.5)
    core = tiny_core(num_envs=8)
    core.reset()
    start = ppo.planner(core.observation())
    assert torch.equal(start.scores, planner(core.observation()).scores)
    assert (start.budget_logits == 0).all() and start.budget_logits.shape == (8, 2)


# ---------------------------------------------------------------------- learning


def test_warm_up_trains_the_critic_alone() -> None:
    ppo = make_ppo(critic_warmup=2)
    planner, critic = copy_of(ppo.planner), copy_of(ppo.critic)

    def see(row: dict[str, float]) -> None:
        assert same(ppo.planner.state_dict(), planner) == (row["step"] <= 2)
        assert not same(ppo.critic.state_dict(), critic)

    assert len(logged(ppo.train, see=see)) == 4
    assert not same(ppo.planner.state_dict(), planner)


def test_a_high_step_cost_teaches_the_large_budget() -> None:
    """At 20 nats a step nothing pays but few steps: nine blocks take five."""
    ppo = make_ppo(step_cost=20.0, iterations=10, **WIDE, critic_warmup=1, learning_rate=3e-3)
    rows = logged(ppo.train)
    assert rows[0]["planner_steps"] > 5.8 and rows[-1]["planner_steps"] < 5.4
    assert rows[-1]["return"] > rows[0]["return"] + 8
    assert [row["step"] for row in rows] == list(range(1, 11)) and rows[-1]["frames"] == 1440
    record = roll_out(tiny_core((1, 2)), PlannerPolicy(ppo.planner.eval(), (1, 2)), torch.Generator())
    assert (record.steps == 5).all()


def test_free_steps_teach_the_small_budget() -> None:
    """The lesson turned around (steps are paid for), so it is the reward that teaches and no drift."""
    ppo = make_ppo(step_cost=0.0, iterations=7, critic_warmup=1, learning_rate=3e-3)
    cost = ppo.env.core.reward
    object.__setattr__(cost.config, "step_cost", -20.0)
    rows = logged(ppo.train)
    assert rows[-1]["planner_steps"] > rows[0]["planner_steps"] + 1


def test_the_critic_explains_returns() -> None:
    ppo = make_ppo(budgets=(1,), iterations=10, **WIDE, critic_warmup=10, critic_learning_rate=1e-2, gae_lambda=1.0)
    errors = [row["value_error"] for row in logged(ppo.train)]
    assert errors[0] == pytest.approx(1, abs=1e-3) and max(errors[-3:]) < 0.85


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("warmup", [0, 3])
def test_resuming_equals_an_uninterrupted_run(warmup: int, tmp_path: Path) -> None:
    """Bit for bit, through a file, in a fresh environment, whatever random numbers were drawn in between."""
    short: dict[str, Any] = {"critic_warmup": warmup, "frames_per_batch": 72, "epochs": 2}
    whole = make_ppo(tiny_planner(), (1, 2, 4), **short)
    rows = logged(whole.train)
    with pytest.raises(Enough), Seen(print, 3, tmp_path, "job", 0) as job:
        make_ppo(tiny_planner(), (1, 2, 4), **short).train(job)
    torch.rand(1000)
    second = make_ppo(tiny_planner(seed=9), (1, 2, 4), **short)  # its start does not matter any more
    seen: list[dict[str, float]] = []
    with Seen(seen.append, None, tmp_path, "job", 0) as again:
        second.train(again)
    assert seen == rows[2:] and again.history == rows
    assert same(second.planner.state_dict(), whole.planner.state_dict())
    assert same(second.critic.state_dict(), whole.critic.state_dict())


def test_a_state_is_a_snapshot() -> None:
    ppo = make_ppo()
    logged(ppo.train, until=1)
    state = ppo.state_dict()
    kept = {k: v.clone() for k, v in state["planner"].items()}
    logged(ppo.train, until=1)
    assert same(state["planner"], kept) and state["iteration"] == 1


# ---------------------------------------------------------------------- housekeeping


@pytest.mark.filterwarnings("error::DeprecationWarning", "error::FutureWarning", "error::UserWarning")
def test_a_round_runs_without_warnings() -> None:
    assert len(logged(make_ppo(budgets=(1, 2, 4)).train, until=1)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"minibatch_size": 0}, "minibatch_size must be at least 1, got 0"),
        ({"num_envs": 7}, "num_envs=7 must divide frames_per_batch=144"),
        ({"sharpness": 0.0}, "sharpness must be positive, got 0.0"),
        ({"gae_lambda": 1.1}, r"gae_lambda must lie in \[0, 1\], got 1.1"),
        ({"clip_epsilon": 0.0}, "clip_epsilon must be positive, got 0.0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"entropy_coeff": -0.1}, "entropy_coeff must be at least 0, got -0.1"),
        ({"critic_warmup": -1}, "critic_warmup must be at least 0, got -1"),
    ],
)
def test_bad_configs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**(SMALL | change))


# ---------------------------------------------------------------------- groups


def test_leave_one_out_means_by_hand() -> None:
    """Two groups of two; episodes of a group are compared step by step however fast each is played."""
    values = torch.tensor([[1.0, 2, 3, 4], [10.0, 20, 30, 40], [5.0, 6, 7, 8], [50.0, 60, 70, 80]])
    done = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 1]]).bool()
    expected = torch.tensor([[10.0, 20, 40, 0], [1, 2, 0, 3], [50, 0, 0, 0], [5, 0, 0, 0]])
    assert torch.equal(leave_one_out_mean(values, done, 2), expected)


@pytest.mark.parametrize("budgets", [(1,), (1, 2, 4)])
def test_a_group_plays_the_same_images_and_its_baseline_ignores_the_own_actions(budgets: tuple[int, ...]) -> None:
    ppo = make_ppo(tiny_planner(noisy=False), budgets, group_size=4)
    ppo.env.core.seed(ppo._round_seeds())
    data = ppo._collect()
    done = data["next", "done"][..., 0]
    starts = data["fraction"][..., 0] == 0
    images = [row[first].tolist() for row, first in zip(data["context_loss"].sum(-1), starts, strict=True)]
    for group in (images[:4], images[4:]):
        for other in group[1:]:
            both = min(len(group[0]), len(other))
            assert group[0][:both] == pytest.approx(other[:both], rel=1e-4)
    assert images[0][0] != pytest.approx(images[4][0], rel=1e-4)
    values = torch.randn(done.shape)
    before = leave_one_out_mean(values, done, 4)
    values[1] += 100
    after = leave_one_out_mean(values, done, 4)
    assert torch.allclose(before[1], after[1], atol=1e-4)  # not of its own
    assert torch.equal(before[4:], after[4:])  # not of the other group
    assert not torch.equal(before[0], after[0])


def test_group_baselines_are_taken_from_advantages_alone() -> None:
    ppo = make_ppo(budgets=(1,), group_size=4)
    ppo.env.core.seed(ppo._round_seeds())
    data = ppo._collect()
    plain = data.clone()
    with torch.no_grad():
        ppo.advantage(plain)
    ppo._estimate(data)
    others = leave_one_out_mean(plain["advantage"][..., 0], plain["next", "done"][..., 0], 4)
    assert torch.allclose(data["advantage"][..., 0], plain["advantage"][..., 0] - others)
    assert torch.equal(data["value_target"], plain["value_target"])


def test_a_group_must_divide_the_environments() -> None:
    with pytest.raises(ValueError, match="group_size=3"):
        PPOConfig(group_size=3, num_envs=128)


def test_a_start_may_keep_its_own_sharpness_and_repulsion() -> None:
    planner = tiny_planner()
    with torch.no_grad():
        planner.sharpness.fill_(0.7)
        planner.repulsion.fill_(0.3)
    ppo = make_ppo(planner, budgets=(1, 2), sharpness=None, spacing=None)
    assert torch.equal(ppo.planner.sharpness, planner.sharpness)
    assert torch.equal(ppo.planner.repulsion, planner.repulsion)
