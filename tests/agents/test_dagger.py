"""DAgger: contexts of a planner's own trajectories, the union of labels, and rounds that are found again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor

from orderrl import compose
from orderrl import labels as labelling
from orderrl.agents import bc
from orderrl.agents.bc import Config as BCConfig
from orderrl.agents.dagger import own_contexts
from orderrl.agents.policies import PlannerPolicy, Policy
from orderrl.backbones import load_backbone, save_backbone
from orderrl.data import load_split
from orderrl.labels import join
from orderrl.oracle import Contexts
from orderrl.planner import load_planner
from tests.agents.helpers import tiny_core, tiny_labels, tiny_planner
from tests.helpers import tiny_backbone
from tests.jobs import trained

BLOCKS = 9
IMAGES = torch.tensor([1, 4, 5, 8, 11])


def contexts(policy: Policy | None = None, count: int = 30, **changes: Any) -> Contexts:
    """Contexts of a deterministic planner on five of twelve images, seven episodes at a time."""
    settings: dict[str, Any] = {"own_share": 1.0, "seed": 3, "first": 100} | changes
    return own_contexts(policy or PlannerPolicy(tiny_planner()), tiny_core(num_envs=7), IMAGES, count, **settings)


def played(policy: Policy, found: Contexts) -> Tensor:
    """The whole order of a policy on the image of every context, played one image at a time."""
    orders = {}
    for image in set(found.image.tolist()):
        core = tiny_core(num_envs=1)
        core.reset(index=image)
        for _ in range(BLOCKS):
            core.step(policy(core.observation(), torch.Generator()))
        orders[image] = core.reveal_step[0].argsort()
    return torch.stack([orders[image] for image in found.image.tolist()])


# ---------------------------------------------------------------------- contexts


def test_contexts_are_prefixes_that_the_planner_plays() -> None:
    policy = PlannerPolicy(tiny_planner())
    found = contexts(policy)
    orders = played(policy, found)
    assert len(found.length.unique()) > 4 and len(orders.unique(dim=0)) > 1, "prefixes that tell something"
    for order, mine, length in zip(orders, found.order, found.length.tolist(), strict=True):
        assert torch.equal(mine[:length], order[:length])
    assert torch.equal(found.order.sort(1).values, torch.arange(BLOCKS).expand(30, -1))


def test_contexts_are_sorted_numbered_and_drawn_from_the_seed() -> None:
    found = contexts()
    assert (found.length.diff() >= 0).all()
    assert torch.equal(found.number, 100 + torch.arange(30))
    assert all(torch.equal(one, other) for one, other in zip(found, contexts(), strict=True))
    assert not torch.equal(found.length, contexts(seed=4).length)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_contexts_do_not_depend_on_how_many_are_played_at_once(share: float) -> None:
    def lowest(observation: TensorDict, generator: torch.Generator) -> Tensor:
        return observation["action_mask"].long().argmax(-1)

    one, other = (own_contexts(lowest, tiny_core(num_envs=n), IMAGES, 30, share, 0, 0) for n in (7, 30))
    shown = torch.arange(BLOCKS) < one.length[:, None]
    assert torch.equal(one.length, other.length) and torch.equal(one.order[shown], other.order[shown])


def test_images_take_turns_and_no_other_is_played() -> None:
    counts = Counter(contexts(count=32).image.tolist())
    assert set(counts) == set(IMAGES.tolist()) and set(counts.values()) == {6, 7}


def test_lengths_are_uniform() -> None:
    def lowest(observation: TensorDict, generator: torch.Generator) -> Tensor:
        return observation["action_mask"].long().argmax(-1)

    core = tiny_core(num_envs=200)
    found = own_contexts(lowest, core, IMAGES, 800, 1.0, 0, 0)
    count = torch.bincount(found.length, minlength=BLOCKS)
    assert count[BLOCKS - 1] == 0, "with one hidden block there is no choice"
    expected = 800 / (BLOCKS - 1)
    assert ((count[: BLOCKS - 1] - expected).abs() < 4.5 * expected**0.5).all()
    by_image = torch.stack([found.length[found.image == image].float().mean() for image in IMAGES])
    assert (by_image - (BLOCKS - 2) / 2).abs().max() < 0.8, "whatever the image"


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_rest_of_the_actions_is_random(share: float) -> None:
    def lowest(observation: TensorDict, generator: torch.Generator) -> Tensor:
        return observation["action_mask"].long().argmax(-1)

    found = own_contexts(lowest, tiny_core(num_envs=100), IMAGES, 400, share, 0, 0)
    first = found.order[found.length > 0, 0]
    own = (first == 0).float().mean().item()
    assert own == pytest.approx(share + (1 - share) / BLOCKS, abs=0.1)
    assert len(first.unique()) == BLOCKS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dagger_rounds": -1}, "dagger_rounds must be at least 0, got -1"),
        ({"dagger_contexts": 0}, "dagger_contexts must be at least 1, got 0"),
        ({"dagger_steps": 0}, "dagger_steps must be at least 1, got 0"),
        ({"dagger_own_share": 1.5}, r"dagger_own_share must lie in \[0, 1\], got 1.5"),
    ],
)
def test_bad_configs_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BCConfig(**change)


# ---------------------------------------------------------------------- the union


def test_joined_labels_are_the_sets_one_behind_the_other(tmp_path: Path) -> None:
    parts = [tiny_labels(images=count, each=3, seed=count) for count in (4, 7)]
    for number, part in enumerate(parts):
        part.memmap(str(tmp_path / str(number)))
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined" / "half").write_text("from an interruption")
    join([tmp_path / "0", tmp_path / "1"], tmp_path / "joined")
    joined = TensorDict.load_memmap(str(tmp_path / "joined"))
    assert len(joined) == 33 and set(joined.keys()) == set(parts[0].keys())
    for key in joined.keys():  # noqa: SIM118 - not a mapping
        assert torch.equal(joined[key], torch.cat([part[key] for part in parts])), key
    assert not (tmp_path / "joined" / "half").exists()


# ---------------------------------------------------------------------- rounds

SMALL = [
    *("labels.contexts=48", "labels.shard_size=16", "labels.batch_size=16", "planner.dim=16", "planner.stem=1"),
    *("agent=bc", "agent.steps=6", "agent.evaluate_every=3", "agent.batch_size=16", "agent.held_out=0.2"),
    *("agent.dagger_contexts=24", "agent.dagger_steps=4", "checkpoint_seconds=0"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dagger")
    save_backbone(folder / "tiny.safetensors", tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    return folder


def configure(home: Path, cache: str, *overrides: str) -> DictConfig:
    places = ["backbone=digits", f"backbone.name={home / 'tiny.safetensors'}", f"cache_dir={home / cache}"]
    return compose("train", [*SMALL, *places, *overrides])


def clone(config: DictConfig) -> Path:
    return trained(config)


def described(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint.parent / "key.json").read_text())["description"]


@pytest.fixture(scope="module")
def two_rounds(home: Path) -> tuple[Path, list[dict[str, set[int]]]]:
    """The planner of two rounds, and for each of the three clones the images learnt from and kept back."""
    seen: list[dict[str, set[int]]] = []
    original = bc.split_images

    def spy(image: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        train, kept = original(image, share, generator)
        seen.append({"train": set(image[train].tolist()), "kept": set(image[kept].tolist())})
        return train, kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bc, "split_images", spy)
        return clone(configure(home, "whole", "agent.dagger_rounds=2")), seen


def test_no_rounds_give_the_key_and_the_planner_of_plain_cloning(home: Path) -> None:
    path = clone(configure(home, "plain"))
    assert not [key for key in described(path)["agent"] if key.startswith("dagger")]
    assert "own_labels" not in described(path)
    assert clone(configure(home, "plain", "agent.dagger_contexts=7", "agent.dagger_steps=9")) == path
    assert len(list((home / "plain" / "planners").iterdir())) == 1


def test_every_round_adds_labels_of_the_last_planner(
    home: Path, two_rounds: tuple[Path, list[dict[str, set[int]]]]
) -> None:
    """Each is labelled on the planner's own states, and every planner is kept under the key of its number of rounds."""
    path, _ = two_rounds
    description = described(path)
    sets = [home / "whole" / "labels" / name for name in (description["labels"], *description["own_labels"])]
    opened = [TensorDict.load_memmap(str(found / "contexts")) for found in sets]
    assert [len(labels) for labels in opened] == [48, 24, 24]
    numbers = [json.loads((found / "key.json").read_text())["description"]["own"]["round"] for found in sets[1:]]
    assert numbers == [1, 2] and len(set(sets)) == 3
    data = load_split("digits", "planner")
    for labels in opened:
        assert torch.equal(data.labels[labels["image"]], labels["label"])
    before = load_planner(clone(configure(home, "whole")))[0]  # of the first round: plain cloning's
    core = tiny_core(num_envs=24, backbone=load_backbone(str(home / "tiny.safetensors")), data=data)  # type: ignore[arg-type]
    core.reset(index=opened[1]["image"])
    policy, generator = PlannerPolicy(before), torch.Generator()
    for step in range(int(opened[1]["length"].max())):
        action = policy(core.observation(), generator)
        reached = opened[1]["length"] > step
        assert torch.equal(action[reached], opened[1]["order"][reached, step])
        core.step(action)
    assert clone(configure(home, "whole", "agent.dagger_rounds=1")).parent.name != path.parent.name
    assert len(list((home / "whole" / "planners").iterdir())) == 3, "the first round's planner was there already"
    assert clone(configure(home, "whole", "agent.dagger_rounds=2")) == path


def test_kept_back_images_stay_the_same_and_are_never_learnt_from(
    two_rounds: tuple[Path, list[dict[str, set[int]]]],
) -> None:
    _, seen = two_rounds
    assert len(seen) == 3
    for split in seen:
        assert split["kept"] == seen[0]["kept"] and split["train"] == seen[0]["train"]
        assert not split["kept"] & split["train"] and split["kept"]


@pytest.mark.parametrize("moment", ["labelling", "training"])
def test_an_interrupted_round_ends_with_the_same_planner(
    home: Path, two_rounds: tuple[Path, list[dict[str, set[int]]]], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second round; what was made before is found again and not made twice."""
    whole, _ = two_rounds
    calls: Counter[str] = Counter()
    stop_at = {"labelling": ("label_part", 6), "training": ("bc_loss", 6 + 4 + 2)}[moment]
    parts = ((labelling, "label_part"), (bc, "bc_loss"))

    def watch(module: Any, name: str, stopping: bool) -> None:
        original = getattr(module, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            if stopping and stop_at == (name, calls[name]):
                raise KeyboardInterrupt
            return original(*arguments, **named)

        monkeypatch.setattr(module, name, watched)

    config = configure(home, f"cut-{moment}", "agent.dagger_rounds=2")
    for module, name in parts:
        watch(module, name, stopping=True)
    with pytest.raises(KeyboardInterrupt):
        clone(config)
    monkeypatch.undo()
    first, calls = calls, Counter()
    for module, name in parts:
        watch(module, name, stopping=False)
    resumed = clone(config)
    shards = 3 + 2 + 2  # of 48, 24 and 24 contexts by at least 16
    assert first["label_part"] + calls["label_part"] - (moment == "labelling") == shards
    assert calls["bc_loss"] == {"labelling": 4, "training": 3}[moment], "steps of the second round that were left"
    one, other = load_planner(whole)[0].state_dict(), load_planner(resumed)[0].state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not list((home / f"cut-{moment}" / "unfinished").iterdir())
