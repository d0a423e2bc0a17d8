"""Everything on a CUDA device: a real one, or the simulated one of `tests.simulated_cuda` in a process of its own.

`tests/test_cuda.py` runs this file; alone it is `python -m pytest tests/on_cuda.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor
from torchrl.envs.utils import check_env_specs

from benchmarks import gpu
from benchmarks.shapes import SHAPES, Shape
from orderrl import compose
from orderrl.agents.distribution import RankedBlocks
from orderrl.agents.play import play, roll_out
from orderrl.agents.policies import RankingPolicy, fixed_order, uniform_random
from orderrl.agents.ppo import PPO, Config
from orderrl.backbones import OrderRobustTransformer, Sampling, TransformerConfig, load_backbone, save_backbone
from orderrl.backbones.memory import VALUES_AT_ONCE
from orderrl.backbones.pretraining import PretrainConfig, pretrain
from orderrl.data import TokenSet, load_split
from orderrl.envs.core import CoreConfig, NextBlockCore, Transition
from orderrl.envs.gymnasium import NextBlockEnv
from orderrl.envs.torchrl import NextBlockTorchRLEnv
from orderrl.envs.vector import NextBlockVectorEnv
from orderrl.evaluate import evaluate
from orderrl.evaluation.drawing import generate_published
from orderrl.generate import generate
from orderrl.label import label
from orderrl.metrics.recognisability import complete
from orderrl.planner import OrderHead, PlannerConfig
from orderrl.pretrain import pretrain as pretrain_command
from orderrl.rollouts import rollouts
from orderrl.runtime.job import Job
from orderrl.tokenize import tokenize
from orderrl.train import train
from orderrl.verify import main
from tests.backbones.families import FAMILIES, ORDER_ROBUST, images, tiny
from tests.helpers import tiny_backbone
from tests.simulated_cuda import MISSING, Counts, counting, simulated_cuda
from tests.test_verify import fixture  # noqa: F401  # what a tiny raster model computes, recorded
from tests.tokenizers.helpers import image_folder

REAL = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(bool(MISSING) and not REAL, reason=MISSING)
simulated_only = pytest.mark.skipif(REAL, reason="counted on the simulated device")


@pytest.fixture(scope="module", autouse=True)
def device() -> Iterator[None]:
    with nullcontext() if REAL else simulated_cuda():
        yield


def on_cuda(family: str) -> Any:
    return deepcopy(tiny(family)).to("cuda")


def agrees(there: Tensor, here: Tensor) -> None:
    """What the device computed is what the CPU computes, but for rounding."""
    assert there.device.type == "cuda" and here.device.type == "cpu"
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4)


def core_of(backbone: Any, mode: str, budgets: tuple[int, ...] = (1, 2), num_envs: int = 4, **settings: Any) -> Any:
    return NextBlockCore(backbone, images(backbone), num_envs, CoreConfig(mode, budgets, **settings), seed=3)


def first_hidden(core: NextBlockCore, budget: int = 0) -> Tensor:
    """Actions that list the first hidden blocks, on the core's device."""
    ranked = core.visible.long().argsort(dim=1, stable=True)[:, : core.largest_budget]
    if not core.multi:
        return ranked[:, 0]
    return torch.cat([ranked, torch.full_like(ranked[:, :1], budget)], 1)


def _by_bits(family: str, mode: str) -> bool:
    """Whether what is paid depends on the last bit of what was drawn: MAR's noises are keyed by the tokens' bits."""
    return family == "mar" and mode == "generate"


@pytest.mark.parametrize("mode", ["teacher", "generate"])
@pytest.mark.parametrize("family", ORDER_ROBUST)
def test_episodes_are_those_of_the_cpu(family: str, mode: str) -> None:
    there, here = core_of(on_cuda(family), mode), core_of(tiny(family), mode)
    for core in (there, here):
        core.reset()
    for step in range(4):
        budget = int(step == 1)  # in the second step two blocks
        outcomes = [core.step(first_hidden(core, budget)) for core in (there, here)]
        for name, mine, expected in zip(Transition._fields, *outcomes, strict=True):
            if not (name == "reward" and _by_bits(family, mode)):
                agrees(mine, expected)
        for key, expected in here.observation().items():
            agrees(there.observation()[key], expected)
    agrees(there.tokens, here.tokens)
    assert bool(here.visible.all()) and bool(there.visible.all())


@pytest.mark.parametrize("mode", ["teacher", "generate"])
def test_gymnasium_environments_give_what_they_give_on_the_cpu(mode: str) -> None:
    seen = []
    for backbone in (on_cuda("randar"), tiny("randar")):
        envs = NextBlockVectorEnv(
            3, backbone=backbone, data=images(backbone), mode=mode, seed=0, render_mode="rgb_array"
        )
        observation, _ = envs.reset()
        trajectory = [observation]
        for _ in range(6):  # beyond the end: the last step begins a new episode
            observation, reward, *_ = envs.step(observation["action_mask"].argmax(1))
            trajectory.append(observation | {"reward": reward, "picture": np.stack(envs.render() or ())})
        seen.append(trajectory)
    for there, here in zip(*seen, strict=True):
        for key, expected in here.items():
            np.testing.assert_allclose(there[key], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["teacher", "generate"])
@pytest.mark.parametrize("budgets", [(1,), (1, 2)])
def test_gymnasiums_checker_is_content(mode: str, budgets: tuple[int, ...]) -> None:
    backbone = on_cuda("randar")
    check_env(
        NextBlockEnv(backbone=backbone, data=images(backbone), mode=mode, budgets=budgets), skip_render_check=True
    )


@pytest.mark.parametrize("mode", ["teacher", "generate"])
@pytest.mark.parametrize("budgets", [(1,), (1, 2)])
def test_torchrls_checker_is_content_and_specs_lie_on_the_device(mode: str, budgets: tuple[int, ...]) -> None:
    backbone = on_cuda("randar")
    settings: dict[str, Any] = {"backbone": backbone, "data": images(backbone), "mode": mode, "budgets": budgets}
    ranges: dict[str, Any] = {"objective": "likelihood", "step_cost": (0.1, 1.0)} if len(budgets) > 1 else {}
    env = NextBlockTorchRLEnv(3, privileged=mode == "teacher", **settings, **ranges)
    check_env_specs(env)
    for spec in (env.observation_spec, env.action_spec, env.reward_spec, env.done_spec):
        assert (
            all(leaf.device == env.core.device for leaf in spec.values(True, True)) if hasattr(spec, "values") else True
        )
        assert spec.device == env.core.device


def test_actions_are_drawn_as_on_the_cpu() -> None:
    logits, budgets = torch.randn(5, 9), torch.randn(5, 2)
    drawn = []
    for device in ("cuda", "cpu"):
        mask = torch.ones(5, 9, dtype=torch.bool, device=device)
        actions = RankedBlocks(logits.to(device), mask, budgets.to(device), None, (1, 3))
        drawn.append(actions.sample((4,), generator=torch.Generator().manual_seed(0)))
        torch.manual_seed(1)
        drawn.append(actions.sample())
    agrees(drawn[0], drawn[2])
    agrees(drawn[1], drawn[3])


# ---------------------------------------------------------------------- how much a step asks of the device

# At most so many launches and synchronisations, and what was reached with PyTorch 2.15. A step waits for its actions,
# which were chosen on the device, and for nothing else. RandAR-XL's has 36 layers as there; launches know no width.
LIMITS = {  # (launches, synchronisations)
    "digits, teacher": (200, 1),  # 199, 1
    "digits, teacher, mixed budgets": (480, 1),  # 458, 1
    "digits, generate": (620, 1),  # 605, 1
    "RandAR-XL, teacher": (1500, 1),  # 1415, 1
    "a block as a graph": (20, 0),
    "PPO, minibatch": (1200, 20),  # 1102, 7; real CUDA updates all weights of AdamW in a few launches
}


def within(name: str, counts: Counts) -> None:
    launches, synchronisations = LIMITS[name]
    assert counts.launches <= launches and counts.synchronisations <= synchronisations, (counts.launched, counts.waited)


def counted_step(backbone: Any, data: TokenSet, num_envs: int, mode: str, budgets: tuple[int, ...] = (1,)) -> Counts:
    """What a step in the middle of an episode asks of the device; rows reveal budgets in turn."""
    core = NextBlockCore(backbone, data, num_envs, CoreConfig(mode, budgets), seed=0)
    core.reset()
    for _ in range(3):
        actions = first_hidden(core)
        if core.multi:
            actions[:, -1] = torch.arange(num_envs, device=actions.device) % len(budgets)
        with counting() as counts:
            core.step(actions)
    return counts


@simulated_only
@pytest.mark.parametrize("name", [name for name in LIMITS if name.startswith("digits")])
def test_a_step_of_the_digits_asks_little_of_the_device(name: str) -> None:
    budgets = (1, 2) if "mixed" in name else (1,)
    data, mode = load_split("digits", "planner"), name.split(", ")[1]
    within(name, counted_step(load_backbone("digits", device="cuda"), data, 16, mode, budgets))


@simulated_only
def test_a_step_of_randar_xl_asks_little_of_the_device() -> None:
    config = TransformerConfig(16, 16, 4, vocab_size=16, num_classes=10, dim=8, layers=36, heads=2)
    backbone = OrderRobustTransformer(config).requires_grad_(False).eval().to("cuda")
    within("RandAR-XL, teacher", counted_step(backbone, images(backbone), 2, "teacher"))
    # at the real shape scores and logits of 64 images with 8 hidden blocks are one piece
    assert VALUES_AT_ONCE >= 64 * 20 * 8 * 16 * (256 + 32) and VALUES_AT_ONCE >= 64 * 8 * 16 * 16384


@simulated_only
@pytest.mark.parametrize("mode", ["teacher", "generate"])
def test_play_waits_for_actions_alone(mode: str) -> None:
    core = core_of(on_cuda("randar"), mode, (1,), hindsight=False)
    core.reset()
    policy = RankingPolicy(fixed_order(torch.arange(core.geometry.num_blocks)), core.geometry)
    with counting() as counts:
        play(core, policy)
    assert bool(core.books.visible.all()) and counts.synchronisations <= core.geometry.num_blocks, counts.waited


@simulated_only
def test_a_gradient_step_of_ppo_asks_little_of_the_device() -> None:
    backbone = on_cuda("randar")
    env = NextBlockTorchRLEnv(4, True, backbone=backbone, data=images(backbone), budgets=(1, 2), objective="likelihood")
    planner = OrderHead(PlannerConfig.for_backbone(backbone, dim=16, stem=1, heads=2, latents=2))
    ppo = PPO(planner, env, Config(num_envs=4, frames_per_batch=32, minibatch_size=16, group_size=1))
    data = ppo._collect()
    ppo._estimate(data)
    samples, rows = ppo._samples(data), torch.arange(16).to("cuda")
    with counting() as counts:
        ppo._update(samples[rows])
    within("PPO, minibatch", counts)


def test_backbones_compute_in_bfloat16_on_gpus_by_default(home: Path) -> None:
    for place, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        backbone: Any = load_backbone(home / "tiny.safetensors", device=place, dtype="auto")
        assert backbone.output.weight.dtype == dtype and backbone.output.weight.device.type == place


# ---------------------------------------------------------------------- commands

LABELS = ["labels.contexts=24"]
SHAPE = ["planner.dim=16", "planner.stem=1", "planner.heads=2", "planner.latents=2"]
PLANNER = [*LABELS, *SHAPE]
ROUNDS = ["agent.iterations=1", "agent.num_envs=4", "agent.epochs=1"]
BC = [*PLANNER, "agent=bc", "agent.steps=3", "agent.evaluate_every=2"]
AGENTS = {
    "bc": BC,
    "bc_pairs": [*BC, "agent.target=pairs", "planner.pairs=true"],
    "bc_dagger": [*BC, "agent.dagger_rounds=1", "agent.dagger_contexts=12", "agent.dagger_steps=2"],
    "ppo": [
        *(*PLANNER, "agent=ppo", "env=likelihood", *ROUNDS, "agent.frames_per_batch=128", "agent.minibatch_size=64"),
        *("agent.critic_warmup=0", "agent.group_size=1", "agent.start={bc}"),
    ],
    "grpo": [
        *(*PLANNER, "agent=grpo", "env=likelihood", *ROUNDS, "agent.group_size=2", "agent.episodes=4"),
        *("agent.minibatch_size=4", "agent.kl_coeff=0.1", "agent.start={bc}"),
    ],
    "fitted_q": [*SHAPE, "agent=fitted_q", "agent.images=6", "agent.steps=2", "agent.batch_size=4"],
    "schedule": [
        *(*SHAPE, "agent=schedule", "agent.search.episodes=16", "agent.search.refinements=1"),
        *("agent.search.epochs=1", "agent.search.moves=4", "agent.search.chains=2"),
        *("agent.imitation.steps=2", "agent.imitation.num_envs=4"),
    ],
    "imitation": [
        *(*SHAPE, "agent=imitation", "agent.policy=random@2", "agent.imitation.steps=3"),
        "agent.imitation.num_envs=4",
    ],
    "joint": [
        *(*PLANNER, "agent=joint", "agent.start={bc}", "agent.steps=2", "agent.batch_size=4", "agent.contexts=4"),
        *("agent.held_out_images=4", "agent.held_out_contexts=4", "agent.evaluate_every=1"),
    ],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs, the cache and the tiny backbones lie."""
    home = tmp_path_factory.mktemp("home")
    save_backbone(home / "tiny.safetensors", tiny_backbone(8, 8, 4, 17, 10), {})
    return home


def configure(home: Path, command: str, *overrides: str, device: str = "cuda") -> DictConfig:
    own = ["backbone=digits", "data=digits", f"backbone.name={home / 'tiny.safetensors'}", "backbone.dtype=float32"]
    own = [] if command in ("pretrain", "tokenize") else own
    cache = [] if command == "tokenize" else [f"cache_dir={home / device}"]
    return compose(command, [*own, *overrides, f"device={device}", f"output_dir={home / 'runs'}", *cache])


@pytest.fixture(scope="module")
def cloned(home: Path) -> Path:
    return train(configure(home, "train", *BC))


def test_labels_are_made(home: Path) -> None:
    assert label(configure(home, "label", *LABELS, "backbone.dtype=auto")).exists()


@pytest.mark.parametrize("agent", AGENTS)
def test_agents_train(home: Path, cloned: Path, agent: str) -> None:
    assert train(configure(home, "train", *(part.format(bc=cloned) for part in AGENTS[agent]))).exists()


def test_a_clone_is_that_of_the_cpu(home: Path, cloned: Path) -> None:
    same = [train(configure(home, "train", *BC, "planner.dropout=0", device=device)) for device in ("cuda", "cpu")]
    there, here = (load_file(path) for path in same)
    for name, expected in here.items():
        torch.testing.assert_close(there[name], expected, rtol=1e-3, atol=1e-4)


def test_policies_are_evaluated(home: Path, cloned: Path) -> None:
    folder = evaluate(
        configure(
            home, "evaluate", *LABELS, "eval.policies=[random@2,oracle]", f"eval.planners=[{cloned}]",
            "eval.token_raster=[self]",
            "eval.images=2", "eval.samples=4", "eval.states=2", "eval.reference_images=2", "eval.resamples=10",
            "eval.real_images=10", "eval.kid_subsets=2", "eval.distance_resamples=0", "eval.lookahead_states=1",
            "eval.lookahead_draws=2",
        )
    )  # fmt: skip
    assert (folder / "results.json").exists()


def test_hidden_blocks_are_completed() -> None:
    backbone = on_cuda("randar")
    core, data = core_of(backbone, "teacher", (1,)), images(backbone)
    rollout = roll_out(core, RankingPolicy(uniform_random, core.geometry), torch.Generator(), torch.arange(4))
    tokens = complete(backbone, data, rollout, 2)
    visible = rollout.visible[2][:, backbone.geometry.token_block.to(tokens.device)]
    assert torch.equal(tokens.masked_fill(~visible, -1), rollout.tokens.masked_fill(~visible, -1))


@pytest.mark.parametrize("policy", ["random@2", "planner"])
def test_images_are_generated(home: Path, cloned: Path, policy: str) -> None:
    chosen = f"policy={cloned if policy == 'planner' else policy}"
    folder = generate(configure(home, "generate", chosen, "n=3", "keep_samples=true", "guidance=1.5", "top_k=5"))
    assert (folder / "images.png").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_published_samplers_draw_what_they_draw_on_the_cpu(family: str) -> None:
    sampling = Sampling(guidance=1.5)
    there, here = (
        generate_published(model, torch.tensor([0, 2]), 4 if family in ("randar", "mar") else None, sampling)
        for model in (on_cuda(family), tiny(family))
    )
    torch.testing.assert_close(there.tokens, here.tokens, rtol=1e-3, atol=1e-4)


def test_episodes_are_recorded(home: Path) -> None:
    folder = rollouts(configure(home, "rollouts", "policy=random", "n=3", "batch_size=2"))
    assert (folder / "meta.json").exists()


@pytest.mark.parametrize("family", ["randar", "mar"])
def test_pretraining_continues_after_an_interruption(family: str, tmp_path: Path) -> None:
    backbone = tiny(family)
    data, config = images(backbone), PretrainConfig(steps=3, batch_size=4, warmup=1, evaluate_every=2)

    class Interrupted(Exception):
        pass

    class Stopping(Job):
        rows = 0

        def log(self, **row: float) -> None:
            super().log(**row)
            self.rows += 1
            if self.rows == 2:
                raise Interrupted

    def trained(folder: Path, kind: type[Job]) -> dict[str, Tensor]:
        torch.manual_seed(0)  # of dropout
        model = deepcopy(backbone).requires_grad_(True).to("cuda")
        with suppress(Interrupted), kind(folder, "job", 0.0) as job:
            pretrain(model, data, data, config, job=job)
        return model.state_dict()

    whole = trained(tmp_path / "whole", Job)
    trained(tmp_path / "parts", Stopping)
    assert (tmp_path / "parts" / "unfinished" / "job").exists()
    for name, value in trained(tmp_path / "parts", Job).items():
        assert torch.equal(value.cpu(), whole[name].cpu())


def test_backbones_are_pretrained(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orderrl.backbones.recipe.load_split", lambda name, split: load_split(name, split).first(8))
    small = ["backbone.model.dim=32", "backbone.model.layers=1", "training.steps=2", "training.evaluate_every=2",
             "training.batch_size=4"]  # fmt: skip
    assert load_backbone(pretrain_command(configure(home, "pretrain", *small))).hidden_size == 32


def test_images_become_tokens_and_tokens_pixels_on_the_device(home: Path, tmp_path: Path) -> None:
    data = [f"data.root={image_folder(tmp_path / 'images', per_class=10)}", "data.image_size=8"]
    training = ["tokenizer.training.steps=2", "tokenizer.training.batch_size=4", "tokenizer.training.evaluate_every=1"]
    small = ["tokenizer.model.codebook_size=16", "tokenizer.model.z_channels=32"]
    trained = pretrain_command(
        configure(home, "pretrain", "backbone=none", "data=folder", "tokenizer=small", *data, *training, *small)
    )
    made = [f"tokenizer.path={trained}", f"output={tmp_path / 'set'}"]
    tokenize(configure(home, "tokenize", *data, "tokenizer=small", *made))
    test = load_split(f"tokens:{tmp_path / 'set'}", "test")
    with counting() as counts:
        pixels = test.images(test.tokens[:], torch.device("cuda"))
    assert REAL or counts.launches > 10
    assert pixels.device.type == "cpu" and (pixels.int() - test.images(test.tokens[:]).int()).abs().max() <= 1


def test_recorded_numbers_are_replayed(request: pytest.FixtureRequest) -> None:
    recorded = request.getfixturevalue("fixture")
    assert main([str(recorded), "--allow-missing", "--device", "cuda"]) == 0


@simulated_only
def test_the_script_for_a_gpu_measures_and_writes_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TransformerConfig(4, 4, 2, vocab_size=8, num_classes=3, dim=8, layers=1, heads=2)
    smallest = OrderRobustTransformer(config).requires_grad_(False).eval()
    shape = Shape("tiny", lambda dtype: deepcopy(smallest), batch=2)
    monkeypatch.setattr("benchmarks.limits.SIZE", 64)
    monkeypatch.setattr("benchmarks.limits.COPIED", 2**12)
    monkeypatch.setitem(SHAPES, "tiny", shape)
    monkeypatch.setattr("benchmarks.suites.PPOConfig", partial(Config, epochs=1, group_size=1))
    monkeypatch.setattr(gpu, "run_tests", lambda: {"counts": {"passed": 3}, "ok": True, "output": ""})
    monkeypatch.setattr(sys, "argv", ["gpu", "--runs", "1", "--json", str(tmp_path / "gpu.json")])
    plan = tuple(gpu.Piece(suite, "tiny", 2, ("float32",)) for suite in ("generation", "ppo"))
    gpu.main(plan)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["tests"]["counts"] == {"passed": 3} and found["left_out"] == []
    assert {row["suite"] for row in found["rows"]} == {"generation", "ppo"}
    assert all(row["seconds"] > 0 for row in found["rows"]) and "images" in capsys.readouterr().out
    sys.argv += ["--minutes", "0"]
    gpu.main(plan)
    assert "left out for want of time: generation at tiny" in capsys.readouterr().out
