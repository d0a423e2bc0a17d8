"""Token sets on disk: memory-mapped shards with checksums, made once, continued where they stopped.

A folder holds

- `tokens.json`: the identity (tokeniser, crops, splits, grid), every finished shard with its checksums, and its own;
- `images.tsv`: split, class index, file name and version (see `orderrl.runtime.sources`) of every image;
- `SPLIT-00000.tokens.npy` and `SPLIT-00000.labels.npy`: tokens (rows, N) uint16 or int32, or (rows, N, C) float16 or
  float32 if continuous, and labels (rows,) int64. A row is a view (crop, flip) of an image; the views of an image
  follow one another, and images stand in the order of `images.tsv`.

Files are written aside and moved into place; a shard counts once `tokens.json` lists it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from orderrl.data.folder import SPLITS, Images
from orderrl.data.mapped import MappedTokens
from orderrl.data.token_set import TokenSet
from orderrl.runtime.cache import fingerprint
from orderrl.runtime.jsonfile import read_json
from orderrl.runtime.storage import Unsealed, checksum, is_intact, read_sealed, write_sealed, written_aside
from orderrl.runtime.values import differing, flat, require_kind

FORMAT = 1
DESCRIPTION, IMAGES, TOKENIZER = "tokens.json", "images.tsv", "tokenizer.safetensors"
_HUB = "hf://"
_IN_MEMORY = 2**30  # bytes; larger splits are read from their files row by row
_DECODE_BATCH = 50
_KINDS: dict[str, Any] = {
    "images": dict,
    "shard_size": int,
    "grid": tuple[int, int],
    "vocab_size": int | None,
    "token_dim": int | None,
    "dtype": str,
    "classes": list,
    "present": list[int] | None,
    "tokenizer": dict,
}
"""Types of what is read of a token set's identity."""


@dataclass(frozen=True)
class Shard:
    """A run of images of one split."""

    split: str
    number: int  # its place among the shards of the split
    rows: range  # places of its images in the split

    @property
    def name(self) -> str:
        """As it is called in `tokens.json`."""
        return shard_name(self.split, self.number)


def shard_name(split: str, number: int) -> str:
    """What a shard is called."""
    return f"{split}-{number:05d}"


def plan_shards(images: Mapping[str, int], shard_size: int) -> list[Shard]:
    """All shards of a token set, from the number of images of every split."""
    return [
        Shard(split, i, range(i * shard_size, min((i + 1) * shard_size, images[split])))
        for split in SPLITS
        for i in range(math.ceil(images[split] / shard_size))
    ]


def token_dtype(vocab_size: int | None, half: bool) -> str:
    """Name of the dtype that tokens are stored in; vocab_size None is continuous."""
    if vocab_size is None:
        return "float16" if half else "float32"
    return "uint16" if vocab_size <= 2**16 else "int32"


# -- writing ----------------------------------------------------------------------------------------------------------


class TokenSetWriter:
    """A token set being made; what is there is kept, what is missing is made.

    Args:
        folder: the token set's folder, made if need be.
        identity: plain values that determine every token; needs `shard_size`, `dtype`, and of the images `images`, how
            many every split has, and `files`, their version.
        tokenizer_path: file or hub name of the tokeniser's weights, for decoding. A file in OrderRL's own format is
            copied into the folder (`own=True`), published weights are remembered by where they are. None if there is no
            such file.
        own: see `tokenizer_path`.
        remake: make again what is damaged, with a line that says so, instead of refusing it; for folders that nobody
            but this package writes to.

    Raises:
        ValueError: if the folder holds something else, or a token set of another identity (with the keys that differ),
            or something damaged (by name).
    """

    def __init__(
        self,
        folder: Path | str,
        identity: Mapping[str, Any],
        images: Images,
        tokenizer_path: str | Path | None,
        own: bool = False,
        remake: bool = False,
    ) -> None:
        self.folder, self.remake = Path(folder), remake
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.shards = plan_shards(identity["images"], int(identity["shard_size"]))
        self._path = self.folder / DESCRIPTION
        self.folder.mkdir(parents=True, exist_ok=True)
        described = self._read_if_there()
        if described is not None:
            self._described = described
            _refuse_other_identity(self.folder, self._described["identity"], self.identity, images.table)
        elif any(self.folder.iterdir()):
            raise ValueError(f"{self.folder}: is not empty and holds no token set; choose another output")
        else:
            where = TOKENIZER if own else None if tokenizer_path is None else _lasting(tokenizer_path)
            self._described = {"format": FORMAT, "identity": self.identity, "tokenizer_path": where, "shards": {}}
            write_sealed(self._path, self._described)
        copies = {IMAGES: images.table.encode()} | (
            {TOKENIZER: Path(tokenizer_path).read_bytes()} if own and tokenizer_path else {}
        )
        for name, content in copies.items():
            path, there = self.folder / name, (self.folder / name).is_file()
            if there and remake and path.read_bytes() != content:
                print(f"{path}: is truncated or altered; making it again", flush=True)
                there = False
            if not there:
                _move_in(path, lambda file, content=content: file.write(content))  # type: ignore[misc]

    def missing(self) -> list[Shard]:
        """Shards that are still to be made; ValueError, by its name, if a finished one is truncated or altered."""
        listed = self._described["shards"]
        return [shard for shard in self.shards if shard.name not in listed or not self._is_there(shard)]

    def write(self, shard: Shard, tokens: np.ndarray, labels: np.ndarray, skipped: Sequence[str] = ()) -> None:
        """Store a shard.

        Args:
            tokens: (rows, N) or (rows, N, C).
            labels: (rows,) int64.
            skipped: names of its images that could not be read and have no rows.
        """
        arrays = {"tokens": tokens.astype(self.identity["dtype"]), "labels": labels.astype(np.int64)}
        checksums = {}
        for kind, array in arrays.items():
            path = _file(self.folder, shard.name, kind)
            _move_in(path, lambda file, array=array: np.save(file, array))  # type: ignore[misc]
            checksums[kind] = checksum(path)
        entry = {"images": len(shard.rows), "rows": len(labels), "skipped": list(skipped), "sha256": checksums}
        self._described["shards"][shard.name] = entry
        write_sealed(self._path, self._described)

    def finish(self) -> None:
        """Remove what interrupted writes left aside; called when no shard is missing."""
        for path in self.folder.glob(".*.partial"):
            path.unlink()

    @property
    def skipped(self) -> list[str]:
        """Names of all images that could not be read."""
        return [name for entry in self._described["shards"].values() for name in entry["skipped"]]

    def _is_there(self, shard: Shard) -> bool:
        entry = self._described["shards"][shard.name]
        files = {kind: _file(self.folder, shard.name, kind) for kind in ("tokens", "labels")}
        if not all(path.is_file() for path in files.values()):
            return False
        try:
            for kind, path in files.items():
                verify(path, entry["sha256"][kind])
        except ValueError as error:
            if not self.remake:
                raise
            print(f"{error.args[0].partition(';')[0]}; making it again", flush=True)
            return False
        return True

    def _read_if_there(self) -> dict[str, Any] | None:
        """The description of what is in the folder; None makes everything anew."""
        try:
            return read_description(self.folder)
        except FileNotFoundError:
            left = [path for path in self.folder.iterdir() if self.remake]
        except ValueError as error:
            if not self.remake:
                raise
            print(f"{error.args[0].partition(';')[0]}; making {self.folder} again", flush=True)
            left = list(self.folder.iterdir())
        for path in left:
            path.unlink()
        return None


def _lasting(path: str | Path) -> str:
    """A path that does not depend on the current folder; hub names stay as they are."""
    return str(path) if str(path).startswith(_HUB) else str(Path(path).expanduser().resolve())


def _move_in(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file aside and move it into place."""
    with written_aside(path) as aside, aside.open("wb") as file:
        write(file)


def _file(folder: Path, shard: str, kind: str) -> Path:
    return folder / f"{shard}.{kind}.npy"


def _refuse_other_identity(folder: Path, have: Any, want: Any, table: str) -> None:
    there, here = flat(have), flat(want)
    different = [
        f"{key} = {_short(there.get(key))} instead of {_short(here.get(key))}" for key in sorted(differing(there, here))
    ]
    if not different:
        return
    if have.get("files") != want["files"] and (changed := _changed_images(folder / IMAGES, table)):
        different.insert(0, changed)
    rest = f" and {len(different) - 3} more" if len(different) > 3 else ""
    raise ValueError(
        f"{folder}: holds another token set ({'; '.join(different[:3])}{rest}); choose another output, or the same "
        "tokeniser, images, crops and sizes"
    )


def _changed_images(listed: Path, table: str) -> str:
    """How the images of a listing differ from those of a table, in words; nothing if that cannot be said."""
    try:
        before = listed.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    old, new = (dict(line.split("\t", 2)[2].rsplit("\t", 1) for line in _rows(text)) for text in (before, table))
    kinds = {
        "changed": [name for name in new if name in old and old[name] != new[name]],
        "new": [name for name in new if name not in old],
        "gone": [name for name in old if name not in new],
    }
    return ", ".join(f"{len(names)} images {kind}, such as {names[0]}" for kind, names in kinds.items() if names)


def _rows(table: str) -> list[str]:
    """Lines of a listing behind its head that have all columns."""
    return [line for line in table.split("\n")[1:] if line.count("\t") == 3]


def _short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[:limit] + "…"


# -- checking ---------------------------------------------------------------------------------------------------------


def verify(path: Path, expected: str) -> None:
    """Check a file against its checksum; once for every process, unless the file changes.

    ValueError if it is missing, truncated or altered.
    """
    if not path.is_file():
        raise ValueError(f"{path}: is missing; run `python -m orderrl.tokenize` again to make it")
    if not is_intact(path, expected):
        raise ValueError(
            f"{path}: is truncated or altered (its checksum is not the one in {DESCRIPTION}); remove it and run "
            "`python -m orderrl.tokenize` again"
        )


def read_description(folder: Path) -> dict[str, Any]:
    """The contents of `tokens.json`.

    Raises:
        FileNotFoundError: if the folder holds no token set.
        ValueError: if the description is damaged or of another format.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: holds no token set ({DESCRIPTION}); make one with `python -m orderrl.tokenize`"
        )
    try:
        described = read_sealed(path)
    except Unsealed:  # older token sets have no seal
        described = read_json(path)
    if described.get("format") != FORMAT:
        known = described.get("format")
        raise ValueError(f"{path}: has format {known}, this version reads {FORMAT}; make the token set anew")
    try:
        _check_description(described["identity"], described["shards"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: is damaged ({type(error).__name__}: {error}); make the token set anew") from error
    return described


def _check_description(identity: Mapping[str, Any], shards: Mapping[str, Any]) -> None:
    """Raise if what is read of a token set has not the types that `TokenSetWriter` writes."""
    for key, kind in _KINDS.items():
        require_kind(key, identity.get(key), kind)
    for split, count in identity["images"].items():
        require_kind(f"images.{split}", count, int)
    if min(identity["shard_size"], *identity["grid"]) < 1 or min(identity["images"].values(), default=0) < 0:
        raise ValueError("shard_size, grid and images must be positive")
    if not set(identity.get("present") or ()) <= {*range(len(identity["classes"]))}:
        raise ValueError("present must be labels of classes")
    np.dtype(identity["dtype"])
    for key in ("name", "fingerprint"):
        require_kind(f"tokenizer.{key}", identity["tokenizer"][key], str)
    for entry in shards.values():
        require_kind("rows", entry["rows"], int)
        require_kind("sha256.tokens", entry["sha256"]["tokens"], str)
        require_kind("sha256.labels", entry["sha256"]["labels"], str)


# -- reading ----------------------------------------------------------------------------------------------------------


def decode_in_parts(tokenizer: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixels of any number of images, none included, on the CPU: decoded on the tokens' device, a few at a time."""
    if not len(tokens):
        height, width = (length * tokenizer.downsampling for length in grid)
        return torch.zeros(0, 3, height, width, dtype=torch.uint8)
    return torch.cat([tokenizer.decode(part, grid).cpu() for part in tokens.split(_DECODE_BATCH)])


class SetDecoder:
    """Decodes tokens of a token set on disk; its tokeniser is loaded when the first image is asked for."""

    def __init__(self, folder: Path, described: Mapping[str, Any]) -> None:
        self.folder, self.described = folder, described
        self._tokenizer: Any = None

    def __call__(self, tokens: Tensor) -> Tensor:
        """(m, N) int64 or (m, N, C) -> (m, 3, H, W) uint8 on the CPU, computed on the tokens' device.

        Raises:
            ValueError: if the tokeniser's weights are not those that the tokens were made with.
            FileNotFoundError: if they are not where they were.
        """
        if self._tokenizer is None:
            self._tokenizer = self._load()
        rows, columns = self.described["identity"]["grid"]
        return decode_in_parts(self._tokenizer.to(tokens.device), tokens, (rows, columns))

    def _load(self) -> Any:
        from orderrl.tokenizers import load_tokenizer
        from orderrl.tokenizers.registry import TOKENIZERS

        identity, where = self.described["identity"]["tokenizer"], self.described["tokenizer_path"]
        lasts = where is None or str(where).startswith(_HUB)
        path = where if lasts else self.folder / str(where)  # an absolute path stays as it is
        if isinstance(path, Path) and not path.is_file():
            raise FileNotFoundError(
                f"{path}: the weights of tokenizer {identity['name']} that {self.folder} was made with are not there; "
                f"put them there, or set tokenizer_path in {self.folder / DESCRIPTION}"
            )
        if refusal := TOKENIZERS.refusal(identity["name"]):
            raise ValueError(f"{self.folder / DESCRIPTION}: {refusal}")
        tokenizer = load_tokenizer(identity["name"], path)
        if tokenizer.fingerprint != identity["fingerprint"]:
            raise ValueError(
                f"{path or identity['name']}: is not the tokenizer that {self.folder} was made with (fingerprint "
                f"{tokenizer.fingerprint} instead of {identity['fingerprint']})"
            )
        return tokenizer


def load_token_set(folder: Path | str, split: str, mapped: bool | None = None) -> TokenSet:
    """One split of a token set on disk, in stratified order.

    Args:
        folder: what `python -m orderrl.tokenize` wrote.
        split: "backbone", "planner" or "test".
        mapped: leave tokens on disk and read rows when they are asked for; None does so for splits over 1 GiB.

    Raises:
        FileNotFoundError: if the folder holds no token set.
        ValueError: if the split is unknown, empty or not finished, or a shard is truncated or altered (by name).
    """
    folder = Path(folder)
    described = read_description(folder)
    identity = described["identity"]
    if split not in identity["images"]:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(identity['images'])}")
    planned, there = math.ceil(identity["images"][split] / identity["shard_size"]), described["shards"]
    names = [shard_name(split, number) for number in range(min(planned, len(there)))]
    finished = [name for name in names if name in there]
    if len(finished) < planned:
        raise ValueError(
            f"{folder}: {len(finished)} of {planned} shards of split {split} are there; run "
            "`python -m orderrl.tokenize` again to make the rest"
        )
    if not sum(described["shards"][name]["rows"] for name in finished):
        raise ValueError(f"{folder}: split {split} has no images")
    arrays: dict[str, list[np.ndarray]] = {"tokens": [], "labels": []}
    checksums = []
    for name in finished:
        for kind, parts in arrays.items():
            path = _file(folder, name, kind)
            verify(path, described["shards"][name]["sha256"][kind])
            checksums.append(described["shards"][name]["sha256"][kind])
            parts.append(_map(path, described["shards"][name]["rows"], identity, kind))
    continuous = identity["vocab_size"] is None
    tokens = MappedTokens(arrays["tokens"], torch.float32 if continuous else torch.int64)
    if mapped is None:
        mapped = tokens.numel() * (4 if continuous else 8) > _IN_MEMORY
    height, width = identity["grid"]
    stored = TokenSet(
        name=f"tokens:{folder}",
        split=split,
        tokens=cast(Tensor, tokens) if mapped else tokens[:],
        labels=torch.from_numpy(np.concatenate(arrays["labels"])),
        height=height,
        width=width,
        vocab_size=0 if continuous else identity["vocab_size"],
        num_classes=len(identity["classes"]),
        token_dim=identity["token_dim"] if continuous else 0,
        decoder=SetDecoder(folder, described),
        identity=fingerprint([identity["grid"], identity["vocab_size"], identity["classes"], split, checksums]),
        class_names=tuple(map(str, identity["classes"])),
        present=None if identity.get("present") is None else tuple(identity["present"]),
    )
    return stored.shuffled()  # images are stored in the folder's order, which is by class


def _map(path: Path, rows: int, identity: Mapping[str, Any], kind: str) -> np.ndarray:
    """A shard's file, mapped; ValueError if it holds anything but the numbers that belong there."""
    height, width = identity["grid"]
    channels = [identity["token_dim"]] if identity["vocab_size"] is None else []
    row = [] if kind == "labels" else [height * width, *channels]
    dtype = np.dtype(np.int64 if kind == "labels" else identity["dtype"])
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # reads no pickles
    except ValueError as error:
        raise ValueError(f"{path}: holds no array of numbers ({error})") from error
    if array.shape != (rows, *row) or array.dtype != dtype:
        raise ValueError(f"{path}: holds {array.dtype} {array.shape} instead of {dtype} {(rows, *row)}")
    return array


def token_set_splits(folder: Path | str) -> dict[str, TokenSet]:
    """All splits of a token set on disk that have images, by name."""
    images = read_description(Path(folder))["identity"]["images"]
    return {split: load_token_set(folder, split) for split, count in images.items() if count}
