"""Settings of tokenisers: which one is loaded, and the shape and training of one that is made."""

from dataclasses import MISSING, dataclass

from orderrl.runtime.values import Settings, at_least, setting
from orderrl.tokenizers.training import TokenizerTrainingConfig
from orderrl.tokenizers.vq import VQConfig


@dataclass(frozen=True, kw_only=True)
class NoTokenizer:
    """Tokeniser: none, tokens come with the data."""


@dataclass(frozen=True, kw_only=True)
class PublishedTokenizer(Settings):
    """Tokeniser: LlamaGen's VQ-16 or VQ-8, 16x16 or 8x8 pixels a token, 16384 codes."""

    path: str = setting(MISSING, "Published weights: vq_ds16_c2i.pt or vq_ds8_c2i.pt")


@dataclass(frozen=True, kw_only=True)
class ContinuousTokenizer(Settings):
    """Tokeniser: MAR's KL-16, 16x16 pixels a token, 16 channels, scaled by 0.2325."""

    path: str = setting(MISSING, "Published weights: kl16.ckpt")
    sample: bool = setting(False, "Draw tokens from the posterior; false takes its mean")
    sample_seed: int = setting(0, "Seed of the draws", at_least(0))
    half: bool = setting(False, "Store tokens as float16 instead of float32")


@dataclass(frozen=True, kw_only=True)
class Patches(Settings):
    """Tokeniser: none to train, square patches of pixels are continuous tokens."""

    half: bool = setting(False, "Store tokens as float16 instead of float32")


@dataclass(frozen=True, kw_only=True)
class SmallTokenizer(Settings):
    """Tokeniser: a small VQ tokeniser, which pretrain trains on any image folder."""

    path: str | None = setting(None, "Its checkpoint, written by pretrain; null where one is still to be trained")


@dataclass(frozen=True, kw_only=True)
class OwnTokenizer(Settings):
    """Tokeniser: one that a user has registered, or module:attribute."""

    path: str | None = setting(None, "Its weights; null if it needs none")


@dataclass(frozen=True, kw_only=True)
class NewTokenizer(Settings):
    """A tokeniser that pretrain makes."""

    model: VQConfig = setting({}, "Shape of the tokeniser")
    training: TokenizerTrainingConfig = setting({}, "Training of the tokeniser")
