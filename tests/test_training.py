"""The main job in miniature: every command, what it keeps, what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_fidelity
from omegaconf import DictConfig
from PIL import Image

from orderrl import compose, training
from orderrl.agents import ppo
from orderrl.agents.registry import make_policy
from orderrl.backbones import (
    OrderRobustTransformer,
    TransformerConfig,
    load_backbone,
    save_backbone,
)
from orderrl.data import load_split
from orderrl.evaluate import evaluate
from orderrl.evaluation.columns import empty_row
from orderrl.evaluation.rows import folder_name, free_folder
from orderrl.evaluation.runs import open_evaluation
from orderrl.factory import Setup, open_backbone, setup_of
from orderrl.generate import generate
from orderrl.label import label
from orderrl.labels import open_labels
from orderrl.metrics.feature_names import DIGITS
from orderrl.metrics.images import save_images
from orderrl.metrics.references import reference_of
from orderrl.planner import load_planner
from orderrl.pretrain import pretrain
from orderrl.runtime.weights import weights_fingerprint
from orderrl.train import train
from orderrl.training import newest_planner
from tests.helpers import save_reference, tiny_backbone
from tests.jobs import trained

BACKBONE = "tiny.safetensors"
SMALL_LABELS = ["labels.contexts=48"]
SMALL_PLANNER = [*SMALL_LABELS, "planner.dim=32", "planner.stem=1"]
SMALL_BC = [*SMALL_PLANNER, "agent=bc", "agent.steps=8", "agent.evaluate_every=4"]
SMALL_PPO = [
    *SMALL_PLANNER,
    "agent=ppo",
    "env=likelihood",
    "agent.iterations=2",
    "agent.num_envs=8",
    "agent.frames_per_batch=128",
    "agent.minibatch_size=64",
    "agent.epochs=1",
    "agent.critic_warmup=1",
    "checkpoint_seconds=0",
]
SMALL_EVAL = [
    *SMALL_LABELS,
    "eval.images=12",
    "eval.samples=70",
    "eval.states=16",
    "eval.reference_images=4",
    "eval.resamples=200",
    "eval.kid_subsets=5",
    "eval.distance_resamples=10",
]
ALONE = ["eval.planners=[]", "eval.token_raster=[]", "eval.samples=0", "eval.features=null"]
"""What leaves an evaluation to the policies that are named."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's runs, cache and tiny backbone lie."""
    home = tmp_path_factory.mktemp("home")
    save_backbone(home / BACKBONE, tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    return home


def configure(home: Path, command: str, *overrides: str, cache: str = "cache") -> DictConfig:
    """A config on the tiny backbone, with runs and cache in a folder of its own."""
    tiny = ["backbone=digits", f"backbone.name={home / BACKBONE}"] if command != "pretrain" else []
    return compose(command, [*tiny, *overrides, f"output_dir={home / 'runs'}", f"cache_dir={home / cache}"])


@pytest.fixture(scope="module")
def cloned(home: Path) -> Path:
    return train(configure(home, "train", *SMALL_BC))


@pytest.fixture(scope="module")
def improved(home: Path, cloned: Path) -> Path:
    return train(configure(home, "train", *SMALL_PPO, f"agent.start={cloned}"))


@pytest.fixture(scope="module")
def evaluated(home: Path, improved: Path) -> Path:
    policies = "eval.policies=[raster,multiscale@2,multiscale@4,random,fitted,oracle,tests.test_training:last_hidden]"
    return evaluate(
        configure(home, "evaluate", *SMALL_EVAL, policies, "eval.sampled=[raster]", "eval.keep_samples=true")
    )


def last_hidden(observation: Any, generator: torch.Generator) -> torch.Tensor:
    """A policy of a user: the last hidden block first."""
    places = torch.arange(observation["visible"].shape[-1])
    return torch.where(observation["action_mask"], places, -1).argmax(-1)


def illegal(observation: Any, generator: torch.Generator) -> torch.Tensor:
    return torch.zeros_like(observation["label"])


def scores(observation: Any, generator: torch.Generator) -> torch.Tensor:
    return torch.full(observation["label"].shape, float("nan"))


# ---------------------------------------------------------------------- what is made


def test_labels_are_found_again(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = label(configure(home, "label", *SMALL_LABELS))
    capsys.readouterr()
    assert label(configure(home, "label", *SMALL_LABELS)) == first
    assert "cached" in capsys.readouterr().out
    assert label(configure(home, "label", *SMALL_LABELS, "labels.seed=1")) != first


def test_a_run_folder_tells_everything(cloned: Path) -> None:
    folder = cloned.parent
    for name in ("config.yaml", "versions.json", "metrics.jsonl", "planner.safetensors"):
        assert (folder / name).stat().st_size > 0, name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all(row["loss"] > 0 for row in rows)


def test_an_identical_config_is_not_trained_again(home: Path, cloned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    again = train(configure(home, "train", *SMALL_BC))
    assert "cached" in capsys.readouterr().out
    assert again.read_bytes() == cloned.read_bytes() and again != cloned


def test_reuse_false_replaces_the_cached_planner(home: Path) -> None:
    config = configure(home, "train", *SMALL_BC, "seed=7", cache="again")
    train(config)
    (entry,) = (home / "again" / "planners").glob("*/key.json")
    before = json.loads(entry.read_text())["created"]
    config.reuse = False
    train(config)
    assert json.loads(entry.read_text())["created"] > before
    assert list((home / "again" / "planners").glob("*/key.json")) == [entry]


def test_ppo_starts_from_the_schedule_it_needs(home: Path) -> None:
    """A schedule is a checkpoint like a clone, and is improved with its own sharpness and repulsion."""
    small = ["agent.search.episodes=8", "agent.search.moves=10", "agent.search.epochs=1", "agent.imitation.steps=3"]
    shape = ["planner.dim=32", "planner.stem=1", "env=likelihood"]
    schedule = train(configure(home, "train", *shape, "agent=schedule", *small, cache="scheduled"))
    planner, description = load_planner(schedule)
    assert planner.config.num_budgets == 3 and description["budgets"] == [1, 2, 4]
    own = ["agent.sharpness=null", "agent.spacing=null"]
    improved = train(configure(home, "train", *shape, *SMALL_PPO, *own, f"agent.start={schedule}", cache="scheduled"))
    assert load_planner(improved)[1]["start"] == weights_fingerprint(planner)


def asked_for_a_start(config: DictConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Setup, str, Any]:
    """Setup, agent and settings with which a training makes the planner that it starts from."""
    made: list[Any] = []

    def remember(*asked: Any) -> Path:
        made.append(asked)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "find_or_train", remember)
    with pytest.raises(KeyboardInterrupt):
        trained(config)
    setup, agent, settings = made[0]
    return setup, agent, settings


def test_start_target_schedule_searches_in_the_environment_of_ppo(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(home, "train", *SMALL_PPO, "env.step_cost=0.7", "agent.start_target=schedule", "seed=3")
    setup, agent, _ = asked_for_a_start(config, monkeypatch)
    assert agent == "schedule" and setup.seed == 3 and setup.environment.reward.step_cost == 0.7


def test_start_target_may_be_any_policys_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names hold what an override must quote."""
    name = "diagonal@i<3/1,2,4"
    config = configure(home, "train", *SMALL_PPO, f"agent.start_target='{name}'", "seed=3")
    setup, agent, settings = asked_for_a_start(config, monkeypatch)
    assert agent == "imitation" and settings.policy == name and setup.seed == 3


@pytest.mark.parametrize("agent", ["schedule", "fitted_q"])
def test_agents_for_code_length_are_refused_for_context(home: Path, agent: str) -> None:
    with pytest.raises(ValueError, match="env=likelihood"):
        train(configure(home, "train", f"agent={agent}", "env=context"))


@pytest.mark.parametrize("order", ["staggered", "schedule"])
def test_fitted_q_trains_a_planner_of_several_budgets_and_costs(home: Path, order: str) -> None:
    small = ["agent.images=6", "agent.steps=3", "agent.batch_size=4", "planner.dim=32", "planner.stem=1"]
    search = ["agent.search.episodes=8", "agent.search.moves=10", "agent.search.epochs=1"]
    costs = "env.step_cost=[0.1,1.0]"
    found = train(configure(home, "train", "agent=fitted_q", f"agent.order={order}", *small, *search, costs))
    planner, description = load_planner(found)
    assert planner.config.num_budgets == 3 and planner.config.step_cost_range == (0.1, 1.0)
    assert ("search" in description["agent"]) == (order == "schedule")  # what plays no part names no other planner
    named = make_policy(f"{found}@cost0.5", load_backbone(str(home / BACKBONE)))
    assert named.name == "fitted_q_likelihood_conditioned_r2@cost0.5" and named.budgets == (1, 2, 4)


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("agent.order=random", "staggered"),
        ("env.budgets=[2]", "nothing to choose"),
        ("env.budgets=[1,99]", "the 16 blocks of the image"),
        ("env.weight=far", "env.weight='far'"),
        ("agent.search.episodes=0", "episodes"),
    ],
)
def test_fitted_q_refuses_what_it_cannot_learn(home: Path, override: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        train(configure(home, "train", "agent=fitted_q", override))


def test_ppo_makes_the_clone_it_needs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(home, "train", *SMALL_PPO, "seed=5", cache="other_cache")
    made: list[tuple[str, int]] = []
    original = training.find_or_train

    def remember(setup: Setup, name: str, config: Any) -> Path:
        made.append((name, setup.seed))
        return original(setup, name, replace(config, steps=4, evaluate_every=2))

    monkeypatch.setattr(training, "find_or_train", remember)
    path = trained(config)
    assert made == [("bc", 5)]
    planner, description = load_planner(path)
    assert planner.config.num_budgets == 3 and description["objective"] == "likelihood"


def test_ppo_continues_after_an_interruption_with_the_same_result(home: Path, cloned: Path) -> None:
    overrides = [*SMALL_PPO, f"agent.start={cloned}", "agent.iterations=3"]
    whole = train(configure(home, "train", *overrides, cache="whole"))

    class Interruption(Exception):
        pass

    def stop(config: DictConfig) -> None:
        original = ppo.PPO.state_dict

        def save_then_stop(self: Any) -> dict[str, Any]:
            if self.iteration == 2:
                raise Interruption
            return original(self)

        ppo.PPO.state_dict = save_then_stop  # type: ignore[method-assign]
        try:
            with pytest.raises(Interruption):
                train(config)
        finally:
            ppo.PPO.state_dict = original  # type: ignore[method-assign]

    config = configure(home, "train", *overrides, cache="cut")
    stop(config)
    assert list((home / "cut" / "unfinished").glob("*/state.*.pt"))
    resumed = train(config)
    one, other = load_planner(whole)[0].state_dict(), load_planner(resumed)[0].state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not list((home / "cut" / "unfinished").iterdir())


@pytest.mark.parametrize("overrides", [SMALL_BC, SMALL_PPO], ids=["bc", "ppo"])
def test_no_training_changes_a_byte_of_the_backbone(home: Path, cloned: Path, overrides: list[str]) -> None:
    start = [f"agent.start={cloned}"] if overrides is SMALL_PPO else []
    config = configure(home, "train", *overrides, *start, cache="frozen")
    backbone = open_backbone(config)
    assert isinstance(backbone, torch.nn.Module)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    trained(config, backbone, reuse=False)
    after = backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in backbone.parameters())
    assert not backbone.training


def test_results_have_every_column_and_null_where_a_metric_does_not_apply(evaluated: Path) -> None:
    results = json.loads((evaluated / "results.json").read_text())
    rows = {row["policy"]: row for row in results["rows"]}
    assert all(set(row) == set(empty_row()) for row in rows.values())
    assert rows["oracle"]["oracle_top1"] == 1 and rows["oracle"]["regret"] == 0
    assert rows["oracle"]["frechet_distance"] is None and rows["raster"]["frechet_distance"] > 0
    assert rows["multiscale@4"]["steps"] == 4 and rows["raster"]["steps"] == 16
    assert rows["raster"]["decode_calls"] == 64 and rows["multiscale@4"]["decode_calls"] == 16
    assert rows["digits_raster"]["gain_auc"] is None and rows["digits_raster"]["accuracy"] > 0.5
    assert rows["real images"]["frechet_distance"] < rows["digits_raster"]["frechet_distance"]
    for key in ("inception_score", "kid", "precision", "recall", "spatial_frechet_distance"):
        assert rows["oracle"][key] is None and rows["digits_raster"][key] is not None, key
    assert rows["digits_raster"]["kid"] < rows["raster"]["kid"] and 0 < rows["digits_raster"]["recall"] <= 1
    assert {"bc_utility_r2", "ppo_likelihood_r2", "tests.test_training:last_hidden"} <= set(rows)
    assert rows["bc_utility_r2"]["R"] == 2 and rows["bc_utility_r2"]["seed"] == 0
    low, high = rows["raster"]["gain_auc_ci"]
    assert low < rows["raster"]["gain_auc"] < high
    assert results["protocol"]["samples"].startswith("70 per row against 1797 real images")
    names = {entry["name"] for entry in results["comparisons"]}
    assert {"bc_utility_r2 - raster", "ppo_likelihood_r2 - raster"} <= names


def test_torch_fidelity_measures_the_same_on_the_kept_samples(evaluated: Path, tmp_path: Path) -> None:
    rows = {row["policy"]: row for row in json.loads((evaluated / "results.json").read_text())["rows"]}
    kept = {path.name for path in (evaluated / "samples").iterdir()}
    names = {"raster", "bc_utility_r2_seed0", "tests.test_training_last_hidden", "digits_raster"}
    assert names <= kept and "oracle" not in kept
    splits = [load_split("digits", split) for split in ("backbone", "planner", "test")]
    save_images(torch.cat([split.images(split.tokens) for split in splits]), tmp_path / "real")
    for name in ("raster", "digits_raster"):
        folder = evaluated / "samples" / name
        assert [len(list(part.glob("*.png"))) for part in sorted(folder.iterdir())] == [7] * 10  # a folder per class
        found = torch_fidelity.calculate_metrics(
            input1=str(folder), input2=str(tmp_path / "real"), feature_extractor=DIGITS, fid=True, isc=True, prc=True,
            samples_find_deep=True, cuda=False, cache=False, save_cpu_ram=True, verbose=False,
        )  # fmt: skip
        assert found["frechet_inception_distance"] == pytest.approx(rows[name]["frechet_distance"], rel=1e-4)
        assert found["inception_score_mean"] == pytest.approx(rows[name]["inception_score"], rel=1e-4)
        assert (found["precision"], found["recall"]) == (rows[name]["precision"], rows[name]["recall"])


def test_every_row_keeps_its_samples_in_a_folder_of_its_own(tmp_path: Path) -> None:
    assert folder_name("my.module:policy/2", None) == "my.module_policy_2"
    assert folder_name("multiscale@1+1+14", None) == "multiscale@1+1+14"
    for expected in ("bc_seed1", "bc_seed1-2", "bc_seed1-3"):
        folder = free_folder(tmp_path, folder_name("bc", 1))
        assert folder == tmp_path / expected
        folder.mkdir()


def test_values_of_single_images_lie_beside_the_results(evaluated: Path) -> None:
    found = open_evaluation(evaluated)
    rows = {row.row["policy"]: row for row in found.rows}
    assert found.identity["images"] == 12 and rows["real images"].per_image == {}
    assert len(rows["oracle"].per_image["gain_auc"]) == 4 and len(rows["raster"].per_image["decode_nll"]) == 12
    for row in found.rows:
        for key, values in row.per_image.items():
            assert row.row[key] == pytest.approx(values.double().mean().item()), key


def test_generated_images_are_kept_in_folders_of_their_classes(home: Path) -> None:
    folder = generate(configure(home, "generate", "policy=raster", "n=12", "keep_samples=true"))
    kept = sorted(path.relative_to(folder / "samples").as_posix() for path in (folder / "samples").rglob("*.png"))
    assert len(kept) == 12 and {name[:2] for name in kept} == {f"{label}/" for label in range(10)}
    assert not (generate(configure(home, "generate", "policy=raster", "n=2")) / "samples").exists()


def test_samples_are_scored_against_a_reference_of_statistics(home: Path, tmp_path: Path) -> None:
    data = load_split("digits", "test")
    save_reference(tmp_path / "real.npz", reference_of(data.images(data.tokens), DIGITS))
    overrides = [f"eval.reference={tmp_path / 'real.npz'}", "eval.policies=[]", "eval.planners=[]"]
    folder = evaluate(configure(home, "evaluate", *SMALL_EVAL, *overrides))
    results = json.loads((folder / "results.json").read_text())
    assert "against statistics of real.npz" in results["protocol"]["samples"]
    assert "bias" in results["protocol"]["samples"]
    for row in results["rows"]:
        assert row["frechet_distance"] > 0 and row["spatial_frechet_distance"] > 0 and row["inception_score"] > 1
        assert row["kid"] is row["precision"] is row["recall"] is None
    assert not (folder / "samples").exists()


def test_the_report_lies_beside_the_results(evaluated: Path) -> None:
    page = (evaluated / "report.html").read_text()
    assert "bc_utility_r2" in page and "<table" in page


def test_own_policy_is_the_reverse_of_raster(evaluated: Path) -> None:
    rows = {row["policy"]: row for row in json.loads((evaluated / "results.json").read_text())["rows"]}
    assert rows["tests.test_training:last_hidden"]["steps"] == 16
    assert rows["tests.test_training:last_hidden"]["gain_auc"] != rows["raster"]["gain_auc"]


@pytest.mark.parametrize("policy", ["multiscale@4", "newest"])
def test_generate_writes_pictures_that_open(home: Path, improved: Path, policy: str) -> None:
    folder = generate(configure(home, "generate", f"policy={policy}", "label=3", "n=4"))
    with Image.open(folder / "images.png") as image:
        assert image.width > 64
    with Image.open(folder / "order.gif") as animation:
        assert getattr(animation, "n_frames", 1) > 3 and animation.info["loop"] == 0


def test_pretrain_writes_a_backbone_that_loads(home: Path) -> None:
    small = ["backbone.model.dim=32", "backbone.model.layers=1", "training.steps=4",
             "training.evaluate_every=2", "training.anneal_from=0.5"]  # fmt: skip
    path = pretrain(configure(home, "pretrain", *small))
    assert (path.parent / "backbone_final.safetensors").exists()
    backbone = load_backbone(path)
    assert backbone.hidden_size == 32 and backbone.geometry.num_blocks == 16


def test_newest_planner_is_the_last_one_of_its_agent(home: Path, improved: Path) -> None:
    config = configure(home, "evaluate")
    path = newest_planner(setup_of(config, open_backbone(config)), "ppo")
    assert path is not None and load_planner(path)[1]["agent"]["name"] == "ppo"


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        (train, ["agent.target=best"], r"target='best' is unknown; choose one of label, soft, utility"),
        (train, ["backbone.name=missing"], r"backbone='missing' is unknown; choose one of .*digits"),
        (train, ["data.name=missing"], r"data.name='missing' is unknown; choose one of digits"),
        (evaluate, ["eval.policies=[spiral]"], r"policy 'spiral' is unknown; choose one of raster"),
        (evaluate, ["eval.policies=[raster@5+5]"], r"must sum to the 16 blocks"),
        (evaluate, ["eval.policies=[raster@17]"], r"between 1 and 16 blocks"),
        (evaluate, ["eval.policies=[raster@x]"], r"is no schedule"),
        (evaluate, ["eval.policies=[nowhere:policy]"], r"'nowhere:policy' cannot be imported"),
        (evaluate, ["eval.policies=[tests.test_training:illegal]", *ALONE], r"is illegal"),
        (evaluate, ["eval.policies=[tests.test_training:scores]", *ALONE], r"action must be int64"),
        (evaluate, ["eval.features=vgg"], r"features='vgg' is unknown; choose one of orderrl-digits"),
        (evaluate, ["eval.reference=none.npz"], r"reference='none.npz' does not exist"),
        (evaluate, ["eval.reference=none.npz", "eval.features=null"], r"reference='none.npz' needs features"),
        (evaluate, ["eval.feature_weights=w.pth"], r"orderrl-digits has its own, pass None"),
        (evaluate, ["eval.kid_subsets=0"], r"kid_subsets must be at least 1, got 0"),
        (evaluate, ["eval.classifier=vgg"], r"classifier='vgg' is unknown; choose one of own, digits, canvas, timm"),
        (
            evaluate,
            ["eval.hidden_fill=noise", "eval.classifier=null"],
            r"hidden_fill='noise' is unknown; choose one of grey",
        ),
        (
            evaluate,
            ["eval.reference_images=1", "eval.planners=[none]"],
            r"eval.reference_images must be at least 2, got 1",
        ),
        (evaluate, ["data=tokens", "data.path=none"], r"eval.features=own: no .* ships for data 'tokens:none'"),
        (evaluate, ["eval.images=1", "eval.planners=[none]"], r"eval.images must be at least 2, got 1"),
        (evaluate, ["eval.distance_resamples=1"], r"eval.distance_resamples must be 0 or at least 2, got 1"),
        (evaluate, ["eval.lookahead_states=0"], r"eval.lookahead_states must be at least 1, got 0"),
        (generate, ["label=10"], r"label=10 is no class"),
        (generate, ["n=0"], r"n must be at least 1"),
        (generate, ["temperature=-1"], r"temperature must be "),
        (label, ["labels.kind=guess"], r"kind='guess' is unknown"),
        (train, ["agent=fitted_q", "labels=kl"], r"labels: agent=fitted_q learns from no labels; leave labels=... out"),
        (pretrain, ["backbone.model.block_size=3"], r"block_size=3 must divide the token grid 8x8"),
    ],
)
def test_bad_values_are_refused_in_one_line(
    home: Path, cloned: Path, command: Any, overrides: list[str], message: str
) -> None:
    names = {train: "train", evaluate: "evaluate", generate: "generate", label: "label", pretrain: "pretrain"}
    small = SMALL_EVAL if command is evaluate else []
    with pytest.raises(ValueError, match=message) as caught:
        command(configure(home, names[command], *small, *overrides))
    assert "\n" not in str(caught.value)


def test_budgets_beyond_the_blocks_are_refused(home: Path, cloned: Path) -> None:
    with pytest.raises(ValueError, match="exceed the 16 blocks"):
        train(configure(home, "train", *SMALL_PPO, f"agent.start={cloned}", "env.budgets=[1,32]"))


def test_labels_of_another_backbone_are_refused(home: Path) -> None:
    folder = label(configure(home, "label", *SMALL_LABELS))
    other = OrderRobustTransformer(TransformerConfig(8, 8, 2, 17, 10, dim=32, layers=1))
    with pytest.raises(ValueError, match="labels made for backbone"):
        open_labels(folder, other)


def test_a_planner_of_another_shape_is_refused(home: Path, cloned: Path, tmp_path: Path) -> None:
    other = OrderRobustTransformer(TransformerConfig(8, 8, 4, 17, 10, dim=32, layers=1))
    save_backbone(tmp_path / "other.safetensors", other, {})
    overrides = [f"backbone.name={tmp_path / 'other.safetensors'}", f"eval.planners=[{cloned}]"]
    with pytest.raises(ValueError, match="does not fit the backbone"):
        evaluate(configure(home, "evaluate", *SMALL_EVAL, *overrides))


def test_evaluate_without_a_planner_says_how_to_train_one(home: Path) -> None:
    with pytest.raises(ValueError, match=r"python -m orderrl.train agent=bc"):
        evaluate(configure(home, "evaluate", cache="empty"))


def test_a_truncated_planner_is_refused(home: Path, cloned: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(cloned.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"broken.safetensors"):
        evaluate(configure(home, "evaluate", *SMALL_EVAL, f"eval.planners=[{broken}]"))
