"""What is not finite is refused where it shows first, and nothing of it is kept."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from orderrl.backbones import load_backbone, save_backbone
from orderrl.backbones.sampling import Sampling, sample_tokens
from orderrl.generate import generate
from orderrl.labels import LABELS
from orderrl.metrics.classifier import Classifier, load_classifier, save_classifier
from orderrl.planner import OrderHead, PlannerConfig, load_planner, require_described, save_planner
from orderrl.runtime.checkpoint import save_checkpoint
from orderrl.runtime.config import compose
from orderrl.runtime.finite import NotFiniteError, leaves, require_finite
from orderrl.runtime.job import Job
from orderrl.runtime.parts import make_parts
from orderrl.tokenizers import VQConfig, VQTokenizer, load_tokenizer, save_tokenizer
from orderrl.tokenizers.layers import StackConfig
from orderrl.train import train
from tests.helpers import tiny_backbone

SHAPE = PlannerConfig(num_blocks=9, hidden_size=32, num_classes=3, dim=16, heads=2, stem=1)
STACK = StackConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1)
TRAINED = {"agent": {"name": "bc"}, "objective": "context", "seed": 0, "budgets": [1]}


def saved_backbone(path: Path) -> Callable[[Path], Any]:
    save_backbone(path, tiny_backbone(), {})
    return load_backbone


def saved_planner(path: Path) -> Callable[[Path], Any]:
    save_planner(path, OrderHead(SHAPE), TRAINED)
    return load_planner


def saved_tokenizer(path: Path) -> Callable[[Path], Any]:
    save_tokenizer(path, VQTokenizer(VQConfig(16, 4, True, 32, STACK, STACK), "small"), {})
    return load_tokenizer


def saved_classifier(path: Path) -> Callable[[Path], Any]:
    save_classifier(load_classifier("digits"), path)
    return lambda file: load_classifier("digits", file)


SAVED = [saved_backbone, saved_planner, saved_tokenizer, saved_classifier]


def changed(path: Path, tensors: dict[str, Tensor] | None = None, **shape: Any) -> Path:
    """The file with other tensors, or another configuration of its shape, and no checksum, as a stranger writes it."""
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key in ("format", "kind", "config")}
    config = json.loads(metadata["config"])
    config["shape" if "shape" in config else "model"] = config.get("shape", config.get("model", {})) | shape
    save_file(load_file(path) | (tensors or {}), path, metadata=metadata | {"config": json.dumps(config)})
    return path


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", SAVED)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_are_refused_at_loading_by_file_and_tensor(
    save: Callable[[Path], Callable[[Path], Any]], value: float, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    load = save(path)
    load(path)
    weights = load_file(path)
    name = sorted(key for key, tensor in weights.items() if tensor.is_floating_point())[-1]
    weights[name].view(-1)[0] = value
    with pytest.raises(ValueError) as caught:
        load(changed(path, weights))
    assert str(path) in str(caught.value) and f"not finite: {name} (1 of" in str(caught.value)


def test_weights_that_overflow_in_a_dtype_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    saved_backbone(path)
    weights = load_file(path)
    weights["output.weight"][0, 0] = 1e6
    load_backbone(changed(path, weights), dtype="bfloat16")
    with pytest.raises(ValueError, match=r"large.safetensors: not finite: output.weight .* overflow in this dtype"):
        load_backbone(path, dtype="float16")


def test_a_backbone_whose_outputs_overflow_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    backbone = tiny_backbone(8, 8, vocab_size=17, num_classes=10)
    with torch.no_grad():
        backbone.output.weight.mul_(6e4 / backbone.output.weight.abs().max())  # finite in float16, its products are not
    save_backbone(tmp_path / "loud.safetensors", backbone, {})
    own = ["backbone=digits", "policy=raster", "n=2", f"output_dir={tmp_path}"]
    own += [f"backbone.name={tmp_path / 'loud.safetensors'}"]
    assert generate(compose("generate", own)).exists()
    with pytest.raises(NotFiniteError, match=r"loud.safetensors: not finite: entropy .*or overflow in this dtype"):
        generate(compose("generate", [*own, "backbone.dtype=float16"]))


def test_published_weights_are_refused_too(tmp_path: Path) -> None:
    from orderrl.backbones.registry import build_backbone

    shape = {"height": 4, "width": 4, "block_size": 2, "dim": 32, "layers": 1, "heads": 2, "vocab_size": 5}
    weights = dict(build_backbone("randar_l", shape=shape).state_dict())
    torch.save(weights, tmp_path / "good.pt")
    load_backbone("randar_l", tmp_path / "good.pt", shape=shape)
    weights["norm.weight"] = torch.full_like(weights["norm.weight"], math.nan)
    torch.save(weights, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad.pt: not finite: norm.weight"):
        load_backbone("randar_l", tmp_path / "bad.pt", shape=shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_a_checkpoint_that_is_not_finite_is_not_written(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"good": torch.ones(2), "bad": torch.tensor([1.0, math.nan]).to(dtype)}
    with pytest.raises(NotFiniteError, match="not finite: bad"):
        save_checkpoint(tmp_path / "x.safetensors", tensors, {"kind": "planner"})
    assert not list(tmp_path.iterdir())


def test_a_planner_whose_scores_overflow_is_not_written(tmp_path: Path) -> None:
    planner = OrderHead(SHAPE)
    with torch.no_grad():
        for parameter in planner.parameters():
            parameter.fill_(1e30)  # finite itself
    with pytest.raises(NotFiniteError, match="diverged"):
        save_planner(tmp_path / "x.safetensors", planner, TRAINED)
    assert not list(tmp_path.iterdir())


# -- training ---------------------------------------------------------------------------------------------------------


def diverging(job: Job, weight: Tensor, at: int, key: str) -> None:
    """A loop of ten steps whose loss is NaN from a step on, and its weight from the step before."""
    for step in job.steps(10, part={"weight": weight}):
        weight.fill_(math.nan if step + 1 >= at - 1 else 1.0)
        job.log(**{key: math.nan if step + 1 >= at else 1.0, "held_in": math.nan})


@pytest.mark.parametrize("key", ["loss", "loss_random", "held_out_psnr", "return", "kl"])
@pytest.mark.parametrize("seconds", [0, 1000])
def test_training_stops_at_the_first_loss_that_is_not_finite_and_starts_anew(
    key: str, seconds: float, tmp_path: Path
) -> None:
    weight = torch.zeros(1)
    for _ in range(2):  # the next run does not continue on the way to it
        with (
            pytest.raises(NotFiniteError, match=r"diverged: lower its learning rate"),
            Job(tmp_path, "job", seconds) as work,
        ):
            work.store("piece", torch.ones(1)) if not work.has("piece") else None
            diverging(work, weight, 5, key)
        assert len(work.history) <= 5
        assert work.has("piece") and not list(work.folder.glob("state.*"))


def test_a_state_that_is_not_finite_is_never_continued(tmp_path: Path) -> None:
    work = Job(tmp_path, "job", 0)
    weight = torch.ones(1)
    with pytest.raises(NotFiniteError, match=r"state after step 1: not finite: part.weight"):
        for _ in work.steps(3, part={"weight": weight}):
            weight.fill_(math.nan)
    assert not list(work.folder.glob("state.*"))


@pytest.mark.parametrize(
    "agent",
    [
        ["agent=bc", "labels.contexts=16", "agent.steps=6", "agent.batch_size=16", "agent.learning_rate=1e30"],
        ["agent=fitted_q", "agent.images=8", "agent.steps=6", "agent.learning_rate=1e30"],
        [
            "agent=imitation",
            "agent.imitation.steps=6",
            "agent.imitation.num_envs=4",
            "agent.imitation.learning_rate=1e30",
        ],
    ],
    ids=lambda agent: agent[0],
)
def test_a_planner_that_diverges_is_not_published(agent: list[str], tmp_path: Path) -> None:
    places = [f"cache_dir={tmp_path}/cache", f"output_dir={tmp_path}/runs", "planner=one_shot"]
    with pytest.raises(NotFiniteError, match=r"step \d: loss is nan; the training diverged"):
        train(compose("train", [*agent, *places]))
    assert not list(tmp_path.rglob("planner.safetensors"))
    assert not list(tmp_path.rglob("state.*"))


def test_labels_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    work = Job(tmp_path, "labels")
    shards = [range(2), range(2, 4)]

    def make(shard: range) -> dict[str, Tensor]:
        return {"gains": torch.full((2,), math.inf if shard.start else 1.0), "image": torch.arange(2)}

    with pytest.raises(NotFiniteError, match="labels of rows 2 to 3: not finite: gains"):
        make_parts(work, LABELS, shards, make)
    assert len(list(work.folder.glob("labels-*.pt"))) == 1


def test_nested_tensors_are_found_by_their_place() -> None:
    value = {"a": [torch.ones(1), {"b": torch.zeros(2)}], "c": 3, "d": (torch.arange(2),)}
    assert list(leaves(value, Tensor)) == ["a.0", "a.1.b", "d.0"]
    require_finite("here", leaves(value, Tensor) | {"int8": torch.ones(1, dtype=torch.int8)}, "")


# -- a configuration is no larger than its tensors --------------------------------------------------------------------

HOSTILE: dict[Any, list[dict[str, Any]]] = {
    saved_backbone: [
        *({"layers": value} for value in (10**8, 500, 10**30, 1e9, "two", True, None, [2])),
        *({name: 2**31} for name in ("dim", "vocab_size", "num_classes", "multiple_of")),
        *({"height": 10**5, "width": 10**5}, {"height": 10**30}, {"dropout": math.nan}, {"widht": 6}, {"heads": 3}),
        {"vocab_size": 4 * 10**9, "dim": 4 * 10**9},
    ],
    saved_planner: [
        *({"stem": value} for value in (10**9, 900, 1e9, -1, "x")),
        *({name: 2**31} for name in ("dim", "core", "latents", "num_blocks", "num_classes", "reasoning_steps")),
        *({"shape": 1}, {"heads": None}, {"step_cost_range": [1.0]}, {"step_cost_range": "ab"}),
    ],
    saved_tokenizer: [
        *({name: 2**31} for name in ("codebook_size", "codebook_embed_dim", "z_channels")),
        *({"encoder": value} for value in (5, None, {"ch_mult": [1] * 40}, {"ch": 31}, {"num_res_blocks": 10**8})),
        {"encoder": {"ch": 32, "ch_mult": [1, 10**7]}},
    ],
}


@pytest.mark.parametrize(("save", "shape"), [(save, shape) for save, shapes in HOSTILE.items() for shape in shapes])
def test_a_configuration_that_does_not_fit_its_tensors_is_refused_before_anything_is_built(
    save: Callable[[Path], Callable[[Path], Any]],
    shape: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "x.safetensors"
    load = save(path)
    changed(path, **shape)
    largest = 0
    allocate = torch.empty

    def watched(*args: Any, **options: Any) -> Tensor:
        nonlocal largest
        made = allocate(*args, **options)
        largest = max(largest, 0 if made.is_meta else made.numel())
        return made

    monkeypatch.setattr(torch, "empty", watched)
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert largest < 10**6


@pytest.mark.parametrize(
    "described",
    [
        {"agent": "bc"},
        {"agent": {}},
        {"budgets": [2, 1]},
        {"budgets": "1"},
        {"budgets": [99]},
        {"seed": "0"},
        {"name": 3},
    ],
)
def test_a_planner_that_does_not_say_how_it_was_trained_is_refused(described: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"x.safetensors: does not say how it was trained"):
        require_described("x.safetensors", OrderHead(SHAPE), TRAINED | described)


# -- greedy sampling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_temperature_0_takes_the_most_likely_token(filters: dict[str, Any]) -> None:
    logits, uniforms = torch.randn(50, 7), torch.rand(50)
    drawn = sample_tokens(logits, uniforms, Sampling(temperature=0, **filters))
    assert torch.equal(drawn, logits.argmax(-1))
    assert torch.equal(drawn, sample_tokens(logits, uniforms, Sampling(top_k=1)))
    assert (
        int(sample_tokens(torch.zeros(1, 7), torch.tensor([0.9]), Sampling(temperature=0))) == 0
    )  # the first of equals


def test_classifiers_are_saved_finite(tmp_path: Path) -> None:
    from orderrl.metrics.classifier import CLASSIFIERS

    classifier = Classifier(CLASSIFIERS["digits"])
    with torch.no_grad():
        classifier.head.bias[0] = math.nan
    with pytest.raises(NotFiniteError, match=r"head.bias"):
        save_classifier(classifier, tmp_path / "x.safetensors")


def test_wrong_budgets_and_short_rounds_are_refused_before_labels_are_made(tmp_path: Path) -> None:
    places = ["agent=ppo", f"cache_dir={tmp_path}/cache", f"output_dir={tmp_path}/runs"]
    for override, said in (
        ("env.budgets=[1,99]", r"budgets=\(1, 99\) exceed the 16 blocks of the image"),
        (
            "agent.num_envs=256",
            "8 steps of each image a round, but an episode takes up to 16; use frames",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            train(compose("train", [*places, override]))
    assert not (tmp_path / "cache").exists()
