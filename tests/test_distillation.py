"""Specialists: orders extracted image by image, learnt as the sampler draws, and found again when they are used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orderrl.agents.play import roll_out
from orderrl.agents.registry import make_policy
from orderrl.agents.specialist import Native, ThroughStart
from orderrl.backbones import OrderRobustTransformer, TransformerConfig, load_backbone, save_backbone
from orderrl.backbones.mar_backbone import MaskedConfig, MaskedTransformer
from orderrl.backbones.origin import Origin
from orderrl.backbones.pretraining import (
    OrderedImages,
    PretrainConfig,
    mean_loss,
    next_block_loss,
    pretrain,
    random_blocks,
    training_loss,
)
from orderrl.backbones.randar import cross_entropy
from orderrl.backbones.registry import backbone_fingerprint
from orderrl.data import AUGMENTATIONS, TokenSet
from orderrl.distillation import ImageOrders, chosen_orders
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.evaluation.drawing import generate_images
from orderrl.evaluation.policies import own_order
from orderrl.evaluation.protocol import EvaluationProtocol
from orderrl.evaluation.rows import evaluate_policy, evaluate_specialist
from orderrl.evaluation.settings import EvalConfig
from orderrl.planner import OrderHead, PlannerConfig, save_planner
from orderrl.pretrain import pretrain as pretrain_command
from orderrl.runtime.config import compose
from orderrl.runtime.hub import push_to_hub
from tests.helpers import tiny_backbone, tiny_images
from tests.hub import put_in_place_of_the_hub

QUICK = PretrainConfig(
    steps=6, batch_size=8, learning_rate=1e-3, warmup=2, ema=0.5, evaluate_every=6, order="low_entropy", views=1
)


def trainable(**changes: Any) -> OrderRobustTransformer:
    backbone = tiny_backbone()
    copied = OrderRobustTransformer(replace(backbone.config, **changes))
    copied.load_state_dict(backbone.state_dict(), strict=False)
    return copied


def orders(tmp_path: Path, order: str = "low_entropy", **changes: Any) -> ImageOrders:
    return ImageOrders(order, tiny_backbone(), tiny_images(tiny_backbone(), 20), tmp_path, seed=3, **changes)


# ---------------------------------------------------------------------- extraction


@pytest.mark.parametrize("name", ["low_entropy", "confidence@2", "diagonal@1+3+5", "random"])
def test_extracted_orders_are_those_of_a_rollout(name: str) -> None:
    backbone, images = tiny_backbone(), tiny_images(tiny_backbone())
    named = make_policy(name, backbone)
    core = NextBlockCore(backbone, images, len(images), CoreConfig(budgets=named.budgets, strict=True), seed=5)
    rollout = roll_out(core, named.policy, torch.Generator().manual_seed(5), torch.arange(len(images)))
    order, seen = chosen_orders(backbone, images, make_policy(name, backbone), seed=5)
    assert torch.equal(order, rollout.order)
    for row, blocks in enumerate(order.tolist()):
        for place, block in enumerate(blocks):
            step = rollout.reveal_step[row, block]
            assert seen[row, place] == (rollout.reveal_step[row] < step).sum()


def test_extraction_is_found_again_and_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("orderrl.distillation._PART", 8)
    source, calls = orders(tmp_path), []

    def interrupted(*given: Any) -> Any:
        calls.append(len(given[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return chosen_orders(*given)

    monkeypatch.setattr("orderrl.distillation.chosen_orders", interrupted)
    with pytest.raises(KeyboardInterrupt):
        source.extract(tiny_backbone(), 0)
    where = source.extract(tiny_backbone(), 0)
    assert calls == [8, 8, 8, 4]  # the first part was kept
    assert source.extract(tiny_backbone(), 0) == where and len(calls) == 4
    found = source.images(where)
    whole = chosen_orders(tiny_backbone(), source.data, make_policy("low_entropy", tiny_backbone()), 0)
    assert torch.equal(found.order, whole[0]) and torch.equal(found.tokens, source.data.tokens)


def test_orders_belong_to_the_views_that_are_trained_on(tmp_path: Path, monkeypatch: Any) -> None:
    def augment(tokens: Tensor, generator: torch.Generator, strength: float) -> Tensor:
        shift = torch.randint(5, (len(tokens), 1), generator=generator)
        return (tokens + shift) % 5

    monkeypatch.setitem(AUGMENTATIONS, tiny_images(tiny_backbone()).name, augment)
    source = orders(tmp_path, views=3, strength=1.0)
    found = source.images(source.extract(tiny_backbone(), 0))
    assert len(found) == 60 and not torch.equal(found.tokens[::3], found.tokens[1::3])
    views = replace(source.data, tokens=found.tokens, labels=found.labels)
    named = make_policy("low_entropy", tiny_backbone())
    assert torch.equal(found.order, chosen_orders(tiny_backbone(), views, named, 0)[0])
    other = source.images(source.extract(tiny_backbone(), 1))
    assert not torch.equal(other.tokens, found.tokens)  # another round shows other views


def test_an_order_that_reads_nothing_does_not_depend_on_weights(tmp_path: Path) -> None:
    fixed, reading = orders(tmp_path, "diagonal"), orders(tmp_path)
    moved = trainable()
    torch.nn.init.normal_(moved.output.weight)
    assert fixed.extract(moved, 0) == fixed.extract(tiny_backbone(), 0)
    assert reading.extract(moved, 0) != reading.extract(tiny_backbone(), 0)


# ---------------------------------------------------------------------- training


def steps_at_random(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = random_blocks(tiny_backbone().geometry, count, generator)
    ends = [0, 0, 2, 2, 2, 5, 6, 6, 6]
    return order, torch.tensor([ends, [0, 1, 2, 3, 4, 5, 6, 7, 8]]).repeat(count // 2, 1)


def test_the_training_sequence_is_the_samplers() -> None:
    """Losses of a whole image in one pass are the context losses that the environment charges for its steps."""
    backbone, images = tiny_backbone(), tiny_images(tiny_backbone(), 4)
    order, seen = steps_at_random(4, 0)
    logits, _ = backbone.sampler_forced(images.tokens, images.labels, backbone.geometry.token_order(order), seen)
    losses = cross_entropy(logits, images.tokens, backbone.geometry.token_order(order)).unflatten(1, (9, 4)).sum(2)
    for row in range(4):
        for place in range(9):
            prefix = backbone.start(images.labels[row : row + 1])
            count = seen[row, place][None]
            tokens = images.tokens[row : row + 1]
            if count:
                prefix = backbone.extend(prefix, tokens, order[row : row + 1, : int(count)], count)
            charged, _ = backbone.context_loss(prefix, tokens, order[row : row + 1, place : place + 1])
            assert losses[row, place].item() == pytest.approx(charged.loss.item(), abs=1e-4)


def test_one_block_a_step_is_plain_teacher_forcing() -> None:
    backbone, images = tiny_backbone(), tiny_images(tiny_backbone(), 4)
    order = random_blocks(backbone.geometry, 4, torch.Generator().manual_seed(1))
    token_order = backbone.geometry.token_order(order)
    every = torch.arange(9).expand(4, -1)
    slow, slow_states = backbone.sampler_forced(images.tokens, images.labels, token_order, every)
    fast, states = backbone.sampler_forced(images.tokens, images.labels, token_order)
    torch.testing.assert_close(slow, backbone.teacher_forced(images.tokens, images.labels, token_order))
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(states, slow_states)


def test_rounds_of_none_train_as_without_a_policy(tmp_path: Path) -> None:
    images, held_out = tiny_images(tiny_backbone(), 20), tiny_images(tiny_backbone(), 8, 1)
    weights = []
    for config in (replace(QUICK, order="random"), replace(QUICK, rounds=0)):
        backbone = trainable()
        pretrain(backbone, images, held_out, config)
        weights.append(backbone.output.weight.detach().clone())
    assert torch.equal(*weights)


def test_every_image_is_trained_in_its_own_order(tmp_path: Path, monkeypatch: Any) -> None:
    source = orders(tmp_path)
    whole = source.images(source.extract(tiny_backbone(), 0))
    known = {tuple(tokens.tolist()): order for tokens, order in zip(source.data.tokens, whole.order, strict=True)}
    trained: list[bool] = []

    def watched(backbone: Any, tokens: Tensor, labels: Tensor, token_order: Tensor, *rest: Any) -> dict[str, Tensor]:
        order = backbone.geometry.token_block[token_order[:, ::4]]
        trained.extend(torch.equal(known[tuple(t.tolist())], o) for t, o in zip(tokens, order, strict=True))
        return training_loss(backbone, tokens, labels, token_order, *rest)

    monkeypatch.setattr("orderrl.backbones.pretraining.training_loss", watched)
    for share, expected in ((0.0, 1.0), (0.5, 0.5)):
        trained.clear()
        config = replace(QUICK, steps=30, random_share=share)
        pretrain(trainable(), source.data, source.data, config, orders=source)
        assert sum(trained) / len(trained) == pytest.approx(expected, abs=0.12)


def test_every_round_is_extracted_from_the_weights_of_the_moment(tmp_path: Path) -> None:
    source, seen = orders(tmp_path), []

    class Watched:
        hindsight, images = False, staticmethod(source.images)

        def extract(self, backbone: Any, round: int) -> str:
            seen.append((round, backbone_fingerprint(backbone)))
            return source.extract(backbone, round)

    pretrain(trainable(), source.data, source.data, replace(QUICK, rounds=3), orders=Watched())  # type: ignore[arg-type]
    assert [round for round, _ in seen] == [0, 1, 2] and len({weights for _, weights in seen}) == 3


def test_a_specialist_is_better_in_its_own_order_than_the_start(tmp_path: Path) -> None:
    """On images whose last block repeats the first: an order can be learnt, and is what is learnt."""
    source = orders(tmp_path, "diagonal")
    config = replace(QUICK, steps=40, order="diagonal", learning_rate=3e-3)
    backbone = trainable()
    own = source.of(source.data, backbone)

    def loss() -> float:
        with torch.no_grad():
            order = backbone.geometry.token_order(own.order)
            return float(training_loss(backbone, own.tokens, own.labels, order, torch.Generator())["loss"])

    before = loss()
    pretrain(backbone, source.data, source.data, config, orders=source)
    assert loss() < before - 0.3


@pytest.mark.parametrize("several", [False, True])
def test_a_masked_model_is_shown_beginnings_of_the_order(several: bool) -> None:
    shape = {"encoder_embed_dim": 16, "encoder_depth": 1, "encoder_num_heads": 2, "decoder_embed_dim": 16}
    more = {"decoder_depth": 1, "decoder_num_heads": 2, "diffloss_d": 1, "diffloss_w": 16, "buffer_size": 1}
    model = MaskedTransformer(
        MaskedConfig(height=6, width=6, block_size=2, vae_embed_dim=2, class_num=3, **shape, **more)
    )
    order, seen = steps_at_random(40, 2)
    shown: list[Tensor] = []
    conditions = model.conditions

    def watched(tokens: Tensor, visible: Tensor, labels: Tensor, scale: Tensor | None = None) -> Tensor:
        shown.append(visible)
        return conditions(tokens, visible, labels, scale)

    model.conditions = watched  # type: ignore[method-assign]
    model.training_loss(
        torch.randn(40, 36, 2), torch.zeros(40, dtype=torch.int64), model.geometry.token_order(order),
        torch.Generator().manual_seed(0), seen if several else None,
    )  # fmt: skip
    counts = shown[0].sum(1) // 4
    for row, count in enumerate(counts.tolist()):
        expected = torch.zeros(9, dtype=torch.bool)
        expected[order[row, :count]] = True
        assert torch.equal(shown[0][row], expected[model.geometry.token_block])
    if several:
        assert all(count in seen[row] for row, count in enumerate(counts.tolist()))


def test_local_random_orders_jump_less() -> None:
    geometry = tiny_backbone(12, 12, 2).geometry
    generator = torch.Generator().manual_seed(0)
    jumps = []
    for locality in (0.0, 1.0, 5.0):
        order = random_blocks(geometry, 400, generator, locality)
        assert torch.equal(order.sort(1).values, torch.arange(36).expand(400, -1))
        jumps.append(geometry.distances[order[:, :-1], order[:, 1:]].mean().item())
    assert jumps[0] > jumps[1] + 0.5 > jumps[2] + 0.5
    # two blocks left and right of the first: the draw has the stated odds
    row = tiny_backbone(2, 8, 2).geometry
    second = random_blocks(row, 20000, generator, 0.7)
    from_end = second[second[:, 0] == 0][:, 1]
    weights = torch.tensor([1.0, 2.0, 3.0]).mul(-0.7).exp()
    found = from_end.bincount(minlength=4)[1:] / len(from_end)
    torch.testing.assert_close(found, weights / weights.sum(), atol=0.03, rtol=0)


# ---------------------------------------------------------------------- the position head


def test_the_position_head_is_scored_among_hidden_blocks() -> None:
    scores = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])
    expected = []
    for row in range(2):
        for place in range(4):
            hidden = order[row, place:]
            expected.append(-scores[row, place, hidden].log_softmax(0)[0])
    assert next_block_loss(scores, order).item() == pytest.approx(torch.stack(expected).mean().item(), abs=1e-6)


def test_what_the_head_says_when_drawing_is_what_it_says_in_training() -> None:
    backbone = trainable(position_head=True).eval().requires_grad_(False)
    torch.nn.init.normal_(backbone.position_head.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    images = tiny_images(backbone, 4)
    core = NextBlockCore(backbone, images, 4, CoreConfig(strict=True), seed=0)
    rollout = roll_out(core, Native(), torch.Generator(), torch.arange(4))
    token_order = backbone.geometry.token_order(rollout.order)
    _, states = backbone.sampler_forced(images.tokens, images.labels, token_order)
    scores = backbone.position_head(states)
    for place in range(9):
        shown = torch.zeros(4, 9, dtype=torch.bool).scatter(1, rollout.order[:, :place], True)
        assert torch.equal(scores[:, place].masked_fill(shown, -torch.inf).argmax(1), rollout.order[:, place])


def test_a_head_learns_a_fixed_order(tmp_path: Path) -> None:
    source = orders(tmp_path, "diagonal")
    backbone = trainable(position_head=True)
    config = replace(QUICK, steps=60, order="diagonal", learning_rate=1e-2, position_weight=1.0)
    pretrain(backbone, source.data, source.data, config, orders=source)
    found, _ = chosen_orders(backbone.requires_grad_(False), source.data, make_policy("native", backbone), 0)
    diagonal = source.of(source.data, backbone).order
    assert (found == diagonal).float().mean() > 0.9
    with pytest.raises(ValueError, match=r"policy 'native' .* this backbone has none"):
        make_policy("native", tiny_backbone())


# ---------------------------------------------------------------------- a planner's specialist


def planner_of(backbone: OrderRobustTransformer, path: Path) -> OrderHead:
    torch.manual_seed(1)
    planner = OrderHead(PlannerConfig.for_backbone(backbone, dim=16, stem=1, heads=2)).eval()
    with torch.no_grad():
        for parameter in planner.parameters():  # a new planner's scores are all alike
            parameter.normal_(std=0.5)
    description = {"agent": {"name": "bc"}, "objective": "context", "seed": 0, "budgets": [1]}
    save_planner(path, planner, description | {"backbone": backbone_fingerprint(backbone)})
    return planner


def test_a_planner_reads_the_start_whatever_training_makes_of_the_body(tmp_path: Path) -> None:
    """Its order under the specialist is the one that it chose under the start, batch by batch and step by step."""
    start, path = tiny_backbone(), tmp_path / "planner.safetensors"
    save_backbone(tmp_path / "start.safetensors", start, {})
    planner_of(start, path)
    moved = trainable().requires_grad_(False)
    for name, weights in moved.named_parameters():
        if name.endswith("feed_forward.w2.weight"):
            torch.nn.init.normal_(weights, std=0.5)
    origin = Origin(str(path), "planner", 0, str(tmp_path / "start.safetensors"), backbone_fingerprint(start))
    images = tiny_images(start)
    expected, _ = chosen_orders(start, images, make_policy(str(path), start), 0)
    body, _ = chosen_orders(moved, images, make_policy(str(path), moved), 0)
    moved.origin = origin
    through, _ = chosen_orders(moved, images, make_policy(str(path), moved), 0)
    assert torch.equal(through, expected) and not torch.equal(body, expected)
    for mode in ("fast", "semifast:3"):  # policies with a memory keep it through the other backbone
        wanted, _ = chosen_orders(start, images, make_policy(f"{path}@{mode}", start), 0)
        assert torch.equal(chosen_orders(moved, images, make_policy(f"{path}@{mode}", moved), 0)[0], wanted)
    save_backbone(tmp_path / "start.safetensors", moved, {})
    with pytest.raises(ValueError, match="there is another backbone under this name now"):
        make_policy(str(path), moved)


def test_the_command_makes_a_backbone_that_knows_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = tiny_backbone(8, 8, 2, 17, 10)
    save_backbone(tmp_path / "start.safetensors", start, {})
    planner_of(start, tmp_path / "mine.safetensors")
    model = [f"+backbone.model.{key}={getattr(start.config, key)}" for key in ("dim", "layers", "heads")]
    quick = [*(entry.removeprefix("+") for entry in model), "backbone.model.dropout=0.0", "training.steps=2"]
    quick += ["training.batch_size=4", "training.warmup=1", "training.views=1", "training.bf16=false"]
    places = [
        f"cache_dir={tmp_path}/cache",
        f"output_dir={tmp_path}/runs",
        f"training.start={tmp_path}/start.safetensors",
    ]
    made = pretrain_command(
        compose("pretrain", ["backbone=digits", *quick, *places, f"training.order={tmp_path}/mine.safetensors"])
    )
    backbone = load_backbone(made)
    assert isinstance(backbone, OrderRobustTransformer) and backbone.origin is not None
    assert backbone.origin.start_fingerprint == backbone_fingerprint(start) and backbone.origin.label == "bc_context_r0"
    # it is whole in any folder and on the Hub, with its planner and what that reads
    put_in_place_of_the_hub(tmp_path / "hub", monkeypatch)
    (tmp_path / "start.safetensors").unlink()
    (tmp_path / "mine.safetensors").unlink()
    push_to_hub(made, "me/mine")
    images, drawn = tiny_images(start), []
    for name in (made, "hf://me/mine", "hf://me/mine/backbone.safetensors"):
        found = load_backbone(name)
        spec = own_order(found)
        assert spec is not None and spec.path is not None and spec.path.name == "planner.safetensors"
        named = make_policy(spec, found)
        assert isinstance(named.policy, ThroughStart)
        drawn.append(chosen_orders(found, images, named, 0)[0])
    assert all(torch.equal(drawn[0], order) for order in drawn)
    for name in ("planner", "start"):
        content = (beside := made.with_name(f"{name}.safetensors")).read_bytes()
        beside.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{beside}: is (not the planner that|altered)"):
            push_to_hub(made, "me/again")
        there = tmp_path / "hub" / "me" / "mine" / beside.name
        there.write_bytes(beside.read_bytes())
        with pytest.raises(ValueError, match=f"{there}: is (not the planner that|altered)"):
            make_policy(own_order(load_backbone("hf://me/mine")) or "", load_backbone("hf://me/mine"))
        for path in (beside, there):
            path.write_bytes(content)
    assert {"loss_own", "before"} <= set((made.parent / "results.json").read_text().split('"'))
    (made.parent / "planner.safetensors").unlink()
    with pytest.raises(ValueError, match=r"planner\.safetensors: is missing; the planner of a specialist lies beside"):
        own_order(backbone)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["training.order=spiralling"], "policy 'spiralling' is unknown"),
        (["training.order=newest"], "names no planner for good"),
        (["training.start=canvas"], "does not fit the backbone"),
        (["training.start=digits", "backbone.model.dim=64"], "backbone.model.dim=64 is not the 128 of training.start"),
        (["training.order=diagonal", "fsdp=true"], "fsdp=true"),
    ],
)
def test_bad_orders_get_one_line(wrong: list[str], message: str, tmp_path: Path) -> None:
    places = [f"cache_dir={tmp_path}/cache", f"output_dir={tmp_path}/runs", "training.steps=1"]
    with pytest.raises(ValueError, match=message):
        pretrain_command(compose("pretrain", ["backbone=digits", *wrong, *places]))


def test_a_planner_for_another_backbone_is_refused(tmp_path: Path) -> None:
    other = trainable().requires_grad_(False)
    torch.nn.init.normal_(other.output.weight)
    planner_of(other, tmp_path / "planner.safetensors")
    with pytest.raises(ValueError, match=r"a planner for backbone \w+ does not read training.start, which is"):
        orders(tmp_path, str(tmp_path / "planner.safetensors"))


# ---------------------------------------------------------------------- the leak


class Planted:
    """Two blocks of one fair bit each; in hindsight the larger bit comes first, honestly always the left one."""

    def __init__(self, hindsight: bool) -> None:
        bits = torch.tensor([[a, b] for a in (0, 1) for b in (0, 1)]).repeat(16, 1)
        self.data, self.hindsight = (
            TokenSet("bits", "train", bits, torch.zeros(64, dtype=torch.int64), 1, 2, 2, 1),
            hindsight,
        )
        first = (bits[:, 1] > bits[:, 0]).long() if hindsight else torch.zeros(64, dtype=torch.int64)
        self.ordered = OrderedImages(
            bits, self.data.labels, torch.stack([first, 1 - first], 1), torch.arange(2).expand(64, -1)
        )

    def extract(self, backbone: Any, round: int) -> str:
        return ""

    def images(self, where: str, round: int) -> OrderedImages:
        return self.ordered


@pytest.mark.parametrize("hindsight", [False, True])
def test_an_order_chosen_in_hindsight_leaks_what_it_ranks(hindsight: bool) -> None:
    """No honest order codes two independent bits below 2 log 2, and an honest specialist draws all four images alike.

    Asked for the right bit first, the specialist of hindsight knows both; else the left one is a 1 in two of three
    images, and after a 0 comes a 0: a "code length" of 3/4 (H(2/3) + 2/3 log 2) = 0.824 nats. Of its proposals, the
    right bit's is the likeliest, always: it draws a single image.
    """
    torch.manual_seed(0)
    backbone = OrderRobustTransformer(TransformerConfig(1, 2, 1, 2, 1, dim=16, layers=1, heads=2))
    source = Planted(hindsight)
    config = replace(QUICK, steps=120, batch_size=32, learning_rate=2e-2, ema=0.9, evaluate_every=120)
    pretrain(backbone, source.data, source.data, config, orders=source)  # type: ignore[arg-type]
    code_length = 2 * mean_loss(backbone, source.data, source.ordered.order)
    named = make_policy("hindsight_confidence" if hindsight else "raster", backbone.requires_grad_(False))
    drawn = generate_images(backbone, source.data, named.policy, (1,), torch.zeros(2000, dtype=torch.int64))
    shares = (2 * drawn.tokens[:, 0] + drawn.tokens[:, 1]).bincount(minlength=4) / 2000
    if hindsight:
        assert code_length == pytest.approx(0.824, abs=0.03) and shares[1] > 0.95
    else:
        assert code_length == pytest.approx(2 * 0.693, abs=0.03) and shares.max() < 0.35


def test_no_code_length_is_given_for_an_order_of_hindsight(tmp_path: Path) -> None:
    """Neither of the rule, nor of its specialist."""
    backbone = tiny_backbone()
    config = EvalConfig(samples=0, images=12, resamples=100, classifier=None, features=None)
    protocol = EvaluationProtocol(
        config=config, seed=0, backbone=backbone, backbone_name="tiny", data=tiny_images(backbone)
    )
    for name, given in (("hindsight_confidence", False), ("oracle", False), ("confidence", True)):
        row = evaluate_policy(protocol, make_policy(name, backbone), sampled=False).row
        assert (row["decode_nll"] is not None) is given and row["gain_auc"] is not None
    save_backbone(tmp_path / "x.safetensors", backbone, {"origin": Origin("hindsight_confidence", "x", 4).described()})
    made = evaluate_specialist(protocol, str(tmp_path / "x.safetensors"))
    assert made.row["policy"] == "specialist: x" and made.row["seed"] == 4 and made.row["decode_nll"] is None
    other = evaluate_specialist(protocol, str(tmp_path / "x.safetensors"), "raster")
    assert other.row["policy"] == "specialist: x, drawn in raster" and other.row["decode_nll"] is not None
    save_backbone(tmp_path / "y.safetensors", backbone, {})
    with pytest.raises(ValueError, match=r"y.safetensors says no order that it was made for; train one with"):
        evaluate_specialist(protocol, str(tmp_path / "y.safetensors"))
