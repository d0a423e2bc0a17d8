"""Packed products against PyTorch's own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from orderrl.backbones import cpu_linear, load_backbone
from orderrl.backbones.cpu_linear import AVAILABLE, DTYPES, FEW_ROWS, LARGE, WORTH, Linear, pack_weights

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="no oneDNN for this processor")


def frozen(inputs: int = 64, outputs: int = 96, bias: bool = True, dtype: torch.dtype = torch.float32) -> Linear:
    torch.manual_seed(0)
    return Linear(inputs, outputs, bias).to(dtype).requires_grad_(False)


def plain(layer: Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def packs(layer: Linear) -> int:
    return len(layer._packs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(400,), (3, 5, 40), (40, 1, 10)])
def test_a_packed_product_is_the_plain_one(bias: bool, shape: tuple[int, ...]) -> None:
    layer, x = frozen(bias=bias), torch.randn(*shape, 64)
    assert torch.allclose(layer(x), plain(layer, x), atol=1e-5)
    assert packs(layer) == 1
    every_other = x[..., ::2, :] if x.ndim > 2 else x[::2]
    assert torch.allclose(layer(every_other), plain(layer, every_other), atol=1e-5)


def test_large_matrices_are_packed_for_a_single_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "few_rows_that_gain", lambda dtype, threads: FEW_ROWS)
    layer = frozen(512, LARGE // 512)
    x = torch.randn(1, 512)
    assert torch.allclose(layer(x), plain(layer, x), atol=1e-5) and packs(layer) == 1


def test_a_slice_of_the_outputs() -> None:
    layer, x = frozen(), torch.randn(400, 64)
    whole = plain(layer, x)
    for outputs in (slice(32, None), slice(64), slice(32, 96)):
        assert torch.allclose(layer(x, outputs), whole[:, outputs], atol=1e-5)
        assert torch.allclose(layer(x[:2], outputs), whole[:2, outputs], atol=1e-5)  # too few rows to gain


def test_bfloat16() -> None:
    layer, x = frozen(dtype=torch.bfloat16), torch.randn(400, 64).bfloat16()
    assert torch.allclose(layer(x).float(), plain(layer, x).float(), atol=0.05)
    assert packs(layer) == (torch.bfloat16 in DTYPES)


@pytest.mark.parametrize("change", ["in place", "loaded", "replaced"])
def test_changed_weights_are_packed_again(change: str) -> None:
    layer, x = frozen(), torch.randn(400, 64)
    before = layer(x)
    if change == "in place":
        layer.weight.mul_(2)
    elif change == "loaded":
        layer.load_state_dict({"weight": layer.weight * 2, "bias": layer.bias})
    else:
        layer.weight.data = layer.weight.data * 2
    assert torch.allclose(layer(x), plain(layer, x), atol=1e-5)
    assert not torch.allclose(layer(x), before, atol=1e-3)


def test_gradients_and_few_rows_are_left_to_pytorch() -> None:
    layer = frozen()
    x = torch.randn(400, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, layer.weight.sum(0).expand_as(x), atol=1e-5)
    trained = Linear(64, 96)
    trained(torch.randn(400, 64)).sum().backward()
    assert trained.weight.grad is not None
    layer(torch.randn(WORTH // (64 * 96) - 1, 64))
    layer(torch.randn(0, 64))
    assert packs(layer) == packs(trained) == 0


def test_between_steps_of_training_the_weights_of_the_moment_are_used() -> None:
    layer, x = Linear(64, 96), torch.randn(400, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(2):
        with torch.no_grad():
            assert torch.allclose(layer(x), plain(layer, x), atol=1e-5) and packs(layer) == 1
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()


def test_copies_pack_anew() -> None:
    layer, x = frozen(), torch.randn(400, 64)
    layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert packs(other) == 0 and torch.equal(other(x), layer(x))
        other.weight.mul_(2)
        assert not torch.allclose(other(x), layer(x))


def test_the_switch() -> None:
    layer, x = frozen(), torch.randn(400, 64)
    pack_weights(layer, False)
    assert torch.equal(layer(x), plain(layer, x)) and packs(layer) == 0
    pack_weights(layer, True)
    layer(x)
    assert packs(layer) == 1


@pytest.mark.parametrize("gaining", [(), (1, 4, 16)])
def test_few_rows_of_large_matrices_take_the_product_that_was_measured_to_be_faster(
    gaining: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.dtype] = []

    def measured(dtype: torch.dtype, threads: int) -> tuple[int, ...]:
        asked.append(dtype)
        return gaining

    monkeypatch.setattr(cpu_linear, "few_rows_that_gain", measured)
    layer, few, many = frozen(512, 512), torch.randn(3, 512), torch.randn(17, 512)
    assert torch.allclose(layer(few), plain(layer, few), atol=1e-5) and packs(layer) == int(bool(gaining))
    assert torch.allclose(layer(many), plain(layer, many), atol=1e-5) and packs(layer) == 1
    assert asked == [torch.float32]  # many rows are always packed


def test_measuring_products_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    assert set(cpu_linear.few_rows_that_gain.__wrapped__(torch.float32, 1)) <= set(FEW_ROWS)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_backbone_computes_the_same_with_packed_weights() -> None:
    label, tokens = torch.arange(10), torch.randint(17, (10, 64))
    blocks = torch.arange(16).expand(10, -1)
    losses = []
    for packed in (False, True):
        backbone = load_backbone("digits", pack_weights=packed)
        losses.append(backbone.context_loss(backbone.start(label), tokens, blocks)[0])
        modules = [part for part in backbone.modules() if isinstance(part, Linear)]  # type: ignore[attr-defined]
        assert any(packs(part) for part in modules) is packed
    for one, other in zip(*losses, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
