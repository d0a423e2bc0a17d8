"""Class ids of a model for folders that hold images of some of its classes."""

import re
from collections.abc import Sequence
from pathlib import Path

from orderrl.runtime.jsonfile import read_json
from orderrl.runtime.sources import printable

IMAGENET = "imagenet"
MOST_CLASSES = 2**20
_SYNSET = re.compile(r"n\d{8}")


def class_ids(classes: str, num_classes: int | None = None) -> tuple[dict[str, int], list[str]]:
    """Class ids by the names of class folders.

    Args:
        classes: "imagenet" for the 1,000 WordNet ids of ImageNet (ILSVRC 2012) in ascending order, as every published
            model counts them, or a text file with a line "FOLDER ID" for every class, or a .json file with an object of
            ids by folder name.
        num_classes: of the model; None is the largest id and one. ImageNet's are 1,000.

    Returns:
        The ids, and what to call every class of the model: its folder, or "class 7" where the file has none.

    Raises:
        ValueError: if the file is missing or of another form, an id is given twice or not below `num_classes`.
    """
    if classes == IMAGENET:
        from timm.data import ImageNetInfo  # takes long to import

        synsets = [str(name) for name in ImageNetInfo().label_names()]
        if num_classes not in (None, len(synsets)):
            raise ValueError(f"data.num_classes={num_classes} must be {len(synsets)} with data.classes={IMAGENET}")
        return {name: number for number, name in enumerate(synsets)}, synsets
    ids = _read(Path(classes).expanduser(), classes)
    count = max(ids.values()) + 1 if num_classes is None else num_classes
    if count > MOST_CLASSES:
        raise ValueError(f"data.classes={classes}: {count} classes are more than the {MOST_CLASSES} that are allowed")
    by_id: dict[int, str] = {}
    for name, number in ids.items():
        if not 0 <= number < count:
            raise ValueError(
                f"data.classes={classes}: the id of {printable(name)} must lie between 0 and {count - 1} "
                f"(data.num_classes - 1), got {number}"
            )
        if number in by_id:
            raise ValueError(
                f"data.classes={classes}: {printable(by_id[number])} and {printable(name)} have the id {number}; every "
                "class has one folder"
            )
        by_id[number] = name
    return ids, [printable(by_id.get(number, f"class {number}")) for number in range(count)]


def look_like_synsets(names: Sequence[str]) -> bool:
    """Whether class folders are called by WordNet ids."""
    return bool(names) and all(_SYNSET.fullmatch(name) for name in names)


def class_words(names: Sequence[str]) -> list[str]:
    """Names of classes for people: those of ImageNet are words instead of WordNet ids."""
    if not look_like_synsets(names):
        return list(names)
    from timm.data import ImageNetInfo  # takes long to import

    known = ImageNetInfo()
    ids = set(known.label_names())
    return [known.label_name_to_description(name).partition(",")[0] if name in ids else name for name in names]


def _read(path: Path, given: str) -> dict[str, int]:
    """Ids by folder name."""
    form = 'lines "FOLDER ID", or as .json an object of ids by folder name'
    try:
        if path.suffix == ".json":
            pairs = list(read_json(path).items())
            if not all(type(number) is int for _, number in pairs):
                raise ValueError("an id is no integer")
        else:
            pairs = [(name, int(number)) for name, number in (line.rsplit(None, 1) for line in _lines(path))]
    except OSError as error:
        raise ValueError(f"data.classes={given} is neither {IMAGENET} nor a file ({error.strerror})") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"data.classes={given}: must hold {form} ({error})") from error
    if not pairs:
        raise ValueError(f"data.classes={given}: holds no class; it must hold {form}")
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"data.classes={given}: names a folder twice")
    return dict(pairs)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
