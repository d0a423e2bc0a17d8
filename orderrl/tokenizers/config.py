"""Settings of tokenisers: which one is loaded, and the shape and training of one that is made."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from orderrl.runtime.values import at_least, setting
from orderrl.tokenizers.training import TokenizerTrainingConfig
from orderrl.tokenizers.vq import VQConfig


@dataclass(frozen=True, kw_only=True)
class NoTokenizer:
    """Tokens come with the data."""

    name: str = setting("none", "Tokeniser: none, tokens come with the data")


@dataclass(frozen=True, kw_only=True)
class PublishedTokenizer:
    """A published tokeniser with its weights."""

    name: str = setting(
        MISSING,
        "Tokeniser: vq16 or vq8 (LlamaGen's, 16x16 or 8x8 pixels a token, 16384 codes) or kl16 (MAR's KL-16, 16x16 "
        "pixels a token, 16 channels, scaled by 0.2325)",
    )
    path: str = setting(MISSING, "Published weights: vq_ds16_c2i.pt, vq_ds8_c2i.pt or kl16.ckpt")


@dataclass(frozen=True, kw_only=True)
class ContinuousTokenizer(PublishedTokenizer):
    """A published tokeniser of continuous tokens."""

    sample: bool = setting(False, "Draw tokens from the posterior; false takes its mean")
    sample_seed: int = setting(0, "Seed of the draws", at_least(0))
    half: bool = setting(False, "Store tokens as float16 instead of float32")


@dataclass(frozen=True, kw_only=True)
class SmallTokenizer:
    """A VQ tokeniser of one's own."""

    name: str = setting("small", "Tokeniser: small, a VQ tokeniser that pretrain trains on any image folder")
    path: str | None = setting(None, "Its checkpoint, written by pretrain; null where one is still to be trained")


@dataclass(frozen=True, kw_only=True)
class NewTokenizer:
    """A tokeniser that pretrain makes."""

    model: VQConfig = setting({}, "Shape of the tokeniser")
    training: TokenizerTrainingConfig = setting({}, "Training of the tokeniser")

    def __post_init__(self) -> None:
        pass
