"""Backbones by name and path: what is written is read back, and what cannot be read is refused in one line."""

from pathlib import Path

import pytest
import torch

from orderrl.backbones import (
    OrderRobustTransformer,
    backbone_fingerprint,
    backbone_names,
    load_backbone,
    register_backbone,
    registry,
    save_backbone,
    with_block_size,
)
from orderrl.backbones.randar import TransformerConfig
from orderrl.runtime.checkpoint import save_checkpoint
from tests.helpers import tiny_backbone, tiny_images


def test_round_trip(backbone: OrderRobustTransformer, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    save_backbone(path, backbone, {"data": "tiny"})
    loaded = load_backbone(path)
    assert isinstance(loaded, OrderRobustTransformer) and loaded.config == backbone.config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert backbone_fingerprint(loaded) == backbone_fingerprint(backbone)
    data = tiny_images(backbone, 2)
    order = torch.arange(36).expand(2, -1)
    arguments = (data.tokens, data.labels, order)
    assert torch.equal(loaded.teacher_forced(*arguments), backbone.teacher_forced(*arguments))


def test_fingerprint_changes_with_any_weight_and_with_the_blocks(backbone: OrderRobustTransformer) -> None:
    other = OrderRobustTransformer(backbone.config)
    other.load_state_dict(backbone.state_dict())
    assert backbone_fingerprint(other) == backbone_fingerprint(backbone)
    with torch.no_grad():
        other.norm.weight[3] += 1e-6
    assert backbone_fingerprint(other) != backbone_fingerprint(backbone)
    assert backbone_fingerprint(with_block_size(backbone, 3)) != backbone_fingerprint(backbone)


def test_block_size_does_not_change_the_model(backbone: OrderRobustTransformer) -> None:
    other = with_block_size(backbone, 6)
    assert other.geometry.num_blocks == 1
    data = tiny_images(backbone, 2)
    whole = other.context_loss(other.start(data.labels), data.tokens, torch.zeros(2, 1, dtype=torch.int64))[0].loss[
        :, 0
    ]
    order = torch.arange(36).expand(2, -1)
    logits = backbone.teacher_forced(data.tokens, data.labels, order)
    expected = -logits.log_softmax(-1).gather(-1, data.tokens[..., None]).sum((1, 2))
    assert torch.allclose(whole, expected, atol=1e-4)


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.BACKBONES, "members", dict(registry.BACKBONES.members))
    assert {"digits", "digits_raster"} <= set(backbone_names())
    mine = tiny_backbone()
    register_backbone("mine", lambda: mine)
    assert load_backbone("mine") is mine
    with pytest.raises(ValueError, match="'mine' is registered already"):
        register_backbone("mine", lambda: tiny_backbone())
    with pytest.raises(ValueError, match=r"backbone='nobody' is unknown; choose one of .*digits.*mine"):
        load_backbone("nobody")


def test_wrong_files_are_refused(backbone: OrderRobustTransformer, tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_backbone(whole, backbone, {})
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(whole.read_bytes()[:-100])
    pickled = tmp_path / "pickled.pt"
    torch.save(backbone.state_dict(), pickled)
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes(pickled.read_bytes())
    shape = tmp_path / "shape.safetensors"
    model = TransformerConfig(**backbone.config.to_dict() | {"vocab_size": 7}).to_dict()  # type: ignore[arg-type]
    save_checkpoint(shape, backbone.state_dict(), {"kind": "backbone", "model": model})
    key = tmp_path / "key.safetensors"
    save_checkpoint(key, backbone.state_dict(), {"kind": "backbone", "model": model | {"depth": 3}})
    planner = tmp_path / "planner.safetensors"
    save_checkpoint(planner, {"a": torch.ones(1)}, {"kind": "planner"})
    wrong = {
        truncated: "truncated",
        pickled: "pickle",
        renamed: "pickle",
        shape: "tok_embeddings",
        key: "depth",
        planner: "planner checkpoint",
    }
    for path, message in wrong.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_backbone(path)
        assert "\n" not in str(caught.value) and path.name in str(caught.value)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_backbone(tmp_path / "none.safetensors")
