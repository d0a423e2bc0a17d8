"""Many processes: what does not depend on their number, and what may."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor, nn

from orderrl import compose
from orderrl.agents.ppo import PPO
from orderrl.agents.ppo import Config as PPOConfig
from orderrl.backbones import load_backbone, save_backbone
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.torchrl import NextBlockTorchRLEnv
from orderrl.evaluate import evaluate
from orderrl.label import label
from orderrl.planner import OrderHead, PlannerConfig, load_planner
from orderrl.pretrain import pretrain
from orderrl.runtime import distributed
from orderrl.train import train
from tests.helpers import tiny_backbone, tiny_images
from tests.killing import contents, metrics, table
from tests.processes import run_processes

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {"label": label, "train": train, "pretrain": pretrain, "evaluate": evaluate}
LABELS = ["labels.contexts=120", "labels.shard_size=16", "labels.batch_size=8"]
BC = [*LABELS, "planner.dim=32", "planner.stem=1", "agent=bc", "agent.steps=12", "agent.evaluate_every=6"]
PPO_RUN = [
    *("planner.dim=32", "planner.stem=1", "agent=ppo", "env=likelihood", "agent.iterations=2", "agent.num_envs=8"),
    *("agent.frames_per_batch=128", "agent.minibatch_size=64", "agent.epochs=1", "agent.group_size=2"),
]
PRETRAIN = [
    *("backbone.model.dim=32", "backbone.model.layers=2", "backbone.model.heads=2", "backbone.model.dropout=0"),
    *("training.steps=6", "training.evaluate_every=6", "training.batch_size=15"),
    *("training.bf16=false", "training.anneal_from=0.5", "checkpoint_seconds=0"),
]
EVALUATION = [
    *("labels.contexts=32", "labels.shard_size=16", "eval.images=10", "eval.samples=20", "eval.states=16"),
    *("eval.reference_images=4", "eval.resamples=50", "eval.kid_subsets=2", "eval.distance_resamples=5"),
    "eval.policies=[raster,random,multiscale@4]",
    *("eval.sampled=[raster]", "eval.token_raster=[]", "eval.keep_samples=true"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_backbone(home / "tiny.safetensors", tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    return home


def configure(home: Path, where: str, command: str, *overrides: str) -> DictConfig:
    tiny = ["backbone=digits", f"backbone.name={home / 'tiny.safetensors'}"] if command != "pretrain" else []
    places = [f"output_dir={home / where / 'runs'}", f"cache_dir={home / where / 'cache'}"]
    return compose(command, [*tiny, *overrides, *places])


def call(command: str, config: DictConfig) -> Path:
    """A command in a child process."""
    return Path(COMMANDS[command](config))


def run(home: Path, where: str, size: int, command: str, *overrides: str) -> Path:
    """The result of a command in one process, or in several."""
    config = configure(home, where, command, *overrides)
    if size == 1:
        return call(command, config)
    found = run_processes(size, home / where, call, command, config)
    assert len(set(found)) == 1, "all processes speak of the same result"
    assert "error" not in "".join(path.name for path in (home / where).iterdir())
    assert not list((home / where / "cache" / "unfinished").iterdir())
    assert len(list((home / where / "runs" / command).iterdir())) == 1, "one run folder"
    assert (home / where / "out-0.txt").read_text() and not (home / where / "out-1.txt").read_text()
    return Path(found[0])


@pytest.fixture(scope="module")
def labelled(home: Path) -> Path:
    """Labels that one process made."""
    return run(home, "label-1", 1, "label", *LABELS)


@pytest.fixture(scope="module")
def pretrained(home: Path) -> Path:
    """A backbone that one process trained."""
    return run(home, "pretrain-1", 1, "pretrain", *PRETRAIN)


# ---------------------------------------------------------------------- parts


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 9, 16])
def test_every_item_is_done_once_and_a_trend_evens_out(size: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dealt = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "_place", distributed._Place(rank, size))
        dealt.append(distributed.share_of(range(count)))
    assert sorted(item for part in dealt for item in part) == list(range(count))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert count % (2 * size) or len({sum(part) for part in dealt}) == 1


def test_fewer_rows_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_place", distributed._Place(2, 4))
    assert distributed.rows_of(torch.arange(10)).tolist() == [6, 7]
    with pytest.raises(ValueError, match="batch_size=3 must be at least the number of processes, 4"):
        distributed.rows_of(torch.arange(3))


def test_one_gpu_for_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="use device=cuda"):
        distributed._own_gpu("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="lower --nproc-per-node"):
        distributed._own_gpu("cuda")


def averaged_gradients() -> tuple[list[Tensor | None], float]:
    torch.manual_seed(0)
    network, unused, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(7, 3)
    rows = distributed.rows_of(torch.arange(7))
    loss = network(x[rows]).pow(2).mean()
    total = distributed.backward(loss, [*network.parameters(), *unused.parameters()], len(rows) / 7)
    return [p.grad for p in (*network.parameters(), *unused.parameters())], total


def test_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    alone, together = averaged_gradients(), run_processes(2, tmp_path, averaged_gradients)
    for gradients, loss in together:
        assert loss == pytest.approx(alone[1], rel=1e-6)
        assert gradients[2] is None and gradients[3] is None
        for mine, whole in zip(gradients[:2], alone[0][:2], strict=True):
            assert mine is not None and whole is not None
            torch.testing.assert_close(mine, whole)


def summed_and_collected() -> tuple[int, list[int]]:
    return distributed.on_main(lambda: 10 * distributed.size()), distributed.gather(distributed.rank())


def test_the_main_process_works_alone_and_tells_the_others(tmp_path: Path) -> None:
    assert run_processes(2, tmp_path, summed_and_collected) == [(10, [0, 1])] * 2


# ---------------------------------------------------------------------- commands


def test_labels_do_not_depend_on_the_number_of_processes(home: Path, labelled: Path) -> None:
    two = run(home, "label-2", 2, "label", *LABELS)
    assert contents(labelled / "contexts", "*") == contents(two / "contexts", "*")


@pytest.mark.parametrize("target", ["utility", "label"])
def test_cloning_in_two_processes_gives_the_same_losses(home: Path, target: str) -> None:
    overrides = [*BC, f"agent.target={target}"]
    one, two = (run(home, f"bc-{target}-{size}", size, "train", *overrides) for size in (1, 2))
    rows = list(zip(metrics(one.parent), metrics(two.parent), strict=True))
    assert rows[0][0] == pytest.approx(rows[0][1], rel=1e-6)
    for mine, other in rows:  # Adam's first steps are the gradient's sign, so rounding grows
        assert mine["loss"] == pytest.approx(other["loss"], rel=2e-3)


def test_pretraining_in_two_processes_gives_the_same_losses(home: Path, pretrained: Path) -> None:
    two = run(home, "pretrain-2", 2, "pretrain", *PRETRAIN)
    for mine, other in zip(metrics(pretrained.parent), metrics(two.parent), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


def test_an_evaluation_does_not_depend_on_the_number_of_processes(home: Path) -> None:
    clone = run(home, "evaluated", 1, "train", *BC)
    one, two = (
        run(home, f"evaluate-{size}", size, "evaluate", *EVALUATION, f"eval.planners=[{clone}]") for size in (1, 2)
    )
    assert table(one) == table(two)


def play(home: Path) -> tuple[list[int], list[Tensor]]:
    """Images of the first round and the weights after two, of this process."""
    backbone = tiny_backbone()
    torch.manual_seed(0)
    planner = OrderHead(PlannerConfig.for_backbone(backbone, dim=32, stem=1))
    core = NextBlockCore(backbone, tiny_images(backbone), 8 // distributed.size(), CoreConfig(budgets=(1, 2)))
    config = PPOConfig(iterations=2, num_envs=8, frames_per_batch=96, minibatch_size=48, epochs=1, group_size=1)
    ppo = PPO(planner, NextBlockTorchRLEnv(core=core, privileged=True), config)
    seeds = ppo._round_seeds().tolist()
    ppo.train()
    return seeds, [parameter.detach() for parameter in ppo.planner.parameters()]


def test_ppo_shares_out_environments_and_keeps_weights_alike(home: Path, tmp_path: Path) -> None:
    alone = play(home)
    (first, weights), (second, others) = run_processes(2, tmp_path, play, home)
    assert first + second == alone[0], "the seeds of one process, and with them its images"
    assert all(torch.equal(mine, other) for mine, other in zip(weights, others, strict=True))
    assert not all(torch.equal(mine, other) for mine, other in zip(weights, alone[1], strict=True))


@pytest.mark.very_slow
def test_ppo_runs_in_two_processes(home: Path) -> None:
    path = run(home, "ppo-2", 2, "train", *PPO_RUN, f"agent.start={run(home, 'ppo-start', 1, 'train', *BC)}")
    rows = metrics(path.parent)
    assert [row["frames"] for row in rows] == [128, 256] and load_planner(path)[0].config.num_budgets == 3


def test_environments_that_cannot_be_shared_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_place", distributed._Place(0, 3))
    with pytest.raises(ValueError, match=r"num_envs=8 must be a multiple of 6: 3 processes with groups of 2"):
        PPO._check_shares(PPOConfig(num_envs=8, group_size=2, frames_per_batch=64))


# ---------------------------------------------------------------------- backbones split over processes


def test_a_backbone_split_over_processes_gives_the_same_labels(home: Path, labelled: Path) -> None:
    two = run(home, "split", 2, "label", *LABELS, "fsdp=true")
    mine, other = (TensorDict.load_memmap(str(folder / "contexts")) for folder in (labelled, two))
    for key in mine.keys():  # noqa: SIM118 - not a mapping
        torch.testing.assert_close(mine[key], other[key], rtol=1e-4, atol=1e-4)


def test_a_split_backbone_is_trained_and_saved_whole(home: Path, pretrained: Path) -> None:
    two = run(home, "trained-split", 2, "pretrain", *PRETRAIN, "fsdp=true", "training.batch_size=16")
    assert [row["step"] for row in metrics(two.parent)] == [row["step"] for row in metrics(pretrained.parent)]
    results = [json.loads((path.parent / "results.json").read_text()) for path in (pretrained, two)]
    assert results[1]["loss_random"] == pytest.approx(results[0]["loss_random"], rel=0.05)
    for name in ("backbone", "backbone_final"):
        assert load_backbone(str(two.parent / f"{name}.safetensors")).order_robust


def test_a_backbone_is_not_split_in_one_process(home: Path) -> None:
    with pytest.raises(ValueError, match="torchrun"):
        run(home, "alone", 1, "label", *LABELS, "fsdp=true")


# ---------------------------------------------------------------------- torchrun itself


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", *arguments]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=300, env=one_thread)


def test_torchrun_starts_a_command(home: Path) -> None:
    places = [f"output_dir={home / 'torchrun' / 'runs'}", f"cache_dir={home / 'torchrun' / 'cache'}"]
    answer = torchrun(
        "orderrl.label", "backbone=digits", f"backbone.name={home / 'tiny.safetensors'}", *LABELS, *places
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("labels: 120 contexts in") == 1
    (folder,) = (home / "torchrun" / "cache" / "labels").iterdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's processes: sums of other threads have other last bits
    try:
        one = run(home, "one-thread", 1, "label", *LABELS)
    finally:
        torch.set_num_threads(threads)
    assert contents(one / "contexts", "*") == contents(folder / "contexts", "*")


def test_an_error_in_one_process_ends_all_with_its_message(tmp_path: Path) -> None:
    """The others would wait for a day."""
    (tmp_path / "failing.py").write_text(
        "from orderrl.runtime import distributed\n"
        "def main(config):\n"
        "    if distributed.rank() == 1:\n"
        "        raise ValueError('the second process has had enough')\n"
        "    distributed.barrier()\n"
        "from orderrl.runtime.config import run_application\n"
        "run_application('label', distributed.launched(main))\n"
    )
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    answer = subprocess.run(
        [*call, str(tmp_path / "failing.py")], capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, cwd=tmp_path,
    )  # fmt: skip
    assert answer.returncode != 0 and "error: the second process has had enough" in answer.stderr


# ---------------------------------------------------------------------- sweeps


def test_submitits_slurm_launcher_composes_with_a_command() -> None:
    call = [sys.executable, "-m", "orderrl.label", "hydra/launcher=submitit_slurm", "--cfg", "hydra"]
    answer = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert "submitit_launcher" in answer.stdout and "timeout_min" in answer.stdout


@pytest.mark.very_slow
def test_a_sweep_runs_through_submitit(home: Path) -> None:
    where = home / "sweep"
    call = [sys.executable, "-m", "orderrl.label", "--multirun", "hydra/launcher=submitit_local", "labels.seed=0,1"]
    call += [
        "backbone=digits",
        f"backbone.name={home / 'tiny.safetensors'}",
        "labels.contexts=8",
        f"output_dir={where / 'runs'}",
    ]
    answer = subprocess.run([*call, f"cache_dir={where / 'cache'}"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert len(list((where / "cache" / "labels").iterdir())) == 2
