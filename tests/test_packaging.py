"""The wheel: what is inside, and that it neither takes nor is taken by a project's own ``envs`` and ``agents``."""

import json
import os
import re
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("orderrl", "orderrl.envs", "orderrl.agents", "orderrl.configs")
REPORT = f"""
import importlib, json, sys
from importlib import resources
names = {[*PACKAGES, "envs", "agents"]}
found = {{name: importlib.import_module(name).__file__ for name in names}}
found["marker"] = [importlib.import_module(name).MARKER for name in ("envs", "agents")]
found["yaml"] = resources.files("orderrl.configs").joinpath("planner", "latent.yaml").is_file()
found["prefix"] = sys.prefix
print(json.dumps(found))
"""


def _environment(folder: Path) -> Path:
    """A fresh environment that sees the installed dependencies, but no OrderRL of theirs; returns its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    purelib = _run(python, "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # Plain paths only: the dependencies' own .pth files (an editable install of this package) stay unread.
    (Path(purelib) / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


def _run(python: Path, code: str, cwd: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    answer = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@pytest.fixture
def foreign_project(tmp_path: Path) -> Path:
    """A folder with packages ``envs`` and ``agents`` of its own."""
    for name in ("envs", "agents"):
        (tmp_path / "project" / name).mkdir(parents=True)
        (tmp_path / "project" / name / "__init__.py").write_text(f"MARKER = 'my {name}'\n")
    return tmp_path / "project"


def test_the_wheel_holds_code_configuration_and_weights(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"orderrl"}
    assert "orderrl/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for folder, target, pattern in (
        ("envs", "orderrl/envs", "*.py"),
        ("agents", "orderrl/agents", "*.py"),
        ("configs", "orderrl/configs", "**/*.yaml"),
        ("orderrl", "orderrl", "*.py"),
        ("orderrl/weights", "orderrl/weights", "*.safetensors"),
        ("orderrl/report", "orderrl/report", "*"),
    ):
        expected = [path for path in (ROOT / folder).glob(pattern) if path.is_file()]
        assert expected, f"nothing fits {folder}/{pattern}"
        missing = [path for path in expected if f"{target}/{path.relative_to(ROOT / folder).as_posix()}" not in names]
        assert missing == []


def test_all_files_say_the_same_version(wheel: Path) -> None:
    version = re.escape(wheel.name.split("-")[1])
    for name, line in (("orderrl/__init__.py", f'__version__ = "{version}"'), ("CITATION.cff", f"version: {version}")):
        assert re.search(f"^{line}$", (ROOT / name).read_text(), re.MULTILINE), name


def test_every_package_of_the_checkout_is_packaged(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = [path for path in (ROOT / "orderrl").rglob("*.py") if "__pycache__" not in path.parts]
    assert [path for path in modules if path.relative_to(ROOT).as_posix() not in names] == []


def test_the_installed_wheel_lives_beside_a_projects_own_packages(
    wheel: Path, tmp_path: Path, foreign_project: Path
) -> None:
    python = _environment(tmp_path / "environment")
    call = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*call, "--ignore-installed", str(wheel)], check=True, capture_output=True)
    found = json.loads(_run(python, REPORT, cwd=foreign_project))
    for name in PACKAGES:
        assert Path(found[name]).is_relative_to(tmp_path / "environment"), name
    assert found["marker"] == ["my envs", "my agents"]
    for name in ("envs", "agents"):
        assert Path(found[name]).is_relative_to(foreign_project)
    assert found["yaml"]


def test_the_checkout_is_imported_from_its_root_without_being_installed() -> None:
    code = f"import importlib\nfor name in {PACKAGES}: print(importlib.import_module(name).__file__)"
    files = [Path(line) for line in _run(Path(sys.executable), code, cwd=ROOT).splitlines()]
    assert [file.resolve().parent for file in files] == [ROOT / name.rpartition(".")[2] for name in PACKAGES]


def test_importing_the_package_is_cheap_and_registers_the_environment() -> None:
    code = (
        "import sys, gymnasium, orderrl\n"
        "assert 'torch' not in sys.modules and 'hydra' not in sys.modules\n"
        "spec = gymnasium.spec('orderrl/NextBlock-v0')\n"
        "assert spec.entry_point == 'orderrl.envs.gymnasium:NextBlockEnv'\n"
        "assert spec.vector_entry_point == 'orderrl.envs.vector:NextBlockVectorEnv'\n"
        "assert set(orderrl.__all__) <= set(dir(orderrl))\n"
        "assert callable(orderrl.compose)\n"
    )
    _run(Path(sys.executable), code, cwd=ROOT)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import orderrl

    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = orderrl.nothing_of_the_kind
