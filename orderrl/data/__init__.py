"""Data sets as token images, by name."""

from orderrl.data.digits import augment_digits, load_digits_split
from orderrl.data.tokens import TokenSet

__all__ = ["TokenSet", "augment_digits", "load_digits_split", "load_split"]

_LOADERS = {"digits": load_digits_split}


def load_split(name: str, split: str) -> TokenSet:
    """Load one split of a data set by name.

    Raises:
        ValueError: if the data set or its split is unknown.
    """
    if name not in _LOADERS:
        raise ValueError(f"data.name={name!r} is unknown; choose one of {', '.join(_LOADERS)}")
    return _LOADERS[name](split)
