"""The backbone against full recomputation, against published numbers, and its own check against sabotage."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from orderrl.backbones import (
    Backbone,
    BlockLosses,
    Drawing,
    OrderRobustTransformer,
    Sampling,
    TransformerConfig,
    check_backbone,
    load_backbone,
)
from orderrl.backbones.check import naive_block_losses
from orderrl.backbones.layers import rope_table
from orderrl.backbones.randar import cross_entropy
from orderrl.data import load_split
from tests.helpers import block_loss, random_orders, tiny_backbone, tiny_images

SHAPES = [(6, 6, 2), (4, 6, 2), (3, 4, 1), (6, 3, 3)]
PARITY = Path(__file__).parents[3] / "shared" / "parity"


@pytest.fixture(params=SHAPES, ids=str)
def shaped(request: pytest.FixtureRequest) -> OrderRobustTransformer:
    return tiny_backbone(*request.param)


def test_losses_depend_on_the_context(backbone: OrderRobustTransformer) -> None:
    """The other tests mean something only if the random weights let tokens see each other."""
    data = tiny_images(backbone)
    order = random_orders(backbone, len(data))
    few = naive_block_losses(backbone, data.tokens, data.labels, order[:, :1], order[:, -1:])
    many = naive_block_losses(backbone, data.tokens, data.labels, order[:, :8], order[:, -1:])
    assert (few - many).abs().median() > 0.1


@pytest.mark.parametrize("reveals", [[[1, 1, 1, 1]], [[3, 0, 1, 2], [0, 2, 1, 3]], [[2, 1, 0, 0]] * 2, [[0] * 4]])
def test_cache_equals_recomputation(shaped: OrderRobustTransformer, reveals: list[list[int]]) -> None:
    """Blocks are appended in lots of their own size in every row, so that rows differ in length and are padded."""
    data, order = tiny_images(shaped, 4), random_orders(shaped, 4)
    total = shaped.geometry.num_blocks
    done = torch.zeros(4, dtype=torch.int64)
    prefix = shaped.start(data.labels)
    for lot in reveals:
        count = torch.minimum(torch.tensor(lot), total - 1 - done)
        place = (done[:, None] + torch.arange(max(lot))).clamp_max(total - 1)
        prefix = shaped.extend(prefix, data.tokens, order.gather(1, place), count)
        done += count
    blocks = torch.arange(total).expand(4, -1)
    packed, _ = shaped.context_loss(prefix, data.tokens, blocks)
    for row, block in itertools.product(range(4), range(total)):
        visible = order[row, : done[row]].tolist()
        if block not in visible:
            expected = block_loss(shaped, data.tokens[row], data.labels[row], visible, block)
            assert packed.loss[row, block].item() == pytest.approx(expected, abs=1e-5)


def test_reused_entries_equal_encoded_ones(shaped: OrderRobustTransformer) -> None:
    """The first block of an action keeps its chain; the later ones see it, and each other in order."""
    data, order = tiny_images(shaped, 4), random_orders(shaped, 4)
    width = min(3, shaped.geometry.num_blocks - 1)
    count = torch.tensor([0, 1, 2, 3]).clamp_max(width)
    prefix = shaped.start(data.labels)
    _, entries = shaped.context_loss(prefix, data.tokens, order)
    assert entries is not None
    first = entries.chain(torch.zeros(4, dtype=torch.int64))
    reused = shaped.extend(prefix, data.tokens, order[:, :width], count, first)
    again = shaped.extend(shaped.start(data.labels), data.tokens, order[:, :width], count)
    assert torch.equal(reused.length, again.length)
    valid = (torch.arange(reused.slots + 1) < reused.length[:, None])[None, :, None, :, None]
    for one, other in ((reused.keys, again.keys), (reused.values, again.values)):
        assert torch.allclose(one * valid, other * valid, atol=1e-5)


def test_blocks_revealed_together_see_their_predecessors(backbone: OrderRobustTransformer) -> None:
    """Changing the first block of an action changes the entries of the second one, and not the other way round."""
    data, blocks = tiny_images(backbone, 2), torch.tensor([[4, 0], [4, 0]])
    two = torch.full((2,), 2)
    plain = backbone.extend(backbone.start(data.labels), data.tokens, blocks, two).keys
    each = 2 * backbone.geometry.tokens_per_block
    for changed, seen in ((4, True), (0, False)):
        tokens = data.tokens.clone()
        where = backbone.geometry.block_tokens[changed]
        tokens[:, where] = (tokens[:, where] + 1) % backbone.vocab_size
        other = backbone.extend(backbone.start(data.labels), tokens, blocks, two).keys
        unlike = (plain - other).abs().amax((0, 1, 2, 4)) > 1e-4
        of_the_other_block = slice(1 + each, 1 + 2 * each) if changed == 4 else slice(1, 1 + each)
        assert bool(unlike[of_the_other_block].any()) == seen
        assert not unlike[0]


def test_packed_chains_equal_one_by_one(shaped: OrderRobustTransformer) -> None:
    data, order = tiny_images(shaped, 3), random_orders(shaped, 3)
    revealed, hidden = order[:, :1], order[:, 1:]
    prefix = shaped.extend(shaped.start(data.labels), data.tokens, revealed, torch.ones(3, dtype=torch.int64))
    packed, _ = shaped.context_loss(prefix, data.tokens, hidden)
    naive = naive_block_losses(shaped, data.tokens, data.labels, revealed, hidden)
    assert torch.allclose(packed.loss, naive, atol=1e-5)


def test_observe_is_the_first_query_and_reads_no_token(shaped: OrderRobustTransformer) -> None:
    data, order = tiny_images(shaped, 3), random_orders(shaped, 3)
    prefix = shaped.start(data.labels)
    hidden, entropy = shaped.observe(prefix, order)
    for tokens in (data.tokens, data.tokens.flip(0)):
        losses, _ = shaped.context_loss(prefix, tokens, order)
        assert torch.allclose(losses.hidden, hidden, atol=1e-6)
        assert torch.allclose(losses.entropy, entropy, atol=1e-6)
    log_probs = shaped.output(hidden).log_softmax(-1)
    assert torch.allclose(entropy, -(log_probs.exp() * log_probs).sum(-1), atol=1e-6)


def test_likelihood_sums_to_one() -> None:
    """Over all images of a tiny grid, for one order: the chain rule with nothing leaking."""
    backbone = tiny_backbone(2, 2, 1, 3)
    images = torch.tensor(list(itertools.product(range(3), repeat=4)))
    order = torch.tensor([2, 0, 3, 1]).expand(len(images), -1)
    labels = torch.zeros(len(images), dtype=torch.int64)
    nll = cross_entropy(backbone.teacher_forced(images, labels, order), images, order).sum(1)
    assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------------- decoding


def test_parallel_blocks_are_independent(shaped: OrderRobustTransformer) -> None:
    data, order = tiny_images(shaped, 8), random_orders(shaped, 8)
    prefix = shaped.extend(shaped.start(data.labels), data.tokens, order[:, :1], torch.ones(8, dtype=torch.int64))
    blocks = order[:, 1:]
    uniforms = torch.rand(*blocks.shape, shaped.geometry.tokens_per_block, dtype=torch.float64)
    together = shaped.decode(prefix, blocks, uniforms, Sampling()).tokens
    for k in range(blocks.shape[1]):
        alone = shaped.decode(prefix, blocks[:, k : k + 1], uniforms[:, k : k + 1], Sampling()).tokens
        assert torch.equal(alone[:, 0], together[:, k])


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_sampling_frequencies_match_probabilities(guidance: float) -> None:
    """A whole block is drawn with the probability of its chain, under guidance with the guided one."""
    backbone, draws = tiny_backbone(2, 2, 2, 2), 8000
    labels = torch.ones(draws, dtype=torch.int64)
    null = torch.full_like(labels, backbone.num_classes)
    uniforms = torch.rand(draws, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = torch.zeros(draws, 1, dtype=torch.int64)
    drawn = backbone.decode(
        backbone.start(labels), blocks, uniforms, Sampling(guidance=guidance), backbone.start(null)
    ).tokens[:, 0]
    images = torch.tensor(list(itertools.product(range(2), repeat=4)))
    order = torch.arange(4).expand(16, -1)
    with_label = backbone.teacher_forced(images, labels[:16], order)
    without = backbone.teacher_forced(images, null[:16], order)
    guided = without + guidance * (with_label - without)
    probability = torch.exp(-cross_entropy(guided, images, order).sum(1))
    code = (drawn * torch.tensor([8, 4, 2, 1])).sum(1)
    frequency = code.bincount(minlength=16) / draws
    error = (probability * (1 - probability) / draws).sqrt()
    assert ((frequency - probability).abs() < 4.5 * error).all()


def test_guidance_of_one_is_no_guidance(backbone: OrderRobustTransformer) -> None:
    data, blocks = tiny_images(backbone, 12), random_orders(backbone, 12)[:, :3]
    uniforms = torch.rand(12, 3, 4, dtype=torch.float64)
    prefix, null = backbone.start(data.labels), backbone.start(torch.full((12,), backbone.num_classes))
    plain = backbone.decode(prefix, blocks, uniforms, Sampling()).tokens
    assert torch.equal(backbone.decode(prefix, blocks, uniforms, Sampling(guidance=1.0), null).tokens, plain)
    assert not torch.equal(backbone.decode(prefix, blocks, uniforms, Sampling(guidance=4.0), null).tokens, plain)
    with pytest.raises(ValueError, match=r"guidance=4\.0"):
        backbone.decode(prefix, blocks, uniforms, Sampling(guidance=4.0))


def test_greedy_decoding_is_deterministic_and_stepwise_best(backbone: OrderRobustTransformer) -> None:
    data, blocks = tiny_images(backbone, 6), random_orders(backbone, 6)[:, :2]
    prefix = backbone.start(data.labels)
    greedy = [backbone.decode(prefix, blocks, torch.rand(6, 2, 4), Sampling(top_k=1)).tokens for _ in range(2)]
    assert torch.equal(*greedy)
    tokens = data.tokens.scatter(1, backbone.geometry.block_tokens[blocks[:, 0]], greedy[0][:, 0])
    rest = torch.stack([torch.cat([b, torch.tensor([i for i in range(9) if i != b])]) for b in blocks[:, :1]])
    order = backbone.geometry.token_order(rest)
    logits = backbone.teacher_forced(tokens, data.labels, order)[:, :4]
    assert torch.equal(logits.argmax(-1), greedy[0][:, 0])


# ---------------------------------------------------------------------- the check


class Leaky(OrderRobustTransformer):
    """Its first query has seen the block's own first token."""

    def context_loss(self, prefix: Any, tokens: Tensor, blocks: Tensor, *rest: Any, **kw: Any) -> Any:
        losses, entries = super().context_loss(prefix, tokens, blocks, *rest, **kw)
        seen = tokens.gather(1, self.block_tokens[blocks][..., 0])
        return losses._replace(hidden=losses.hidden + 0.01 * seen[..., None]), entries


class Peeking(OrderRobustTransformer):
    """The losses know the block's last token."""

    def context_loss(self, prefix: Any, tokens: Tensor, blocks: Tensor, *rest: Any, **kw: Any) -> Any:
        losses, entries = super().context_loss(prefix, tokens, blocks, *rest, **kw)
        last = tokens.gather(1, self.block_tokens[blocks][..., -1])
        return losses._replace(loss=losses.loss - (last == 1) * 5.0), entries


class CrossTalking(OrderRobustTransformer):
    """Chains that are packed together see each other."""

    def context_loss(self, *arguments: Any, **kw: Any) -> tuple[BlockLosses, Any]:
        losses, entries = super().context_loss(*arguments, **kw)
        return losses._replace(loss=losses.loss + 0.01 * losses.loss.mean(1, keepdim=True)), entries


class Forgetful(OrderRobustTransformer):
    """Blocks that are revealed together do not see each other in the cache."""

    def extend(self, prefix: Any, tokens: Tensor, blocks: Tensor, count: Tensor, first: Any = None) -> Any:
        _, entries = self.context_loss(prefix, tokens, blocks, whole=True)
        assert entries is not None
        for column in range(blocks.shape[1]):
            length = 2 * self.geometry.tokens_per_block * (column < count).long()
            prefix = prefix.append(entries.chain(torch.full_like(count, column)), length)
        return prefix


class WrongReuse(OrderRobustTransformer):
    """Reused entries are damaged on their way into the cache."""

    def extend(self, prefix: Any, tokens: Tensor, blocks: Tensor, count: Tensor, first: Any = None) -> Any:
        if first is not None:
            first = type(first)(first.keys, tuple(part * 1.05 for part in first.values))
        return super().extend(prefix, tokens, blocks, count, first)


class WrongPast(OrderRobustTransformer):
    """A past is ignored."""

    def context_loss(
        self, prefix: Any, tokens: Tensor, blocks: Tensor, past: Any = None, whole: bool = False
    ) -> tuple[BlockLosses, Any]:
        return super().context_loss(prefix, tokens, blocks, None, whole)


class WrongDecode(OrderRobustTransformer):
    """Greedy decoding draws the least likely token."""

    def decode(self, prefix: Any, blocks: Tensor, *rest: Any, **kw: Any) -> Drawing:
        return Drawing((super().decode(prefix, blocks, *rest, **kw).tokens + 1) % self.vocab_size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_check_passes(shape: tuple[int, int, int]) -> None:
    backbone = tiny_backbone(*shape)
    assert isinstance(backbone, Backbone)
    check_backbone(backbone)


@pytest.mark.parametrize(
    ("kind", "promise"),
    [
        (Leaky, "observe equals the first query"),
        (Peeking, "greedy decoding finds the token of least loss"),
        (CrossTalking, "packed chains"),
        (Forgetful, "packed chains"),
        (WrongReuse, "reused chain entries"),
        (WrongPast, "past"),
        (WrongDecode, "greedy decoding"),
    ],
)
def test_check_finds_sabotage(kind: type[OrderRobustTransformer], promise: str) -> None:
    honest = tiny_backbone()
    broken = kind(honest.config)
    broken.load_state_dict(honest.state_dict())
    with pytest.raises(ValueError, match=promise):
        check_backbone(broken.eval())


# ---------------------------------------------------------------------- published numbers, shipped weights


@pytest.fixture(scope="module")
def randar() -> tuple[OrderRobustTransformer, dict[str, Tensor]]:
    file = PARITY / "randar_gpt_open.safetensors"
    if not file.exists():
        pytest.skip(f"needs the parity fixtures of the official RandAR code at {file}, which are not in the repository")
    tensors = load_file(file)
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    config = TransformerConfig(4, 4, 1, vocab_size=96, num_classes=10, dim=64, layers=3, heads=4, multiple_of=32)
    backbone = OrderRobustTransformer(config)
    backbone.load_state_dict({k: v for k, v in weights.items() if k not in {"freqs_cis"}})
    return backbone.eval(), {k.removeprefix("io/"): v for k, v in tensors.items() if k.startswith("io/")}


@torch.no_grad()
def test_randar_parity(randar: tuple[OrderRobustTransformer, dict[str, Tensor]]) -> None:
    backbone, io = randar
    assert torch.allclose(backbone.rope, io["freqs_cis"], atol=1e-6)
    instructions, _ = backbone.instructions(io["token_order"])
    assert torch.allclose(instructions, io["position_instruction_tokens"], atol=1e-4)
    logits = backbone.teacher_forced(io["idx"], io["labels"], io["token_order"])
    assert torch.allclose(logits, io["token_logits"], atol=1e-4)
    loss = cross_entropy(logits, io["idx"], io["token_order"]).mean()
    assert loss.item() == pytest.approx(io["loss"].item(), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("name", "end"), [("gen_seq_cfg1", 1.0), ("gen_seq_cfg4", 4.0)])
def test_randar_greedy_parity(randar: tuple[OrderRobustTransformer, dict[str, Tensor]], name: str, end: float) -> None:
    """Our decode and cache, one token at a time, with the published linear growth of guidance."""
    backbone, io = randar
    order, labels = io["token_order"], io["labels"]
    tokens, one = torch.zeros_like(io["idx"]), torch.ones_like(labels)
    prefix, null = backbone.start(labels), backbone.start(torch.full_like(labels, backbone.num_classes))
    for step in range(order.shape[1]):
        block = order[:, step : step + 1]
        sampling = Sampling(top_k=1, guidance=1 + (end - 1) * step / order.shape[1])
        drawn = backbone.decode(prefix, block, torch.zeros(len(labels), 1, 1), sampling, null).tokens
        tokens = tokens.scatter(1, block, drawn[:, 0])
        prefix, null = (backbone.extend(cache, tokens, block, one) for cache in (prefix, null))
    assert torch.equal(tokens, io[name])


def test_rope_table_turns_rows_then_columns() -> None:
    table = rope_table(2, 3, 8)
    assert table.shape == (7, 4, 2) and (table[0] == 0).all()
    assert torch.equal(table[1], torch.tensor([[1.0, 0.0]] * 4))
    row, column = table[1 + 3], table[1 + 1]
    assert torch.equal(row[2:], table[1][2:]) and torch.equal(column[:2], table[1][:2])
    assert torch.allclose(row[:2, 0].acos(), torch.tensor([1.0, 0.01]), atol=1e-3)
    with pytest.raises(ValueError, match="multiple of 4"):
        rope_table(2, 2, 6)


@pytest.mark.parametrize("name", ["digits", "digits_raster"])
def test_shipped_weights_keep_every_promise(name: str) -> None:
    backbone = load_backbone(name)
    check_backbone(backbone)
    assert isinstance(backbone, OrderRobustTransformer)
    data = load_split("digits", "test")
    rows = torch.arange(2)
    order = random_orders(backbone, 2)
    count = torch.tensor([3, 5])
    prefix = backbone.extend(backbone.start(data.labels[rows]), data.tokens[rows], order[:, :5], count)
    losses, _ = backbone.context_loss(prefix, data.tokens[rows], order[:, 5:8])
    for row, column in itertools.product(range(2), range(3)):
        visible, block = order[row, : count[row]].tolist(), int(order[row, 5 + column])
        expected = block_loss(backbone, data.tokens[row], data.labels[row], visible, block)
        assert losses.loss[row, column].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "heads=5"),
        ({"dropout": 1.0}, "dropout"),
        ({"block_size": 4}, "block_size=4"),
        ({"dim": 0}, "dim"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    shape: dict[str, Any] = {"height": 6, "width": 6, "block_size": 2, "vocab_size": 5, "num_classes": 3}
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(shape | change))
