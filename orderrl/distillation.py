"""Orders of images, extracted for a backbone to be fine-tuned on: OAR (arXiv:2504.17069), with any policy.

A policy reveals every image of the backbone split in teacher mode; the order and the steps that it chose are a row of a
table in the cache. The table is made in parts by any number of processes and found by everything that determines it.
With augmentation, orders are those of the very views that are trained on.

Who reads what: a planner sees images through the backbone that it was trained with, whatever the training makes of the
weights; other policies read the averaged weights of the moment. An order that reads no hidden states needs neither.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orderrl.agents.play import play
from orderrl.agents.policies import ReferencePolicy
from orderrl.agents.registry import NamedPolicy, make_policy, policy_source
from orderrl.agents.schedules import reads_content
from orderrl.agents.spec import FITTED, PolicySpec
from orderrl.backbones.pretraining import OrderedImages
from orderrl.backbones.protocol import Backbone
from orderrl.backbones.registry import TrainableBackbone, backbone_fingerprint
from orderrl.data import AUGMENTATIONS, TokenSet, augmented
from orderrl.envs.config import CoreConfig
from orderrl.envs.core import NextBlockCore
from orderrl.planner import load_planner
from orderrl.runtime import distributed
from orderrl.runtime.cache import Cache
from orderrl.runtime.hub import PLANNER
from orderrl.runtime.isolation import isolated
from orderrl.runtime.job import FOLDER as UNFINISHED
from orderrl.runtime.parts import find_table, store_table
from orderrl.runtime.progress import Advance
from orderrl.runtime.sources import source_identity
from orderrl.runtime.storage import checksum
from orderrl.runtime.tables import Column, floats, open_table

ORDERS = "orders"  # in the cache
_PART = 1024  # images


@dataclass(frozen=True)
class ImageOrders:
    """The orders that a policy chooses for a data set: where a specialist's training gets them.

    ValueError if the policy is unknown, does not fit the backbone, or is none to be distilled.
    """

    order: str  # the policy's name
    start: Backbone  # frozen; what planners read
    data: TokenSet  # images of the backbone split
    cache_dir: Path
    seed: int
    views: int = 1  # of every image; without augmentation 1
    strength: float = 0.0  # of the data set's augmentation
    fitted: Callable[[], Tensor] | None = None  # gives the fixed order that is fitted on gain labels

    def __post_init__(self) -> None:
        if self.spec.kind == "newest":
            raise ValueError("order='newest' names no planner for good; give its file")
        self.policy(self.start)
        if self.spec.path is not None:
            made, here = load_planner(self.spec.path)[1].get("backbone"), backbone_fingerprint(self.start)
            if made != here:
                raise ValueError(
                    f"order={self.order!r}: a planner for backbone {made} does not read training.start, which is "
                    f"{here}; start from the backbone that it was trained with"
                )

    @cached_property
    def spec(self) -> PolicySpec:
        """The policy's name in its parts."""
        return PolicySpec.parse(self.order)

    @property
    def label(self) -> str:
        """What tables call the policy."""
        return self.policy(self.start).name

    @property
    def hindsight(self) -> bool:
        """Whether the orders carry information about the tokens, so that no code length belongs to them."""
        return self.spec.hindsight

    def policy(self, backbone: Backbone) -> NamedPolicy:
        """The policy on a backbone."""
        return make_policy(self.spec, backbone, self.fitted)

    # ------------------------------------------------------------------ what a training asks for

    @isolated
    def extract(self, backbone: Backbone, round: int) -> str:
        """Folder of the orders of a round, found in the cache or made; interrupted work continues."""
        reader = self._reader(backbone)
        named = self.policy(reader)
        description = self._description(named, reader, round)
        cache, total = Cache(self.cache_dir), len(self.data) * self.views
        parts = [range(start, min(start + _PART, total)) for start in range(0, total, _PART)]

        def make(part: range, advance: Advance) -> dict[str, Tensor]:
            views = self._views(part, round)
            order, seen = chosen_orders(reader, views, named, self.seed + part.start)
            advance(len(part))
            kept = {"tokens": views.tokens} if self._augmented else {}
            return {"image": torch.arange(part.start, part.stop) // self.views, "order": order, "seen": seen} | kept

        found = find_table(cache, ORDERS, description)
        if found is None:
            action = f"orders of {self.spec}"
            found = store_table(cache, ORDERS, description, ORDERS, parts, make, action, "images")
        return str(found)

    def images(self, where: str, round: int = 0) -> OrderedImages:
        """The images and orders of a round, read as they are used; damaged ones that can be are made again.

        Raises:
            ValueError: if the table is missing or damaged and was made by weights that are gone, or is of other images.
        """
        wrong = distributed.on_main(lambda: Cache(self.cache_dir).damage(Path(where)))
        if wrong is not None:
            if self.spec.kind != "planner" and _reads(self.policy(self.start)):  # made by the weights of that moment
                raise ValueError(
                    f"{wrong}; the training that learns from these orders cannot continue: remove its state in "
                    f"{self.cache_dir / UNFINISHED} to train from the start"
                )
            where = self.extract(self.start, round)
        blocks, tokens = self.start.geometry.num_blocks, self.data.tokens
        columns = {"image": Column(), "order": Column((blocks,)), "seen": Column((blocks,))}
        if self._augmented:
            shape = tuple(tokens.shape[1:])
            columns["tokens"] = floats(*shape) if self.data.token_dim else Column(shape)
        table = open_table(Path(where) / ORDERS, columns, len(self.data) * self.views)
        shown = table["tokens"] if self._augmented else self.data.tokens
        return OrderedImages(shown, self.data.labels[table["image"]], table["order"], table["seen"])

    def of(self, data: TokenSet, backbone: TrainableBackbone) -> OrderedImages:
        """The orders of other images, kept nowhere."""
        reader = self._reader(backbone)
        order, seen = chosen_orders(reader, data, self.policy(reader), self.seed)
        return OrderedImages(data.tokens, data.labels, order, seen)

    def keep(self, folder: Path) -> dict[str, Any]:
        """Copy what the policy needs to the folder of a specialist; what its `Origin` says of it."""
        if self.spec.path is not None:
            shutil.copyfile(self.spec.path, folder / PLANNER)
            return {"order": str(self.spec.at(PLANNER)), "planner": checksum(folder / PLANNER)}
        return {"order": str(self.spec), "fitted": self._fitted_blocks}

    # ------------------------------------------------------------------ parts

    @property
    def _augmented(self) -> bool:
        return self.strength > 0 and self.data.name in AUGMENTATIONS

    @property
    def _fitted_blocks(self) -> list[int] | None:
        """The fixed order that is fitted on gain labels, where the policy is that one."""
        return self.fitted().tolist() if self.spec.name == FITTED and self.fitted is not None else None

    def _reader(self, backbone: Any) -> Backbone:
        """What the policy reads: planners the start, others a frozen copy of the weights of the moment."""
        if self.spec.kind == "planner":
            return self.start
        frozen: Backbone = copy.deepcopy(backbone).eval().requires_grad_(False)
        return frozen

    def _views(self, part: range, round: int) -> TokenSet:
        """Views of images: row i is view i mod V of image i div V."""
        image = torch.arange(part.start, part.stop) // self.views
        tokens = self.data.tokens[image]
        seed = (self.seed * 1_000_003 + round) * 2**24 + part.start
        generator = torch.Generator().manual_seed(seed % 2**63)
        tokens = augmented(self.data.name, tokens, generator, self.strength)
        return self.data.holding(tokens, self.data.labels[image])

    def _description(self, named: NamedPolicy, reader: Backbone, round: int) -> dict[str, Any]:
        """What determines the orders of a round."""
        return {
            "policy": str(replace(self.spec, kind="newest", name="")) if self.spec.path else str(self.spec),
            "file": source_identity(policy_source(self.spec)),
            "backbone": backbone_fingerprint(reader) if _reads(named) else str(reader.geometry),
            "data": self.data.fingerprint,
            "views": [self.views, self.strength, round] if self._augmented else None,
            "seed": self.seed,
        } | ({} if self._fitted_blocks is None else {"fitted": self._fitted_blocks})


def _reads(named: NamedPolicy) -> bool:
    """Whether a policy reads what a backbone says of an image."""
    return isinstance(named.policy, ReferencePolicy) or reads_content(named.policy)


@isolated
@torch.no_grad()
def chosen_orders(backbone: Backbone, data: TokenSet, named: NamedPolicy, seed: int) -> tuple[Tensor, Tensor]:
    """The orders in which a policy reveals images, in teacher mode.

    Args:
        data: the images, all at once.
        seed: of the policy's random numbers; image i acts as in an environment of seed + i.

    Returns:
        Blocks in the order in which they were revealed, and for each of them in this order how many blocks were visible
        when its step began, both (n, B) int64 on the CPU.

    Raises:
        ValueError: if the policy acts illegally.
    """
    config = CoreConfig(budgets=named.budgets, strict=True)
    core = NextBlockCore(backbone, data, len(data), config, seed, observe=_reads(named), rewards=False)
    core.reset(index=torch.arange(len(data)))
    play(core, named.policy, torch.Generator().manual_seed(seed))
    order = core.reveal_moment.argsort(1).cpu()
    step = core.reveal_step.cpu().gather(1, order)
    return order, (step[:, :, None] > step[:, None]).sum(2)
