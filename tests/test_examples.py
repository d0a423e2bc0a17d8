"""The commands of the example pages, run in order on tiny files of the same layout."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from orderrl.backbones import load_backbone, registry
from orderrl.backbones.registry import new_backbone
from orderrl.data import load_split
from orderrl.evaluate import evaluate
from orderrl.generate import generate
from orderrl.label import label
from orderrl.oracle import LabelConfig, label_contexts, random_contexts
from orderrl.pretrain import pretrain
from orderrl.runtime.config import compose
from orderrl.tokenize import tokenize
from orderrl.tokenizers import PRESETS, StackConfig, VQConfig, build_tokenizer
from orderrl.train import train

EXAMPLES = Path(__file__).parents[1] / "examples"
SYNSETS = ("n01440764", "n02099601", "n02123045")  # ImageNet's classes 0, 207 and 281
SIDE = 4
CODES = 512
SHAPE = {"height": SIDE, "width": SIDE, "vocab_size": CODES, "num_classes": 1000}
SHAPE |= {"dim": 16, "layers": 2, "heads": 2, "multiple_of": 16}
STACK = StackConfig(ch=32, num_res_blocks=1)  # 16 pixels a token, as the published one

# What makes every command small; the rest is as on the page.
SMALL: dict[str, list[str]] = {
    "tokenize": ["data.image_size=64", "batch_size=4"],
    "label": ["labels.contexts=16"],
    "train": ["labels.contexts=16", "agent.steps=4"],
    "evaluate": [
        "labels.contexts=16", "eval.images=2", "eval.states=4", "eval.reference_images=2", "eval.resamples=20",
        "eval.policies=[raster,random,oracle]",
    ],
    "generate": ["n=2", "labels.contexts=16", "steps=5"],
    "pretrain": ["training.steps=2", "training.batch_size=2", "training.warmup=1"],
}  # fmt: skip
MASKED_PART = {"embed_dim": 32, "depth": 1, "num_heads": 2}
PPO_SMALL = [
    "labels.contexts=16",
    "agent.num_envs=4",
    "agent.group_size=4",
    "agent.frames_per_batch=64",
    "agent.iterations=1",
]


def commands(page: str) -> list[list[str]]:
    """Every `python -m orderrl.…` line of a page's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", (EXAMPLES / page).read_text(encoding="utf-8"), re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("python -m")]
    return [[line[2].removeprefix("orderrl."), *line[3:]] for line in lines]


def small(command: str, arguments: list[str]) -> list[str]:
    """The page's arguments with everything large replaced."""
    changes = PPO_SMALL if "agent=ppo" in arguments else SMALL[command]
    model = next((item.removeprefix("backbone=") for item in arguments if item.startswith("backbone=")), None)
    if model is not None:
        block = SIDE if model.startswith("llamagen") else 2
        changes = [*changes, f"backbone.shape={SHAPE | {'block_size': block}}".replace("'", "")]
    if model is not None and model.startswith("llamagen") and command == "pretrain":
        changes = [*changes, "backbone.order_robust_block_size=2"]
    changes = [*changes, "device=cpu"]
    kept = [item for item in arguments if item.split("=")[0] not in {change.split("=")[0] for change in changes}]
    return [*kept, *changes]


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders and weights as the page names them: ImageNet, the tokeniser, RandAR and LlamaGen."""
    pixels = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name in SYNSETS:
            folder = tmp_path / "imagenet" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                array = pixels.integers(0, 256, (70, 80, 3), dtype=np.uint8)
                Image.fromarray(array).save(folder / f"{split}_{i}.JPEG", format="JPEG")
    monkeypatch.setitem(PRESETS, "vq16", VQConfig(codebook_size=CODES, encoder=STACK, decoder=STACK))
    torch.manual_seed(0)
    torch.save({"model": build_tokenizer(PRESETS["vq16"], "vq16").state_dict()}, tmp_path / "vq_ds16_c2i.pt")
    randar = new_backbone("randar", SHAPE | {"block_size": 1})
    torch.nn.init.normal_(randar.output.weight)  # type: ignore[union-attr, arg-type]
    save_file(randar.state_dict(), tmp_path / "randar_xl.safetensors")
    llamagen = new_backbone("llamagen", SHAPE | {"block_size": SIDE})
    torch.save({"model": llamagen.state_dict()}, tmp_path / "c2i_B_256.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORDERRL_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
def test_imagenet_with_randar_xl(layout: Path) -> None:
    ran, result = [], Path()
    for command, *arguments in commands("imagenet_randar_xl.md"):
        arguments = small(command, arguments)
        if "agent=ppo" in arguments:  # from the small clone, not from one of the page's size
            arguments.append(f"agent.start={result}")
        config = compose(command, arguments)
        result = getattr(import_module(f"orderrl.{command}"), command)(config)
        assert Path(result).exists()
        ran.append(command)
    assert ran == ["generate", "tokenize", "label", "train", "train", "evaluate", "generate", "generate", "pretrain"]
    assert len(list(layout.glob("runs/generate/*/images.png"))) == 3
    described = json.loads(next(layout.glob("runs/evaluate/*/results.json")).read_text())["protocol"]["data"]
    assert described.endswith("3 of 1000 classes, samples of these alone")
    assert list(layout.glob("runs/evaluate/*/report.html"))


@pytest.mark.slow
def test_raster_only_backbones_are_refused_with_the_command(layout: Path) -> None:
    tokenize(compose("tokenize", small("tokenize", commands("imagenet_randar_xl.md")[1][1:])))
    arguments = ["backbone=llamagen_b", "backbone.path=c2i_B_256.pt", "data=tokens", "data.path=imagenet_tokens"]
    with pytest.raises(ValueError, match=r"make it order-robust with `python -m orderrl.pretrain backbone=llamagen_b"):
        label(compose("label", small("label", arguments)))


def test_an_own_backbone_keeps_the_promises_and_trains_a_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worked example: checked, registered, labelled and played in the environment."""
    monkeypatch.setattr(registry.BACKBONES, "members", dict(registry.BACKBONES.members))
    spec = importlib.util.spec_from_file_location("own_backbone", EXAMPLES / "own_backbone.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "own_backbone", module)
    spec.loader.exec_module(module)
    module.main()
    env = gymnasium.make("orderrl:orderrl/NextBlock-v0", backbone="masked_tokens", split="planner")
    _, info = env.reset(seed=0)
    ended, total = False, 0.0
    while not ended:
        _, reward, ended, _, info = env.step(int(info["action_mask"].argmax()))
        total += float(reward)
    assert np.isfinite(total)
    data = load_split("digits", "planner")
    settings = LabelConfig(contexts=8)
    contexts = random_contexts(settings, len(data), 16)
    backbone = load_backbone("masked_tokens")
    parts = list(label_contexts(backbone, data.tokens, data.labels, settings, contexts))
    assert sum(len(part["gains"]) for part in parts) == 8
    assert all(part["gains"].isfinite().all() for part in parts)


@pytest.mark.slow
def test_pretrain_goes_from_an_image_folder_to_a_backbone(layout: Path) -> None:
    """Tokeniser, tokens and backbone in one command; the second time tokeniser and tokens come from the cache."""
    overrides = [
        "backbone=small", "data=folder", "data.root=imagenet/train", "data.test_root=imagenet/val",
        "data.image_size=16", "tokenizer=small", "tokenizer.training.steps=2", "tokenizer.training.batch_size=2",
        "tokenizer.training.warmup=1", "tokenizer.model.codebook_size=16", "backbone.model.dim=16",
        "backbone.model.heads=2", "training.steps=2", "training.batch_size=2",
        "training.warmup=1",
    ]  # fmt: skip
    first = pretrain(compose("pretrain", overrides))
    made = sorted((layout / "cache").rglob("*.npy"))
    assert made and load_backbone(first).geometry.num_tokens == 16
    stamps = [path.stat().st_mtime_ns for path in made]
    pretrain(compose("pretrain", overrides))
    assert [path.stat().st_mtime_ns for path in sorted((layout / "cache").rglob("*.npy"))] == stamps


@pytest.mark.slow
def test_a_masked_model_goes_through_the_main_job(layout: Path) -> None:
    """Pretrained, labelled, cloned, evaluated in DiffLoss units; what needs probabilities is refused first."""
    shape = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in MASKED_PART.items()}
    shape |= {"diffloss_d": 1, "diffloss_w": 32, "num_sampling_steps": 5}
    small = ["training.steps=2", "training.batch_size=4", "training.warmup=1"]
    small += [f"backbone.model.{key}={value}" for key, value in shape.items()]
    path = pretrain(compose("pretrain", ["backbone=digits_mar", "data=digits_patches", *small]))
    job = ["backbone=digits_mar", f"backbone.name={path}", "data=digits_patches", "labels.contexts=24"]
    train(compose("train", [*job, "agent=bc", "agent.steps=4"]))
    policies = "eval.policies=[raster,random,oracle]"
    small_eval = ["eval.images=4", "eval.states=8", "eval.reference_images=2", "eval.resamples=20", policies]
    folder = evaluate(compose("evaluate", [*job, "eval=planning", *small_eval]))
    results = json.loads((folder / "results.json").read_text())
    assert all(row["decode_nll"] is None for row in results["rows"])
    assert all(row["decode_loss"] > 0 for row in results["rows"] if row["policy"] != "oracle")
    assert "DiffLoss units" in results["protocol"]["losses"]
    for refused in (["labels=expected"], ["labels=kl"]):
        with pytest.raises(ValueError, match="needs token probabilities"):
            label(compose("label", [*job, *refused]))
    with pytest.raises(ValueError, match="policy 'lookahead' needs token probabilities"):
        evaluate(compose("evaluate", [*job, "eval=planning", "eval.policies=[lookahead]"]))


@pytest.mark.slow
def test_a_raster_model_is_evaluated_and_draws(layout: Path) -> None:
    """Its only row is its own; both its samplers are the published one."""
    tokenize(compose("tokenize", small("tokenize", commands("imagenet_randar_xl.md")[1][1:])))
    job = ["backbone=llamagen_b", "backbone.path=c2i_B_256.pt", "data=tokens", "data.path=imagenet_tokens"]
    folder = evaluate(compose("evaluate", [*small("evaluate", job), "eval=planning"]))
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["token_raster"] and rows[0]["decode_nll"] > 0
    for policy in ("raster", "published"):
        drawn = generate(compose("generate", [*small("generate", job), f"policy={policy}", "guidance=2"]))
        assert (drawn / "images.png").exists()
