"""Parts from outside the package: one file each, known by a call, by module:attribute and by an entry point."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor

import orderrl
from orderrl.agents.agent import find_agent
from orderrl.agents.orders import ORDERS, block_order
from orderrl.agents.play import act, play
from orderrl.agents.policies import AmongBudgets, Policy
from orderrl.agents.registry import make_policy, policy_source
from orderrl.agents.spec import PolicySpec
from orderrl.backbones import OrderRobustTransformer, load_backbone
from orderrl.data import TokenSet, load_split
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.reward import RewardConfig
from orderrl.evaluation.rows import one_each
from orderrl.metrics.extractors import register_features
from orderrl.metrics.features import extract_features
from orderrl.oracle import distance_weights
from orderrl.runtime.config import compose, help_of
from orderrl.runtime.registry import Registry, _entry_points
from orderrl.tokenize import tokenize
from orderrl.tokenizers import load_tokenizer
from orderrl.train import train
from tests.registries import REGISTRIES, keep_registries
from tests.tokenizers.helpers import image_folder

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```python\n(?=# (\w+)\.py\n)(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
(POINTS,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
GROUPS: dict[str, dict[str, str]] = tomllib.loads(POINTS)["project"]["entry-points"]
SMALL = [
    *("backbone=large_blocks", "data=flipped_digits"),
    *("output_dir=runs", "cache_dir=cache"),
]
TRAIN = ["agent=one_block", "env.objective=early", "env.weight=linear", "planner.dim=16", "logger=shout"]
EVALUATE = [
    *("eval.images=12", "eval.samples=40", "eval.states=6", "eval.resamples=50", "eval.distance_resamples=0"),
    "labels.contexts=12",
    "eval.kid_subsets=2",
    *("eval.policies=[raster,right_to_left,right_to_left@2,nearest]", "eval.features=small_pictures"),
    *("eval.sampled=[raster]", "eval.classifier=null", "eval.real_images=40"),
]
SCRIPT = f"""
import orderrl
from orderrl.runtime.config import compose
from orderrl.train import train
from orderrl.evaluate import evaluate
from orderrl.report import page, style
page.save_figures, style.to_svg = (lambda *_: None), (lambda *_: "")  # nobody looks at the figures
print("PACKAGE", orderrl.__file__)
train(compose("train", {[*TRAIN, *SMALL]!r}))
# the planner is found as the newest of its agent
print("FOLDER", evaluate(compose("evaluate", {[*SMALL, *EVALUATE]!r})))
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files in the current folder, which `import` sees."""
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def installed(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as an installed package with the page's entry points."""
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in GROUPS.items()]
    (files / "mine-1.0.dist-info").mkdir()
    (files / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (files / "mine-1.0.dist-info" / "entry_points.txt").write_text("\n".join(lines))
    _entry_points.cache_clear()
    for registry in REGISTRIES:
        registry.__dict__.pop("installed", None)
    return files


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a test registers, looks up or installs is not known to the next one."""
    keep_registries(monkeypatch)
    yield
    _entry_points.cache_clear()
    for registry in REGISTRIES:
        registry.__dict__.pop("installed", None)


def run(folder: Path, *arguments: str, package: Path = ROOT) -> str:
    path = os.pathsep.join([str(folder), str(package)])
    answer = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": path}
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def registry_of(group: str) -> Registry[Any]:
    (found,) = (registry for registry in REGISTRIES if registry.group == group)
    return found


# ---------------------------------------------------------------------- all kinds at once


def test_the_page_has_a_part_of_every_kind() -> None:
    assert set(GROUPS) == {registry.group for registry in REGISTRIES}
    assert all(f"register_{name}" in PAGE for name in ("order", "policy", "objective", "weight", "metric", "agent"))
    assert {value.partition(":")[0] for names in GROUPS.values() for value in names.values()} == set(FILES)


@pytest.mark.slow
def test_installed_parts_of_every_kind_are_found_in_one_report(
    installed: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Nothing but the wheel and entry points: a planner is trained, evaluated, and compared in another process."""
    zipfile.ZipFile(wheel).extractall(package := tmp_path_factory.mktemp("installed"))
    said = run(installed, "-c", SCRIPT, package=package)
    assert f"PACKAGE {package}" in said
    (folder,) = (installed / line.split()[1] for line in said.splitlines() if line.startswith("FOLDER"))
    results = json.loads((folder / "results.json").read_text())
    rows = {row["policy"]: row for row in results["rows"]}
    assert {"raster", "right_to_left", "right_to_left@2", "nearest", "one_block_early_r2"} <= set(rows)
    assert rows["right_to_left@2"]["steps"] == 2 and rows["nearest"]["steps"] == 4
    assert results["protocol"]["data"].startswith("flipped_digits/test")
    assert results["protocol"]["features"] == "small_pictures" and rows["raster"]["frechet_distance"] > 0
    page, markdown = (folder / "report.html").read_text(), (folder / "results.md").read_text()
    assert 0 <= said.index("1 {'STEP': 1.0, 'LOSS': ") < said.index("DONE\n")
    for heading in ("loss left", "early return"):
        assert heading in page and heading in markdown
        assert set(heading.split()) <= set(said.split())  # in lines of its own
    compared = {(entry["policy"], entry["opponent"], entry["metric"]) for entry in results["comparisons"]}
    assert ("one_block_early_r2", "raster", "early_return") in compared
    assert "one_block_early_r2" in page and "early return" in page.partition("<table")[0]

    shutil.copytree(folder, installed / "again")
    both = [str(folder), "again", "--metrics", "loss_left", "early_return"]
    ranked = [str(folder), "--rank", "loss_left"]
    other = f"from orderrl.compare import main; main({both}); print('RANKED'); main({ranked})"
    first, _, second = run(installed, "-c", other, package=package).partition("RANKED")
    assert "Equal on every image" in first and {"loss", "left"} <= set(second.split())


def test_installed_parts_are_choices_of_their_groups(installed: Path) -> None:
    choices = help_of("train").groups | help_of("tokenize").groups
    assert "one_block" in choices["agent"] and "large_blocks" in choices["backbone"]
    assert "flipped_digits" in choices["data"] and "grey" in choices["tokenizer"]
    for group, names in GROUPS.items():
        assert set(names) <= set(registry_of(group)), group
        assert "my_order" not in sys.modules  # it is imported when it is used
    assert ORDERS["right_to_left"].__name__ == "right_to_left" and "my_order" in sys.modules


def test_an_installed_name_that_is_taken_is_left_out_with_a_warning(installed: Path) -> None:
    points = installed / "mine-1.0.dist-info" / "entry_points.txt"
    points.write_text("[orderrl.orders]\nraster = my_order:right_to_left\nsideways = my_order:right_to_left\n")
    with pytest.warns(UserWarning, match=r"order 'raster' \(my_order:right_to_left\) is left out"):
        assert "sideways" in ORDERS
    assert torch.equal(block_order("raster", load_backbone("digits").geometry), torch.arange(16))


# ---------------------------------------------------------------------- module:attribute


def test_every_kind_is_taken_as_module_and_attribute(files: Path) -> None:
    backbone = load_backbone("my_backbone:large_blocks")
    assert backbone.geometry.num_blocks == 4
    assert block_order("my_order:right_to_left", backbone.geometry).tolist() == [1, 3, 0, 2]
    assert load_split("my_data:flipped_digits", "test").name == "my_data:flipped_digits"
    assert load_tokenizer("my_data:Grey").name == "my_data:Grey"
    images = torch.randint(256, (3, 3, 8, 8)).byte()
    assert extract_features(images, "my_features:small_pictures").pooled.shape == (3, 16)
    reward = RewardConfig(objective="my_reward:early", weight="my_reward:linear")
    assert distance_weights(backbone.geometry, reward.weight, 1.0).diagonal().sum() == 0
    assert find_agent("my_agent:AGENT").config.__name__ == "Config"
    config = compose(
        "train",
        ["agent=my_agent:AGENT", "agent.steps=7", "backbone=my_backbone:large_blocks", "data=my_data:flipped_digits"],
    )
    assert dict(config.agent) == {"name": "my_agent:AGENT", "steps": 7, "block": 0}
    assert not config.labels  # it declares none
    assert config.backbone.name == "my_backbone:large_blocks" and config.data.name == "my_data:flipped_digits"
    with pytest.raises(ValueError, match=r"my_agent:NOBODY.* cannot be imported: .*; write module:attribute"):
        compose("train", ["agent=my_agent:NOBODY"])
    with pytest.raises(ValueError, match=r"agent\.steps must be at least 1, got 0"):
        compose("train", ["agent=my_agent:AGENT", "agent.steps=0"])
    assert make_policy("my_nearest:nearest", backbone).policy is make_policy("nearest", backbone).policy


def test_the_command_orderrl_sees_the_current_folder(files: Path) -> None:
    call = [sys.executable, "-P", "-m", "orderrl", "train", "agent=my_agent:AGENT", "--help"]
    answer = subprocess.run(call, capture_output=True, text=True, cwd=files, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert answer.returncode == 0 and re.search(r"agent\.block +0 +The preferred block", answer.stdout)


def test_an_own_tokeniser_makes_a_token_set_that_another_process_decodes(files: Path) -> None:
    image_folder(files / "images")
    overrides = ["data=folder", "data.root=images", "data.image_size=12", "tokenizer=my_data:Grey", "output=set"]
    tokenize(compose("tokenize", overrides))
    look = "from orderrl.data import load_split; a = load_split('tokens:set', 'test'); print(*a.images(a.tokens).shape)"
    known = "import orderrl; orderrl.trust('my_data:Grey'); "
    assert run(files, "-c", known + look).split() == ["1", "3", "12", "12"]


def test_a_policy_with_a_memory_is_imitated(files: Path) -> None:
    config = ["agent=imitation", "agent.policy=my_nearest:nearest", "agent.imitation.steps=2", "planner.dim=16"]
    config += ["agent.imitation.num_envs=4", "backbone=my_backbone:large_blocks", "data=digits", "env=likelihood"]
    assert train(compose("train", [*config, "output_dir=runs", "cache_dir=cache"])).is_file()


@pytest.mark.parametrize(
    ("look_up", "said"),
    [
        (lambda name: find_agent(name), "agent.name"),
        (lambda name: load_backbone(name), "backbone"),
        (lambda name: load_split(name, "test"), "data.name"),
        (lambda name: load_tokenizer(name), "tokenizer"),
        (lambda name: register_features(name), "features"),
        (lambda name: make_policy(name, load_backbone("digits")), "policy"),
        (lambda name: RewardConfig(objective=name), "objective"),
        (lambda name: RewardConfig(weight=name), "weight"),
    ],
)
def test_an_unknown_name_lists_what_there_is(files: Path, look_up: Callable[[str], Any], said: str) -> None:
    for name in FILES:
        __import__(name)
    with pytest.raises(ValueError, match=said) as caught:
        look_up("nobody")
    own = "one_block|large_blocks|flipped_digits|grey|small_pictures|right_to_left.*nearest|early|linear"
    assert re.search(own, str(caught.value)) and "module:attribute" in str(caught.value)
    assert "\n" not in str(caught.value)
    for reference in ("no_such_module:x", "my_order:no_such_attribute"):
        with pytest.raises(ValueError, match=r"cannot be imported: .*; write module:attribute"):
            look_up(reference)


# ---------------------------------------------------------------------- registration


def test_a_name_is_given_once_unless_it_is_overwritten(files: Path) -> None:
    def backwards(geometry: Any) -> Tensor:
        return torch.arange(geometry.num_blocks).flip(0)

    geometry = load_backbone("digits").geometry
    orderrl.register_order("mine", lambda geometry: torch.arange(geometry.num_blocks))
    with pytest.raises(ValueError, match="'mine' is registered already; choose another name, or set overwrite=True"):
        orderrl.register_order("mine", backwards)
    assert orderrl.register_order("mine", overwrite=True)(backwards) is backwards
    assert block_order("mine", geometry)[0] == 15
    for name in ("raster", "oracle", "newest"):
        with pytest.raises(ValueError, match=f"order '{name}': the package has a meaning"):
            orderrl.register_order(name, backwards)
    for name in ("a:b", "a@4", "a/b", "", "4"):
        with pytest.raises(ValueError, match="a name is a letter"):
            orderrl.register_order(name, backwards)


@pytest.mark.parametrize(
    ("register", "wrong"),
    [
        (orderrl.register_agent, lambda setup, config, job: None),
        (orderrl.register_extractor, 3),
        (orderrl.register_policy, lambda observation: None),
    ],
)
def test_what_is_no_member_of_its_kind_is_refused(files: Path, register: Callable[..., Any], wrong: Any) -> None:
    with pytest.raises(ValueError, match="'mine' must be"):
        register("mine", wrong)


def test_a_metric_that_gives_one_number_for_all_images_is_refused() -> None:
    for wrong, got in ((torch.zeros(()), r"\(\)"), (0.5, "float"), (torch.zeros(3, 2), r"\(3, 2\)")):
        with pytest.raises(ValueError, match=rf"metric 'mine' must give a tensor \(3,\), .* got {got}"):
            one_each("mine", wrong, 3)


def test_features_that_are_no_finite_real_numbers_are_refused() -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    for name, said in (
        ("complex_features", r"must give real numbers \(2, d\) .* got torch.complex64 \(2, 3\)"),
        (
            "infinite_features",
            r"features='tests.test_extend:infinite_features': not finite: features \(1 of 6 values\)",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            extract_features(images, f"tests.test_extend:{name}")


def complex_features(images: Tensor) -> Tensor:
    return torch.ones(len(images), 3, dtype=torch.complex64)


def infinite_features(images: Tensor) -> Tensor:
    return torch.tensor([[1.0, 2.0, torch.inf]]).where(torch.arange(len(images))[:, None] == 0, 0.0)


def test_an_objective_or_weight_of_another_shape_is_refused(backbone: OrderRobustTransformer, data: TokenSet) -> None:
    for reward, said in (
        (RewardConfig(objective="tests.test_extend:one_number"), r"a tensor of shape \(2,\), nats per image, got \(\)"),
        (RewardConfig(weight="tests.test_extend:no_weight"), r"must give a tensor of shape \(9, 9\)"),
    ):
        with pytest.raises(ValueError, match=said):
            core = NextBlockCore(backbone, data, 2, CoreConfig(reward=reward))
            core.reset()
            core.step(torch.tensor([0, 1]))


def one_number(step: Any) -> Tensor:
    return step.utility.sum()


def no_weight(geometry: Any, sigma: float) -> Tensor:
    return torch.ones(3)


def test_an_order_that_misses_blocks_is_refused(files: Path, backbone: OrderRobustTransformer) -> None:
    orderrl.register_order("twice", lambda geometry: torch.zeros(geometry.num_blocks, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"order 'twice' must give every block of 0\.\.8 once"):
        make_policy("twice", backbone)


def test_another_content_of_a_users_file_is_another_key(files: Path) -> None:
    before = {group: [registry_of(group).version(name) for name in names.values()] for group, names in GROUPS.items()}
    assert all(None not in versions for versions in before.values())
    assert policy_source(PolicySpec.parse("my_nearest:nearest")) == files / "my_nearest.py"
    for name in FILES:
        (files / f"{name}.py").write_text(FILES[name] + "\n# changed\n")
    after = {group: [registry_of(group).version(name) for name in names.values()] for group, names in GROUPS.items()}
    assert all(before[group] != after[group] for group in GROUPS)
    assert ORDERS.version("raster") is None


# ---------------------------------------------------------------------- policies


class Watching:
    """Plays in raster order; remembers what it was given."""

    reads_tokens = True

    def __init__(self) -> None:
        self.starts: list[list[bool]] = []
        self.seen: list[TensorDictBase] = []

    def reset(self, starting: Tensor) -> None:
        self.starts.append(starting.tolist())

    def __call__(self, observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        self.seen.append(observation.clone())
        return observation["action_mask"].long().argmax(-1)


def test_a_policy_forgets_where_episodes_begin(backbone: OrderRobustTransformer, data: TokenSet) -> None:
    policy, core = Watching(), NextBlockCore(backbone, data, 2, CoreConfig())
    core.reset()
    play(core, policy, steps=11, restart=True)  # nine steps, one that restarts, and the next episode's first
    assert policy.starts == [[True, True]] * 2
    core.reset(rows=torch.tensor([1]))
    act(policy, core, torch.Generator())
    assert policy.starts[2:] == [[False, True]]
    wrapped = AmongBudgets(policy, (1,), (1, 2))
    many = NextBlockCore(backbone, data, 2, CoreConfig(budgets=(1, 2)))
    many.reset()
    play(many, wrapped)
    assert policy.starts[3:] == [[True, True]] and "tokens" in policy.seen[-1]


def test_hidden_tokens_change_nothing_that_a_policy_gets(backbone: OrderRobustTransformer, data: TokenSet) -> None:
    """Two images that agree on the blocks revealed so far look the same, tokens and all."""
    for visible in (0, 1, 4, 8):
        shown = backbone.geometry.token_block < visible
        tokens = data.tokens.clone()
        tokens[1] = torch.where(shown, tokens[0], (tokens[0] + 1) % backbone.vocab_size)
        same = TokenSet("same", "test", tokens, torch.zeros_like(data.labels), 6, 6, 5, 3)
        policy, core = Watching(), NextBlockCore(backbone, same, 2, CoreConfig())
        core.reset(index=torch.tensor([0, 1]))
        play(core, policy, steps=visible + 1)
        seen = policy.seen[-1]
        assert all(torch.equal(*value[:2]) for value in seen.values())
        assert torch.equal(seen["tokens"][0], torch.where(shown, tokens[0], -1))


def test_policies_that_do_not_ask_see_no_tokens(backbone: OrderRobustTransformer, data: TokenSet) -> None:
    seen: list[set[str]] = []

    def policy(observation: TensorDictBase, generator: torch.Generator) -> Tensor:
        seen.append(set(observation.keys()))
        return observation["action_mask"].long().argmax(-1)

    core = NextBlockCore(backbone, data, 2, CoreConfig())
    core.reset()
    play(core, policy, steps=1)
    assert seen == [{"hidden", "entropy", "visible", "label", "fraction", "action_mask"}]


def one_argument(observation: TensorDictBase) -> Tensor:
    return observation["action_mask"].long().argmax(-1)


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("Watching", "the class Watching: give an instance"),
        ("one_argument", r"one_argument\(observation"),
        ("FILES", "dict"),
    ],
)
def test_what_is_no_policy_gets_one_line_that_says_what_a_policy_is(
    name: str, got: str, backbone: OrderRobustTransformer, data: TokenSet, files: Path
) -> None:
    said = rf"must be callable as policy\(observation, generator\), which gives int64 actions .*; got {got}"
    with pytest.raises(ValueError, match=said):
        make_policy(f"tests.test_extend:{name}", backbone)
    core = NextBlockCore(backbone, data, 2, CoreConfig())
    core.reset()
    policy: Policy = globals()[name]
    with pytest.raises(ValueError, match=said):
        play(core, policy)
