"""The verifier: recorded fixtures agree, a changed number does not, and nothing is passed over in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orderrl.backbones import Sampling
from orderrl.backbones.published import llamagen_sampler
from orderrl.verification.compare import compare
from orderrl.verification.fixture import load_fixture
from orderrl.verify import main
from tests.backbones.families import CAUSAL, images, tiny

PARITY = Path(__file__).parents[2] / "shared" / "parity"
NAMES = ("llamagen_gpt", "randar_gpt", "arpg", "mar", "llamagen_vq", "mar_vae")


@pytest.mark.parametrize("name", NAMES)
def test_published_numbers_are_reproduced(name: str) -> None:
    path = PARITY / f"{name}_open.safetensors"
    if not path.exists():
        pytest.skip(f"needs the recorded numbers at {path}, which are not in the repository")
    for row in compare(load_fixture(path)):
        assert row.agrees, row


@pytest.fixture
def fixture(tmp_path: Path) -> Path:
    """What our tiny raster model computes, recorded as the published one would be."""
    model = tiny("llamagen")
    data = images(model, 2)
    drawn = llamagen_sampler(model, data.labels, torch.zeros(2, 16), Sampling(top_k=1))
    io = {
        "idx": (data.tokens, "input", "tokens"),
        "labels": (data.labels, "input", "labels"),
        "logits_teacher": (model.teacher_forced(data.tokens, data.labels), "output", "teacher-forced logits"),
        "freqs_cis": (model.rope.clone(), "output", "rotary table"),
        "gen_cfg1": (drawn.tokens, "output", "greedy generation, cfg_scale 1.0, cfg_interval -1"),
    }
    tensors = {f"weights/{name}": value.clone() for name, value in model.state_dict().items()}
    save_file(tensors | {f"io/{name}": part[0].contiguous() for name, part in io.items()}, tmp_path / "f.safetensors")
    arguments = {
        "dim": CAUSAL["dim"], "n_layer": CAUSAL["layers"], "n_head": CAUSAL["heads"], "multiple_of": 32,
        "num_classes": CAUSAL["num_classes"], "vocab_size": CAUSAL["vocab_size"], "block_size": 16,
    }  # fmt: skip
    _write(
        tmp_path,
        {
            "config": {"constructor": "Transformer(ModelArgs)", "arguments": arguments},
            "source": {"files": ["autoregressive/models/gpt.py"]},
            "numerics": {"suggested_tolerance_logits": 1e-5},
            "io": {
                name: {"role": role, "shape": list(value.shape), "dtype": str(value.dtype), "meaning": meaning}
                for name, (value, role, meaning) in io.items()
            },
        },
    )
    return tmp_path / "f.safetensors"


def _write(folder: Path, description: dict[str, Any]) -> None:
    (folder / "f.json").write_text(json.dumps(description))


def _change(path: Path, name: str, by: float) -> None:
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    tensors[name].view(-1)[3] += by
    save_file(tensors, path)


def _describe(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.with_suffix(".json").read_text()))


def test_tolerances_come_from_the_fixture(fixture: Path) -> None:
    rows = {row.name: row for row in compare(load_fixture(fixture))}
    assert rows["gen_cfg1"].tolerance == 0 and rows["logits_teacher"].tolerance == 1e-5
    assert rows["freqs_cis"].tolerance == 1e-4


def test_tolerances_of_guided_logits_follow_the_scale(fixture: Path) -> None:
    """Of two forwards that are off by rounding, u + s (c - u) is off by up to s times as much; indices stay exact."""
    description, tensors = _describe(fixture), load_file(fixture)
    for meaning, scale in (
        ("greedy generation, cfg_scale 5.0, cfg_interval 7", 5),
        ("tokens, cfg_scales (1.0, 4.0), 6 steps", 4),
        ("tokens, guidance_scale 2.5, cfg_schedule linear", 2.5),
        ("cfg_scale 0.5", 1),
        ("no guidance", 1),
    ):
        outputs = {"gen_x": torch.zeros(2).long(), "gen_x_logits": torch.zeros(2), "net_out": torch.zeros(2)}
        for name in outputs:  # the tokens' meaning states the arguments of the call that gave the logits too
            said = "guided logits" if name == "gen_x_logits" else meaning
            description["io"][name] = {"role": "output", "meaning": said}
        save_file(tensors | {f"io/{name}": value for name, value in outputs.items()}, fixture)
        description["numerics"] = {"suggested_tolerance": 1e-4, "suggested_tolerance_logits": 1e-5}
        _write(fixture.parent, description)
        recorded = load_fixture(fixture)
        assert recorded.tolerance("gen_x") == 0
        assert recorded.tolerance("gen_x_logits") == pytest.approx(scale * 1e-5)
        assert recorded.tolerance("net_out") == pytest.approx(scale * 1e-4)
        assert recorded.tolerance("logits_teacher") == 1e-5
        description["numerics"] = {"suggested_tolerance_net_out": 3e-3}  # measured on this very output
        _write(fixture.parent, description)
        assert load_fixture(fixture).tolerance("net_out") == 3e-3


def test_agreement_and_disagreement(fixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(fixture)]) == 0
    assert "3 of 3 recorded outputs agree" in capsys.readouterr().out
    _change(fixture, "io/logits_teacher", 3e-5)
    assert main([str(fixture)]) == 1
    assert "outside: logits_teacher" in capsys.readouterr().out
    _change(fixture, "io/gen_cfg1", 1)
    assert main([str(fixture)]) == 1
    assert "outside: logits_teacher, gen_cfg1" in capsys.readouterr().out


def test_missing_counterparts_count_unless_allowed(fixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    description = _describe(fixture)
    description["io"]["attention_map"] = description["io"]["freqs_cis"]
    _write(fixture.parent, description)
    save_file(load_file(fixture) | {"io/attention_map": torch.zeros(3)}, fixture)
    assert main([str(fixture)]) == 1
    assert main([str(fixture), "--allow-missing"]) == 0
    assert "without a counterpart: attention_map" in capsys.readouterr().out


def test_not_a_number_disagrees(fixture: Path) -> None:
    _change(fixture, "io/logits_teacher", float("nan"))
    assert not {row.name: row for row in compare(load_fixture(fixture))}["logits_teacher"].agrees


def test_refusals(fixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(message: str) -> None:
        assert main([str(fixture)]) == 2
        assert message in capsys.readouterr().err

    assert main([str(tmp_path / "none.safetensors")]) == 2
    assert "does not exist" in capsys.readouterr().err
    good = _describe(fixture)
    _write(fixture.parent, good | {"config": good["config"] | {"constructor": "Diffuser"}})
    refused("no model of ours replays 'Diffuser'; known are RandARTransformer")
    arguments = good["config"]["arguments"]
    _write(fixture.parent, good | {"config": good["config"] | {"arguments": arguments | {"rope_base": 500}}})
    refused("rope_base=500 is not supported, only 10000")
    _write(fixture.parent, good | {"config": good["config"] | {"arguments": arguments | {"n_layer": 3}}})
    refused("missing: layers.2.attention.wo.weight")
    (fixture.parent / "f.json").write_text("{}")
    refused("not a fixture")
