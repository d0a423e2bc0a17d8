"""Train a backbone, or the tokeniser of an image folder: `python -m orderrl.pretrain backbone=digits`.

Backbones learn with the block-RAR curriculum. A published one continues from its weights: `backbone=llamagen_b
backbone.path=...` becomes order-robust. `backbone=none data=folder data.root=... tokenizer=small` trains the tokeniser
alone; with a backbone, a tokeniser that has no path yet is trained first.

A specialist learns the orders of a policy (OAR, arXiv:2504.17069): `backbone=digits training.start=digits
training.order=confidence`.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor

from orderrl.backbones import Backbone
from orderrl.backbones.pretraining import PretrainConfig
from orderrl.backbones.recipe import BackboneRecipe
from orderrl.data import AUGMENTATIONS, TokenSet
from orderrl.data.encode import tokenize_with
from orderrl.data.folder import folder_config
from orderrl.data.tokenizer_recipe import TokenizerRecipe
from orderrl.distillation import ImageOrders
from orderrl.evaluation.policies import fitted_order
from orderrl.factory import Setup, section
from orderrl.planner import PlannerConfig
from orderrl.runtime.cache import Cache
from orderrl.runtime.config import run_application
from orderrl.runtime.distributed import launched, on_main, print_main
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.run import Run


@isolated_float32
def pretrain(config: DictConfig) -> Path:
    """Train what a config asks for and return its checkpoint, in the run's folder."""
    if not config.training:  # backbone=none
        return trained(config, tokenizer_recipe(config))
    data = config.data.name
    if data == "folder":  # images become tokens first
        data = f"tokens:{on_main(lambda: find_or_make_tokens(config))}"
    return trained(config, backbone_recipe(config, data))


def backbone_recipe(config: DictConfig, data: str) -> BackboneRecipe:
    """The backbone that a config trains on a data set."""
    cache_dir, seed = Path(config.cache_dir), config.seed

    def orders(start: Backbone, train: TokenSet, training: PretrainConfig) -> ImageOrders:
        views = training.views if training.augmentation and data in AUGMENTATIONS else 1
        return ImageOrders(training.order, start, train, cache_dir, seed, views, training.augmentation, fitted(start))

    def fitted(start: Backbone) -> Callable[[], Tensor]:
        setup = Setup(
            backbone=start,
            backbone_name=str(config.training.start),
            backbone_path=None,
            data=data,
            planner=PlannerConfig.for_backbone(start),
            seed=seed,
            cache_dir=cache_dir,
            device=config.device,
        )
        return cache(partial(fitted_order, setup))

    return BackboneRecipe(
        backbone=section(config, "backbone"),
        training=section(config, "training"),
        data=data,
        seed=seed,
        device=config.device,
        fsdp=config.fsdp,
        orders=orders,
    )


def trained(config: DictConfig, recipe: BackboneRecipe | TokenizerRecipe) -> Path:
    """Train in a run of the command and say where the checkpoint is."""
    path = recipe.train(config.cache_dir, config.checkpoint_seconds, partial(Run, "pretrain", config))
    print_main(f"checkpoint: {path}\nrun: {path.parent}")
    return path


def tokenizer_recipe(config: DictConfig) -> TokenizerRecipe:
    """The tokeniser that a config trains on an image folder; ValueError if it is none to train."""
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
        chosen["path"] = recipe.find_or_train(cache, lambda: trained(config, recipe))
    return tokenize_with(chosen, folder_config(section(config, "data")), cache, config.device)


if __name__ == "__main__":
    run_application("pretrain", launched(pretrain))
