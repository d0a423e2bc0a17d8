"""Train a backbone, or the tokeniser of an image folder: `python -m orderrl.pretrain backbone=digits`.

Backbones learn with the block-RAR curriculum. A published one continues from its weights: `backbone=llamagen_b
backbone.path=...` becomes order-robust. `backbone=none data=folder data.root=... tokenizer=small` trains the tokeniser
alone; with a backbone, a tokeniser that has no path yet is trained first.
"""

from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from orderrl.backbones.recipe import BackboneRecipe
from orderrl.data.encode import tokenize_with
from orderrl.data.folder import folder_config
from orderrl.data.tokenizer_recipe import TokenizerRecipe
from orderrl.factory import section
from orderrl.runtime.cache import Cache
from orderrl.runtime.config import run_application
from orderrl.runtime.distributed import launched, on_main, print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.run import Run


@isolated_float32
def pretrain(config: DictConfig) -> Path:
    """Train what a config asks for and return its checkpoint, in the run's folder.

    Raises:
        ValueError: if a value of the config is not allowed, or the weights to start from do not fit.
    """
    if not config.training:  # backbone=none
        return _trained(config, tokenizer_recipe(config))
    data = config.data.name
    if data == "folder":  # images become tokens first
        data = f"tokens:{on_main(lambda: find_or_make_tokens(config))}"
    backbone, training = section(config, "backbone"), section(config, "training")
    recipe = BackboneRecipe(
        backbone=backbone, training=training, data=data, seed=config.seed, device=config.device, shard=config.shard
    )
    return _trained(config, recipe)


def _trained(config: DictConfig, recipe: BackboneRecipe | TokenizerRecipe) -> Path:
    path = recipe.train(config.cache_dir, config.checkpoint_seconds, partial(Run, "pretrain", config))
    print_main(f"checkpoint: {path}\nrun: {path.parent}")
    return path


def tokenizer_recipe(config: DictConfig) -> TokenizerRecipe:
    """The tokeniser that a config trains.

    Raises:
        ValueError: if the data are no image folder, or the tokeniser is not one to train.
    """
    folder = folder_config(section(config, "data"))
    return TokenizerRecipe(section(config, "tokenizer"), folder, config.seed, config.device)


def find_or_make_tokens(config: DictConfig) -> Path:
    """Folder of the token set of an image folder, kept in the cache.

    A tokeniser that is still to be trained is trained first and kept, too. Both are found by the images, whatever
    folder they lie in: where files are new, gone or changed, others are made.
    """
    cache, chosen = Cache(config.cache_dir), section(config, "tokenizer")
    if chosen.get("path") is None and "training" in chosen:
        recipe = tokenizer_recipe(config)
        chosen["path"] = recipe.find_or_train(cache, lambda: _trained(config, recipe))
    return tokenize_with(chosen, folder_config(section(config, "data")), cache, config.device)


if __name__ == "__main__":
    run_application("pretrain", launched(pretrain))
