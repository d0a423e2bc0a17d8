"""Data sets as token images, by name."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from torch import Generator, Tensor

from orderrl.data.canvas import augment_canvas, load_canvas_split
from orderrl.data.digits import augment_digits, augment_patches, load_digits_split, load_patches_split
from orderrl.data.token_files import load_token_set
from orderrl.data.token_set import TokenSet
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.registry import Registry

__all__ = [
    "AUGMENTATIONS",
    "DATA",
    "TokenSet",
    "augment_canvas",
    "augment_digits",
    "augment_patches",
    "augmented",
    "load_canvas_split",
    "load_digits_split",
    "load_patches_split",
    "load_split",
    "load_token_set",
    "register_data",
]

DATA: Registry[Callable[[str], TokenSet]] = Registry(
    "data set",
    "orderrl.data",
    {"digits": load_digits_split, "digits_patches": load_patches_split, "canvas": load_canvas_split},
    taken=("folder", "tokens", "none"),
)
"""Loaders: a split, "backbone", "planner" or "test" -> its images."""
register_data = DATA.register
Augmentation = Callable[[Tensor, Generator, float], Tensor]
"""(tokens, generator, strength) -> tokens."""
AUGMENTATIONS: dict[str, Augmentation] = {
    "digits": augment_digits,
    "digits_patches": augment_patches,
    "canvas": augment_canvas,
}
"""The mild augmentation of a data set; others have none."""
_ON_DISK = "tokens:"


def augmented(name: str, tokens: Tensor, generator: Generator, strength: float) -> Tensor:
    """Tokens of a data set under its augmentation, if it has one; strength 0 is none."""
    augment = AUGMENTATIONS.get(name) if strength > 0 else None
    return tokens if augment is None else augment(tokens, generator, strength)


@isolated_float32
def load_split(name: str, split: str) -> TokenSet:
    """Load one split of a data set by name.

    Args:
        name: "digits", "digits_patches", "canvas", a registered data set, the module:attribute of one, or
            "tokens:FOLDER" for a token set that `python -m orderrl.tokenize` wrote.
        split: "backbone", "planner" or "test".

    Raises:
        ValueError: if the data set or its split is unknown, or a token set on disk is not whole.
        FileNotFoundError: if there is no token set in the folder.
    """
    if name.startswith(_ON_DISK):
        return load_token_set(name.removeprefix(_ON_DISK), split)
    if name == "folder":
        raise ValueError(
            "data=folder holds images, not tokens; make tokens with `python -m orderrl.tokenize data=folder "
            "data.root=... output=FOLDER` and use data=tokens data.path=FOLDER"
        )
    if DATA.given(name) is None:
        known = ", ".join(DATA)
        raise ValueError(f"data.name={name!r} is unknown; choose one of {known}, module:attribute, {_ON_DISK}FOLDER")
    return DATA[name](split) if name in DATA.shipped else _own_split(DATA.find(name), name, split)


@lru_cache(maxsize=8)
def _own_split(loader: Callable[[str], TokenSet], name: str, split: str) -> TokenSet:
    """A split of a user's data set, under its name."""
    found = loader(split)
    if not isinstance(found, TokenSet):
        raise ValueError(f"data set {name!r} must give a TokenSet for a split, got {type(found).__name__}")
    return replace(found, name=name, split=split)
