"""Every code block of README, docs and examples: Python runs, commands and their arguments exist."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.run import get_args_parser
from torch_fidelity import defaults as torch_fidelity_defaults

from orderrl.agents.bc import TARGETS
from orderrl.agents.registry import make_policy
from orderrl.backbones import Backbone, load_backbone
from orderrl.backbones.registry import WEIGHTS
from orderrl.configs.schema import COMMANDS
from orderrl.metrics.images import save_images
from orderrl.reproduce import training_config
from orderrl.rollouts import rollouts
from orderrl.runtime.config import compose
from tests.hub import put_in_place_of_the_hub
from tests.registries import keep_registries

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*.md"))]
CHOSEN_BY_COMMANDS = ("newest", "published", "token_raster")  # policies that a command knows, no name in the registry


class Fence(NamedTuple):
    """A code block and where it stands."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def fences(page: Path) -> list[Fence]:
    found = []
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        line = text[: block.start()].count("\n") + 1
        found.append(Fence(str(page.relative_to(ROOT)), line, block.group(2), block.group(3)))
    assert len(found) == len(re.findall(r"^ *```", text, re.MULTILINE)) // 2  # none is lost
    return found


FENCES = [fence for page in PAGES for fence in fences(page)]


def test_every_block_says_what_it_is() -> None:
    assert {fence.language for fence in FENCES} == {"sh", "python", "toml"} and len(FENCES) > 40


# ---------------------------------------------------------------------- commands


def calls() -> list[Any]:
    """Every command line of a shell block: where, and its words, variables and comments left out."""
    found = []
    for fence in FENCES:
        if fence.language == "sh":
            for line in fence.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    del words[0]
                if words:
                    found.append(pytest.param(words, id=f"{fence}-{' '.join(words)[:60]}"))
    return found


class ParsedError(Exception):
    """A program got as far as having read its arguments."""


def reads(main: Callable[[], Any], program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that a program understands its arguments; what it would do then is not done."""
    parse = argparse.ArgumentParser.parse_known_args

    def stop(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        _, unknown = parse(parser, *given, **named)
        assert unknown == []
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(ParsedError):
        main()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages' names stand for: the files whose names stand in the first line of a block."""
    for fence in FENCES:
        if named := re.match(r"# (my_\w+)\.py$", fence.text, re.MULTILINE):
            (tmp_path / f"{named[1]}.py").write_text(fence.text)
            monkeypatch.delitem(sys.modules, named[1], raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    keep_registries(monkeypatch)
    return tmp_path


@pytest.mark.parametrize("words", calls())
def test_a_command_of_the_pages_exists_with_its_arguments(
    words: list[str], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0] == "srun":
        del words[0]
    words = [word.split("|")[0] for word in words if word not in ("…", "...")]  # "a|b" offers a choice
    words = [word.replace("…", "DATE") for word in words]
    program, arguments = words[0], words[1:]
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "fidelity":
        reads(importlib.import_module("torch_fidelity.fidelity").main, program, arguments, monkeypatch)
    elif program == "torchrun":
        options = get_args_parser().parse_args([word.replace("$(hostname)", "host") for word in arguments])
        assert options.module
        check_module(options.training_script, options.training_script_args, monkeypatch)
    elif arguments[0] == "-m":
        assert program == "python"
        check_module(arguments[1], arguments[2:], monkeypatch)
    else:
        assert program == "python" and arguments[0].startswith("examples/")
        monkeypatch.syspath_prepend(ROOT / "examples")
        example = importlib.import_module(Path(arguments[0]).stem)
        reads(example.main, program, arguments[1:], monkeypatch)


def check_module(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m MODULE arguments`: a Hydra application of ours, or a program that reads its arguments itself."""
    command = module.removeprefix("orderrl.")
    if module == "pytest":
        assert all((ROOT / word).is_file() for word in arguments if word.startswith("tests/"))
        return
    if command not in COMMANDS:
        name = f"{module}.__main__" if hasattr(importlib.import_module(module), "__path__") else module
        reads(importlib.import_module(name).main, module, arguments, monkeypatch)
        return
    overrides = [word for word in arguments if not word.startswith(("--", "hydra.", "hydra/", "device="))]
    assert {word for word in arguments if word.startswith("--")} <= {"--multirun"}
    if "--multirun" in arguments:  # the first of the values of each
        overrides = [word if "[" in word else word.split(",")[0] for word in overrides]
    config = compose(command, overrides)
    check_policies(config)


@cache
def shipped(name: str) -> Backbone:
    """A backbone that comes with the package."""
    return load_backbone(name)


def check_policies(config: Any) -> None:
    """Names of policies that a config holds are known to the registry, schedule and all."""
    named = [OmegaConf.select(config, key) for key in ("policy", "agent.order", "agent.start_target", "agent.policy")]
    for key in ("eval.policies", "eval.sampled"):
        named += OmegaConf.select(config, key) or []
    backbone = shipped("canvas" if OmegaConf.select(config, "data.name") == "canvas" else "digits")
    for spec in filter(None, named):
        if spec.startswith(CHOSEN_BY_COMMANDS) or spec in (*TARGETS, "schedule") or ".safetensors" in spec:
            continue
        make_policy(spec, backbone, lambda: torch.arange(backbone.geometry.num_blocks), (1,))


@pytest.mark.parametrize("suite", sorted(path.stem for path in (ROOT / "configs" / "suite").glob("[!_]*.yaml")))
def test_every_training_of_a_suite_composes(suite: str) -> None:
    config = compose("reproduce", [f"suite={suite}"])
    for overrides in config.runs:
        check_policies(training_config(config, list(overrides), 0))
    check_policies(config)


# ---------------------------------------------------------------------- Python

EXECUTED = [fence for fence in FENCES if fence.language == "python"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages' Python reads: generated and real images, and rollouts."""
    folder = tmp_path_factory.mktemp("made")
    generator = torch.Generator().manual_seed(0)
    for name in ("runs/evaluate/DATE/samples/raster", "REAL"):
        save_images(torch.randint(256, (12, 3, 12, 12), generator=generator).byte(), folder / name)
    places = [f"output={folder / 'transitions'}", f"output_dir={folder / 'runs'}", f"cache_dir={folder / 'cache'}"]
    rollouts(compose("rollouts", ["policy=random", "n=4", *places]))
    return folder


@pytest.fixture
def results(files: Path, made: Path) -> Path:
    """The same in a folder of a test's own."""
    shutil.copytree(made, files, dirs_exist_ok=True)
    return files


@pytest.mark.slow
@pytest.mark.parametrize("fence", EXECUTED, ids=str)
def test_python_of_the_pages_runs(fence: Fence, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(results / "minari"))
    if "push_to_hub" in fence.text:
        put_in_place_of_the_hub(results / "hub", monkeypatch)
        for kind, name in (("train", "planner"), ("pretrain", "backbone")):
            shipped = WEIGHTS / ("canvas_planner.safetensors" if kind == "train" else "canvas.safetensors")
            (folder := results / "runs" / kind / "DATE").mkdir(parents=True)
            shutil.copyfile(shipped, folder / f"{name}.safetensors")
        (results / "runs" / "evaluate" / "DATE" / "results.md").write_text("| policy |")
    if "torch_fidelity" in fence.text:  # without processes that read a dozen images
        monkeypatch.setitem(torch_fidelity_defaults.DEFAULTS, "save_cpu_ram", True)
    if "minari" in fence.text:
        pytest.importorskip("minari")
        made = ["policy=random@4", "n=4", "env=likelihood", "minari=orderrl/canvas-random4-v0", "output=null"]
        rollouts(compose("rollouts", [*made, f"cache_dir={results}/cache"]))
    with contextlib.redirect_stdout(sys.stderr):
        exec(compile(fence.text, str(fence), "exec"), {"__name__": "__main__"})


def test_the_readmes_own_policy_plays() -> None:
    (own,) = (fence for fence in EXECUTED if fence.text.startswith("# my_policy.py"))
    space: dict[str, Any] = {}
    exec(compile(own.text, str(own), "exec"), space)
    env = importlib.import_module("orderrl.envs").NextBlockTorchRLEnv(num_envs=2, seed=0)
    state = env.reset()
    for _ in range(3):
        state = env.step(state.set("action", space["nearest_first"](state, torch.Generator())))["next"]
        assert not bool(state["illegal"].any())


def test_masks_are_where_the_pages_say() -> None:
    """Every expression in code marks that begins with `env.` or `info[` works on the pages' environment."""
    gym = importlib.import_module("gymnasium")
    env = gym.make("orderrl:orderrl/NextBlock-v0", objective="context")
    _, info = env.reset(seed=0)
    for text in ((ROOT / "docs" / "environment.md").read_text(), env.unwrapped.__doc__):
        said = {expression for expression in re.findall(r"`((?:env\.|info\[)[^`]*)`", text) if "mask" in expression}
        assert len(said) >= 2
        for expression in said:
            mask = eval(expression, {"env": env, "info": info})
            assert mask.shape == (16,) and mask.all(), expression
