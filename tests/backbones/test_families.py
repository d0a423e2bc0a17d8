"""What every family must do: keep the protocol's promises, score as its teacher-forced pass does, stay frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from orderrl.backbones import (
    OrderRobustTransformer,
    Sampling,
    TransformerConfig,
    backbone_fingerprint,
    build_backbone,
    check_backbone,
    load_backbone,
    published_names,
    registry,
    save_backbone,
)
from orderrl.backbones.llamagen import RasterTransformer
from orderrl.backbones.presets import PRESETS
from orderrl.backbones.randar import cross_entropy
from orderrl.backbones.registry import new_backbone
from orderrl.envs.core import CoreConfig, NextBlockCore
from tests.backbones.families import CAUSAL, FAMILIES, MASKED, ORDER_ROBUST, block_orders, images, tiny


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal up to rounding of the largest entry: a random masked model draws and loses numbers of any size."""
    return torch.allclose(one.float(), other.float(), rtol=0, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(4, 4, 1), (4, 4, 2), (4, 4, 4)], ids=str)
def test_every_backbone_passes_the_check(family: str, shape: tuple[int, int, int]) -> None:
    check_backbone(tiny(family, *shape))


@pytest.mark.parametrize("family", ["randar", "arpg"])
@pytest.mark.parametrize("shape", [(4, 4, 2), (2, 6, 1), (4, 6, 2)], ids=str)
def test_block_losses_are_the_teacher_forced_ones(family: str, shape: tuple[int, int, int]) -> None:
    """Chains over the cache against one pass over the whole sequence without cache or chains."""
    backbone = tiny(family, *shape)
    data, order = images(backbone, 4), block_orders(backbone, 4)
    token_order = backbone.geometry.token_order(order)
    logits = backbone.teacher_forced(data.tokens, data.labels, token_order)
    losses = cross_entropy(logits, data.tokens, token_order).unflatten(1, (backbone.geometry.num_blocks, -1)).sum(-1)
    prefix, one = backbone.start(data.labels), torch.ones_like(data.labels)
    for step in range(backbone.geometry.num_blocks):
        block = order[:, step : step + 1]
        now, entries = backbone.context_loss(prefix, data.tokens, block)
        assert torch.allclose(now.loss[:, 0], losses[:, step], atol=1e-4)
        prefix = backbone.extend(prefix, data.tokens, block, one, entries.chain(torch.zeros_like(data.labels)))


@pytest.mark.parametrize("family", ORDER_ROBUST)
def test_context_matters(family: str) -> None:
    """The other tests mean something only if visible tokens change the losses of hidden ones."""
    backbone = tiny(family)
    data, order = images(backbone), block_orders(backbone, 6)
    prefix = backbone.start(data.labels)
    before = backbone.context_loss(prefix, data.tokens, order[:, 1:])[0].loss
    prefix = backbone.extend(prefix, data.tokens, order[:, :1], torch.ones_like(data.labels))
    after = backbone.context_loss(prefix, data.tokens, order[:, 1:])[0].loss
    assert ((before - after).abs() / before.abs()).median() > 1e-3


def test_arpg_without_context_looks_alike_everywhere() -> None:
    """At S = {} the class key is zero, so every position has the same prediction and ties go to the lowest block."""
    backbone = tiny("arpg")
    blocks = torch.arange(4).expand(2, -1)
    hidden, entropy = backbone.observe(backbone.start(torch.tensor([0, 1])), blocks)
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))
    assert (entropy.argmax(1) == 0).all()


@pytest.mark.parametrize("family", ["randar", "arpg"])
def test_drawn_chains_are_kept_as_they_are(family: str) -> None:
    """What drawing leaves behind is what scoring the drawn tokens leaves behind, and extending reuses it."""
    backbone: Any = tiny(family)
    data, order = images(backbone, 5), block_orders(backbone, 5)
    prefix = backbone.start(data.labels)
    null = backbone.start(torch.full_like(data.labels, backbone.num_classes))
    uniforms = torch.rand(5, 2, backbone.geometry.tokens_per_block, dtype=torch.float64)
    drawing = backbone.decode(prefix, order[:, :2], uniforms, Sampling(guidance=2.0), null)
    tokens = backbone.geometry.write(data.tokens, order[:, :2], drawing.tokens)
    for cache, kept in ((prefix, drawing.entries), (null, drawing.unconditional)):
        scored = backbone.context_loss(cache, tokens, order[:, :2])[1].whole()
        assert kept.length == scored.length and all(map(close, kept.keys, scored.keys))
    count, first = torch.full((5,), 2), torch.zeros(5, dtype=torch.int64)
    reused = backbone.extend(prefix, tokens, order[:, :2], count, drawing.entries.chain(first))
    again = backbone.extend(backbone.start(data.labels), tokens, order[:, :2], count)
    one, other = (backbone.context_loss(state, data.tokens, order[:, 2:])[0].loss for state in (reused, again))
    assert close(one, other)


def test_arpg_queries_leave_no_entries() -> None:
    """With blocks of one token a context loss encodes nothing: its chains are empty until a token is known."""
    backbone = tiny("arpg", 4, 4, 1)
    data = images(backbone, 2)
    _, entries = backbone.context_loss(backbone.start(data.labels), data.tokens, torch.arange(16).expand(2, -1))
    assert entries.whole().length == 0
    prefix = backbone.extend(backbone.start(data.labels), data.tokens, torch.tensor([[3], [5]]), torch.ones(2).long())
    assert prefix.length.tolist() == [2, 2]  # the class and one token


@pytest.mark.parametrize("family", ORDER_ROBUST)
def test_the_environment_runs_and_telescopes(family: str) -> None:
    """With w = 1 the undiscounted return is the drop from the start losses to what was charged."""
    backbone = tiny(family)
    data, order = images(backbone, 5), block_orders(backbone, 5)
    core = NextBlockCore(backbone, data, 5, CoreConfig(strict=True))
    core.reset(index=torch.arange(5))
    start, charged, gained = core.losses.sum(1), torch.zeros(5), torch.zeros(5)
    for step in range(4):
        before = core.losses.clone()
        charged += before.gather(1, order[:, step : step + 1])[:, 0]
        core.step(order[:, step])
        gained += torch.where(~core.visible, before - core.losses, 0.0).sum(1)
    assert torch.allclose(gained, start - charged, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_depends_on_seed_alone_and_fills_the_image(family: str) -> None:
    """A batch draws what single environments of the same seeds draw."""
    backbone = tiny(family)
    data = images(backbone, 3)
    together = _generate(backbone, data, 3, seed=5)
    alone = torch.cat([_generate(backbone, data, 1, seed=5 + i) for i in range(3)])
    assert close(together, alone)
    assert not close(together, _generate(backbone, data, 3, seed=50))


def _generate(backbone: Any, data: Any, count: int, seed: int) -> torch.Tensor:
    core = NextBlockCore(backbone, data, count, CoreConfig("generate", strict=True, hindsight=False), seed)
    core.reset(labels=torch.zeros(count, dtype=torch.int64))
    for block in range(backbone.geometry.num_blocks):
        core.step(torch.full((count,), block))
    assert core.visible.all()
    return core.tokens


# ---------------------------------------------------------------------- shapes, presets, checkpoints


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_remember_their_family(family: str, tmp_path: Path) -> None:
    backbone = tiny(family)
    save_backbone(tmp_path / "b.safetensors", backbone, {"data": "tiny"})
    loaded = load_backbone(tmp_path / "b.safetensors")
    assert type(loaded) is type(backbone)
    assert backbone_fingerprint(loaded) == backbone_fingerprint(backbone)
    assert isinstance(loaded, torch.nn.Module) and not any(p.requires_grad for p in loaded.parameters())


PUBLISHED_MILLIONS = {
    "llamagen_b": 111, "llamagen_l": 343, "llamagen_xl": 775, "llamagen_xxl": 1411, "llamagen_3b": 3097,
    "llamagen_b_384": 111, "llamagen_l_384": 343, "llamagen_xl_384": 775, "llamagen_xxl_384": 1411,
    "llamagen_3b_384": 3097, "randar_l": 343, "randar_xl": 775, "arpg_l": 320, "arpg_xl": 719, "arpg_xxl": 1302,
    "mar_b": 208, "mar_l": 478, "mar_h": 942,
}  # fmt: skip


def test_parameter_counts_are_the_published_ones() -> None:
    """Without memory, on the meta device; published tables give MAR rounded up (479 M, 943 M)."""
    assert set(PUBLISHED_MILLIONS) == set(published_names())
    for name, millions in PUBLISHED_MILLIONS.items():
        with torch.device("meta"):
            model: Any = build_backbone(name)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert round(count / 1e6) == millions, name


def test_presets_name_their_family() -> None:
    for name, preset in PRESETS.items():
        assert name.startswith(preset.family)


def test_raster_weights_start_order_robust_training() -> None:
    """Only the instruction tokens are new; everything else is the raster model's."""
    raster = tiny("llamagen")
    model = OrderRobustTransformer.from_raster(raster, block_size=2)
    assert model.geometry.num_blocks == 4
    ours, theirs = model.state_dict(), raster.state_dict()
    assert ours.keys() - theirs.keys() == {"pos_instruct_embeddings"}
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_close(family: str, dtype: torch.dtype) -> None:
    """Rotations and diffusion stay in float32, observations are float32; losses move by what the format allows."""
    backbone = tiny(family)
    shape = {"height": 4, "width": 4, "block_size": backbone.geometry.block_size}
    half: Any = new_backbone(family, shape | (MASKED if family == "mar" else CAUSAL))
    half.load_state_dict(backbone.state_dict())
    for parameter in half.parameters():
        parameter.data = parameter.data.to(dtype)
    half.eval().requires_grad_(False)
    data = images(backbone, 2)
    blocks = torch.arange(backbone.geometry.num_blocks).expand(2, -1)
    exact = backbone.context_loss(backbone.start(data.labels), data.tokens, blocks)[0]
    rough = half.context_loss(half.start(data.labels), data.tokens, blocks)[0]
    assert rough.hidden.dtype == rough.loss.dtype == torch.float32
    assert family == "mar" or half.rope.dtype == torch.float32
    uniforms = torch.rand(2, blocks.shape[1], backbone.geometry.tokens_per_block, dtype=torch.float64)
    assert half.decode(half.start(data.labels), blocks, uniforms, Sampling()).tokens.dtype == data.tokens.dtype
    assert torch.allclose(exact.loss, rough.loss, rtol=0.03, atol=0.1)


def test_refusals() -> None:
    grid = {"height": 4, "width": 4}
    with pytest.raises(ValueError, match=r"family='gpt' is unknown; choose one of llamagen"):
        new_backbone("gpt", {})
    with pytest.raises(ValueError, match=r"layers=3 must be even"):
        new_backbone("arpg", grid | CAUSAL | {"block_size": 2, "layers": 3})
    with pytest.raises(ValueError, match=r"block_size=2 must be the side of the square token grid 4x4"):
        RasterTransformer(TransformerConfig(**(grid | CAUSAL | {"block_size": 2})))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unexpected keyword argument 'depth'"):
        new_backbone("randar", grid | CAUSAL | {"block_size": 2, "depth": 3})
    with pytest.raises(ValueError, match=r"block_size=3 must divide the token grid 4x4"):
        new_backbone("mar", grid | MASKED | {"block_size": 3})
    with pytest.raises(ValueError, match=r"backbone 'randar_l' needs weights: give path=FILE"):
        load_backbone("randar_l")
    with pytest.raises(ValueError, match=r"path and shape belong to published models"):
        load_backbone("digits", "somewhere.pt")
    with pytest.raises(ValueError, match=r"dtype='int8' is unknown; choose one of float32, bfloat16, float16"):
        load_backbone("digits", dtype="int8")


def test_a_raster_model_refuses_other_orders() -> None:
    backbone = tiny("llamagen")
    data = images(backbone, 2)
    raster = torch.arange(16).expand(2, -1)
    assert torch.equal(
        backbone.teacher_forced(data.tokens, data.labels, raster), backbone.teacher_forced(data.tokens, data.labels)
    )
    with pytest.raises(ValueError, match="token_order must be raster"):
        backbone.teacher_forced(data.tokens, data.labels, raster.flip(1))


# ---------------------------------------------------------------------- masked models


def test_masked_losses_depend_on_the_image_alone() -> None:
    """Noise is keyed by image, position and draw: neither batch nor companions move a loss."""
    backbone = tiny("mar")
    data = images(backbone, 4)
    blocks = torch.arange(4).expand(4, -1)
    whole = backbone.context_loss(backbone.start(data.labels), data.tokens, blocks)[0].loss
    for i in range(4):
        rows = torch.tensor([i])
        alone = backbone.context_loss(backbone.start(data.labels[rows]), data.tokens[rows], blocks[rows])[0].loss
        assert close(alone[0], whole[i])
    shuffled = backbone.context_loss(backbone.start(data.labels), data.tokens, blocks.flip(1))[0].loss
    assert close(shuffled.flip(1), whole)


def test_masked_losses_average_over_draws() -> None:
    """More draws, less noise; the reported spread says how much a loss still moves."""
    few, many = (
        tiny("mar"),
        new_backbone("mar", {"height": 4, "width": 4, "block_size": 2} | MASKED | {"loss_draws": 48}),
    )
    many.load_state_dict(few.state_dict())
    data = images(few, 4)
    assert many.eval().loss_noise(data.tokens, data.labels) < few.loss_noise(data.tokens, data.labels)  # type: ignore


def test_masked_times_and_fingerprint() -> None:
    """Times do not depend on the dtype that a model is built in; settings that change losses change the fingerprint."""
    shape = MASKED | {"height": 4, "width": 4, "block_size": 2, "loss_draws": 8}
    for dtype in ("float32", "bfloat16"):
        model: Any = build_backbone("mar_b", dtype=dtype, shape=shape)
        assert model.loss_times.tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    more = new_backbone("mar", {"height": 4, "width": 4, "block_size": 2} | MASKED | {"loss_draws": 4})
    more.load_state_dict(tiny("mar").state_dict())
    assert backbone_fingerprint(more) != backbone_fingerprint(tiny("mar"))


def test_a_registered_backbone_keeps_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    half: Any = new_backbone("randar", {"height": 4, "width": 4, "block_size": 2} | CAUSAL).to(torch.bfloat16)
    monkeypatch.setitem(registry.BACKBONES.members, "half", lambda: half)
    loaded: Any = load_backbone("half")
    assert loaded.norm.weight.dtype == torch.bfloat16
    assert load_backbone("half", dtype="float32").norm.weight.dtype == torch.float32  # type: ignore[attr-defined]


def test_masked_models_refuse_what_needs_probabilities() -> None:
    backbone = tiny("mar")
    data = images(backbone, 2)
    prefix, blocks = backbone.start(data.labels), torch.zeros(2, 1, dtype=torch.int64)
    uniforms = torch.rand(2, 1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="no token probabilities"):
        backbone.expected_gain(prefix, blocks, None, uniforms)
    with pytest.raises(ValueError, match="top_k=3"):
        backbone.decode(prefix, blocks, uniforms, Sampling(top_k=3))
    with pytest.raises(ValueError, match=r"guidance=2\.0 needs the unconditional state"):
        backbone.decode(prefix, blocks, uniforms, Sampling(guidance=2.0))


def test_masked_guidance_of_one_is_none_and_more_moves_the_draw() -> None:
    backbone = tiny("mar")
    data = images(backbone, 3)
    blocks = torch.zeros(3, 1, dtype=torch.int64)
    uniforms = torch.rand(3, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state, null = backbone.start(data.labels), backbone.start(torch.full((3,), 3))
    plain = backbone.decode(state, blocks, uniforms, Sampling()).tokens
    assert close(backbone.decode(state, blocks, uniforms, Sampling(guidance=1.0), null).tokens, plain)
    assert not close(backbone.decode(state, blocks, uniforms, Sampling(guidance=3.0), null).tokens, plain)
