"""Tokenisers: images as grids of discrete or continuous tokens, and back."""

from orderrl.tokenizers.kl import KLConfig, KLTokenizer, Posterior
from orderrl.tokenizers.layers import StackConfig
from orderrl.tokenizers.protocol import Tokenizer
from orderrl.tokenizers.registry import PRESETS, build_tokenizer, load_tokenizer, load_weights, save_tokenizer
from orderrl.tokenizers.vq import VQConfig, VQTokenizer

__all__ = [
    "Tokenizer",
    "KLConfig",
    "KLTokenizer",
    "Posterior",
    "StackConfig",
    "VQConfig",
    "VQTokenizer",
    "PRESETS",
    "build_tokenizer",
    "load_tokenizer",
    "load_weights",
    "save_tokenizer",
]
