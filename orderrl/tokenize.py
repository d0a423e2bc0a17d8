"""Turn an image folder into a token set: `python -m orderrl.tokenize data=folder data.root=... output=...`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from orderrl.data.encode import tokenize_folder
from orderrl.data.folder import folder_config
from orderrl.factory import section
from orderrl.runtime.config import run_application
from orderrl.runtime.isolation import isolated_float32
from orderrl.tokenizers import load_tokenizer


@isolated_float32
def tokenize(config: DictConfig) -> Path:
    """Make the token set of a config, or what is missing of it, and return its folder.

    Raises:
        ValueError: if the output holds another token set, or a file can't be read as an image.
    """
    chosen = section(config, "tokenizer")
    return tokenize_folder(
        load_tokenizer(chosen["name"], chosen.get("path"), config.device),
        folder_config(section(config, "data")),
        Path(config.output),
        chosen.get("path"),
        batch_size=config.batch_size,
        shard_size=config.shard_size,
        sample_seed=chosen.get("sample_seed") if chosen.get("sample") else None,
        half=chosen.get("half", False),
    )


if __name__ == "__main__":
    run_application("tokenize", tokenize)
