"""No file runs code: every loader of the package is fed pickles that would, and new loaders must be listed here."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import orderrl
from orderrl import compose
from orderrl.agents.policies import POLICIES
from orderrl.agents.registry import make_policy
from orderrl.backbones import backbone_fingerprint, load_backbone, save_backbone
from orderrl.backbones.registry import BACKBONES
from orderrl.data import load_token_set
from orderrl.data.classes import class_ids
from orderrl.data.encode import tokenize_folder
from orderrl.data.folder import FolderConfig, read_image
from orderrl.envs.reward import OBJECTIVES
from orderrl.evaluation.policies import own_order
from orderrl.evaluation.runs import open_evaluation, save_results
from orderrl.labels import label_columns, open_labels
from orderrl.metrics.classifier import load_classifier
from orderrl.metrics.clip_score import load_clip
from orderrl.metrics.features import extract_features
from orderrl.metrics.images import ImageFolder
from orderrl.metrics.references import open_reference
from orderrl.planner import OrderHead, PlannerConfig, load_planner, save_planner
from orderrl.runtime import registry
from orderrl.runtime.cache import Cache
from orderrl.runtime.checkpoint import load_checkpoint
from orderrl.runtime.job import Job
from orderrl.runtime.jsonfile import read_json
from orderrl.runtime.storage import manifest, write_sealed
from orderrl.runtime.tables import TableWriter, open_table
from orderrl.runtime.weights import read_state
from orderrl.tokenizers import load_tokenizer
from orderrl.tokenizers.registry import TOKENIZERS
from orderrl.verification.fixture import load_fixture
from tests.helpers import tiny_backbone
from tests.tokenizers.helpers import image_folder, save_tiny_vq, tiny_vq

IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
TABLE = {name: torch.zeros(2, *column.shape, dtype=column.dtypes[-1]) for name, column in label_columns(9, 32).items()}


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def attacks(mark: Path) -> dict[str, bytes]:
    """Contents of files that make a folder in a reader that unpickles."""
    payload = Payload(mark)
    saved, legacy, arrays, archive = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"model": payload}, saved)
    torch.save({"model": payload}, legacy, _use_new_zipfile_serialization=False)
    np.save(arrays, np.array([payload], dtype=object), allow_pickle=True)
    np.savez(archive, **{name: np.array([payload], dtype=object) for name in ("mu", "sigma", "arr_0")})  # type: ignore[arg-type]
    return {
        "pickle": pickle.dumps(payload),
        "pickle in a dictionary": pickle.dumps({"step": payload, "model": payload, "mu": payload}),
        "torch.save": saved.getvalue(),
        "torch.save before 1.6": legacy.getvalue(),
        "npy of objects": arrays.getvalue(),
        "npz of objects": archive.getvalue(),
    }


def test_the_attacks_work_where_nobody_takes_care(tmp_path: Path) -> None:
    """Otherwise the tests below would prove nothing."""
    readers: dict[str, Callable[[io.BytesIO], Any]] = {
        "pickle": pickle.load,
        "torch": lambda file: torch.load(file, weights_only=False),
        "npy": lambda file: np.load(file, allow_pickle=True),
        "npz": lambda file: np.load(file, allow_pickle=True)["mu"],
    }
    for name, content in attacks(tmp_path / "mark").items():
        readers[name.split(".")[0].split(" ")[0]](io.BytesIO(content))
        (tmp_path / "mark").rmdir()


# -- loaders of single files ------------------------------------------------------------------------------------------


def _piece(path: Path) -> Any:
    """A piece of an unfinished job whose name has the right checksum."""
    with Job(path.parent, "job") as work:
        shutil.copyfile(path, work.folder / f"labels.{work.checksum('labels', path)}.pt")
        assert work.has("labels")
        return work.load("labels")


def _clip(path: Path) -> Any:
    open_clip = pytest.importorskip("open_clip")
    tiny = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (path.parent / "tiny-hostile.json").write_text(
        json.dumps({"embed_dim": 16, "vision_cfg": tiny, "text_cfg": text}), encoding="utf-8"
    )
    open_clip.add_model_config(path.parent / "tiny-hostile.json")
    return load_clip("tiny-hostile", str(path))


def _local_dir(path: Path) -> Any:
    """A folder of timm whose weights are the file."""
    config = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": {"num_classes": 3}}
    (path.parent / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return extract_features(IMAGES, f"timm:local-dir:{path.parent}")


def _index(path: Path) -> Any:
    """Shards of published weights."""
    index = path.parent / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": path.name}}), encoding="utf-8")
    return read_state(index)


def _fixture(path: Path) -> Any:
    path.with_suffix(".json").write_bytes(path.read_bytes())
    return load_fixture(path)


def _sealed(path: Path) -> Any:
    folder = path.parent / "planners" / "k"
    folder.mkdir(parents=True)
    shutil.copyfile(path, folder / "key.json")
    assert Cache(path.parent).find("planners", "k") is None and Cache(path.parent).newest("planners") is None


LOADERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "checkpoint": ("x.safetensors", lambda path: load_checkpoint(path, "planner")),
    "planner": ("x.safetensors", load_planner),
    "backbone": ("x.safetensors", load_backbone),
    "published backbone": ("x.pt", lambda path: load_backbone("llamagen_b", path)),
    "classifier": ("x.safetensors", lambda path: load_classifier("digits", path)),
    "tokeniser": ("x.safetensors", load_tokenizer),
    "published tokeniser": ("x.pt", lambda path: load_tokenizer("vq16", path)),
    "weights .pt": ("x.pt", read_state),
    "weights .pth": ("x.pth", read_state),
    "weights .bin": ("x.bin", read_state),
    "weights .ckpt": ("x.ckpt", read_state),
    "weights .safetensors": ("x.safetensors", read_state),
    "shards of weights": ("x.bin", _index),
    "piece of a job": ("x.pt", _piece),
    "statistics .npz": ("x.npz", lambda path: open_reference(path, "inception-v3-compat")),
    "statistics .pt": ("x.pt", lambda path: open_reference(path, "inception-v3-compat")),
    "Inception weights": ("x.pth", lambda path: extract_features(IMAGES, "inception-v3-compat", path)),
    "VGG weights": ("x.pth", lambda path: extract_features(IMAGES, "vgg16", path)),
    "CLIP features": ("x.pt", lambda path: extract_features(IMAGES, "clip-vit-b-32", path)),
    "timm checkpoint": ("x.pth", lambda path: extract_features(IMAGES, f"timm:test_resnet:{path}")),
    "timm folder .bin": ("pytorch_model.bin", _local_dir),
    "timm folder .safetensors": ("model.safetensors", _local_dir),
    "CLIP score .pt": ("x.pt", _clip),
    "CLIP score .npz": ("x.npz", _clip),
    "fixture": ("x.safetensors", _fixture),
    "JSON": ("x.json", read_json),
    "key of the cache": ("x.json", _sealed),
    "class ids": ("x.json", lambda path: class_ids(str(path))),
    "image": ("x.png", read_image),
    "images of a folder": ("x.png", lambda path: ImageFolder(path.parent)[0]),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_loader_of_files_runs_nothing(loader: str, tmp_path: Path) -> None:
    name, load = LOADERS[loader]
    for number, content in enumerate(attacks(tmp_path / "mark").values()):
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        path.write_bytes(content)
        try:
            load(path)
        except (ValueError, OSError) as error:
            assert str(tmp_path) in str(error) or "x.png" in str(error), "the line names the file"
        else:
            assert loader == "key of the cache"
        assert not (tmp_path / "mark").exists()


# -- loaders of folders -----------------------------------------------------------------------------------------------


def _labels(folder: Path) -> tuple[Path, Callable[[], Any]]:
    backbone = tiny_backbone()
    cache = Cache(folder)
    description = {"backbone": backbone_fingerprint(backbone)}
    with cache.store("labels", "k", description) as inside, TableWriter(inside / "contexts") as table:
        table.append(TABLE)
    found = cache.folder("labels", "k")
    assert len(open_labels(found, backbone)) == 2
    return found / "contexts", lambda: open_labels(found, backbone)


def _table(folder: Path) -> tuple[Path, Callable[[], Any]]:
    with TableWriter(folder / "t") as table:
        table.append(TABLE)
    return folder / "t", lambda: open_table(folder / "t")


def _token_set(folder: Path) -> tuple[Path, Callable[[], Any]]:
    images = FolderConfig(str(image_folder(folder / "images", per_class=5)), image_size=8)
    made = tokenize_folder(tiny_vq(), images, folder / "set", save_tiny_vq(folder / "vq.safetensors"))

    def load() -> None:
        described = json.loads((made / "tokens.json").read_text())
        for name, entry in described["shards"].items():  # an attacker can compute checksums, too
            for kind in ("tokens", "labels"):
                entry["sha256"][kind] = sha256((made / f"{name}.{kind}.npy").read_bytes()).hexdigest()
        described.pop("sha256")
        write_sealed(made / "tokens.json", described)
        for split in ("backbone", "planner", "test"):
            data = load_token_set(made, split)
        data.images(data.tokens[:1])

    load()
    return made, load


def _evaluation(folder: Path) -> tuple[Path, Callable[[], Any]]:
    folder = folder / "run"
    folder.mkdir()
    save_results(folder, {"identity": {}, "protocol": {}, "rows": []}, [])

    def load() -> Any:
        results = json.loads((folder / "results.json").read_text()) | {
            "files": manifest(folder, "per_image.safetensors")
        }
        results.pop("sha256")
        write_sealed(folder / "results.json", results)
        return open_evaluation(folder)

    load()
    return folder, load


FOLDERS = {"labels": _labels, "table": _table, "token set": _token_set, "evaluation": _evaluation}
BESIDE = ("other.pickle", "_tensordict.pkl", "data.pkl")


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_loader_of_folders_runs_nothing_whatever_its_files_hold(kind: str, tmp_path: Path) -> None:
    """Every file in turn holds every attack; checksums that anyone can compute are right."""
    folder, load = FOLDERS[kind](tmp_path)
    for name in BESIDE:
        (folder / name).write_bytes(attacks(tmp_path / "mark")["pickle in a dictionary"])
    load()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in BESIDE):
        original = path.read_bytes()
        for name in ("pickle", "torch.save", "npy of objects"):
            path.write_bytes(attacks(tmp_path / "mark")[name])
            try:
                load()
            except (ValueError, OSError) as error:
                assert str(tmp_path) in str(error) or isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
            assert not (tmp_path / "mark").exists(), path
        path.write_bytes(original)


def test_a_table_that_says_it_holds_python_objects_is_refused(tmp_path: Path) -> None:
    """What `TensorDict.load_memmap` unpickles in silence."""
    folder, load = _labels(tmp_path)
    described = {"_type": "<class 'tensordict.tensorclass.NonTensorData'>"}
    (folder / "meta.json").write_text(json.dumps(described))
    (folder / "other.pickle").write_bytes(pickle.dumps({"data": Payload(tmp_path / "mark")}))
    with pytest.raises(ValueError, match=r"meta\.json: describes no table"):
        load()
    assert not (tmp_path / "mark").exists()


def test_a_run_is_configured_by_plain_values(tmp_path: Path) -> None:
    """YAML of a run that is read again makes no objects."""
    (tmp_path / "config.yaml").write_text(f"x: !!python/object/apply:os.mkdir ['{tmp_path / 'mark'}']\n")
    with pytest.raises(Exception, match="could not determine a constructor"):
        OmegaConf.load(tmp_path / "config.yaml")
    assert not (tmp_path / "mark").exists()


# -- names of code ----------------------------------------------------------------------------------------------------

PART = "hostile_part:made"
ORIGIN = {"order": "planner.safetensors", "label": "x", "seed": 0, "start": PART, "start_fingerprint": "abc"}
TRAINED = {"agent": {"name": "bc"}, "objective": "context", "seed": 0, "budgets": [1], "backbone": "abc"}


def _planner_file(folder: Path, **changes: Any) -> None:
    planner = OrderHead(PlannerConfig.for_backbone(tiny_backbone(), dim=16, stem=1, heads=2))
    save_planner(folder / "planner.safetensors", planner, TRAINED | changes)


def _of_a_specialist(folder: Path, **changes: Any) -> Any:
    save_backbone(folder / "x.safetensors", tiny_backbone(), {"origin": ORIGIN | changes})
    specialist = load_backbone(folder / "x.safetensors")
    return make_policy(own_order(specialist) or "raster", specialist)


def _named_policy(folder: Path) -> Any:
    return _of_a_specialist(folder, order=PART)


def _named_start(folder: Path) -> Any:
    _planner_file(folder)
    return _of_a_specialist(folder)


def _named_objective(folder: Path) -> Any:
    _planner_file(folder, objective=PART)
    return make_policy(str(folder / "planner.safetensors"), tiny_backbone())


def _named_tokenizer(folder: Path) -> Any:
    made, _ = _token_set(folder)
    described = json.loads((made / "tokens.json").read_text())
    described["identity"]["tokenizer"]["name"] = PART
    described.pop("sha256")
    write_sealed(made / "tokens.json", described)
    data = load_token_set(made, "test")
    return data.images(data.tokens[:1])


NAMED = {"policy": _named_policy, "start": _named_start, "objective": _named_objective, "tokeniser": _named_tokenizer}


@pytest.mark.parametrize("what", NAMED)
def test_a_file_that_names_code_runs_it_only_where_the_user_trusts_it(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hostile_part.py").write_text(
        f"from pathlib import Path\n\nPath({str(tmp_path / 'mark')!r}).mkdir()\n\n\ndef made(*given):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hostile_part", raising=False)
    for number in "12":
        (tmp_path / number).mkdir()
    trusted: set[str] = set()
    monkeypatch.setattr(registry, "_trusted", trusted)
    for known in (POLICIES, OBJECTIVES, TOKENIZERS, BACKBONES):
        monkeypatch.setattr(known, "members", dict(known.members))
    said = f"names the .* '{PART}', and files run no code: if it is yours, set trust=.{PART}"
    if what == "objective":  # which acting does not need
        assert NAMED[what](tmp_path / "1").objective is None
        assert re.search(said, capsys.readouterr().out)
    else:
        with pytest.raises(ValueError, match=said):
            NAMED[what](tmp_path / "1")
    assert not (tmp_path / "mark").exists()
    compose("generate", [f"trust=[{PART}]"])
    assert trusted == {PART}
    with suppress(ValueError):  # it makes nothing
        NAMED[what](tmp_path / "2")
    assert (tmp_path / "mark").is_dir()


# -- no other loader --------------------------------------------------------------------------------------------------

READERS = {
    "load", "load_file", "safe_open", "open_memmap", "memmap", "load_memmap", "fromfile", "from_file", "from_filename",
    "loads", "open", "unsafe_load", "full_load", "load_all", "load_state_dict_from_url", "create_feature_extractor",
    "create_model", "create_model_from_pretrained",
}  # fmt: skip
"""Functions of libraries that read files."""
KNOWN = {
    "runtime/weights.py", "data/classes.py", "data/images.py", "data/token_files.py", "evaluation/runs.py",
    "metrics/clip_score.py", "metrics/extractors.py", "metrics/recognisability.py", "metrics/references.py",
    "evaluation/transitions.py", "runtime/cache.py", "runtime/checkpoint.py", "runtime/job.py", "runtime/jsonfile.py",
    "runtime/loggers.py", "runtime/run.py", "runtime/storage.py", "runtime/tables.py", "verification/fixture.py",
}  # fmt: skip
"""Modules whose loaders are in this file's lists."""


@cache
def _calls() -> list[tuple[str, str, ast.Call]]:
    """Calls of functions of the package: module, dotted name, call."""
    root = Path(orderrl.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                found.append((path.relative_to(root).as_posix(), ast.unparse(node.func), node))
    return found


def test_files_are_read_in_known_modules_alone() -> None:
    pieces = ("job.load", "work.load")  # of a job's folder
    reading = {module for module, name, _ in _calls() if name.rpartition(".")[2] in READERS and name not in pieces}
    assert reading - KNOWN == set(), "list the loader in this file and feed it the attacks"


def test_nothing_that_runs_code_is_called() -> None:
    for module, name, call in _calls():
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load":
            assert options.get("weights_only") == "True", module
        if name in ("np.load", "numpy.load"):
            assert options.get("allow_pickle") == "False", module
        assert name.split(".")[0] not in ("pickle", "joblib", "dill", "cloudpickle", "marshal", "shelve"), module
        assert name not in ("eval", "exec", "TensorDict.load_memmap", "torch.jit.load", "yaml.load"), module
