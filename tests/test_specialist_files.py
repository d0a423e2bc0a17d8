"""What a specialist is made of lies in files: orders, its planner, its start. None of them is taken for another."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orderrl import compose
from orderrl.agents.agent import find_agent
from orderrl.agents.bc import Config, teacher_ranks
from orderrl.agents.ppo import Config as PPOConfig
from orderrl.agents.registry import make_policy
from orderrl.backbones import OrderRobustTransformer, load_backbone, save_backbone
from orderrl.backbones.origin import Origin
from orderrl.backbones.pretraining import PretrainConfig, pretrain
from orderrl.backbones.registry import WEIGHTS, backbone_fingerprint, require_made_for
from orderrl.data import AUGMENTATIONS, load_split
from orderrl.distillation import ImageOrders, chosen_orders
from orderrl.evaluation.policies import own_order
from orderrl.factory import Setup
from orderrl.planner import OrderHead, PlannerConfig, load_planner, save_planner
from orderrl.pretrain import backbone_recipe
from orderrl.reproduce import specialist_configs
from orderrl.runtime.cache import fingerprint
from orderrl.runtime.job import Job
from orderrl.runtime.storage import checksum
from orderrl.training import describe, find_or_train
from tests.helpers import tiny_backbone, tiny_images
from tests.jobs import Enough, Seen

QUICK = PretrainConfig(steps=6, batch_size=8, learning_rate=1e-3, warmup=2, ema=0.5, evaluate_every=6, order="diagonal")
FORWARDS, BACKWARDS = torch.arange(9), torch.arange(9).flip(0)


def orders(folder: Path, order: str = "low_entropy", seed: int = 3, **changes: Any) -> ImageOrders:
    return ImageOrders(order, tiny_backbone(), tiny_images(tiny_backbone(), 20), folder / "cache", seed, **changes)


def shifted(tokens: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    return (tokens + torch.randint(5, (len(tokens), 1), generator=generator)) % 5


@pytest.fixture
def views(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two views of every image, of a data set that has an augmentation."""
    monkeypatch.setitem(AUGMENTATIONS, tiny_images(tiny_backbone()).name, shifted)
    return {"views": 2, "strength": 1.0}


def specialist(folder: Path, **origin: Any) -> OrderRobustTransformer:
    """A backbone that says what it was made for."""
    described = Origin("diagonal", "mine", 0).described() | origin
    save_backbone(folder / "x.safetensors", tiny_backbone(), {"origin": described})
    found = load_backbone(folder / "x.safetensors")
    assert isinstance(found, OrderRobustTransformer)
    return found


def planner(folder: Path, name: str = "planner.safetensors", **description: Any) -> Path:
    made = OrderHead(PlannerConfig.for_backbone(tiny_backbone(), dim=16, stem=1, heads=2))
    said = {"agent": {"name": "bc"}, "objective": "context", "seed": 0, "budgets": [1]} | description
    save_planner(folder / name, made, said)
    return folder / name


# ---------------------------------------------------------------------- orders


def test_fitted_orders_are_found_by_what_was_fitted_and_kept_with_the_specialist(tmp_path: Path) -> None:
    """Other labels, other order: neither those in the cache nor those fitted on the specialist's own labels."""
    for order in (FORWARDS, BACKWARDS):
        source = orders(tmp_path, "fitted", fitted=lambda order=order: order)
        found = source.images(source.extract(tiny_backbone(), 0))
        assert torch.equal(found.order, order.expand(20, -1))
    made = specialist(tmp_path, **source.keep(tmp_path))
    spec = own_order(made)
    assert spec is not None and str(spec) == "fitted"
    drawn, _ = chosen_orders(made, tiny_images(made), make_policy(spec, made, lambda: FORWARDS), 0)
    assert torch.equal(drawn[0], BACKWARDS)


@pytest.mark.parametrize("fitted", [[0, 0, 1], [0, 2], "012", [0.0, 1.0]])
def test_what_is_no_fitted_order_is_refused(fitted: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.safetensors: does not say which orders it was made for \(fitted must be"):
        specialist(tmp_path, fitted=fitted)


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 4
    path.write_bytes(content)


def gone(path: Path) -> None:
    shutil.rmtree(path.parents[1])


@pytest.mark.parametrize(("order", "harm"), [("diagonal", damaged), ("low_entropy", Path.unlink), ("planner", gone)])
def test_a_training_that_continues_makes_damaged_orders_again(
    order: str, harm: Any, tmp_path: Path, views: dict[str, Any]
) -> None:
    """By the weights of the start, whatever the steps since made of the backbone; those of a later round are gone."""
    name = str(planner(tmp_path, backbone=backbone_fingerprint(tiny_backbone()))) if order == "planner" else order
    source = orders(tmp_path, name, **views)

    def train(job: Job, rounds: int = 1) -> Tensor:
        backbone = OrderRobustTransformer(tiny_backbone().config)
        backbone.load_state_dict(tiny_backbone().state_dict())
        torch.manual_seed(0)
        pretrain(backbone, source.data, source.data, replace(QUICK, order=name, rounds=rounds), job=job, orders=source)
        return torch.cat([values.flatten() for values in backbone.state_dict().values()])

    def interrupted(rounds: int) -> tuple[Job, Path]:
        """Continues after the fourth of six steps; with the table that it reads."""
        place = (tmp_path / "cache", f"job-{rounds}", 0.0)
        with pytest.raises(Enough):
            train(Seen(lambda row: None, 5, *place), rounds)
        tables = (tmp_path / "cache").glob("orders/*/orders/order.memmap")
        return Job(*place), max(tables, key=lambda path: path.stat().st_mtime)

    whole = train(Job())
    shutil.rmtree(tmp_path / "cache")
    job, table = interrupted(1)
    content = table.read_bytes()
    harm(table)
    assert torch.equal(train(job), whole) and table.read_bytes() == content
    job, table = interrupted(2)
    harm(table)
    if order == "low_entropy":
        with pytest.raises(ValueError, match=rf"{table}.*; the training that learns from these orders cannot continue"):
            train(job, 2)
    else:
        train(job, 2)
        assert table.read_bytes() == content


def test_what_a_killed_extraction_left_goes_with_the_next_command(tmp_path: Path) -> None:
    """Killed between the table's move into the cache and the end of its job."""
    source = orders(tmp_path)
    where = source.extract(tiny_backbone(), 0)
    left = tmp_path / "cache" / "unfinished" / f"orders-{Path(where).name}"
    left.mkdir(parents=True)
    (left / "orders-000000000-000000020.0123456789abcdef.pt").write_bytes(b"x")
    assert source.extract(tiny_backbone(), 0) == where and not left.exists()


@pytest.mark.parametrize("seed", [549_756, 2**32 - 1])
def test_every_seed_gives_views(seed: int, tmp_path: Path, views: dict[str, Any]) -> None:
    source = orders(tmp_path, "diagonal", seed, **views)
    assert len(source.images(source.extract(tiny_backbone(), 0))) == 40


# ---------------------------------------------------------------------- its planner and its start


def test_another_planner_beside_a_specialist_is_refused(tmp_path: Path) -> None:
    found = planner(tmp_path)
    made = specialist(tmp_path, order=found.name, planner=checksum(found))
    assert own_order(made) is not None
    planner(tmp_path)
    with pytest.raises(ValueError, match=rf"{found}: is not the planner that the specialist in this folder was made"):
        own_order(made)
    assert own_order(specialist(tmp_path, order=found.name)) is not None  # one of before says nothing


def test_a_specialist_whose_start_is_gone_says_so(tmp_path: Path) -> None:
    found = planner(tmp_path, backbone="abc")
    gone = {"start": str(tmp_path / "gone.safetensors"), "start_fingerprint": "abc"}
    made = specialist(tmp_path, order=found.name, **gone)
    with pytest.raises(ValueError, match=r"specialist 'mine' of .*: its planner reads the backbone that .*gone\.safe"):
        make_policy(own_order(made) or "", made)


def test_a_start_is_found_by_its_name_whatever_lies_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text("no backbone")
    config = compose("pretrain", ["backbone=digits", "training.start=digits", "training.order=diagonal"])
    assert backbone_recipe(config, "digits")._origin(load_backbone("digits"), None).start == "digits"


def test_a_suite_trains_specialists_of_planners_in_any_folder(tmp_path: Path) -> None:
    path = str(tmp_path / "a@b = 'c', [d] {0}" / "planner.safetensors")
    suite = compose("reproduce", ["suite=orders"])
    found = [config.training.order for config in specialist_configs(suite, 0, [path, path])]
    assert {path, f"{path}@cost0.6"} < set(found)


# ---------------------------------------------------------------------- whose planner it is


def test_a_planner_of_other_data_is_refused_and_one_of_other_weights_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of equal shape, as those of digits and canvas are."""
    backbone = OrderRobustTransformer(tiny_backbone().config)
    backbone.trained_on = "canvas"
    here = backbone_fingerprint(backbone)
    for data, made, line in (
        ("canvas", here, ""),
        ("digits", here, ""),  # the very backbone, whatever its data are called
        ("canvas", "abc", f"a planner for backbone abc reads {here}"),
        ("tokens:elsewhere", "abc", None),
    ):
        found = planner(tmp_path, f"{data.partition(':')[0]}_{made}.safetensors", data=data, backbone=made)
        if line is None:
            with pytest.raises(ValueError, match=rf"{found}: a planner for a backbone of tokens:elsewhere \(abc\) can"):
                make_policy(str(found), backbone)
            continue
        for _ in range(2):
            make_policy(str(found), backbone)
        said = capsys.readouterr().out.splitlines()
        assert len(said) == bool(line) and all(line in one for one in said)
    # a set of tokens that was moved, a backbone that says nothing, a planner of before
    for own, description in (
        ("tokens:here", {"data": "tokens:there", "backbone": "abd"}),
        (None, {"data": "digits", "backbone": "abe"}),
        ("canvas", {"data": "digits"}),
    ):
        backbone.trained_on = own
        require_made_for("p.safetensors", description, backbone)


@pytest.mark.parametrize("taken", ["file", "pretrained", "policy", "start", "teacher", "orders"])
def test_a_planner_of_other_data_is_refused_wherever_one_is_taken(taken: str, tmp_path: Path) -> None:
    """Digits and canvas have the same shape."""
    backbone, path = load_backbone("digits"), WEIGHTS / "canvas_planner.safetensors"
    setup = Setup(
        backbone=backbone, backbone_name="digits", backbone_path=None, data="digits",
        planner=PlannerConfig.for_backbone(backbone), cache_dir=tmp_path,
    )  # fmt: skip
    ways = {
        "file": lambda: load_planner(path, backbone),
        "pretrained": lambda: OrderHead.from_pretrained(path, backbone),
        "policy": lambda: make_policy(str(path), backbone),
        "start": lambda: find_or_train(setup, "ppo", PPOConfig(start=str(path))),
        "teacher": lambda: teacher_ranks(setup, str(path), 4),
        "orders": lambda: ImageOrders(str(path), backbone, load_split("digits", "backbone"), tmp_path, 0),
    }
    with pytest.raises(ValueError, match=rf"{path}: a planner for a backbone of canvas \(\w+\) cannot read one of dig"):
        ways[taken]()


def test_what_a_planner_does_is_in_the_key_of_what_learns_from_it(tmp_path: Path) -> None:
    """A teacher by the content of its file, its prefix, cost, mode and schedule; one of a user by its module."""
    (tmp_path / "elsewhere").mkdir()
    path = planner(tmp_path)
    copied = shutil.copyfile(path, tmp_path / "elsewhere" / "copy.safetensors")
    backbone = tiny_backbone(8, 8, 2, 17, 10)
    setup = Setup(
        backbone=backbone, backbone_name="x", backbone_path=None, data="digits",
        planner=PlannerConfig.for_backbone(backbone),
    )  # fmt: skip

    def key(teacher: object) -> str:
        config = Config(target="ranks", teacher=str(teacher))
        return fingerprint(describe(setup, "bc", find_agent("bc"), config))

    ways = [str(path), f"{path}@4", f"{path}@fast", f"spaced_{path}@4", f"{path}@cost0.5", "raster", "raster@4"]
    assert len({key(way) for way in ways}) == len(ways) and key(path) == key(copied)


def test_shipped_backbones_say_what_they_were_trained_on() -> None:
    names = {"digits": "digits", "canvas": "canvas", "digits_raster": "digits", "digits_mar": "digits_patches"}
    assert {name: getattr(load_backbone(name), "trained_on", None) for name in names} == names
