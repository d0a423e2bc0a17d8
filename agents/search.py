"""The best fixed schedule: which blocks to reveal at which step, the same for every image.

Three steps, none of which looks at an image's content: play random orders on planner images and record the losses of
the hidden blocks; fit the mean loss of every block to what is visible; anneal schedules under that model. What is found
is played in turn and searched again. A schedule is a strong start for PPO on objective "likelihood", whose reward for
one step says little about the best set.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orderrl.agents.play import play, scripted
from orderrl.agents.policies import RankingPolicy, fixed_order
from orderrl.agents.schedules import growing
from orderrl.backbones import Backbone
from orderrl.data import TokenSet, load_split
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.factory import Setup
from orderrl.geometry import BlockGrid
from orderrl.runtime.finite import DIVERGED, OVERFLOW, require_finite
from orderrl.runtime.isolation import isolated_float32
from orderrl.runtime.job import Job
from orderrl.runtime.learning_rate import one_cycle
from orderrl.runtime.values import Settings, at_least, positive, setting


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Settings):
    """How a schedule is searched; a refinement plays a seventh as many episodes."""

    episodes: int = setting(3500, "Random orders of planner images whose losses are recorded", at_least(1))
    refinements: int = setting(8, "How often the schedules found are played and searched again", at_least(0))
    width: int = setting(256, "Width of the two hidden layers of the loss model", at_least(1))
    epochs: int = setting(6, "Passes over the recorded states", at_least(1))
    learning_rate: float = setting(2e-3, "Peak learning rate of the loss model", positive())
    chains: int = setting(16, "Schedules annealed side by side", at_least(1))
    moves: int = setting(2000, "Proposals for each of them", at_least(1))
    temperature: float = setting(
        1.0, "Temperature of the first move, nats per image; falls geometrically to a thousandth", positive()
    )

    @property
    def replayed(self) -> int:
        """Schedules that a refinement plays."""
        return -(-self.episodes // 7)


class FixedSchedule(NamedTuple):
    """Which blocks are revealed at which step, the same for every image."""

    order: Tensor  # (B,) int64, the blocks in turn
    sizes: tuple[int, ...]  # how many each step reveals

    def policy(self, geometry: BlockGrid, budgets: tuple[int, ...]) -> RankingPolicy:
        """The policy that plays it with an environment's budgets."""
        return RankingPolicy(fixed_order(self.order), geometry, budgets, growing(budgets, self.sizes))


def require_code_length(setup: Setup, what: str) -> None:
    """Raise ValueError, saying what does so, if the environment pays for anything but code length and steps."""
    reward = setup.environment.reward
    for key, wanted in (("objective", "likelihood"), ("weight", "uniform")):
        if getattr(reward, key) != wanted:
            raise ValueError(
                f"{what} for {key}={wanted!r}, got env.{key}={getattr(reward, key)!r}; use env=likelihood "
                "env.weight=uniform"
            )


def searched(setup: Setup, config: SearchConfig, job: Job) -> FixedSchedule:
    """The best fixed schedule for the planner images and the environment of a setup.

    It is searched for one step cost: of a range the geometric mean.
    """
    data, environment = load_split(setup.data, "planner"), setup.environment
    cost = environment.reward.typical_step_cost
    return search_schedule(setup.backbone, data, environment.budgets, cost, config, setup.seed, job)


@isolated_float32
def search_schedule(
    backbone: Backbone,
    data: TokenSet,
    budgets: tuple[int, ...],
    step_cost: float,
    config: SearchConfig,
    seed: int = 0,
    job: Job | None = None,
) -> FixedSchedule:
    """The cheapest fixed schedule for images of a token set.

    A search finds what its model flatters. So the schedules found are played, and searched again with what they cost.

    Args:
        budgets: numbers of blocks that a step may reveal.
        step_cost: cost of a step, nats per image; decides how many steps the schedule takes.
        seed: of orders, weights and moves.
        job: keeps what was played and annealed, so that an interrupted search continues.
    """
    # random orders, and what is lost along them
    job = job or Job()
    generator = torch.Generator().manual_seed(seed)
    blocks = backbone.geometry.num_blocks
    order = torch.rand(config.episodes, blocks, generator=generator).argsort(1)
    one_by_one = torch.arange(blocks).expand_as(order)
    visible, excess, start = record_losses(backbone, data, order, one_by_one, job=job)
    # search, and play what was found
    for refinement in range(config.refinements + 1):

        def search(visible: Tensor = visible, excess: Tensor = excess) -> dict[str, Any]:
            model = fit_mean_losses(visible, excess + start, config, seed)
            order, step, cost = anneal(model, blocks, budgets, step_cost, config, generator)
            require_finite("costs of the schedules found", {"cost": cost}, DIVERGED)
            return {"order": order, "step": step, "cost": cost, "generator": generator.get_state()}

        found = job.piece(f"annealed-{refinement:03d}", search)
        generator.set_state(found["generator"])
        order, step, cost = found["order"], found["step"], found["cost"]
        if refinement < config.refinements:
            turns = torch.arange(config.replayed) % config.chains
            name = f"refinement-{refinement:03d}"
            played = record_losses(backbone, data, order[turns], step[turns], job=job, name=name)
            visible, excess = torch.cat([visible, played[0]]), torch.cat([excess, played[1]])
    best = int(cost.argmin())
    return FixedSchedule(order[best], tuple(torch.bincount(step[best]).tolist()))


@torch.no_grad()
def record_losses(
    backbone: Backbone,
    data: TokenSet,
    order: Tensor,
    step: Tensor,
    batch: int = 128,
    job: Job | None = None,
    name: str = "played",
) -> tuple[Tensor, Tensor, Tensor]:
    """Play schedules on images in turn and look before every step.

    Args:
        order: (m, B) int64, blocks in the order in which they are revealed.
        step: (m, B) int64, the step of each place of the order, ascending from 0.
        job: keeps every batch under `name`.

    Returns:
        visible (n, B) bool of all n states with a hidden block; excess (n, B) float32, the losses in nats less those of
        the same image when nothing is visible (most of the differences between images cancel); and the mean of what
        was taken off, (B,).
    """
    largest = int(F.one_hot(step).sum(1).max())

    def played(rows: Tensor) -> dict[str, Tensor]:
        return _play(backbone, data, rows % len(data), order[rows], step[rows], largest)

    what = f"playing schedules on {data.name}/{data.split} ({name})"
    found = (job or Job()).batches(name, len(order), batch, played, what, "schedules")
    return found["visible"], found["excess"], found["start"].mean(0)


def _play(
    backbone: Backbone, data: TokenSet, images: Tensor, order: Tensor, step: Tensor, largest: int
) -> dict[str, Tensor]:
    """What `record_losses` keeps of some schedules; `largest` is the largest number of blocks in a step of any."""
    sizes, width = F.one_hot(step).sum(1), order.shape[1]  # sizes (m, T)
    core = NextBlockCore(backbone, data, len(order), CoreConfig(budgets=tuple(range(1, largest + 1))))
    core.reset(index=images)
    start = core.losses.cpu().clone()
    visible, excess = [], []

    def look(*step: Any) -> None:
        playing = ~core.finished.cpu()
        visible.append(core.visible.cpu()[playing])
        excess.append((core.losses.cpu() - start)[playing])

    look()
    before = sizes.cumsum(1) - sizes  # (m, T) blocks revealed before each step
    places = (before[..., None] + torch.arange(largest)).clamp_max(width - 1)
    listed = order[:, None].expand(-1, sizes.shape[1], -1).gather(2, places)  # (m, T, largest)
    actions = torch.cat([listed, sizes[..., None] - 1], 2) if core.multi else listed[..., 0]
    play(core, scripted(actions.unbind(1)), record=look)
    played = {"visible": torch.cat(visible), "excess": torch.cat(excess), "start": start}
    require_finite("losses of played schedules", played, OVERFLOW)
    return played


class MeanLosses(nn.Module):
    """Mean loss of every block given which blocks are visible: (..., B) bool -> (..., B) nats."""

    def __init__(self, num_blocks: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(num_blocks, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.output = nn.Linear(width, num_blocks)
        nn.init.zeros_(self.output.weight)

    def forward(self, visible: Tensor) -> Tensor:
        return self.output(self.hidden(visible.float() * 2 - 1))


def fit_mean_losses(visible: Tensor, loss: Tensor, config: SearchConfig, seed: int = 0) -> MeanLosses:
    """Regress losses (n, B) of hidden blocks on what is visible (n, B) bool."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MeanLosses(visible.shape[1], config.width)
    hidden = ~visible
    with torch.no_grad():
        model.output.bias.copy_((loss * hidden).sum(0) / hidden.sum(0))
    generator = torch.Generator().manual_seed(seed)
    batches = [rows for _ in range(config.epochs) for rows in torch.randperm(len(loss), generator=generator).split(512)]
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=1e-3)
    rate = one_cycle(optimizer, len(batches), config.learning_rate, warmup=0.31)
    for rows in batches:
        error = F.mse_loss(model(visible[rows])[hidden[rows]], loss[rows][hidden[rows]])
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        rate.step()
    return model.requires_grad_(False)


def schedule_cost(model: nn.Module, order: Tensor, step: Tensor, step_cost: float) -> Tensor:
    """Code length under a loss model plus the cost of the steps.

    Args:
        model: as `MeanLosses`.
        order: (m, B) int64, blocks in the order in which they are revealed.
        step: (m, B) int64, the step of each place of the order, ascending from 0.
        step_cost: nats per image.

    Returns:
        (m,) nats per image.
    """
    step_of_block = torch.empty_like(step).scatter(1, order, step)
    moments = torch.arange(int(step.max()) + 1)[:, None, None]
    charged = torch.where(step_of_block == moments, model(step_of_block < moments), 0.0)  # (T, m, B)
    return charged.sum((0, 2)) + step_cost * (step[:, -1] + 1)


@torch.no_grad()
def anneal(
    model: nn.Module,
    blocks: int,
    budgets: tuple[int, ...],
    step_cost: float,
    config: SearchConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cheap schedules by simulated annealing; a move swaps two places of the order, or draws some budgets anew.

    Returns:
        order (m, B), step (m, B) and cost (m,) as in `schedule_cost`, one for each chain.
    """
    count = config.chains
    order = torch.rand(count, blocks, generator=generator).argsort(1)
    step = torch.stack([_draw_steps(blocks, budgets, generator) for _ in range(count)])
    cost = schedule_cost(model, order, step, step_cost)
    for move in range(config.moves):
        temperature = config.temperature * 0.001 ** (move / config.moves)
        swapped = torch.randint(blocks, (count, 2), generator=generator)
        new_order = order.scatter(1, swapped, order.gather(1, swapped.flip(1)))
        new_step = step.clone()
        for row in (torch.rand(count, generator=generator) < 0.25).nonzero().flatten().tolist():
            new_order[row] = order[row]
            new_step[row] = _redraw_steps(step[row], budgets, generator)
        new_cost = schedule_cost(model, new_order, new_step, step_cost)
        taken = torch.rand(count, generator=generator) < ((cost - new_cost) / temperature).exp()
        order = torch.where(taken[:, None], new_order, order)
        step = torch.where(taken[:, None], new_step, step)
        cost = torch.where(taken, new_cost, cost)
    return order, step, cost


def _draw_steps(places: int, budgets: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(places,) int64, the step of each place, from random legal budgets."""
    steps: list[int] = []
    number = 0
    while len(steps) < places:
        legal = [k for k in budgets if k <= places - len(steps)] or [places - len(steps)]
        steps += [number] * legal[int(torch.randint(len(legal), (), generator=generator))]
        number += 1
    return torch.tensor(steps)


def _redraw_steps(step: Tensor, budgets: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The same steps up to a random one, others from there on, as far as a second random step where the sums meet."""
    sizes = torch.bincount(step).tolist()
    begin = int(torch.randint(len(sizes), (), generator=generator))
    end = min(begin + 1 + int(torch.randint(3, (), generator=generator)), len(sizes))
    between = torch.bincount(_draw_steps(sum(sizes[begin:end]), budgets, generator)).tolist()
    if any(size not in budgets for size in between) and end < len(sizes):
        return step  # only the last step may be cut short
    sizes = sizes[:begin] + between + sizes[end:]
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
