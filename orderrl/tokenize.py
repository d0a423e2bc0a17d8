"""Turn an image folder into a token set: `python -m orderrl.tokenize data=folder data.root=... output=...`."""

from pathlib import Path

from omegaconf import DictConfig

from orderrl.data.encode import tokenize_with
from orderrl.data.folder import folder_config
from orderrl.factory import section
from orderrl.runtime.config import run_application
from orderrl.runtime.isolation import isolated_float32


@isolated_float32
def tokenize(config: DictConfig) -> Path:
    """Make the token set of a config, or what is missing of it, and return its folder; another set there is refused."""
    folder, sizes = folder_config(section(config, "data")), {key: config[key] for key in ("batch_size", "shard_size")}
    return tokenize_with(section(config, "tokenizer"), folder, Path(config.output), config.device, **sizes)


if __name__ == "__main__":
    run_application("tokenize", tokenize)
