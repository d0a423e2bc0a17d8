"""PyTorch's switches that a caller set change nothing of what the package builds, plays, labels, trains and draws."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from orderrl.agents.bc import Config as BCConfig
from orderrl.agents.bc import clone
from orderrl.agents.body import merge_adapters, trained_part, tunable_copy
from orderrl.agents.play import act
from orderrl.agents.registry import make_policy, policy_names
from orderrl.agents.ste import Config as SplitConfig
from orderrl.agents.ste import SplitTraining
from orderrl.backbones import Sampling, check_backbone, load_backbone
from orderrl.backbones.pretraining import PretrainConfig, pretrain
from orderrl.data import AUGMENTATIONS, load_split
from orderrl.distillation import ImageOrders
from orderrl.envs import NextBlockTorchRLEnv, NextBlockVectorEnv
from orderrl.evaluate import evaluate
from orderrl.evaluation.drawing import balanced_labels, generate_images, generate_published
from orderrl.generate import generate
from orderrl.oracle import LabelConfig, label_contexts, random_contexts
from orderrl.partial_classifier import ClassifierConfig, cluster_orders, find_or_train_classifier, importance
from orderrl.planner import OrderHead, PlannerConfig, load_planner, new_planner, save_planner
from orderrl.runtime.config import compose
from orderrl.runtime.isolation import isolated, isolated_float32
from orderrl.runtime.weights import weights_fingerprint
from orderrl.train import train
from tests.backbones.families import FAMILIES, ORDER_ROBUST, images, tiny
from tests.helpers import tiny_backbone, tiny_images
from tests.jobs import logged

Switch = Callable[[], AbstractContextManager[Any]]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def everything() -> Iterator[None]:
    with (
        default_dtype(torch.bfloat16),
        torch.set_grad_enabled(False),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        deterministic(),
        torch.autograd.set_detect_anomaly(True),
        np.errstate(all="raise"),
    ):
        yield


SWITCHES: dict[str, Switch] = {
    "float64": lambda: default_dtype(torch.float64),
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default device": lambda: default_device("meta"),  # a device that every mistake shows on, without a GPU
    "many at once": everything,
}
every_switch = pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
# where much is done: many are on at once, and inference mode cannot be among them
both_switches = pytest.mark.parametrize("switch", [torch.inference_mode, everything], ids=["inference mode", "many"])


def same(found: Any, expected: Any) -> bool:
    """Whether nested results are equal, bit by bit and in their dtypes, and lie on the CPU."""
    if isinstance(expected, TensorDict):
        found, expected = dict(found.items()), dict(expected.items())
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], value) for key, value in expected.items())
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, Tensor):
        return bool(found.dtype == expected.dtype and found.device.type == "cpu" and torch.equal(found, expected))
    return bool(np.array_equal(found, expected)) and type(found) is type(expected)


# ---------------------------------------------------------------------- backbones, asked directly


def answers(family: str, switch: Switch) -> list[Any]:
    """All that the protocol asks, each question in the switch by itself."""
    backbone = tiny(family)
    tokens, labels = images(backbone, 3).tokens[:], torch.arange(3)
    blocks = torch.arange(backbone.geometry.num_blocks).repeat(3, 1)
    uniforms = torch.full((3, 1, backbone.geometry.tokens_per_block), 0.4)

    def ask(question: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        with switch():
            return question(*arguments, **options)

    prefix = ask(backbone.start, labels)
    found = [
        ask(backbone.observe, prefix, blocks),
        ask(backbone.decode, prefix, blocks[:, :1], uniforms, Sampling())[0],
    ]
    losses, past = ask(backbone.context_loss, prefix, tokens, blocks[:, :1], whole=True)
    if family in ("randar", "arpg"):
        found.append(ask(backbone.expected_gain, prefix, blocks[:, 1:], past, uniforms.repeat(1, 3, 1)))
    if family in ORDER_ROBUST:
        longer = ask(backbone.extend, prefix, tokens, blocks[:, :1], torch.ones(3, dtype=torch.int64))
        found.append(ask(backbone.observe, longer, blocks[:, 1:]))
    return [*found, losses]


@every_switch
@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_answers_alike_when_it_is_asked_directly(family: str, switch: Switch) -> None:
    assert same(answers(family, switch), answers(family, torch.no_grad))


@pytest.mark.parametrize("wanted", [True, False])
def test_a_backbone_leaves_gradients_to_the_caller(wanted: bool) -> None:
    backbone = deepcopy(tiny("randar")).requires_grad_(True)
    with torch.set_grad_enabled(wanted):
        hidden, _ = backbone.observe(
            backbone.start(torch.zeros(1, dtype=torch.int64)), torch.zeros(1, 1, dtype=torch.int64)
        )
    assert hidden.requires_grad == wanted


# ---------------------------------------------------------------------- the environment's three faces

KEYWORDS: dict[str, dict[str, Any]] = {
    "teacher": {"objective": "context", "seed": 3},
    "far": {"weight": "far", "budgets": (1, 2), "step_cost": (0.1, 1.0), "seed": 3},
    "charged": {"objective": "likelihood", "form": "charged", "step_cost": 0.2, "seed": 3},
    "generate": {"mode": "generate", "budgets": (4, 8), "seed": 3},
}


def action(env: Any, step: int) -> np.ndarray:
    """Blocks in turn, as many as the smallest budget."""
    core = env.core
    if not core.multi:
        return np.array(step)
    smallest, largest = core.config.budgets[0], core.largest_budget
    return np.array([*((step * smallest + np.arange(largest)) % core.geometry.num_blocks), 0])


def single(around: Switch, within: Switch, arguments: dict[str, Any]) -> list[Any]:
    with around():
        env = gym.make("orderrl:orderrl/NextBlock-v0", render_mode="rgb_array", **arguments)
    with within():
        seen: list[Any] = [env.reset()]
        for step in range(4):
            seen.append(env.step(action(env.unwrapped, step)))
            seen += [env.get_wrapper_attr("action_masks")(), env.render()]
        assert env.observation_space.contains(seen[0][0])
    return seen


def vector(around: Switch, within: Switch, arguments: dict[str, Any]) -> list[Any]:
    with around():
        env = NextBlockVectorEnv(num_envs=3, **arguments)
    with within():
        seen: list[Any] = [env.reset()]
        for step in range(17 if env.core.config.mode == "teacher" else 4):  # past the end of an episode
            chosen = action(env, step % 16)
            seen.append(env.step(np.repeat(chosen[None], 3, 0)))
            seen.append(env.action_masks())
    return seen


def torchrl(around: Switch, within: Switch, arguments: dict[str, Any]) -> list[Any]:
    with around():
        env = NextBlockTorchRLEnv(num_envs=3, **arguments)
    with within():
        state = env.reset()
        seen: list[Any] = [state.clone()]
        for step in range(4):
            chosen = torch.tensor(action(env, step), device="cpu")
            state = env.step(state.set("action", chosen.expand(3, *chosen.shape)))["next"]
            seen.append(state.clone())
        seen.append(env.reset(TensorDict({"_reset": torch.tensor([[True], [False], [True]], device="cpu")}, [3])))
    return seen


def plainly() -> AbstractContextManager[None]:
    return ExitStack()  # type: ignore[return-value]


FACES = {"single": (single, "teacher"), "vector": (vector, "far"), "torchrl": (torchrl, "generate")}
_PLAIN: dict[str, list[Any]] = {}


@both_switches
@pytest.mark.parametrize("face", [*FACES, "charged"])
def test_an_environment_is_the_same_wherever_the_switch_is_on(face: str, switch: Switch) -> None:
    """On only while it is made, or only while it is played."""
    play, kind = FACES.get(face, (torchrl, "charged"))
    if face not in _PLAIN:
        _PLAIN[face] = play(plainly, plainly, KEYWORDS[kind])
    for around, within in ((switch, plainly), (plainly, switch)):
        assert same(play(around, within, KEYWORDS[kind]), _PLAIN[face])


def test_the_number_of_threads_changes_rounding_alone() -> None:
    before = torch.get_num_threads()
    expected = torchrl(plainly, plainly, KEYWORDS["teacher"])
    try:
        torch.set_num_threads(before + 1)
        found = torchrl(plainly, plainly, KEYWORDS["teacher"])
    finally:
        torch.set_num_threads(before)
    for state, wanted in zip(found[1:-1], expected[1:-1], strict=True):
        torch.testing.assert_close(state["reward"], wanted["reward"], atol=1e-5, rtol=1e-5)


def test_a_backbone_of_another_precision_gives_float32() -> None:
    """The caller's own module in float64: every tensor of the core is float32, and within rounding the same."""
    backbone: Any = load_backbone("digits")
    expected = torchrl(plainly, plainly, KEYWORDS["teacher"])
    double = load_backbone("digits")
    assert isinstance(double, torch.nn.Module)
    double.double()
    found = torchrl(plainly, plainly, KEYWORDS["teacher"] | {"backbone": double})
    for state, wanted in zip(found, expected, strict=True):
        for key in wanted.keys():  # noqa: SIM118 - a TensorDict
            assert state[key].dtype == wanted[key].dtype
            torch.testing.assert_close(state[key], wanted[key], atol=1e-3, rtol=1e-3)
    assert weights_fingerprint(backbone) != weights_fingerprint(double)


# ---------------------------------------------------------------------- what is built, labelled, trained, drawn


def labelled() -> list[Any]:
    backbone, data = load_backbone("digits"), load_split("digits", "planner")
    made = []
    for config in (LabelConfig(contexts=4), LabelConfig(contexts=2, kind="kl", target_fraction=0.5)):
        contexts = random_contexts(config, len(data), 16)
        made += [list(contexts), *label_contexts(backbone, data.tokens, data.labels, config, contexts)]
    return made


def planner_of(seed: int = 0) -> OrderHead:
    torch.manual_seed(seed)
    return OrderHead(PlannerConfig.for_backbone(load_backbone("digits"), dim=8, stem=1, pairs=True, num_budgets=2))


def cloned() -> list[Any]:
    """A planner after three steps of cloning, before and after it was written."""
    backbone, data, config = load_backbone("digits"), load_split("digits", "planner"), LabelConfig(contexts=24)
    contexts = random_contexts(config, len(data), 16)
    parts = list(label_contexts(backbone, data.tokens, data.labels, config, contexts))
    labels = TensorDict({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, [24])
    planner = planner_of()
    rows = logged(clone, planner, labels, backbone.geometry, BCConfig(steps=3, batch_size=8))
    return [dict(planner.state_dict()), [row["loss"] for row in rows]]


def drawn() -> list[Any]:
    backbone, data = load_backbone("digits"), load_split("digits", "test")
    labels = balanced_labels(2, 10)
    named = make_policy("multiscale@8", backbone)
    made = generate_images(backbone, data, named.policy, named.budgets, labels)
    published = generate_published(backbone, labels, steps=4)
    return [made.tokens, made.reveal_step, published.tokens, published.reveal_step]


def decided() -> list[Any]:
    """What every policy by name does in one state."""
    backbone = load_backbone("digits")
    unfit = ("fitted", "newest", "published", "token_raster", "greedy_labels")
    names = [name for name in policy_names() if name not in unfit]
    made = []
    for name in names:
        try:
            named = make_policy(name, backbone)
        except ValueError:  # it needs a number or a file
            continue
        core = NextBlockTorchRLEnv(num_envs=2, backbone=backbone, seed=0, budgets=named.budgets).core
        core.reset()
        made.append(act(named.policy, core, torch.Generator(device="cpu").manual_seed(0)))
    assert len(made) > 10
    return made


def fetched() -> list[Any]:
    """Data, backbones and augmentations."""
    made: list[Any] = []
    for name in ("digits", "digits_patches", "canvas"):
        data = load_split(name, "test")
        tokens = AUGMENTATIONS[name](data.tokens[:3], torch.Generator(device="cpu").manual_seed(0), 1.0)
        made += [data.tokens[:3], data.labels[:3], data.images(data.tokens[:3]), tokens]
    for name in ("digits", "digits_raster", "digits_mar", "canvas"):
        module: Any = load_backbone(name)
        made += [dict(module.state_dict()), weights_fingerprint(module)]
        made += [module.geometry.distances, module.geometry.touching, module.geometry.token_block]
    check_backbone(load_backbone("digits"))
    return [*made, dict(planner_of().state_dict())]


def judged() -> list[Any]:
    """The classifier of partly seen images, and the importance of blocks by it."""
    backbone, data = load_backbone("digits"), load_split("digits", "test")
    settings = ClassifierConfig(dim=16, depth=1, heads=2, steps=2, batch_size=4)
    with TemporaryDirectory() as cache:
        classifier = find_or_train_classifier("digits", settings, 0, Path(cache))
    rows = torch.arange(3, device="cpu")
    tokens, labels = data.tokens[rows], data.labels[rows]
    orders = [cluster_orders(name, backbone.geometry, 4, 2, (rows,)) for name in ("random", "tiles")]
    found = [importance(classifier, backbone.geometry, tokens, labels, order, 4, True) for order in orders]
    return [dict(classifier.state_dict()), *orders, *found]


def split() -> list[Any]:
    """A head, and adapters of a body, after two steps of training through binary splits."""
    backbone: Any = load_backbone("digits")
    tuned = tunable_copy(backbone)
    torch.manual_seed(0)
    head: Any = new_planner(PlannerConfig.for_backbone(backbone, dim=16, stem=1, heads=2, network="orderhead"))
    adapters = trained_part(tuned, "lora")
    config = SplitConfig(steps=2, batch_size=4, body="lora", evaluate_every=2)
    SplitTraining(head, tuned, adapters, load_split("digits", "test").first(40), config).train()
    merge_adapters(tuned)
    return [dict(head.state_dict()), dict(tuned.state_dict())]


TINY = tiny_images(tiny_backbone(), 8)


def distilled() -> list[Any]:
    """Orders of images, and two steps of fine-tuning on them."""
    backbone, data = tiny_backbone(), TINY
    tuned = tunable_copy(backbone).requires_grad_(True)
    config = PretrainConfig(
        steps=2, batch_size=4, warmup=1, order="low_entropy@2", locality=0.5, random_share=0.5, evaluate_every=2
    )
    with TemporaryDirectory() as cache:
        source = ImageOrders("low_entropy@2", backbone, data, Path(cache), 3)
        pretrain(tuned, data, data, config, orders=source)
        found = source.images(source.extract(backbone, 0))
        return [dict(tuned.state_dict()), found.order.clone(), found.seen.clone()]


WORK: dict[str, Callable[[], list[Any]]] = {
    "data, backbones, planners": fetched,
    "labels": labelled,
    "cloning": cloned,
    "samples": drawn,
    "policies": decided,
    "classifier": judged,
    "split training": split,
    "specialists": distilled,
}
_DONE: dict[str, list[Any]] = {}


@both_switches
@pytest.mark.parametrize("work", WORK)
def test_what_is_made_is_the_same(work: str, switch: Switch) -> None:
    if work not in _DONE:
        _DONE[work] = WORK[work]()
    with switch():
        found = WORK[work]()
    assert same(found, _DONE[work])
    assert torch.get_default_dtype() is torch.float32


def test_what_was_built_in_inference_mode_can_be_trained(tmp_path: Path) -> None:
    save_planner(tmp_path / "p.safetensors", planner_of(), {})
    with torch.inference_mode():
        planners = [planner_of(), load_planner(tmp_path / "p.safetensors")[0]]
        planners += [planners[0].with_budgets(3), planners[0].with_budgets(2, (0.1, 1.0)).at_step_cost(0.5)]
    env = NextBlockTorchRLEnv(num_envs=2, seed=0)
    for planner in planners:
        planner.train()(env.reset()).value.sum().backward()
        assert planner.value_head.weight.grad is not None


@pytest.mark.very_slow
def test_the_main_job_is_the_same_with_every_switch_on(tmp_path: Path) -> None:
    """Labels, a clone, PPO from it, samples and the table, as functions of a notebook."""

    def job(folder: Path) -> list[Any]:
        at = [f"cache_dir={folder}/cache", f"output_dir={folder}/runs", "labels.contexts=24", "backbone=digits"]
        clone = train(compose("train", [*at, "agent=bc", "agent.steps=3"]))
        ppo = ["agent=ppo", "agent.num_envs=4", "agent.group_size=1", "agent.frames_per_batch=64", "agent.iterations=1"]
        better = train(compose("train", [*at, *ppo, f"agent.start={clone}"]))
        images = generate(compose("generate", [*at, f"policy={clone}", "n=2"]))
        small = ["eval.images=4", "eval.states=8", "eval.reference_images=2", "eval.resamples=20"]
        table = evaluate(compose("evaluate", [*at, *small, "eval=planning", "eval.policies=[raster,oracle]"]))
        states = [dict(load_planner(path)[0].state_dict()) for path in (clone, better)]
        rows = (table / "results.md").read_text()
        return [states, (images / "images.png").read_bytes(), rows]

    expected = job(tmp_path / "plain")
    with everything():
        found = job(tmp_path / "switched")
    assert same(found, expected)


# ---------------------------------------------------------------------- the mechanism


def test_the_callers_switches_are_on_again_afterwards() -> None:
    def modes() -> list[Any]:
        return [
            torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"), str(torch.get_default_device()),
        ]  # fmt: skip

    @isolated_float32
    def fail() -> None:
        raise KeyError("inside")

    with everything(), torch.inference_mode():
        before = modes()
        assert isolated_float32(modes)() == [torch.float32, False, True, False, "cpu"]
        assert isolated(modes)() == [torch.bfloat16, False, True, False, "cpu"]
        with pytest.raises(KeyError):
            fail()
        assert modes() == before


def test_a_generator_leaves_its_modes_at_every_step() -> None:
    closed: list[bool] = []

    @isolated_float32
    def steps() -> Iterator[tuple[torch.dtype, bool]]:
        try:
            while True:
                yield torch.get_default_dtype(), torch.is_grad_enabled()
        finally:
            closed.append(torch.is_grad_enabled())

    with default_dtype(torch.float64), torch.no_grad():
        for number, inside in enumerate(steps()):
            assert inside == (torch.float32, True)
            assert torch.get_default_dtype() is torch.float64 and not torch.is_grad_enabled()
            if number:
                break
        assert closed == [True]


def test_threads_that_leave_in_any_order_restore_the_default_dtype() -> None:
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    @isolated_float32
    def first() -> None:
        first_in.set()
        second_in.wait(10)

    @isolated_float32
    def second() -> None:
        second_in.set()
        first_out.wait(10)
        assert torch.get_default_dtype() is torch.float32

    with default_dtype(torch.float64):

        def leave() -> None:
            first()
            first_out.set()

        one = threading.Thread(target=leave)
        one.start()
        first_in.wait(10)
        second()
        one.join()
        assert torch.get_default_dtype() is torch.float64
