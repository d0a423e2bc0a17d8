"""The planner: what it reads, how it reasons, what its heads see, saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from orderrl.planner import OrderHead, PlannerConfig, load_planner, save_planner
from orderrl.runtime.checkpoint import save_checkpoint
from tests.agents.helpers import mid_episode, tiny_core, tiny_planner
from tests.helpers import tiny_backbone


def observe(rows: int = 4) -> TensorDict:
    return mid_episode(tiny_core(num_envs=rows)).observation()


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_the_same_weights_run_with_any_number_of_passes(steps: int) -> None:
    planner, observation = tiny_planner(num_budgets=3), observe()
    scores, logits, budget_logits, value, dependence, repulsion = planner(observation, steps)
    assert scores.shape == (4, 9) and budget_logits.shape == (4, 3) and value.shape == (4, 1)
    assert logits.shape == (4, 9) and dependence.shape == repulsion.shape == (4, 9, 9)
    assert torch.isfinite(scores).all()
    assert not torch.allclose(scores, planner(observation, steps + 1).scores)
    again = OrderHead(PlannerConfig(**(planner.config.__dict__ | {"reasoning_steps": steps})))
    again.load_state_dict(planner.state_dict())
    assert torch.equal(again.eval()(observation).scores, scores)


def gradients(planner: OrderHead, steps: int) -> set[str]:
    """Names of the parameters that the scores depend on."""
    planner.zero_grad()
    planner(observe(), steps).scores.square().sum().backward()
    return {name for name, p in planner.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def test_one_shot_planner_uses_neither_scratchpad_nor_core() -> None:
    touched = gradients(tiny_planner(), 0)
    assert not any(name == "scratchpad" or name.startswith("core.") for name in touched)
    assert any(name.startswith("stem.") for name in touched)


@pytest.mark.parametrize("steps", [1, 2])
def test_latent_reasoning_reaches_scratchpad_and_core(steps: int) -> None:
    touched = gradients(tiny_planner(), steps)
    assert "scratchpad" in touched and any(name.startswith("core.") for name in touched)


def test_the_scratchpad_is_carried_and_never_decoded() -> None:
    """Heads read block tokens; a latent changes them only through the core, and its state moves on between passes."""
    planner, observation = tiny_planner(), observe()
    seen: list[torch.Tensor] = []
    planner.core.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][:, 9:].detach()))
    block_tokens = planner.encode(observation, 2)
    assert block_tokens.shape == (4, 9, 16)
    assert [latents.shape for latents in seen] == [(4, 2, 16)] * 2
    assert torch.equal(seen[0], planner.scratchpad.expand(4, -1, -1)) and not torch.allclose(seen[0], seen[1])
    scores = planner(observation, 2).scores
    assert torch.allclose(scores, planner.score_head(block_tokens)[..., 0])
    with torch.no_grad():
        planner.scratchpad.add_(torch.linspace(-1, 1, 32).view(2, 16).roll(5, 1))
    assert torch.equal(planner(observation, 0).scores, tiny_planner()(observation, 0).scores)
    assert not torch.allclose(planner(observation, 2).scores, scores)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("pairs", [False, True])
def test_rows_do_not_depend_on_their_batch(pairs: bool, steps: int) -> None:
    planner, observation = tiny_planner(num_budgets=2, pairs=pairs), observe(6)
    whole = planner(observation, steps)
    for row in range(6):
        for all_rows, alone in zip(whole, planner(observation[row : row + 1], steps), strict=True):
            assert torch.allclose(all_rows[row : row + 1], alone, atol=1e-5)


@pytest.mark.parametrize("key", ["hidden", "entropy", "visible", "label", "fraction"])
@pytest.mark.parametrize("content", [True, False])
def test_which_parts_are_read(key: str, content: bool) -> None:
    planner, observation = tiny_planner(content=content, pairs=True), observe()
    changed = observation.clone()
    changed[key] = observation[key].roll(1, 0) if key not in ("label", "fraction") else (observation[key] + 1) % 3
    before, after = planner(observation, 1), planner(changed, 1)
    read = content or key not in ("hidden", "entropy")
    assert torch.equal(before.scores, after.scores) != read
    assert torch.equal(before.dependence, after.dependence) != read


def test_only_a_privileged_planner_reads_context_losses() -> None:
    core = mid_episode(tiny_core())
    observation = core.observation()
    observation["context_loss"] = core.losses
    changed = observation.clone()
    changed["context_loss"] = core.losses + 1
    for privileged in (False, True):
        planner = tiny_planner(privileged=privileged)
        assert torch.equal(planner(observation).value, planner(changed).value) != privileged


def test_a_new_planner_prefers_nothing() -> None:
    assert all((part == 0).all() for part in tiny_planner(noisy=False, num_budgets=3, pairs=True)(observe()))


# ---------------------------------------------------------------------- pairs


def with_pairs(plain: OrderHead) -> OrderHead:
    """The same planner with a pair head that is new."""
    planner = tiny_planner(noisy=False, pairs=True)
    planner.load_state_dict(plain.state_dict(), strict=False)
    return planner


def test_a_new_pair_head_changes_nothing_and_can_learn() -> None:
    plain = tiny_planner()
    torch.nn.init.normal_(plain.repulsion)
    planner, observation = with_pairs(plain), observe()
    output = planner(observation)
    for ours, theirs in zip(output, plain(observation), strict=True):
        assert torch.equal(ours, theirs)
    output.repulsion.square().sum().backward()  # exactly zero on both sides would have no gradient
    assert planner.pair_head is not None and planner.pair_head.right.weight.grad is not None
    assert planner.pair_head.right.weight.grad.abs().max() > 0


@pytest.mark.parametrize("steps", [0, 2])
def test_dependence_is_symmetric_and_differs_between_states(steps: int) -> None:
    dependence = tiny_planner(pairs=True)(observe(), steps).dependence
    assert torch.allclose(dependence, dependence.mT, atol=1e-6)
    assert not torch.allclose(dependence[0], dependence[1], atol=0.01)


def test_repulsion_is_a_constant_and_the_dependence_in_units_of_scores() -> None:
    planner, observation = tiny_planner(pairs=True), observe()
    torch.nn.init.normal_(planner.repulsion)
    planner.set_pair_strength(0.25)
    with torch.no_grad():
        planner.sharpness.fill_(3.0).log_()
    output = planner(observation)
    assert torch.allclose(output.logits, 3 * output.scores)
    assert torch.allclose(output.repulsion, planner.repulsion + 3 * 0.25 * output.dependence, atol=1e-5)


def test_a_planner_without_pairs_has_no_pair_strength() -> None:
    with pytest.raises(
        ValueError, match=r"pair_strength=0\.5 needs a planner with pairs=True, this one has pairs=False"
    ):
        tiny_planner().set_pair_strength(0.5)


@pytest.mark.parametrize("num_budgets", [1, 2, 3])
def test_with_budgets_keeps_all_but_the_budget_head(num_budgets: int) -> None:
    planner = tiny_planner(num_budgets=2, reasoning_steps=2, pairs=True)
    with torch.no_grad():
        planner.sharpness.fill_(0.7)
    other = planner.with_budgets(num_budgets)
    assert other.config.num_budgets == num_budgets and other.training == planner.training
    ours, theirs = planner.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if num_budgets == 2 or not name.startswith("budget_head."):
            assert torch.equal(theirs[name], value), name
        else:
            assert (theirs[name] == 0).all(), name
        assert theirs[name].data_ptr() != value.data_ptr()
    observation = observe()
    assert torch.equal(planner(observation).scores, other(observation).scores)


def test_saving_and_loading_by_name(tmp_path: Path) -> None:
    planner = tiny_planner(num_budgets=3, reasoning_steps=2, pairs=True)
    planner.set_pair_strength(0.3)
    path = tmp_path / "planner.safetensors"
    save_planner(path, planner, {"agent": "bc", "budgets": [1, 2, 4], "shape": {"dim": 5}, "kind": "other"})
    loaded, description = load_planner(path, tiny_backbone())
    assert loaded.config == planner.config and not loaded.training
    assert description["agent"] == "bc" and description["budgets"] == [1, 2, 4]
    observation = observe()
    for ours, theirs in zip(planner(observation), loaded(observation), strict=True):
        assert torch.equal(ours, theirs)
    assert load_planner(str(path))[0].config == planner.config


def test_a_checkpoint_from_before_pairs_loads(tmp_path: Path) -> None:
    path, planner = tmp_path / "planner.safetensors", tiny_planner()
    before = {name: value for name, value in planner.config.__dict__.items() if name != "pairs"}
    save_checkpoint(path, planner.state_dict(), {"kind": "planner", "shape": before})
    observation = observe()
    for ours, theirs in zip(planner(observation), load_planner(path, tiny_backbone())[0](observation), strict=True):
        assert torch.equal(ours, theirs)


def test_a_planner_for_another_backbone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "planner.safetensors"
    save_planner(path, tiny_planner(), {})
    with pytest.raises(ValueError, match=r"num_blocks=9 does not fit the backbone's num_blocks=16; train one") as error:
        load_planner(path, tiny_backbone(4, 4, 1))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_config_that_this_version_does_not_know_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "planner.safetensors"
    planner = tiny_planner()
    save_checkpoint(path, planner.state_dict(), {"kind": "planner", "shape": planner.config.__dict__ | {"depth": 3}})
    with pytest.raises(ValueError, match=r"planner\.safetensors: .*depth") as error:
        load_planner(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": 0}, "latents must be at least 1, got 0"),
        ({"core": 0}, "core must be at least 1, got 0"),
        ({"reasoning_steps": -1}, "reasoning_steps must lie in \\[0, 1000\\], got -1"),
        ({"stem": -1}, "stem must be at least 0, got -1"),
        ({"heads": 5}, "heads=5 must divide dim=16"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_shapes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_planner(**change)


@pytest.mark.parametrize("stem", [0, 2])
def test_any_depth(stem: int) -> None:
    assert torch.isfinite(tiny_planner(stem=stem, core=2)(observe(), 2).scores).all()
