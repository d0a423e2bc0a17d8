"""From a command's config to what it works with: `DictConfig` ends here, everything below gets typed, frozen values.

`open_backbone` loads the backbone of a config, `backbone_and_data` what draws images, and `setup_of` collects all that
an agent, a label set, an evaluation or a search for the newest planner depends on.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf

from orderrl.backbones import Backbone, Sampling, load_backbone
from orderrl.backbones.protocol import check_fits, require_finite_outputs
from orderrl.data import TokenSet, load_split
from orderrl.data.token_files import decode_in_parts
from orderrl.envs.config import CoreConfig
from orderrl.envs.reward import RewardConfig
from orderrl.oracle import LabelConfig
from orderrl.planner import OrderHead, PlannerConfig
from orderrl.runtime.devices import checked_device, default_dtype
from orderrl.runtime.values import named
from orderrl.tokenizers import KLTokenizer, VQTokenizer, load_tokenizer

T = TypeVar("T")
NO_DATA = "none"  # the data of a config that draws with a backbone and a tokeniser alone
FORMAT = 2  # of what is cached; raised when the meaning of stored files changes
_OF_BACKBONE = ("num_blocks", "hidden_size", "num_classes", "token_dim")
_OF_AGENT = ("num_budgets", "privileged", "step_cost_range")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is trained or labelled with, in typed values."""

    backbone: Backbone  # frozen; scores the blocks
    backbone_name: str  # of the config, for messages
    backbone_path: str | None  # of the config, for messages
    data: str  # name of the data set, or `NO_DATA`
    planner: PlannerConfig  # shape of a planner of one budget that fits the backbone
    labels: LabelConfig = field(default_factory=LabelConfig)  # how contexts are labelled
    shard_size: int = 256  # contexts per file while labelling
    environment: CoreConfig = field(default_factory=CoreConfig)  # what planners learn in
    seed: int = 0  # of everything random that has no seed of its own
    cache_dir: Path = Path("cache")  # where labels and planners are kept
    checkpoint_seconds: float = 60.0  # between two states of a training
    device: str = "cpu"  # of the backbone
    fsdp: bool = False  # split the backbone's weights over all processes while labelling
    name: str | None = None  # what tables call the planner; None makes a name
    # folders of the gain labels that an agent learns from: random contexts, then those of its own rounds
    label_sets: tuple[Path, ...] = ()
    start: OrderHead | None = None  # the planner that an agent starts from; None if it starts from nothing

    @property
    def planner_settings(self) -> dict[str, Any]:
        """The planner's shape without what backbone and agent decide."""
        values = asdict(self.planner)
        return {key: value for key, value in values.items() if key not in (*_OF_BACKBONE, *_OF_AGENT)}

    @property
    def environment_settings(self) -> dict[str, Any]:
        """The environment as its config group has it."""
        values = {"budgets": self.environment.budgets} | asdict(self.environment.reward)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @property
    def images(self) -> str:
        """Fingerprint of the images that planners learn from; a token set may change under its name."""
        return load_split(self.data, "planner").fingerprint

    def require_order_robust(self, what: str) -> None:
        """Refuse a backbone that knows raster order only, with the command that makes it order-robust."""
        if not self.backbone.order_robust:
            data = "tokens" if self.data.startswith("tokens:") else self.data
            raise ValueError(
                f"{what} needs an order-robust backbone, and {self.backbone_name!r} draws in raster order only; make "
                f"it order-robust with `python -m orderrl.pretrain backbone={self.backbone_name} "
                f"backbone.path={self.backbone_path} data={data}` and use the checkpoint as "
                "backbone.name"
            )


def setup_of(config: DictConfig, backbone: Backbone) -> Setup:
    """The setup of a config; groups that it lacks have their defaults."""
    own = {key: config[key] for key in ("seed", "checkpoint_seconds", "device", "fsdp", "name") if key in config}
    planner = section(config, "planner") if "planner" in config else {}
    parts: dict[str, Any] = {}
    if labels := section(config, "labels") if "labels" in config else {}:  # empty for agents that need none
        seen = planner.get("visible_states", False)
        parts |= {
            "shard_size": labels.pop("shard_size"),
            "labels": replace(typed(LabelConfig, labels), visible_states=seen),
        }
    if "env" in config:
        parts["environment"] = environment_of(config)
    return Setup(
        backbone=backbone,
        backbone_name=config.backbone.name,
        backbone_path=config.backbone.get("path"),
        data=config.data.name,
        planner=PlannerConfig.for_backbone(backbone, **planner),
        cache_dir=Path(config.cache_dir),
        **own,
        **parts,
    )


def environment_of(config: DictConfig) -> CoreConfig:
    """The environment of the group env; without budgets (null, for those of a policy that is to come) it has one."""
    values = section(config, "env")
    budgets = values.pop("budgets") or (1,)
    return CoreConfig(budgets=tuple(budgets), reward=RewardConfig(**values))


def open_backbone(config: DictConfig) -> Backbone:
    """The frozen backbone of a config, checked against its data unless that is `NO_DATA`.

    ValueError if the config names none, or it cannot be loaded, does not fit the data or overflows in its dtype.
    """
    chosen = config.backbone
    if chosen.name is None:
        raise ValueError(
            f"backbone.name is not set; train a backbone with `python -m orderrl.pretrain data={config.data.name} ...` "
            "and give backbone.name=PATH"
        )
    backbone = load_backbone(
        chosen.name,
        chosen.get("path"),
        device="cpu" if config.get("fsdp") else config.device,  # no device ever holds all of a backbone to be split
        dtype=default_dtype(checked_device(config.device)) if chosen.get("dtype") == "auto" else chosen.get("dtype"),
        shape=chosen.get("shape"),
        memory_gb=chosen.get("memory_gb"),
        compile=chosen.get("compile"),
        pack_weights=chosen.get("pack_weights", True),
        cuda_graph=chosen.get("cuda_graph"),
    )
    if config.data.name != NO_DATA:
        check_fits(backbone, load_split(config.data.name, "test"))
    if not config.get("fsdp"):
        require_finite_outputs(backbone, chosen.name)
    return backbone


def backbone_and_data(config: DictConfig) -> tuple[DictConfig, Backbone, TokenSet]:
    """What draws images, and the config: with a tokeniser it has no data, and the data set holds no images.

    ValueError if they cannot be opened or do not fit.
    """
    chosen = config.tokenizer
    if chosen.name == "none":
        return config, open_backbone(config), load_split(config.data.name, "test")
    if config.data.name.startswith("tokens:"):
        raise ValueError(
            f"tokenizer={chosen.name} draws without a data set, and {config.data.name} has a tokeniser of its own; "
            "leave out one of them"
        )
    config = with_values(config, {"data": {"name": NO_DATA}})
    backbone = open_backbone(config)
    return config, backbone, set_without_images(backbone, load_tokenizer(chosen.name, chosen.path))


def set_without_images(backbone: Backbone, tokenizer: VQTokenizer | KLTokenizer) -> TokenSet:
    """What stands for a data set where images are drawn and none are read; the tokeniser must decode what is drawn."""
    geometry, channels = backbone.geometry, getattr(backbone, "token_dim", 0)
    drawn = backbone.vocab_size or None, channels or tokenizer.token_dim
    decoded = tokenizer.vocab_size, tokenizer.token_dim
    if drawn != decoded:
        raise ValueError(
            f"tokenizer={tokenizer.name} (vocab_size, token_dim) = {decoded} does not fit the backbone's "
            f"{backbone.vocab_size, channels}; choose the tokeniser that the backbone was trained with"
        )
    empty = torch.zeros(0, geometry.num_tokens, dtype=torch.int64)
    return TokenSet(
        NO_DATA,
        "test",
        torch.zeros(0, geometry.num_tokens, channels) if channels else empty,
        torch.zeros(0, dtype=torch.int64),
        geometry.height,
        geometry.width,
        backbone.vocab_size,
        backbone.num_classes,
        channels,
        lambda tokens: decode_in_parts(tokenizer.to(tokens.device), tokens, (geometry.height, geometry.width)),
    )


def sampling_of(config: DictConfig) -> Sampling:
    """How tokens are drawn, from a config that has the keys of `Sampling`."""
    return Sampling(**{item.name: config[item.name] for item in fields(Sampling)})


# ---------------------------------------------------------------------- configs as plain and typed values


def section(config: DictConfig, name: str, *without: str) -> dict[str, Any]:
    """A config group as plain values."""
    values = OmegaConf.to_container(config[name], resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items() if key not in without}


def typed(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of settings from plain values, wrong ones refused; mappings become the dataclasses of its fields."""
    hints = get_type_hints(kind)
    built = dict(values)
    for key, value in values.items():
        if is_dataclass(hints.get(key)) and isinstance(value, Mapping):
            with named(key):
                built[key] = typed(hints[key], value)
    return kind(**built)


def with_values(config: DictConfig, values: dict[str, Any]) -> DictConfig:
    """A copy of a config with some values replaced; a section that is a config itself replaces the whole section."""
    changed = config.copy()
    OmegaConf.set_struct(changed, False)
    for key, value in values.items():
        if isinstance(value, DictConfig) or key not in changed:
            changed[key] = value
        else:
            OmegaConf.update(changed, key, value, merge=True)
    OmegaConf.set_struct(changed, True)
    return changed
