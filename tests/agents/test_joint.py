"""Joint tuning: what is trained and what is not, the observation with gradients, collapse and explosion, resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from orderrl import compose, training
from orderrl.agents.bc import Config as BCConfig
from orderrl.agents.bc import clone
from orderrl.agents.body import require_tunable, top_of, tunable_copy
from orderrl.agents.joint import Config as JointConfig
from orderrl.agents.joint import JointTuning, observe
from orderrl.agents.registry import make_policy
from orderrl.backbones import OrderRobustTransformer, backbone_fingerprint, load_backbone, save_backbone
from orderrl.backbones.pretraining import block_orders
from orderrl.backbones.randar import cross_entropy
from orderrl.backbones.registry import new_backbone
from orderrl.data import TokenSet
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.evaluation.policies import own_order
from orderrl.factory import Setup
from orderrl.oracle import LabelConfig, label_contexts, random_contexts
from orderrl.planner import OrderHead, load_planner
from orderrl.runtime.weights import weights_fingerprint
from orderrl.train import train
from tests.agents.helpers import tiny_planner
from tests.helpers import block_loss, tiny_backbone, tiny_images
from tests.jobs import Enough, Seen, logged
from tests.killing import Case, kill_and_compare, metrics, weights
from tests.processes import run_processes

LABELLED, IMAGES = tiny_images(tiny_backbone(), 16, seed=1), tiny_images(tiny_backbone(), 16, seed=2)
TUNED = ["layers.1.", "norm.", "output."]


def real_labels(images: TokenSet = LABELLED, contexts: int = 96) -> TensorDict:
    """Contexts labelled by the tiny backbone."""
    backbone, config = tiny_backbone(), LabelConfig(contexts=contexts)
    drawn = random_contexts(config, len(images), backbone.geometry.num_blocks)
    parts = label_contexts(backbone, images.tokens, images.labels, config, drawn)
    return torch.cat([TensorDict(part, batch_size=[len(part["label"])]) for part in parts])


LABELS = real_labels()


def cloned_planner() -> OrderHead:
    torch.manual_seed(0)
    planner = tiny_planner(noisy=False)
    clone(planner, LABELS, tiny_backbone().geometry, BCConfig(steps=40, learning_rate=5e-3))
    return planner


def tuning(planner: OrderHead | None = None, **config: Any) -> JointTuning:
    """A tuning of copies, a few steps long."""
    torch.manual_seed(0)
    settings = {
        "steps": 6,
        "batch_size": 8,
        "contexts": 8,
        "evaluate_every": 3,
        "backbone_learning_rate": 1e-3,
    } | config
    chosen = JointConfig(**settings)
    backbone = tunable_copy(tiny_backbone())
    return JointTuning(planner or tiny_planner(), backbone, LABELS, LABELLED, IMAGES, chosen)


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def changed(module: torch.nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}


# ---------------------------------------------------------------------- the observation


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_recomputed_observation_is_the_environments(block_size: int) -> None:
    backbone = tiny_backbone(block_size=block_size)
    images, blocks = tiny_images(backbone, 5), backbone.geometry.num_blocks
    generator = torch.Generator().manual_seed(0)
    length = torch.arange(4 * blocks) % blocks
    image = torch.randint(len(images), (len(length),), generator=generator)
    order = torch.rand(len(length), blocks, generator=generator).argsort(1)
    core = NextBlockCore(backbone, images, len(length), CoreConfig())
    core.reset(index=image)
    core.show(order, length)
    contexts = {"image": image, "order": order, "length": length, "label": images.labels[image]}
    contexts["visible"] = core.visible
    found = observe(tunable_copy(backbone), images, TensorDict(contexts, batch_size=[len(length)]))
    expected = core.observation()
    assert set(found.keys()) == set(expected.keys())
    for key in expected.keys():  # noqa: SIM118 - not a mapping
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-4)
    for alike in (0, 1):
        part = TensorDict(contexts, batch_size=[len(image)])[length == alike]
        assert torch.allclose(observe(backbone, images, part)["hidden"], expected["hidden"][length == alike], atol=1e-4)


def test_gradients_of_the_observation_are_those_of_finite_differences() -> None:
    """By way of the prefix too: in a layer below the last the queries see keys that the weights changed."""
    contexts = LABELS[LABELS["length"] > 3][:4]
    backbone = tunable_copy(tiny_backbone()).double()
    top_of(backbone, 2).requires_grad_(True)
    direction = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).double()

    def value() -> Tensor:
        observation = observe(backbone, LABELLED, contexts)
        return (observation["hidden"].double() ** 2).sum() + observation["entropy"].double().sum()

    keys = dict(backbone.named_parameters())["layers.0.attention.wqkv.weight"]
    value().backward()
    assert keys.grad is not None
    slope = (keys.grad[32:64] * direction).sum().item()
    ends = []
    with torch.no_grad():
        for sign in (1, -1):
            keys[32:64] += sign * 1e-3 * direction
            ends.append(value().item())
            keys[32:64] -= sign * 1e-3 * direction
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=2e-2)


def test_hidden_tokens_do_not_leak_into_the_recomputed_observation() -> None:
    backbone, contexts = tiny_backbone(), LABELS[:32]
    hidden = ~contexts["visible"][:, backbone.geometry.token_block]
    tokens = LABELLED.tokens[contexts["image"]]
    changed_tokens = torch.where(hidden, (tokens + 1) % 5, tokens)
    own = contexts.clone()
    own["image"] = torch.arange(32)
    seen, other = (
        observe(backbone, replace(LABELLED, tokens=t, labels=contexts["label"]), own)["hidden"]
        for t in (tokens, changed_tokens)
    )
    assert torch.equal(seen, other)


# ---------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("layers", [1, 2])
def test_the_top_changes_and_the_rest_is_equal_to_the_last_bit(layers: int) -> None:
    joint = tuning(layers=layers, steps=3)
    before, planner = state(joint.backbone), state(joint.planner)
    found: set[str] = set()

    def see(row: dict[str, float]) -> None:  # looked at here because the end takes the best state, perhaps the start
        if row["step"] == 3:
            found.update(changed(joint.backbone, before))
            assert changed(joint.planner, planner)

    logged(joint.train, see=see)
    names = TUNED if layers == 1 else [*TUNED, "layers.0."]
    assert found == {key for key in before if key.startswith(tuple(names))}
    assert not any(parameter.requires_grad for parameter in joint.backbone.parameters())
    assert not changed(tiny_backbone(), before), "the original is another object"


def test_without_layers_the_whole_backbone_is_equal_to_the_last_bit() -> None:
    joint = tuning(layers=0)
    before, planner = state(joint.backbone), state(joint.planner)

    def see(row: dict[str, float]) -> None:
        assert not changed(joint.backbone, before)
        assert bool(changed(joint.planner, planner)) == (row["step"] > 0)

    rows = logged(joint.train, see=see)
    assert backbone_fingerprint(joint.backbone) == backbone_fingerprint(tiny_backbone())
    losses = {row["loss_random"] for row in rows if "loss_random" in row}
    assert len(losses) == 1


def test_the_frozen_twin_takes_the_same_batches() -> None:
    """The first step of both sees the same images, orders, contexts and dropout."""
    first = [logged(tuning(layers=layers, steps=1).train)[1] for layers in (0, 1)]
    assert first[0]["loss_ar"] == pytest.approx(first[1]["loss_ar"], rel=1e-5)
    assert first[0]["loss_oh"] == pytest.approx(first[1]["loss_oh"], rel=1e-5)


def test_the_planners_loss_reaches_the_top_layer_and_lambda_weighs_it() -> None:
    joint = tuning()
    joint._planner_loss().backward()
    gradients = {key: p.grad for key, p in joint.backbone.named_parameters()}
    assert all((gradients[key] is not None) == key.startswith(tuple(TUNED)) for key in gradients)
    assert all(bool((g != 0).any()) for g in gradients.values() if g is not None)


@pytest.mark.parametrize(("oh_coeff", "same"), [(0.0, True), (0.5, False)])
def test_without_lambda_the_planner_has_no_influence_on_the_backbone(oh_coeff: float, same: bool) -> None:
    tops = []
    for seed in (0, 1):
        joint = tuning(tiny_planner(seed=seed), oh_coeff=oh_coeff, steps=2)

        def see(row: dict[str, float], joint: JointTuning = joint) -> None:
            if row["step"] == 2:
                tops.append(state(joint.top))

        logged(joint.train, see=see)
    assert all(torch.equal(value, tops[1][key]) for key, value in tops[0].items()) == same


def test_tuning_lowers_its_loss_on_held_out_images_and_keeps_the_best_state() -> None:
    """The tiny backbone is untrained, so L_AR has far to fall."""
    joint = tuning(cloned_planner(), steps=40, evaluate_every=10, contexts=32, learning_rate=1e-3)
    rows = logged(joint.train)
    watched = [row for row in rows if "held_out_loss" in row]
    best = min(watched, key=lambda row: row["held_out_loss"])
    assert [row["step"] for row in watched] == [0, 10, 20, 30, 40]
    for row in rows[1:]:  # what is watched does not hide the training's own losses
        assert row["loss"] == pytest.approx(row["loss_ar"] + 0.1 * row["loss_oh"], rel=1e-5)
    assert joint.outcome["kept_step"] == best["step"] > 0 and joint.outcome["stopped"] is None
    assert joint.outcome["kept"]["loss_random"] < joint.outcome["start"]["loss_random"] - 0.1
    assert joint.watch() == {key: best[key] for key in joint.outcome["kept"]}


# ---------------------------------------------------------------------- what is watched


def test_what_is_watched_agrees_with_slow_forms() -> None:
    joint = tuning(cloned_planner())
    found, backbone = joint.watch(), tiny_backbone()
    images, tokens = joint.shown, backbone.geometry.num_tokens
    held_out = set(LABELS["image"].unique().tolist()) - set(LABELS["image"][joint.learnt].tolist())
    assert len(images) == len(held_out) == 1 and torch.equal(images.tokens[0], LABELLED.tokens[held_out.pop()])
    visible: list[int] = []
    losses = {b: block_loss(backbone, images.tokens[0], images.labels[0], [], b) for b in range(9)}
    start, area, charged = sum(losses.values()), 0.0, 0.0
    while len(visible) < 9:
        core = NextBlockCore(backbone, images, 1, CoreConfig())
        core.reset(index=0)
        core.show(torch.tensor([[*visible, *set(range(9)) - set(visible)]]), torch.tensor([len(visible)]))
        scores = joint.planner(core.observation()).scores[0]
        chosen = max(losses, key=lambda b: scores[b].item())
        charged += losses.pop(chosen)
        visible.append(chosen)
        after = {b: block_loss(backbone, images.tokens[0], images.labels[0], visible, b) for b in losses}
        area += sum(losses[b] - after[b] for b in losses) * (1 - len(visible) / 9)
        losses = after
    assert found["gain_auc"] == pytest.approx(area / start, abs=1e-4)
    assert found["loss_planner"] == pytest.approx(charged / tokens, abs=1e-4)
    order = block_orders(backbone.geometry, 1, 1.0, torch.Generator().manual_seed(0))
    logits = backbone.teacher_forced(images.tokens, images.labels, order)
    assert found["loss_random"] == pytest.approx(cross_entropy(logits, images.tokens, order).mean().item(), abs=1e-4)
    spreads = []
    for row in joint.watched.tolist():
        observation = observe(backbone, LABELLED, LABELS[[row]])
        spreads.append(joint.planner(observation).scores[0][~LABELS["visible"][row]].std(correction=0).item())
    assert found["score_std"] == pytest.approx(sum(spreads) / len(spreads), rel=1e-4)
    assert found["held_out_loss"] == pytest.approx(found["loss_random"] + 0.1 * found["held_out_oh"])


def test_a_collapse_stops_and_the_state_before_it_is_kept() -> None:
    """A planner with loud random scores regresses utilities: its scores shrink towards what can be predicted."""
    planner = tiny_planner()
    with torch.no_grad():
        planner.score_head.weight *= 30
    joint = tuning(planner, steps=400, learning_rate=2e-2, evaluate_every=5, collapse=0.7, explosion=1e9, layers=0)
    rows = logged(joint.train)
    watched = [row for row in rows if "score_std" in row]
    assert (
        rows[-1]["step"] < 400 and watched[-1]["score_std"] < 0.7 * watched[0]["score_std"] <= watched[-2]["score_std"]
    )
    assert joint.outcome["stopped"].startswith(f"collapse at step {rows[-1]['step']}: score_std fell from")
    best = min(watched[:-1], key=lambda row: row["held_out_loss"])
    assert joint.outcome["kept_step"] == best["step"] < rows[-1]["step"]
    assert joint.watch()["score_std"] == best["score_std"]


def test_an_explosion_stops_and_the_state_before_it_is_kept() -> None:
    joint = tuning(steps=60, backbone_learning_rate=3.0, evaluate_every=2)
    before, start = state(joint.backbone), joint.watch()
    rows = logged(joint.train)
    assert rows[-1]["step"] < 60 and joint.outcome["stopped"].startswith(
        f"explosion at step {rows[-1]['step']}: loss_ra"
    )
    assert rows[-1]["loss_random"] > 1.05 * start["loss_random"]
    assert joint.outcome["kept_step"] == 0 and not changed(joint.backbone, before)
    assert joint.watch() == start == joint.outcome["kept"]


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    joint = tuning(steps=20, evaluate_every=2)
    original, calls = joint._planner_loss, []

    def overflowing() -> Tensor:
        calls.append(1)
        return original() * (float("inf") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(joint, "_planner_loss", overflowing)
    rows = logged(joint.train)
    assert rows[-1]["step"] == 5 and joint.outcome["stopped"] == "explosion at step 5: the training loss is inf"
    assert all(
        bool(value.isfinite().all()) for part in (joint.planner, joint.backbone) for value in state(part).values()
    )
    assert joint.outcome["kept_step"] in (0, 2, 4)


# ---------------------------------------------------------------------- interruptions


def test_a_resumed_tuning_is_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(key: str, end: int | None = None) -> tuple[JointTuning, list[dict[str, float]]]:
        joint = tuning(tiny_planner(noisy=True, dropout=0.2), steps=9)
        with Seen(lambda row: None, end, tmp_path, key, 0) as job:
            joint.train(job)
        return joint, job.history

    expected, history = run("whole")
    for end in (2, 4, 7):
        with pytest.raises(Enough):
            run("part", end)
    found, again = run("part")
    assert again == history
    for part in ("planner", "backbone"):
        assert not changed(getattr(found, part), state(getattr(expected, part)))
    assert found.outcome == expected.outcome


# ---------------------------------------------------------------------- the command

SMALL = [
    *("labels.contexts=48", "planner.dim=32", "planner.stem=1", "agent=joint", "agent.steps=6", "agent.batch_size=8"),
    *("agent.contexts=8", "agent.evaluate_every=3", "agent.held_out_images=8", "agent.held_out_contexts=8"),
    "agent.backbone_learning_rate=1e-3",
]
OFTEN = "checkpoint_seconds=0.05"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone, and a planner to start from."""
    home = tmp_path_factory.mktemp("home")
    save_backbone(home / "tiny.safetensors", tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    cloning = ["agent=bc", "agent.steps=8", "agent.evaluate_every=4", *SMALL[:3]]
    start = train(compose("train", [*places(home, "start"), *cloning]))
    (home / "clone.safetensors").write_bytes(start.read_bytes())
    return home


def places(home: Path, where: str) -> list[str]:
    tiny = ["backbone=digits", f"backbone.name={home / 'tiny.safetensors'}"]
    return [*tiny, f"output_dir={home / where / 'runs'}", f"cache_dir={home / where / 'cache'}"]


def command(home: Path, where: str, *overrides: str) -> Path:
    start = f"agent.start={home / 'clone.safetensors'}"
    return train(compose("train", [*places(home, where), *SMALL, start, *overrides]))


def test_the_command_leaves_a_planner_and_its_backbone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = command(home, "plain")
    tuned = load_backbone(str(path.parent / "backbone.safetensors"))
    _, description = load_planner(path, tuned)
    frozen = backbone_fingerprint(load_backbone(str(home / "tiny.safetensors")))
    assert description["backbone"] == backbone_fingerprint(tuned) and description["budgets"] == [1]
    own = own_order(tuned)  # whoever takes the backbone draws in the order of the planner beside it
    assert own is not None and own.path == path.parent / "planner.safetensors"
    outcome = json.loads((path.parent / "results.json").read_text())
    assert (description["backbone"] != frozen) == (outcome["kept_step"] > 0)
    assert [row["step"] for row in metrics(path.parent)] == list(range(7))
    assert metrics(path.parent)[0]["score_std"] == outcome["start"]["score_std"]
    assert make_policy(str(path), tuned, lambda: torch.arange(16), (1,)).name == "joint_utility_r2"
    assert "joint: no collapse, no explosion; kept step" in capsys.readouterr().out
    again = command(home, "plain")
    assert "(cached" in capsys.readouterr().out
    for name in ("planner.safetensors", "backbone.safetensors", "results.json"):
        assert (again.parent / name).read_bytes() == (path.parent / name).read_bytes()


def test_the_clone_of_the_config_is_the_start(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the loss that L_OH will be, so that the held-out images are the same."""
    asked: list[Any] = []
    original = training.find_or_train

    def cloned(setup: Setup, name: str, config: Any, *arguments: Any) -> Path:
        if name != "bc":
            return original(setup, name, config, *arguments)
        asked.append((setup, config))
        return home / "clone.safetensors"

    monkeypatch.setattr(training, "find_or_train", cloned)
    monkeypatch.setattr("orderrl.train.find_or_train", cloned)
    chosen = {"target": "soft", "temperature": 1.5, "weight": "far", "sigma": 2.5, "held_out": 0.3}
    values = [f"agent.{key}={value}" for key, value in chosen.items()]
    path = train(compose("train", [*places(home, "cloned"), *SMALL, *values, "agent.steps=1", "seed=3"]))
    ((setup, config),) = asked
    assert setup.seed == 3 and setup.labels.contexts == 48
    assert {key: getattr(config, key) for key in chosen} == chosen
    assert load_planner(path)[1]["start"] == weights_fingerprint(load_planner(home / "clone.safetensors")[0])


def test_the_frozen_twin_of_the_command_keeps_the_backbones_fingerprint(home: Path) -> None:
    path = command(home, "frozen", "agent.layers=0")
    frozen = load_backbone(str(home / "tiny.safetensors"))
    assert backbone_fingerprint(load_backbone(str(path.parent / "backbone.safetensors"))) == backbone_fingerprint(
        frozen
    )
    assert load_planner(path)[1]["backbone"] == backbone_fingerprint(frozen)


def everything(path: Path) -> Any:
    found = weights(path, "planner"), weights(path.parent / "backbone.safetensors", "backbone")
    return found, metrics(path.parent), json.loads((path.parent / "results.json").read_text())


@pytest.mark.very_slow
def test_a_command_that_is_killed_twice_ends_with_the_same_result(home: Path, tmp_path: Path) -> None:
    overrides = [*places(home, "")[:2], *SMALL, f"agent.start={home / 'clone.safetensors'}", "agent.steps=30", OFTEN]
    kill_and_compare(Case("train", "orderrl.train:train", overrides, everything), tmp_path, kills=2, seed=0)


def tune_in_processes() -> list[dict[str, float]]:
    return logged(tuning(layers=1, steps=4).train)


def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    alone, (first, second) = tune_in_processes(), run_processes(2, tmp_path, tune_in_processes)
    assert first == second
    for mine, other in zip(alone, first, strict=True):  # Adam's first steps are the gradient's sign, so rounding grows
        assert mine == pytest.approx(other, rel=2e-2, abs=1e-3)
    assert alone[1]["loss_oh"] == pytest.approx(first[1]["loss_oh"], rel=1e-4)
    assert alone[1]["loss_ar"] == pytest.approx(first[1]["loss_ar"], rel=1e-4)


# ---------------------------------------------------------------------- refused


def test_backbones_that_cannot_be_tuned_are_refused() -> None:
    arpg = new_backbone("arpg", tiny_backbone().config.to_dict())
    with pytest.raises(ValueError, match=r"type OrderRobustTransformer .* got ARPG; use agent=bc or agent=ppo"):
        require_tunable(arpg, 1, "joint")
    with pytest.raises(ValueError, match="layers=3 exceed the backbone's; use 0 to 2"):
        require_tunable(tiny_backbone(), 3, "joint")
    half: OrderRobustTransformer = tiny_backbone().bfloat16()
    with pytest.raises(ValueError, match=r"use backbone\.dtype=float32"):
        require_tunable(half, 1, "joint")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": -1}, "layers must be at least 0, got -1"),
        ({"oh_coeff": -0.1}, "oh_coeff must be at least 0, got -0.1"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"contexts": 0}, "contexts must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"backbone_learning_rate": float("nan")}, "backbone_learning_rate must be a finite number, got nan"),
        ({"collapse": 2.0}, r"collapse must lie in \[0, 1\], got 2.0"),
        ({"explosion": -1.0}, "explosion must be at least 0, got -1.0"),
        ({"target": "argmax"}, "target='argmax' is unknown"),
        ({"held_out": 1.0}, r"held_out must lie in \(0, 1\), got 1.0"),
    ],
)
def test_bad_configs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JointConfig(**change)
