"""Damage to every kind of file that the package writes: refused by its path, made again with a line, or harmless.

A case damages one file and uses what it belongs to. The use must give exactly what it gave before, or refuse and name
the file. `make test` tries some eighty cases, `make test-slow` more than 1,200.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from orderrl import compose
from orderrl.backbones import backbone_fingerprint, load_backbone, save_backbone
from orderrl.backbones.origin import Origin
from orderrl.data import load_token_set
from orderrl.data.encode import tokenize_folder
from orderrl.data.folder import SPLITS, FolderConfig
from orderrl.distillation import ImageOrders
from orderrl.envs.core import CoreConfig
from orderrl.evaluation.policies import own_order
from orderrl.evaluation.rows import Evaluated
from orderrl.evaluation.runs import open_evaluation, save_results
from orderrl.evaluation.transitions import record_dataset
from orderrl.factory import setup_of
from orderrl.labels import find_or_make_labels
from orderrl.metrics.classifier import load_classifier, save_classifier
from orderrl.metrics.references import Gaussian, Reference, open_reference
from orderrl.partial_classifier import ClassifierConfig, find_or_train_classifier
from orderrl.planner import OrderHead, PlannerConfig, load_planner, save_planner
from orderrl.runtime.cache import Cache
from orderrl.runtime.job import Job
from orderrl.runtime.storage import checksum
from orderrl.runtime.tables import open_table
from orderrl.runtime.weights import weights_fingerprint
from orderrl.tokenizers import load_tokenizer
from orderrl.training import newest_planner
from tests.helpers import save_reference, tiny_backbone, tiny_images
from tests.jobs import trained
from tests.tokenizers.helpers import image_folder, save_tiny_vq, tiny_vq

DAMAGES = ("flipped", "truncated", "emptied", "swapped", "deleted")
AGAIN = "again"  # in the line that says that something is made again


@dataclass
class Kind:
    """Something that the package writes.

    Attributes:
        folder: holds its files and nothing else.
        use: what commands do with it; gives plain values.
        refuses: whether it may be refused, or must be made again.
    """

    folder: Path
    use: Callable[[], Any]
    refuses: bool = True


# -- what is written --------------------------------------------------------------------------------------------------


def labels(home: Path) -> Kind:
    config, backbone = small_training(home)
    found = find_or_make_labels(setup_of(config, backbone))
    names = sorted(path.name for path in (found / "contexts").iterdir())

    def use() -> Any:
        folder = find_or_make_labels(setup_of(config, backbone)) / "contexts"
        return [(folder / name).read_bytes() for name in names]

    return Kind(found, use, refuses=False)


def planner(home: Path) -> Kind:
    config, backbone = small_training(home)
    found = trained(config, backbone)
    return Kind(found.parent, lambda: weights(load_planner(trained(config, backbone))[0]), refuses=False)


def newest(home: Path) -> Kind:
    """Two planners: the older one is taken where the newer one is damaged."""
    config, backbone = small_training(home)
    first = trained(config, backbone)
    config.seed = 1
    second = trained(config, backbone)
    older, newer = (weights(load_planner(path)[0]) for path in (first, second))

    def use() -> Any:
        path = newest_planner(setup_of(config, backbone), "bc")
        assert path is not None
        found = weights(load_planner(path)[0])
        return newer if path == first and found == older else found

    return Kind(second.parent, use, refuses=False)


def small_training(home: Path) -> Any:
    settings = ["labels.contexts=12", "labels.shard_size=4", "labels.batch_size=4", "agent.steps=2", "planner.dim=32"]
    places = ["backbone=digits", f"backbone.name={home / 'tiny.safetensors'}", f"cache_dir={home / 'cache'}"]
    config = compose("train", ["agent=bc", "planner.stem=1", *settings, *places])
    save_backbone(home / "tiny.safetensors", tiny_backbone(8, 8, vocab_size=17, num_classes=10), {})
    return config, load_backbone(home / "tiny.safetensors")


def planner_of_a_path(home: Path) -> Kind:
    config, backbone = small_training(home)
    return checkpoint(home, trained(config, backbone), lambda path: weights(load_planner(path)[0]))


def backbone_of_a_path(home: Path) -> Kind:
    save_backbone(home / "made.safetensors", tiny_backbone(), {})
    return checkpoint(home, home / "made.safetensors", lambda path: backbone_fingerprint(load_backbone(path)))


def orders(home: Path) -> Kind:
    backbone = tiny_backbone()
    source = ImageOrders("low_entropy", backbone, tiny_images(backbone), home / "cache", 3)
    found = Path(source.extract(backbone, 0))
    names = sorted(path.name for path in (found / "orders").iterdir())

    def use() -> Any:
        folder = Path(source.extract(backbone, 0)) / "orders"
        return [(folder / name).read_bytes() for name in names]

    return Kind(found, use, refuses=False)


def oracle(home: Path) -> Kind:
    """The classifier of partly seen images."""
    config = ClassifierConfig(dim=8, depth=1, heads=1, steps=1, batch_size=2)

    def use() -> Any:
        return weights_fingerprint(find_or_train_classifier("digits", config, 0, home / "cache"))

    use()
    (found,) = (home / "cache" / "classifiers").iterdir()
    return Kind(found, use, refuses=False)


def specialist(home: Path) -> Kind:
    """A backbone and the planner that it was made for."""
    folder, backbone = home / "specialist", tiny_backbone()
    save_planner(folder / "planner.safetensors", OrderHead(PlannerConfig.for_backbone(backbone, dim=8, heads=1)), {})
    said = Origin("planner.safetensors", "x", 0, planner=checksum(folder / "planner.safetensors"))
    save_backbone(folder / "backbone.safetensors", backbone, {"origin": said.described()})

    def use() -> Any:
        made = load_backbone(folder / "backbone.safetensors")
        order = own_order(made)
        assert order is not None and order.path is not None
        return backbone_fingerprint(made), weights(load_planner(order.path)[0])

    return Kind(folder, use)


def classifier_of_a_path(home: Path) -> Kind:
    save_classifier(load_classifier("digits"), home / "made.safetensors")
    return checkpoint(
        home, home / "made.safetensors", lambda path: weights_fingerprint(load_classifier("digits", path))
    )


def tokenizer_of_a_path(home: Path) -> Kind:
    made = save_tiny_vq(home / "made.safetensors")
    return checkpoint(home, made, lambda path: load_tokenizer(path).fingerprint)


def checkpoint(home: Path, made: Path, load: Callable[[Path], Any]) -> Kind:
    """A file that the user names, with another one beside it to swap it with."""
    folder = home / "named"
    folder.mkdir()
    (folder / "x.safetensors").write_bytes(made.read_bytes())
    return Kind(folder, lambda: load(folder / "x.safetensors"))


def token_set(home: Path) -> Kind:
    folder = tokens(home)

    def use() -> Any:
        splits = [load_token_set(folder, split) for split in SPLITS]
        return [(data.tokens.tolist(), data.labels.tolist()) for data in splits], pixels(splits[2])

    return Kind(folder, use)


def token_set_of_the_cache(home: Path) -> Kind:
    cache = Cache(home / "cache")
    folder = tokens(home, cache)
    names = sorted(path.name for path in folder.iterdir())

    def use() -> Any:
        assert tokens(home, cache) == folder
        return [(folder / name).read_bytes() for name in names]

    return Kind(folder, use, refuses=False)


def tokens(home: Path, output: Cache | None = None) -> Path:
    if not (home / "images").exists():
        image_folder(home / "images", per_class=5)
        save_tiny_vq(home / "vq.safetensors")
    source = FolderConfig(str(home / "images"), image_size=8)
    return tokenize_folder(tiny_vq(), source, output or home / "set", home / "vq.safetensors", shard_size=4)


def pixels(data: Any) -> Any:
    return data.images(data.tokens[:1]).tolist()


def evaluation(home: Path) -> Kind:
    folder = home / "run"
    folder.mkdir()
    rows = [Evaluated({"policy": name, "gain_auc": 0.5}, {"gain_auc": torch.rand(30)}) for name in ("raster", "bc")]
    save_results(folder, {"identity": {"seed": 0}, "protocol": {"data": "x"}, "rows": [row.row for row in rows]}, rows)

    def use() -> Any:
        found = open_evaluation(folder)
        return found.identity, [(row.row, row.per_image["gain_auc"].tolist()) for row in found.rows]

    return Kind(folder, use)


def transitions(home: Path) -> Kind:
    backbone = tiny_backbone()
    record_dataset(backbone, tiny_images(backbone), Raster(), CoreConfig(), 3, home / "transitions")

    def use() -> Any:
        found = open_table(home / "transitions").flatten_keys()
        return {key: found[key].tolist() for key in sorted(found.keys())}

    return Kind(home / "transitions", use)


class Raster:
    """The first hidden block."""

    def __call__(self, observation: Any, generator: torch.Generator) -> torch.Tensor:
        return observation["action_mask"].int().argmax(-1)


def pieces(home: Path) -> Kind:
    def use() -> Any:
        work = Job(home, "job")
        return [work.piece(f"row-{number}", partial(torch.arange, number, 50)).tolist() for number in (0, 1)]

    use()
    return Kind(home / "unfinished" / "job", use, refuses=False)


def state(home: Path) -> Kind:
    """Of a training loop: a damaged one is refused, because the steps before it are lost."""

    def use() -> Any:
        values: dict[str, Any] = {"loss": 1.0}
        work = Job(home, "job", seconds=0)
        for _ in work.steps(4, values=values):
            values["loss"] /= 2
            if len(list(work.folder.glob("state.*"))) and stop:
                break
        return values

    stop: list[bool] = [True]
    use()
    stop.clear()
    before = {path: path.read_bytes() for path in (home / "unfinished" / "job").iterdir()}

    def use_and_restore() -> Any:
        try:
            return use()
        finally:
            for path in (home / "unfinished" / "job").glob("state.*"):
                if path not in before:
                    path.unlink()

    return Kind(home / "unfinished" / "job", use_and_restore)


def reference(home: Path) -> Kind:
    (home / "reference").mkdir()
    path = home / "reference" / "x.npz"
    gaussian = Gaussian(torch.rand(6).numpy(), torch.eye(6).numpy())
    save_reference(path, Reference("x", "inception-v3-compat", gaussian))

    def use() -> Any:
        found = open_reference(path, "inception-v3-compat").pooled
        return found.mean.tolist(), found.covariance.tolist()

    return Kind(path.parent, use)


def weights(module: torch.nn.Module) -> dict[str, Any]:
    return {key: value.tolist() for key, value in module.state_dict().items()}


KINDS: dict[str, Callable[[Path], Kind]] = {
    make.__name__: make
    for make in (
        *(labels, planner, newest, planner_of_a_path, backbone_of_a_path, classifier_of_a_path, tokenizer_of_a_path),
        *(orders, oracle, specialist),
        *(token_set, token_set_of_the_cache, evaluation, transitions, pieces, state, reference),
    )
}


Made = tuple[Kind, dict[Path, bytes], Any]


# -- damaging it ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Every kind, made when it is asked for first: itself, its files, and what its use gives."""
    found: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in found:
            kind = KINDS[name](tmp_path_factory.mktemp(name))
            files = {path: path.read_bytes() for path in sorted(kind.folder.rglob("*")) if path.is_file()}
            found[name] = kind, {path: content for path, content in files.items() if path.name != ".lock"}, kind.use()
        return found[name]

    return make


def damaged(how: str, content: bytes, others: list[bytes], source: random.Random) -> bytes | None:
    """Another content than before; None is no file."""
    if how == "flipped":
        place = source.randrange(len(content))
        return content[:place] + bytes([content[place] ^ (1 << source.randrange(8))]) + content[place + 1 :]
    if how == "truncated":
        return content[: source.randrange(1, len(content))]
    if how == "swapped":
        return source.choice([other for other in others if other != content] or [content[::-1]])
    return b"" if how == "emptied" else None


def try_case(made: Made, how: str, seed: int, capsys: Any) -> str:
    """Damage one file, use the kind, put everything back; "refused", "made again" or "harmless"."""
    kind, files, wanted = made
    source = random.Random(f"{how} {seed}")
    path = source.choice([path for path, content in files.items() if len(content) > 1])
    content = damaged(how, files[path], list(files.values()), source)
    path.unlink() if content is None else path.write_bytes(content)
    capsys.readouterr()
    case = f"{path} {how}, seed {seed}"
    try:
        found = kind.use()
    except (ValueError, OSError) as error:
        assert kind.refuses, f"{case}: {error!r}"
        assert str(kind.folder) in str(error) and "\n" not in str(error), f"{case}: {error}"
        return "refused"
    else:
        assert found == wanted, f"{case}: used in silence"
        said = str(kind.folder) in (out := capsys.readouterr().out) and (AGAIN in out or "left out" in out)
        # spaces of JSON, notes for people, times in archives; what is gone and not needed, or made again unasked
        assert said or how == "deleted" or path.suffix in (".json", ".tsv", ".npz", ".safetensors"), f"{case}: {out}"
        return "made again" if said else "harmless"
    finally:
        for other in kind.folder.rglob("*"):
            if other.is_file() and other not in files and other.name != ".lock":
                other.unlink()
        kind.folder.mkdir(parents=True, exist_ok=True)
        for other, before in files.items():
            other.parent.mkdir(parents=True, exist_ok=True)
            if not other.is_file() or other.read_bytes() != before:
                other.write_bytes(before)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_refused_made_again_or_harmless(name: str, how: str, made: Any, capsys: Any) -> None:
    outcome = try_case(made(name), how, 0, capsys)
    if how == "emptied":
        assert outcome != "harmless" or name == "token_set"  # its list of images is for people


@pytest.mark.very_slow
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", KINDS)
def test_nothing_damaged_is_used_in_silence(name: str, how: str, made: Any, capsys: Any) -> None:
    for seed in range(1, 31 if how in ("flipped", "swapped") else 6):
        try_case(made(name), how, seed, capsys)
