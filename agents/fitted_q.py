"""Adaptive budgets along a fixed order, learned by fitted Q iteration.

One play of an image, a block at a time, prices every schedule along the order: the losses that are charged for a step
are those of its blocks before the step, and these were looked at. So nothing has to be explored. With S_i the first i
blocks of the order and l_b(S) the block losses, the Q value of revealing blocks i..j-1 together is

    Q_i(j) = E[ sum of l_b(S_i) over these blocks + the step's cost + V_j | what is visible ],  V_B = 0,

and the planner's budget logits regress how much dearer each budget is than the smallest on what the recorded images
cost from there on when the planner's own best budgets follow. These are whole returns, found backwards from the last
block (Longstaff and Schwartz, 2001), not the one-step targets of Ernst, Geurts and Wehenkel (2005). The block scores
learn the order beside it.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from orderrl.agents.agent import Agent
from orderrl.agents.distribution import RankedBlocks
from orderrl.agents.orders import block_order
from orderrl.agents.play import play, scripted
from orderrl.agents.search import SearchConfig, require_code_length, searched
from orderrl.backbones import Backbone
from orderrl.backbones.protocol import backbone_device
from orderrl.data import TokenSet, load_split
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.factory import Setup
from orderrl.planner import OrderHead
from orderrl.runtime.distributed import print_main
from orderrl.runtime.finite import OVERFLOW, require_finite
from orderrl.runtime.isolation import isolated, isolated_float32
from orderrl.runtime.job import Job
from orderrl.runtime.learning_rate import one_cycle
from orderrl.runtime.optimisation import descend
from orderrl.runtime.values import Settings, at_least, positive, setting

_LEAST_SPREAD = 0.1  # nats; differences that hardly vary do not count for more


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """How a planner learns the budgets of an order."""

    order: str = setting(
        "diagonal",
        "A fixed order: raster, diagonal, staggered, halton, ..., or schedule, that of the best fixed schedule",
    )
    images: int = setting(
        2000,
        "Planner images that are played, fewer if there are fewer; each keeps 2 B^2 D bytes if content is read",
        at_least(1),
    )
    steps: int = setting(1800, "Optimiser steps", at_least(1))
    batch_size: int = setting(32, "Images of a step, each before every block", at_least(2))
    learning_rate: float = setting(2e-3, "Peak learning rate", positive())
    weight_decay: float = setting(0.01, "Weight decay of AdamW", at_least(0))
    temperature: float = setting(
        1.0,
        "Nats that one unit of a budget's logit is worth; the lower, the less PPO explores when it goes on",
        positive(),
    )
    search: SearchConfig = setting(SearchConfig(), "How the schedule is found, for order=schedule")


def train(setup: Setup, config: Config, job: Job) -> OrderHead:
    """Play the order on planner images, then fit the budgets along it."""
    data, budgets, reward = load_split(setup.data, "planner"), setup.environment.budgets, setup.environment.reward
    # play the order
    if config.order == "schedule":
        order = searched(setup, config.search, job).order
    else:
        order = block_order(config.order, setup.backbone.geometry)
    played = record_order(setup.backbone, data, order, config.images, setup.planner.content, job=job)
    for steps, (nats, sizes) in best_schedules(played["cost"], budgets).items():
        written = "+".join(map(str, sizes))
        print_main(
            f"best fixed schedule in {config.order} order, {steps} steps: {written}, {nats:.2f} nats (planner images)"
        )
    # fit the budgets, by a planner that sees the cost of a step if that is a range
    torch.manual_seed(setup.seed)
    shape = replace(setup.planner, num_budgets=len(budgets), step_cost_range=reward.step_cost_range)
    planner = OrderHead(shape).to(backbone_device(setup.backbone)).eval()
    fit_budgets(planner, played, order, budgets, reward.step_cost, config, setup.seed, job)
    return planner


@isolated
@torch.no_grad()
def record_order(
    backbone: Backbone,
    data: TokenSet,
    order: Tensor,
    images: int,
    content: bool = True,
    batch: int = 128,
    job: Job | None = None,
) -> TensorDict:
    """Play an order on the first images, one block a step, and look before every step.

    Args:
        order: (B,) int64.
        images: how many are played; all if there are fewer.
        content: keep hidden states too, B^2 times their width for every image; planners without content read none.
        job: keeps every batch.

    Returns:
        Batch (n, B) on the CPU, place i before the step that reveals block i of the order: the keys of an
        observation, `hidden` (if kept) in float16, and `cost` (B,) float32: at k, the nats that are charged for blocks
        i..k in one step; zero before i.

    Raises:
        ValueError: if the order is no permutation of the blocks.
    """
    joined = (job or Job()).batches(
        "in-order",
        min(images, len(data)),
        batch,
        lambda rows: _play(backbone, data, rows, order, content),
        f"playing the order on {data.name}/{data.split}",
        "images",
    )
    return TensorDict(joined, batch_size=joined["visible"].shape[:2])


def _play(backbone: Backbone, data: TokenSet, images: Tensor, order: Tensor, content: bool) -> dict[str, Tensor]:
    core = NextBlockCore(backbone, data, len(images), CoreConfig(strict=True))
    core.reset(index=images)
    order = order.to(core.device)
    seen: list[TensorDict] = []

    def look(*step: Any) -> None:
        observation = core.observation()
        hidden = observation.pop("hidden")
        if content:
            observation["hidden"] = hidden.half()
        observation["cost"] = core.losses[:, order].cumsum(-1)  # the losses of visible blocks are zero
        seen.append(observation)

    look()
    play(core, scripted(block.expand(len(images)) for block in order), record=look)
    played: dict[str, Tensor] = TensorDict.stack(seen[:-1], 1).cpu().to_dict()
    require_finite("losses of a played order", played, OVERFLOW)
    return played


def legal_ends(blocks: int, budgets: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Where a step of each budget ends on a list of blocks, and whether the budget is legal, as the environment has it.

    Returns:
        ends (B, n) int64, blocks visible after the step, and legal (B, n) bool; place i has i blocks visible.
    """
    ends = torch.arange(blocks)[:, None] + torch.tensor(budgets)
    legal = ends <= blocks
    legal[:, 0] = True  # cut short
    return ends.clamp_max(blocks), legal


def best_schedules(cost: Tensor, budgets: tuple[int, ...]) -> dict[int, tuple[float, tuple[int, ...]]]:
    """The best fixed schedule along an order for every number of steps, by dynamic programming over the recorded costs.

    Costs (n, B, B) are those of `record_order`. Each number of steps gets the mean nats per image, steps not counted,
    and the blocks of each step; the smallest budget may be cut short at the end.
    """
    mean = cost.double().mean(0)
    blocks = len(mean)
    ends, legal = legal_ends(blocks, budgets)
    best: list[dict[int, tuple[float, tuple[int, ...]]]] = [{} for _ in range(blocks)] + [{0: (0.0, ())}]
    for place in reversed(range(blocks)):
        for end in ends[place][legal[place]].tolist():
            for steps, (nats, sizes) in best[end].items():
                nats += mean[place, end - 1].item()
                if nats < best[place].get(steps + 1, (float("inf"), ()))[0]:
                    best[place][steps + 1] = (nats, (end - place, *sizes))
    return dict(sorted(best[0].items()))


def costs_to_go(preference: Tensor, cost: Tensor, budgets: tuple[int, ...], step_cost: Tensor) -> Tensor:
    """What every budget in every state costs an image up to its end, if the preferred budgets follow.

    Args:
        preference: (n, B, number of budgets), the legal one with the largest follows.
        cost: (n, B, B) as in `record_order`.
        step_cost: (n,) nats per image.

    Returns:
        (n, B, number of budgets) nats per image; illegal budgets are cut short.
    """
    count, blocks, _ = cost.shape
    ends, legal = (value.to(cost.device) for value in legal_ends(blocks, budgets))
    chosen = preference.masked_fill(~legal, -torch.inf).argmax(-1, keepdim=True)
    rest = cost.new_zeros(count, blocks + 1)
    spent = cost.new_zeros(count, blocks, len(budgets))
    for place in reversed(range(blocks)):
        spent[:, place] = cost[:, place, ends[place] - 1] + step_cost[:, None] + rest[:, ends[place]]
        rest[:, place] = spent[:, place].gather(1, chosen[:, place])[:, 0]
    return spent


def budget_loss(logits: Tensor, spent: Tensor, legal: Tensor, temperature: float) -> Tensor:
    """How far budget logits are from minus the costs to go over the temperature: mean squared error in units of spread.

    Both count against the smallest budget, so what an image costs anyway cancels. Large budgets cost much more and vary
    much more, and must not drown what tells small ones apart: each difference is divided by its standard deviation over
    the images.

    Args:
        logits: (m, B, number of budgets).
        spent: (m, B, number of budgets) nats, from `costs_to_go`.
        legal: (B, number of budgets) bool.
        temperature: nats that one unit of a logit is worth.

    Returns:
        (), without unit.
    """
    further = legal.clone()
    further[:, 0] = False
    dearer = spent - spent[..., :1]
    error = temperature * (logits - logits[..., :1]) + dearer
    spread = dearer.std(0, keepdim=True).clamp_min(_LEAST_SPREAD)
    return torch.where(further, error / spread, 0.0).square().sum() / (len(spent) * further.sum())


@isolated_float32
def fit_budgets(
    planner: OrderHead,
    played: TensorDict,
    order: Tensor,
    budgets: tuple[int, ...],
    step_cost: float | tuple[float, float],
    config: Config,
    seed: int = 0,
    job: Job | None = None,
) -> None:
    """Train in place: budget logits on minus the costs to go, block scores on the order.

    Args:
        planner: with as many budgets; it sees the step cost if that is a range.
        played: from `record_order`.
        order: (B,) int64, the one that was played.
        step_cost: nats per image; of a range every image of every step draws its own, log-uniformly.
        seed: of weights, batches and drawn step costs.

    Metrics: loss, loss_budget (see `budget_loss`), loss_order (nats), cost (mean nats per image of the planner's own
    schedules on the batch, steps included) and agreement (share of states in which the highest-scored block is the
    order's next).
    """
    device = planner.position.device
    order = order.to(device)
    job = job or Job()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of dropout
    optimizer = torch.optim.AdamW(planner.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    rate = one_cycle(optimizer, config.steps, config.learning_rate)
    steps = job.steps(
        config.steps, f"fitting budgets (R = {planner.config.reasoning_steps})", "steps", "cost {cost:.1f} nats",
        planner=planner, optimizer=optimizer, rate=rate, generator=generator,
    )  # fmt: skip
    for _ in steps:
        batch = played[torch.randint(len(played), (config.batch_size,), generator=generator)].to(device)
        costs = _drawn(step_cost, config.batch_size, generator).to(device)
        row = _update(planner, optimizer, batch, order, budgets, costs, config.temperature)
        rate.step()
        job.log(**row)
    planner.eval()


def _update(
    planner: OrderHead,
    optimizer: torch.optim.Optimizer,
    batch: TensorDict,
    order: Tensor,
    budgets: tuple[int, ...],
    step_cost: Tensor,
    temperature: float,
) -> dict[str, float]:
    """One optimiser step on images in all their states, batch (m, B), at step costs (m,)."""
    images, blocks = batch.batch_size
    observation = batch.exclude("cost").reshape(-1)
    if planner.config.content:
        observation["hidden"] = observation["hidden"].float()
    if planner.config.step_cost_range is not None:
        observation["step_cost"] = step_cost.repeat_interleave(blocks)[:, None]
    with torch.no_grad():
        preference = planner.eval()(observation).budget_logits.view(images, blocks, -1)
    spent = costs_to_go(preference, batch["cost"], budgets, step_cost)
    output = planner.train()(observation)
    legal = legal_ends(blocks, budgets)[1].to(spent.device)
    loss_budget = budget_loss(output.budget_logits.view_as(spent), spent, legal, temperature)
    # of one budget, so that its choice adds nothing to the log-probability
    mask, places = observation["action_mask"], budgets[-1]
    ranked = RankedBlocks(output.logits, mask, output.logits.new_zeros(len(mask), 1), None, (places,), output.repulsion)
    loss_order = -ranked.log_prob(_following(order, places).repeat(images, 1)).mean()
    loss = descend(optimizer, loss_budget + loss_order, planner)
    chosen = preference[:, 0].masked_fill(~legal[0], -torch.inf).argmax(-1, keepdim=True)
    return {
        "loss": loss,
        "loss_budget": loss_budget.item(),
        "loss_order": loss_order.item(),
        "cost": spent[:, 0].gather(1, chosen).mean().item(),
        "agreement": (ranked.logits.argmax(-1).view(images, blocks) == order).float().mean().item(),
    }


def _following(order: Tensor, places: int) -> Tensor:
    """Actions that list what follows each place of an order: (B, places + 1) int64, the first of a single budget."""
    blocks, device = len(order), order.device
    following = torch.arange(blocks, device=device)[:, None] + torch.arange(places, device=device)
    return torch.cat([order[following.clamp_max(blocks - 1)], order.new_zeros(blocks, 1)], 1)


def _drawn(step_cost: float | tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    """(count,) float32 nats per image: the number, or log-uniform draws from the range."""
    if not isinstance(step_cost, tuple):
        return torch.full((count,), float(step_cost))
    low, high = step_cost
    return low * (high / low) ** torch.rand(count, generator=generator)


def _check(setup: Setup, config: Config) -> None:
    require_code_length(setup, "agent=fitted_q learns budgets")
    if config.order != "schedule":
        block_order(config.order, setup.backbone.geometry, "agent.order")
    if len(budgets := setup.environment.budgets) < 2:
        raise ValueError(f"budgets={budgets} leave nothing to choose; give several, for example env.budgets=[1,2,4]")


def _idle(config: Config) -> list[str]:
    return [] if config.order == "schedule" else ["search"]


AGENT = Agent(Config, train, check=_check, idle=_idle, alone=True)
