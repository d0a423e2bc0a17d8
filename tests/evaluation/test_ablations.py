"""Ablations against slow computations, policies whose answer is known, and the command in miniature."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from orderrl import compose
from orderrl.agents.play import roll_out
from orderrl.agents.policies import RankingPolicy, fixed_order, planner_scorer, uniform_random
from orderrl.analyze import analyze
from orderrl.backbones import save_backbone
from orderrl.data import load_split
from orderrl.envs.observation import labelled
from orderrl.evaluation.ablations import (
    ablated_observations,
    best_blocks,
    content_ablation,
    injection,
    order_agreements,
    other_images,
    pooled_r2,
    quality_curves,
    random_injection,
    without_content,
)
from orderrl.evaluation.protocol import EvaluationProtocol
from orderrl.evaluation.row_entries import image_average
from orderrl.evaluation.settings import EvalConfig
from orderrl.metrics.recognisability import Recogniser
from orderrl.oracle import LabelConfig, label_contexts, random_contexts, utilities
from orderrl.train import train
from tests.agents.helpers import tiny_core, tiny_planner
from tests.helpers import block_loss, tiny_backbone, tiny_images

BACKBONE = tiny_backbone()
DATA = tiny_images(BACKBONE)


@pytest.fixture(scope="module")
def protocol() -> EvaluationProtocol:
    """Thirty labelled states of twelve images."""
    labels = LabelConfig(contexts=30)
    contexts = random_contexts(labels, len(DATA), 9)
    parts = label_contexts(BACKBONE, DATA.tokens, DATA.labels, labels, contexts)
    states = TensorDict.cat([TensorDict(part, batch_size=[len(part["label"])]) for part in parts])
    config = EvalConfig(samples=0, reference_images=4, resamples=200)
    return EvaluationProtocol(config=config, seed=0, backbone=BACKBONE, backbone_name="tiny", data=DATA, states=states)


@pytest.fixture(scope="module")
def utility(protocol: EvaluationProtocol) -> Tensor:
    assert protocol.states is not None
    return utilities(protocol.states["gains"], BACKBONE.geometry, torch.ones(9, 9))


def states_of(protocol: EvaluationProtocol) -> TensorDict:
    assert protocol.states is not None
    return protocol.states


# ---------------------------------------------------------------------- what is seen


@pytest.mark.parametrize("budgets", [(1,), (1, 2, 4)], ids=str)
def test_labelled_states_are_observed_as_in_the_environment(
    protocol: EvaluationProtocol, budgets: tuple[int, ...]
) -> None:
    states = states_of(protocol)
    core = tiny_core(budgets, len(states))
    core.reset(index=states["image"])
    core.show(states["order"], states["length"])
    expected, found = core.observation(), labelled(states, budgets=budgets)
    assert set(found.keys()) == set(expected.keys())
    for key in set(expected.keys()):
        assert found[key].dtype == expected[key].dtype, key
        torch.testing.assert_close(found[key], expected[key], atol=1e-4, rtol=1e-4, msg=key)


def test_another_image_stands_in_the_same_context(protocol: EvaluationProtocol) -> None:
    states = states_of(protocol)
    own, other = labelled(states), other_images(BACKBONE, DATA, states, (states["image"] + 1) % len(DATA))
    assert torch.equal(own["visible"], other["visible"])
    shown = states["length"] > 0  # with nothing visible, only the class differs
    assert ((own["hidden"] - other["hidden"]).abs().amax((1, 2)) > 1e-3)[shown].all()
    assert torch.equal(other["label"], DATA.labels[(states["image"] + 1) % len(DATA)])


def test_without_content_states_of_one_mask_and_class_look_alike(protocol: EvaluationProtocol) -> None:
    own = labelled(states_of(protocol))
    blank = without_content(own)
    assert torch.equal(blank["visible"], own["visible"]) and torch.equal(blank["label"], own["label"])
    for block in range(9):
        rows = own["action_mask"][:, block]
        torch.testing.assert_close(blank["hidden"][rows, block].mean(0), own["hidden"][rows, block].mean(0))
        assert (blank["hidden"][rows, block] == blank["hidden"][rows, block][0]).all()
        assert (blank["entropy"][rows, block] == blank["entropy"][rows, block][0]).all()
        assert (blank["hidden"][~rows, block] == 0).all() and (blank["entropy"][~rows, block] == 0).all()


# ---------------------------------------------------------------------- content


def test_a_policy_that_reads_no_content_loses_nothing_without_it(protocol: EvaluationProtocol, utility: Tensor) -> None:
    seen = ablated_observations(protocol)
    for scorer in (fixed_order(torch.randperm(9)), uniform_random):
        found = content_ablation(protocol, seen, scorer, utility)
        for removal in ("other image", "mean"):
            torch.testing.assert_close(found.spearman[removal], found.spearman["true"])
            difference = found.r2_difference[removal]
            assert difference.mean == difference.low == difference.high == 0
    blind = content_ablation(protocol, seen, planner_scorer(tiny_planner(content=False)), utility)
    torch.testing.assert_close(blind.spearman["mean"], blind.spearman["true"])  # another image has another class


def test_a_policy_whose_content_is_the_answer_loses_it_without(protocol: EvaluationProtocol) -> None:
    """Utilities that are the entropies plus a positional part: without content only the positional part is left."""

    def entropies(observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        return observation["entropy"] + 0.01 * torch.arange(9)

    states = states_of(protocol)
    found = content_ablation(
        protocol, ablated_observations(protocol), entropies, states["entropy"] + 0.01 * torch.arange(9)
    )
    torch.testing.assert_close(found.spearman["true"], torch.ones(12).double())
    assert found.r2["true"].mean == pytest.approx(1)
    for removal in ("other image", "mean"):
        assert found.spearman[removal].mean() < 0.9 and found.r2[removal].mean < 0.9
        difference = found.r2_difference[removal]
        assert difference.mean == pytest.approx(1 - found.r2[removal].mean) and difference.low > 0


def test_r2_from_sums_is_the_squared_correlation() -> None:
    s, u = np.random.default_rng(0).normal(0, 1, (2, 50))
    sums = np.array([50, s.sum(), u.sum(), (s * s).sum(), (u * u).sum(), (s * u).sum()])
    assert pooled_r2(sums) == pytest.approx(np.corrcoef(s, u)[0, 1] ** 2)
    assert pooled_r2(np.array([50.0, 0, u.sum(), 0, (u * u).sum(), 0])) == 0


def test_images_are_averaged_over_their_states() -> None:
    found = image_average(torch.tensor([1.0, 5.0, 3.0, 7.0]), torch.tensor([4, 2, 4, 9]))
    assert found.tolist() == [5.0, 2.0, 7.0]


# ---------------------------------------------------------------------- injection


@pytest.mark.parametrize("count", [1, 3])
def test_injected_tokens_lower_the_loss_as_in_a_full_pass(protocol: EvaluationProtocol, count: int) -> None:
    states = states_of(protocol)
    states = states[states["length"] + count < 9][::4]
    blocks = best_blocks(torch.rand(len(states), 9), states["visible"], count)
    found = injection(BACKBONE, DATA, states, blocks)
    for row, state in enumerate(states):
        tokens, label = DATA.tokens[state["image"]], DATA.labels[state["image"]]
        shown = state["order"][: int(state["length"])].tolist()
        rest = [b for b in range(9) if b not in shown and b not in blocks[row].tolist()]
        before = sum(block_loss(BACKBONE, tokens, label, shown, b) for b in rest)
        after = sum(block_loss(BACKBONE, tokens, label, [*shown, *blocks[row].tolist()], b) for b in rest)
        assert found.before[row].item() == pytest.approx(before / 36, rel=1e-4)
        assert found.after[row].item() == pytest.approx(after / 36, rel=1e-4)


def test_one_injected_block_is_worth_its_utility_and_the_oracles_the_most(
    protocol: EvaluationProtocol, utility: Tensor
) -> None:
    states = states_of(protocol)
    best = best_blocks(utility, states["visible"], 1)
    oracle = injection(BACKBONE, DATA, states, best).drop
    torch.testing.assert_close(oracle, utility.gather(1, best)[:, 0], atol=1e-5, rtol=1e-3)
    chance = random_injection(protocol, states, 1).drop
    assert (oracle >= chance - 1e-5).all() and oracle.mean() > chance.mean()


# ---------------------------------------------------------------------- orders and curves


def test_orders_agree_with_themselves_most_and_on_shared_images_alone() -> None:
    policy = RankingPolicy(uniform_random, BACKBONE.geometry)
    many = roll_out(tiny_core(num_envs=8), policy, torch.Generator().manual_seed(0), torch.arange(8))
    few = roll_out(tiny_core(num_envs=3), policy, torch.Generator().manual_seed(0), torch.arange(3))
    found = np.array(order_agreements([many, few]))
    assert found[0, 0] == pytest.approx(1) and found[1, 1] == pytest.approx(1)
    places = [rollout.order[:3].argsort(1).numpy() for rollout in (many, few)]
    expected = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*places, strict=True)])
    assert found[0, 1] == found[1, 0] == pytest.approx(expected)


def test_curves_begin_with_nothing_and_end_with_the_image(protocol: EvaluationProtocol) -> None:
    policy = RankingPolicy(uniform_random, BACKBONE.geometry, (4,))
    rollout = roll_out(tiny_core((4,), 6), policy, torch.Generator().manual_seed(0), torch.arange(6))
    curves = quality_curves(protocol, rollout)
    assert set(curves) == {"loss", "mse"}
    loss, mse = curves["loss"], curves["mse"]
    assert loss["mean"][0] == pytest.approx(rollout.start_loss.mean().item(), rel=1e-5)
    assert loss["mean"][-1] == 0 == mse["mean"][-1] and mse["mean"][0] > 0.01
    assert loss["mean"][1] == loss["mean"][0] != loss["mean"][4]  # held until the first step of four is complete
    moments = rollout.losses.sum(-1).mean(1) / 36
    area = 4 / 9 * moments[0] + 4 / 9 * moments[1] + 1 / 9 * moments[2]
    assert loss["area"][0] == pytest.approx(area.item(), rel=1e-5) and loss["area"][1] < area < loss["area"][2]


def test_curves_show_completions_where_the_protocol_says_so(protocol: EvaluationProtocol) -> None:
    def classify(images: Tensor) -> Tensor:
        return images.float().mean((2, 3)) / 40

    policy = RankingPolicy(uniform_random, BACKBONE.geometry, (4,))
    rollout = roll_out(tiny_core((4,), 6), policy, torch.Generator().manual_seed(0), torch.arange(6))
    curves = {}
    for fill in ("grey", "completion"):
        shown = replace(protocol, recogniser=Recogniser("mean", classify, fill))
        curves[fill] = quality_curves(shown, rollout)
        assert set(curves[fill]) == {"loss", "mse", "confidence", "accuracy"}
    assert curves["grey"]["mse"]["mean"][0] != curves["completion"]["mse"]["mean"][0]
    assert curves["grey"]["confidence"]["mean"][-1] == pytest.approx(curves["completion"]["confidence"]["mean"][-1])


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_backbone(home / "tiny.safetensors", tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    return home


def configure(home: Path, command: str, *overrides: str) -> Any:
    small = ["backbone=digits", f"backbone.name={home / 'tiny.safetensors'}", "labels.contexts=48"]
    return compose(command, [*small, *overrides, f"output_dir={home / 'runs'}", f"cache_dir={home / 'cache'}"])


SMALL = ["eval.images=12", "eval.states=16", "eval.reference_images=4", "eval.resamples=200", "eval.lookahead_states=4"]


def test_the_command_writes_all_analyses(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(configure(home, "train", "agent=bc", "agent.steps=8", "agent.evaluate_every=4", "planner.dim=32"))
    policies = "eval.policies=[raster,random,fitted,oracle]"
    small = ["injected=[1,2]", "headroom.steps=4", "headroom.draws=[1]", "headroom.lookahead_states=8"]
    folder = analyze(configure(home, "analyze", *SMALL, policies, *small))
    found = json.loads((folder / "analysis.json").read_text())
    names = ["raster", "random", "fitted", "oracle", "bc_utility_r2"]
    assert found["orders"]["agreement"]["policies"] == names and set(found["curves"]) == set(names)
    content = {entry["policy"]: entry for entry in found["content"]}
    assert set(content) == set(names) - {"oracle"}  # the oracle reads no observation
    assert content["raster"]["spearman_difference"]["mean"]["mean"] == 0
    assert content["bc_utility_r2"]["spearman_difference"]["other image"]["p_holm"] <= 1
    entries = {(entry["policy"], entry["blocks"]): entry for entry in found["injection"]}
    assert len(entries) == 10 and entries["random", 2]["against_random"] is None
    assert entries["oracle", 1]["drop"] >= max(entries[name, 1]["drop"] for name in names)
    data = load_split("digits", "test")
    assert found["protocol"]["data"].startswith(f"{data.name}/test, 12 images")
    levels = ["positions", "class", "content"]
    expected = [(name, 12) for name in levels] + [(name, 8) for name in (*levels, "lookahead:1")]
    assert [(entry["predictor"], entry["states"]) for entry in found["headroom"]] == expected
    assert found["headroom"][-1]["above"] == "class" and 0 <= found["headroom"][-1]["r2_utility"]["mean"] <= 1
    (latents,) = found["latents"]
    assert latents["policy"] == "bc_utility_r2"
    assert list(latents["variants"]) == ["trained", "R = 0", "R = 1", "R = 4", "reset", "mean"]
    own = next(row for row in found["orders"]["rows"] if row["policy"] == "bc_utility_r2")
    assert latents["variants"]["trained"]["regret"] == pytest.approx(own["regret"], rel=0.2)  # of images, not of states
    assert latents["variants"]["reset"]["regret_difference"]["p_holm"] <= 1
    shown = capsys.readouterr().out
    for title in ("Spearman of scores and oracle", "what explains gains", "without its passes"):
        assert title in shown


def test_headroom_and_latents_are_left_out_where_there_are_none(home: Path) -> None:
    policies = ["eval.policies=[raster,random]", "eval.planners=[]"]
    folder = analyze(configure(home, "analyze", *SMALL, *policies, "injected=[1]", "headroom=null"))
    found = json.loads((folder / "analysis.json").read_text())
    assert found["headroom"] is None and found["latents"] == []


@pytest.mark.parametrize("counts", ["[0]", "[16]", "[]"])
def test_numbers_of_blocks_that_leave_nothing_are_refused(home: Path, counts: str) -> None:
    with pytest.raises(ValueError, match=r"injected must (be at least 1|not be empty|be numbers of blocks)"):
        analyze(configure(home, "analyze", *SMALL, f"injected={counts}"))
