"""Token sets on disk: made once, continued, refused where they don't fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from orderrl.data import load_split, load_token_set
from orderrl.data import token_files as shards
from orderrl.data.encode import tokenize_folder
from orderrl.data.folder import SPLITS, FolderConfig, centre_crop, list_images, read_image
from orderrl.data.mapped import MappedTokens
from orderrl.data.token_files import plan_shards, token_dtype
from orderrl.data.token_set import stratified_order
from orderrl.runtime.storage import read_sealed, write_sealed
from orderrl.tokenizers import VQTokenizer
from tests.tokenizers.helpers import image_folder, save_tiny_vq, tiny_kl, tiny_vq


@pytest.fixture
def source(tmp_path: Path) -> FolderConfig:
    """Twenty images: 14 backbone, 4 planner, 2 test; their mirror images in the backbone split."""
    return FolderConfig(str(image_folder(tmp_path / "images", per_class=10)), image_size=8, flips=True)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_tiny_vq(tmp_path / "tokenizer.safetensors")


@pytest.fixture
def folder(tmp_path: Path, source: FolderConfig, weights: Path) -> Path:
    """A whole token set in shards of 4 images."""
    return make(tmp_path / "set", source, weights)


def make(folder: Path, source: FolderConfig, weights: Path, tokenizer: Any = None, **options: Any) -> Path:
    return tokenize_folder(tokenizer or tiny_vq(), source, folder, weights, **({"shard_size": 4} | options))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def one_by_one(source: FolderConfig, split: str) -> tuple[Tensor, Tensor]:
    """Tokens and labels of a split in stratified order, one image at a time."""
    images = list_images(source).splits[split]
    tokens, labels = [], []
    for name, label in zip(images.names, images.labels, strict=True):
        pixels = np.array(centre_crop(read_image(images.root / name), 8))
        for view in (pixels, pixels[:, ::-1]) if split == "backbone" else (pixels,):
            tokens.append(tiny_vq().encode(torch.from_numpy(view.copy()).permute(2, 0, 1)[None]))
            labels.append(label)
    order = stratified_order(torch.stack(labels))
    return torch.cat(tokens)[order], torch.stack(labels)[order]


# -- reading ----------------------------------------------------------------------------------------------------------


def test_every_split_holds_the_tokens_of_its_images(folder: Path, source: FolderConfig) -> None:
    for split in SPLITS:
        data, (tokens, labels) = load_token_set(folder, split), one_by_one(source, split)
        assert torch.equal(data.labels, labels) and data.tokens.dtype == torch.int64
        assert (data.tokens == tokens).float().mean() > 0.99  # another batch size may decide a tie otherwise
        assert (data.height, data.width, data.vocab_size, data.num_classes) == (4, 4, 24, 2)
        assert data.class_names == ("cat", "dog")
    files = (folder / "images.tsv").read_text().splitlines()
    assert len(files) == 21 and files[1].split("\t")[0] == "backbone"


def test_the_set_decodes_with_its_own_copy_of_a_small_tokeniser(
    folder: Path, weights: Path, tmp_path: Path, source: FolderConfig
) -> None:
    weights.unlink()
    shutil.rmtree(source.root)
    moved = folder.rename(tmp_path / "elsewhere")
    data = load_split(f"tokens:{moved}", "test")
    assert torch.equal(data.images(data.tokens), tiny_vq().decode(data.tokens, (4, 4)))
    assert data.images(data.tokens[:0]).shape == (0, 3, 8, 8)


def test_another_tokeniser_cannot_decode_the_set(folder: Path, tmp_path: Path) -> None:
    shutil.copy(save_tiny_vq(tmp_path / "other.safetensors", seed=1), folder / "tokenizer.safetensors")
    data = load_token_set(folder, "test")
    with pytest.raises(ValueError, match="is not the tokenizer that"):
        data.images(data.tokens)
    (folder / "tokenizer.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="are not there"):
        data.images(data.tokens)


def test_mapped_tokens_are_the_tokens(folder: Path) -> None:
    plain, mapped = (load_token_set(folder, "backbone", mapped=value) for value in (False, True))
    tokens: Any = mapped.tokens
    assert isinstance(tokens, MappedTokens) and isinstance(plain.tokens, Tensor)
    assert tokens.shape == plain.tokens.shape == (28, 16) and len(mapped) == 28
    assert tokens.numel() == plain.tokens.numel()
    rows = torch.tensor([27, 0, 9, 9, 8, 13])
    for index in (rows, rows.view(2, 3), 5, -1, slice(3, 20, 2), [1, 2], torch.arange(28) % 3 == 0):
        assert torch.equal(tokens[index], plain.tokens[index])
    assert torch.equal(tokens.to("cpu"), plain.tokens) and mapped.fingerprint == plain.fingerprint
    with pytest.raises(IndexError, match=r"\[0, 28\)"):
        tokens[28]


def test_the_fingerprint_tells_token_sets_and_splits_apart(
    folder: Path, tmp_path: Path, source: FolderConfig, weights: Path
) -> None:
    again = make(tmp_path / "again", source, weights)
    assert load_token_set(again, "test").fingerprint == load_token_set(folder, "test").fingerprint
    other = make(tmp_path / "other", source, weights, tiny_vq(seed=1))
    prints = {load_token_set(path, split).fingerprint for path in (folder, other) for split in SPLITS}
    assert len(prints) == 6


def test_what_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="backbone, planner, test"):
        load_token_set(folder, "train")
    with pytest.raises(FileNotFoundError, match="no token set"):
        load_token_set(tmp_path, "test")
    (folder / "tokens.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match=r"tokens\.json: is damaged"):
        load_token_set(folder, "test")
    (folder / "tokens.json").write_text('{"format": 7, "identity": {"images": {}}, "shards": {}}')
    with pytest.raises(ValueError, match="format 7"):
        load_token_set(folder, "test")


# -- continuing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shard_size", 0),
        ("shard_size", "4"),
        ("images", None),
        ("images", {"test": "2"}),
        ("images", {"test": -1}),
        ("grid", [0, 4]),
        ("grid", None),
        ("vocab_size", "x"),
        ("dtype", "nonsense"),
        ("classes", 5),
        ("present", [2]),
        ("tokenizer", {"name": 5}),
    ],
)
def test_a_description_that_is_none_is_refused_in_one_line(key: str, value: Any, folder: Path) -> None:
    """Anybody can compute its checksum."""
    described = read_sealed(folder / "tokens.json")
    described["identity"][key] = value
    write_sealed(folder / "tokens.json", described)
    with pytest.raises(ValueError, match=rf"{folder}/tokens\.json: is damaged \(") as caught:
        load_token_set(folder, "test")
    assert "\n" not in str(caught.value)


def test_a_description_of_more_shards_than_there_are_is_refused_at_once(folder: Path) -> None:
    described = read_sealed(folder / "tokens.json")
    described["identity"] |= {"images": {"test": 2**32 - 1}, "shard_size": 1}
    write_sealed(folder / "tokens.json", described)
    with pytest.raises(ValueError, match=r"1 of 4294967295 shards of split test are there"):
        load_token_set(folder, "test")


def test_a_removed_shard_is_made_again_with_the_same_bytes_and_the_others_are_kept(
    folder: Path, source: FolderConfig, weights: Path
) -> None:
    before = contents(folder)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    (folder / "backbone-00001.tokens.npy").unlink()
    with pytest.raises(ValueError, match=r"backbone-00001\.tokens\.npy: is missing"):
        load_token_set(folder, "backbone")
    make(folder, source, weights)
    assert contents(folder) == before
    changed = {name for name, time in kept.items() if (folder / name).stat().st_mtime_ns != time}
    assert changed == {"backbone-00001.tokens.npy", "backbone-00001.labels.npy"}


def test_an_interrupted_run_continues(
    tmp_path: Path, folder: Path, source: FolderConfig, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    encode = VQTokenizer.encode

    def failing(self: VQTokenizer, images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("power cut")
        return encode(self, images)

    broken = tmp_path / "broken"
    monkeypatch.setattr(VQTokenizer, "encode", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        make(broken, source, weights)
    assert len(list(broken.glob("*.tokens.npy"))) == 2
    with pytest.raises(ValueError, match="2 of 4 shards of split backbone"):
        load_token_set(broken, "backbone")
    (broken / ".backbone-00002.tokens.npy.0123.partial").write_bytes(b"half")
    make(broken, source, weights)
    assert calls == 3 + 4  # 6 shards, 2 of them kept
    assert contents(broken) == contents(folder)


def test_a_shard_that_was_written_but_not_listed_is_made_again(
    tmp_path: Path, folder: Path, source: FolderConfig, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = shards.write_sealed

    def failing(path: Path, value: Any) -> None:
        if len(value["shards"]) == 2:
            raise RuntimeError("power cut")
        write(path, value)

    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_sealed", failing)
        with pytest.raises(RuntimeError, match="power cut"):
            make(broken, source, weights)
    assert len(list(broken.glob("*.tokens.npy"))) == 2
    make(broken, source, weights)
    assert contents(broken) == contents(folder)


@pytest.mark.parametrize("harm", ["truncated", "altered"])
@pytest.mark.parametrize("kind", ["tokens", "labels"])
def test_a_harmed_shard_is_refused_by_name_and_left_alone(
    folder: Path, source: FolderConfig, weights: Path, harm: str, kind: str
) -> None:
    path = folder / f"backbone-00002.{kind}.npy"
    content = bytearray(path.read_bytes())
    if harm == "altered":
        content[-2] ^= 1
    path.write_bytes(content if harm == "altered" else content[:-3])
    before = contents(folder)
    for attempt in (lambda: load_token_set(folder, "backbone"), lambda: make(folder, source, weights)):
        with pytest.raises(ValueError, match=rf"backbone-00002\.{kind}\.npy: is truncated or altered"):
            attempt()
    assert contents(folder) == before
    assert len(load_token_set(folder, "test")) == 2  # shards of other splits are whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flips": False}, "data.flips = true instead of false"),
        ({"image_size": 12}, "data.image_size = 8 instead of 12"),
        ({"flips": False, "crop": "ten"}, 'data.crop = "centre" instead of "ten"'),
        ({"split_seed": 1}, "data.split_seed"),
    ],
)
def test_other_crops_and_sizes_are_refused(
    folder: Path, source: FolderConfig, weights: Path, changes: dict[str, Any], message: str
) -> None:
    before = contents(folder)
    with pytest.raises(ValueError, match=message) as caught:
        make(folder, FolderConfig(**{**source.__dict__, **changes}), weights)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


def test_another_tokeniser_other_shards_and_other_images_are_refused(
    folder: Path, source: FolderConfig, weights: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.fingerprint = .* instead of"):
        make(folder, source, weights, tiny_vq(seed=1))
    with pytest.raises(ValueError, match="shard_size = 4 instead of 5"):
        make(folder, source, weights, shard_size=5)
    (Path(source.root) / "cat" / "00.png").rename(Path(source.root) / "cat" / "zz.png")
    with pytest.raises(ValueError, match=r"1 images new, such as cat/zz\.png, 1 images gone, such as cat/00\.png"):
        make(folder, source, weights)
    with pytest.raises(ValueError, match="is not empty"):
        make(Path(source.root), source, weights)


# -- what is in them --------------------------------------------------------------------------------------------------


def test_broken_images_have_no_rows_and_are_listed(
    tmp_path: Path, source: FolderConfig, weights: Path, folder: Path
) -> None:
    images = list_images(source).splits["planner"]
    (images.root / images.names[1]).write_text("broken")
    with pytest.raises(ValueError, match="cannot be read"):
        make(tmp_path / "strict", source, weights)
    lenient = FolderConfig(**{**source.__dict__, "skip_broken": True})
    made = make(tmp_path / "lenient", lenient, weights)
    listed = json.loads((made / "tokens.json").read_text())["shards"]["planner-00000"]
    assert listed["skipped"] == [images.names[1]] and listed["rows"] == 3
    kept = images.labels[[0, 2, 3]]
    assert torch.equal(load_token_set(made, "planner").labels, kept[stratified_order(kept)])
    assert len(load_token_set(made, "backbone")) == len(load_token_set(folder, "backbone"))


@pytest.mark.parametrize("half", [False, True])
def test_continuous_tokens(tmp_path: Path, source: FolderConfig, weights: Path, half: bool) -> None:
    tokenizer = tiny_kl()
    made = make(tmp_path / "kl", source, weights, tokenizer, half=half)
    data = load_token_set(made, "planner")
    assert data.tokens.shape == (4, 16, 4) and data.tokens.dtype == torch.float32
    assert data.vocab_size == 0 and data.token_dim == 4
    images = list_images(source).splits["planner"]
    place = int(stratified_order(images.labels)[2])
    image = read_image(images.root / images.names[place])
    pixels = torch.from_numpy(np.array(centre_crop(image, 8))).permute(2, 0, 1)
    assert torch.allclose(data.tokens[2], tokenizer.encode(pixels[None])[0], atol=1e-2 if half else 1e-5)
    mapped: Any = load_token_set(made, "planner", mapped=True).tokens
    assert torch.equal(mapped[torch.tensor([3, 1])], data.tokens[[3, 1]])


def test_posterior_samples_depend_on_the_image_and_not_on_batches_or_shards(
    tmp_path: Path, source: FolderConfig, weights: Path
) -> None:
    def sampled(name: str, seed: int, **options: Any) -> Tensor:
        made = make(tmp_path / name, source, weights, tiny_kl(), sample_seed=seed, **options)
        return load_token_set(made, "backbone").tokens

    first = sampled("a", 0)
    assert torch.allclose(first, sampled("b", 0, batch_size=3, shard_size=5), atol=1e-5)
    assert (first - sampled("c", 1)).abs().mean() > 0.01


def test_shards_cover_every_image_once() -> None:
    planned = plan_shards({"backbone": 10, "planner": 4, "test": 0}, 4)
    assert [(shard.name, len(shard.rows)) for shard in planned] == [
        ("backbone-00000", 4),
        ("backbone-00001", 4),
        ("backbone-00002", 2),
        ("planner-00000", 4),
    ]
    assert [row for shard in planned if shard.split == "backbone" for row in shard.rows] == list(range(10))


def test_the_smallest_dtype_that_holds_every_token_is_chosen() -> None:
    sizes: list[tuple[int | None, bool]] = [(17, False), (2**16, False), (2**16 + 1, True), (None, True), (None, False)]
    assert [token_dtype(*size) for size in sizes] == ["uint16", "uint16", "int32", "float16", "float32"]
