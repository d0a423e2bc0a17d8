"""Settings of data sets: what the config group `data` holds."""

from dataclasses import MISSING, dataclass

from orderrl.runtime.values import Settings, setting


@dataclass(frozen=True, kw_only=True)
class DataName(Settings):
    """A data set by name."""

    name: str = setting(
        MISSING,
        "Data set: digits (scikit-learn's, 8x8 tokens of 17 grey levels), digits_patches (4x4 continuous tokens, each "
        "2x2 grey levels), canvas (digits at random places, 12x12 tokens of 17 grey levels), tokens:FOLDER, or "
        "an own one",
    )


@dataclass(frozen=True, kw_only=True)
class TokensData(Settings):
    """A token set on disk."""

    name: str = setting("tokens:${data.path}", "Data set: a token set on disk, written by tokenize")
    path: str = setting(MISSING, "Folder of the token set")
