"""Tiny tokenisers and folders of tiny images."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from orderrl.tokenizers import KLConfig, KLTokenizer, StackConfig, VQConfig, VQTokenizer, save_tokenizer

STACK = StackConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1)


def tiny_vq(l2_norm: bool = True, seed: int = 0) -> VQTokenizer:
    """Factor 2, 24 codes of length 4, in eval mode."""
    torch.manual_seed(seed)
    tokenizer = VQTokenizer(VQConfig(24, 4, l2_norm, 32, STACK, STACK), "small")
    with torch.no_grad():  # norms away from 1, and codes that random images do choose
        tokenizer.quantize.embedding.weight.copy_(torch.randn(24, 4) * 0.3)
    return tokenizer.eval().requires_grad_(False)


def tiny_kl(seed: int = 0) -> KLTokenizer:
    """Factor 2, tokens of 4 channels, in eval mode."""
    torch.manual_seed(seed)
    encoder = StackConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=32, attn_resolutions=(16,))
    return KLTokenizer(KLConfig(embed_dim=4, encoder=encoder, decoder=STACK)).eval().requires_grad_(False)


def save_tiny_vq(path: Path, seed: int = 0) -> Path:
    """A checkpoint of `tiny_vq`."""
    save_tokenizer(path, tiny_vq(seed=seed), {})
    return path


def image_folder(root: Path, per_class: int = 6, classes: tuple[str, ...] = ("cat", "dog"), seed: int = 0) -> Path:
    """PNG images of several sizes, every one different."""
    source = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            height, width = 12 + i % 3, 12 + (i + 1) % 4
            pixels = source.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root
