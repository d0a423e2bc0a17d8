"""Ablations: does a planner use content, do its choices help the rest, and how do orders and their pictures compare?

Four questions of the research notes, each a function, on held-out images under one protocol:

- `content_ablation`: rank correlation of scores and oracle with the image's content, and without it. A planner that
  learned a spatial prior ranks blocks as well without.
- `injection`: the true tokens of the best-scored blocks are revealed at once; how much does the loss of the rest fall?
- `order_agreements`: which orders are alike.
- `quality_curves`: what a partly revealed image is worth, against the revealed fraction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orderrl.agents.play import Rollout
from orderrl.agents.policies import Scorer
from orderrl.agents.registry import NamedPolicy
from orderrl.backbones import Backbone
from orderrl.backbones.protocol import backbone_device
from orderrl.data import TokenSet
from orderrl.envs.core import CoreConfig, NextBlockCore
from orderrl.envs.observation import labelled
from orderrl.evaluation.columns import all_columns
from orderrl.evaluation.comparison import Pair, compare
from orderrl.evaluation.protocol import EvaluationProtocol
from orderrl.evaluation.row_entries import image_average, image_means, image_sums
from orderrl.evaluation.rows import Evaluated
from orderrl.metrics.calibration import rank_correlation
from orderrl.metrics.order import order_agreement
from orderrl.metrics.recognisability import area_over_fraction, at_fractions, complete, recognise, shown_images
from orderrl.metrics.statistics import Interval, bootstrap_band, bootstrap_sums, sums_difference
from orderrl.oracle import utilities

if TYPE_CHECKING:
    from tensordict import TensorDict

REMOVALS = ("other image", "mean")
"""How content is removed: the observation of another image (its class too) in the same context, or hidden states and
entropies replaced by their means over the states, block by block (the class stays)."""
RANDOM_SETS = 4
"""Random sets of blocks that are averaged in every state."""

# ---------------------------------------------------------------------- content


class ContentAblation(NamedTuple):
    """Scores against the oracle in the shared states, with content and without.

    Attributes:
        spearman: by "true" and the names of `REMOVALS`, (images,) float64: mean over an image's states of the rank
            correlation over hidden blocks; NaN where all scores are equal.
        r2: the same names: share of the variance of the oracle's utilities, over all candidates of all states, that the
            line explains which fits the scores best.
        r2_difference: by the names of `REMOVALS`: with content minus without, paired.
    """

    spearman: dict[str, Tensor]
    r2: dict[str, Interval]
    r2_difference: dict[str, Interval]


def other_images(backbone: Backbone, data: TokenSet, states: TensorDict, image: Tensor) -> TensorDict:
    """Observations of other images, (m,) int64, put into the contexts of states, batch (m,), keys order and length."""
    core = NextBlockCore(backbone, data, len(states), CoreConfig(strict=True))
    core.reset(index=image)
    core.show(states["order"], states["length"])
    return core.observation()


def without_content(observation: TensorDict) -> TensorDict:
    """Observations with mean hidden states and entropies: of each block over the states in which it is hidden."""
    mask = observation["action_mask"].float()  # (m, B)
    count = mask.sum(0).clamp_min(1)
    hidden = (observation["hidden"] * mask[..., None]).sum(0) / count[:, None]  # (B, D)
    entropy = (observation["entropy"] * mask).sum(0) / count
    changed = {"hidden": hidden * mask[..., None], "entropy": entropy * mask}
    return observation.clone(recurse=False).update(changed)


def ablated_observations(p: EvaluationProtocol) -> dict[str, TensorDict]:
    """Observations of the shared states, by "true" and the names of `REMOVALS`, batch (m,) each."""
    states = p.states
    assert states is not None
    image, images = states["image"], len(p.data)
    shift = torch.randint(1, images, image.shape, generator=torch.Generator().manual_seed(p.seed))
    own = labelled(states).to(p.device)
    other = other_images(p.backbone, p.data, states, (image + shift) % images)  # never an image itself
    return {"true": own, "other image": other, "mean": without_content(own)}


def content_ablation(
    p: EvaluationProtocol, observations: Mapping[str, TensorDict], scorer: Scorer, utility: Tensor
) -> ContentAblation:
    """Score the shared states with their content and without, and compare with the oracle.

    Observations come from `ablated_observations`, the oracle's utilities (m, B) are in nats per image token.
    """
    states = p.states
    assert states is not None
    hidden, image = ~states["visible"], states["image"]
    scores = {
        name: scorer(observation, torch.Generator().manual_seed(p.seed)).cpu().float()
        for name, observation in observations.items()
    }
    moments = {name: moments_by_image(values, utility, hidden, image) for name, values in scores.items()}
    how = (p.config.resamples, p.seed)

    return ContentAblation(
        {name: image_average(rank_correlation(values, utility, hidden), image) for name, values in scores.items()},
        {name: bootstrap_sums(sums, pooled_r2, *how) for name, sums in moments.items()},
        {name: sums_difference(moments["true"], moments[name], pooled_r2, *how) for name in REMOVALS},
    )


def moments_by_image(scores: Tensor, utility: Tensor, hidden: Tensor, image: Tensor) -> NDArray[np.float64]:
    """Sums over the candidates of each image: 1, s, U, s^2, U^2, s U, (6, images); arguments (m, c), image (m,)."""
    # centred over everything first, so that differences of large sums keep their digits
    s, u = ((x.double() - x[hidden].double().mean()) * hidden for x in (scores, utility))
    return image_sums(torch.stack([hidden.double(), s, u, s * s, u * u, s * u]).sum(-1), image)


def pooled_r2(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared correlation of s and U from the sums of 1, s, U, s^2, U^2, s U: (6, ...) -> (...); 0 for equal scores."""
    n, s, u, ss, uu, su = sums
    covariance, spread, total = su - s * u / n, ss - s * s / n, uu - u * u / n
    return np.where(spread > 1e-12 * n, covariance**2 / np.maximum(spread * total, 1e-300), 0.0)


def oracle_utility(p: EvaluationProtocol) -> Tensor:
    """U of every block in the shared states, (m, B), nats per image token."""
    assert p.states is not None
    return utilities(p.states["gains"], p.backbone.geometry)


def content_entries(p: EvaluationProtocol, policies: Sequence[NamedPolicy]) -> list[dict[str, Any]]:
    """One entry for each policy that scores observations, with and without their content.

    The family of comparisons, corrected by Holm, is all removals of all policies.
    """
    utility, observations = oracle_utility(p), ablated_observations(p)
    found: list[dict[str, Any]] = []
    pairs: list[Pair] = []
    for named in policies:
        if named.scorer is None or getattr(named.scorer, "reads_visible_states", False):  # states show no visible ones
            continue
        ablation = content_ablation(p, observations, named.scorer, utility)
        known = torch.stack(list(ablation.spearman.values())).isfinite().all(0)
        spearman = {name: values[known] for name, values in ablation.spearman.items()}
        if int(known.sum()) < 2:
            continue
        pairs += [
            Pair(f"{named.name}, {name}", "spearman", spearman["true"][None], spearman[name][None]) for name in REMOVALS
        ]
        found.append(
            {
                "policy": named.name,
                "spearman": image_means(spearman, p.config.resamples, p.seed),
                "r2": {name: asdict(interval) for name, interval in ablation.r2.items()},
                "r2_difference": {name: asdict(interval) for name, interval in ablation.r2_difference.items()},
            }
        )
    compared = iter(compare(pairs, p.config.resamples, p.seed))
    for row in found:
        row["spearman_difference"] = {name: next(compared) for name in REMOVALS}
    return found


# ---------------------------------------------------------------------- injection


class Injection(NamedTuple):
    """Loss of the blocks that stay hidden when others are revealed, both (m,) float32, nats per image token."""

    before: Tensor  # without the revealed blocks
    after: Tensor  # given them

    @property
    def drop(self) -> Tensor:
        """(m,) float32: the utility of the set, nats per image token."""
        return self.before - self.after


def injection(backbone: Backbone, data: TokenSet, states: TensorDict, blocks: Tensor) -> Injection:
    """Reveal the true tokens of some hidden blocks at once; each sees those before it, as in the environment.

    Args:
        states: labelled contexts, batch (m,), with keys image, order, length, visible, loss.
        blocks: (m, k) int64, different hidden blocks; at least one more is hidden in each state.
    """
    count, total = blocks.shape[1], backbone.geometry.num_blocks
    chosen = torch.zeros(len(states), total, dtype=torch.bool).scatter(1, blocks, True)
    rank = states["order"].argsort(1)  # places of the visible blocks, then of the chosen ones, then of the rest
    rank = torch.where(states["visible"], rank, 2 * total + rank)
    rank = rank.scatter(1, blocks, total + torch.arange(count).expand_as(blocks))
    before = (states["loss"] * ~chosen).sum(1)
    after = hidden_loss(backbone, data, states["image"], rank.argsort(1), states["length"] + count)
    return Injection(before / backbone.geometry.num_tokens, after / backbone.geometry.num_tokens)


@torch.no_grad()
def hidden_loss(
    backbone: Backbone, data: TokenSet, image: Tensor, order: Tensor, length: Tensor, batch_size: int = 64
) -> Tensor:
    """Loss of all hidden blocks of contexts, (m,) float32 on the CPU, nats.

    Of the reveal orders (m, B) of images (m,) as many blocks are visible as `length` (m,) says, 1 to B - 1.
    """
    device, losses = backbone_device(backbone), torch.zeros(len(image))
    for value in length.unique().tolist():
        for rows in (length == value).nonzero().flatten().split(batch_size):
            tokens, labels = data.tokens[image[rows]].to(device), data.labels[image[rows]].to(device)
            shown = order[rows, :value].to(device)
            prefix = backbone.extend(backbone.start(labels), tokens, shown, torch.full_like(labels, value))
            now, _ = backbone.context_loss(prefix, tokens, order[rows, value:].sort(1).values.to(device))
            losses[rows] = now.loss.sum(1).cpu()
    return losses


def best_blocks(scores: Tensor, visible: Tensor, count: int) -> Tensor:
    """The best-scored hidden blocks, (m, count) int64; scores and visible (m, B)."""
    return scores.masked_fill(visible, -torch.inf).topk(count, dim=1).indices


def random_injection(p: EvaluationProtocol, states: TensorDict, count: int, sets: int = RANDOM_SETS) -> Injection:
    """Means over several random sets of hidden blocks in each state; arguments as in `injection`."""
    generator = torch.Generator().manual_seed(p.seed)
    visible, parts = states["visible"], []
    for _ in range(sets):
        blocks = best_blocks(torch.rand(visible.shape, generator=generator), visible, count)
        parts.append(injection(p.backbone, p.data, states, blocks))
    return Injection(*(torch.stack(values).mean(0) for values in zip(*parts, strict=True)))


def checked_counts(counts: Sequence[int], backbone: Backbone) -> list[int]:
    """Numbers of blocks to inject; ValueError if one is not positive or leaves no block hidden."""
    blocks = backbone.geometry.num_blocks
    if not counts or min(counts) < 1 or max(counts) >= blocks:
        raise ValueError(f"injected must be numbers of blocks from 1 to {blocks - 1}, got {list(counts)}")
    return list(counts)


def injection_entries(
    p: EvaluationProtocol, scores: Mapping[str, Tensor | None], counts: Sequence[int]
) -> list[dict[str, Any]]:
    """One entry for each number of blocks and policy with scores, for the oracle's best and for random blocks.

    Drops are compared with those of random blocks; the family, corrected by Holm, is all of them.
    """
    states = p.states
    assert states is not None
    ranked = {name: values for name, values in scores.items() if values is not None and name != "random"}
    ranked["oracle"] = oracle_utility(p)
    found: list[dict[str, Any]] = []
    pairs: list[Pair] = []
    for count in counts:
        chosen = states[(~states["visible"]).sum(1) > count]
        rows = (~states["visible"]).sum(1) > count
        drops = {"random": random_injection(p, chosen, count)}
        for name, scored in ranked.items():
            blocks = best_blocks(scored[rows], chosen["visible"], count)
            drops[name] = injection(p.backbone, p.data, chosen, blocks)
        for name, drop in drops.items():
            values = {"loss_before": drop.before, "loss_after": drop.after, "drop": drop.drop}
            means = {key: image_average(value, chosen["image"]) for key, value in values.items()}
            entry = {"policy": name, "blocks": count, "states": len(chosen)}
            found.append(entry | image_means(means, p.config.resamples, p.seed))
            if name != "random":
                mine, chance = (image_average(x.drop, chosen["image"])[None] for x in (drop, drops["random"]))
                pairs.append(Pair(f"{name}, {count} blocks", "drop", mine, chance))
    compared = iter(compare(pairs, p.config.resamples, p.seed))
    for entry in found:
        entry["against_random"] = None if entry["policy"] == "random" else next(compared)
    return found


# ---------------------------------------------------------------------- orders and curves


def order_agreements(rollouts: Sequence[Rollout]) -> list[list[float]]:
    """Mean over images of the rank correlation of reveal places, for every pair of rollouts of the same images.

    A rollout of the first images only is compared on these.
    """
    orders = [rollout.order.cpu() for rollout in rollouts]
    shared = [[min(len(a), len(b)) for b in orders] for a in orders]
    return [
        [order_agreement(a[: shared[i][j]], b[: shared[i][j]]).mean().item() for j, b in enumerate(orders)]
        for i, a in enumerate(orders)
    ]


def order_entries(p: EvaluationProtocol, rows: Sequence[Evaluated]) -> dict[str, Any]:
    """Rows of the table, paired differences from the first policy, and how alike the orders are."""
    first, metrics = rows[0], [column.name for column in all_columns("compare") if column.direction]
    pairs = []
    for row in rows[1:]:
        name = f"{row.row['policy']} - {first.row['policy']}"
        known = [metric for metric in metrics if metric in row.per_image]
        pairs += [Pair(name, key, row.per_image[key][None], first.per_image[key][None]) for key in known]
    return {
        "rows": [row.row for row in rows],
        "comparisons": compare(pairs, p.config.resamples, p.seed),
        "agreement": {
            "policies": [row.row["policy"] for row in rows],
            "spearman": order_agreements([row.rollout for row in rows if row.rollout is not None]),
        },
    }


def quality_curves(p: EvaluationProtocol, rollout: Rollout) -> dict[str, dict[str, list[float]]]:
    """What the partly revealed images of a rollout are worth, against the revealed fraction.

    Returns:
        By name: loss (of the hidden blocks, nats per image token), mse (of what is shown to the true image, pixels in
        [0, 1]), and with a classifier confidence and accuracy. Each has fraction, mean, low and high (95 % band over
        images), lists of B + 1 numbers, and area, [mean, low, high] of the area under the curve.
    """
    fraction = rollout.fraction.cpu()
    values = {"loss": rollout.losses.sum(-1).cpu() / rollout.geometry.num_tokens, **_shown_values(p, rollout)}
    at = torch.linspace(0, 1, rollout.geometry.num_blocks + 1)
    curves: dict[str, dict[str, list[float]]] = {}
    for name, moments in values.items():
        area = area_over_fraction(moments, fraction)
        band = bootstrap_band(
            torch.cat([at_fractions(moments, fraction, at), area[None]]), p.config.resamples, seed=p.seed
        )
        curves[name] = {"fraction": at.tolist()}
        curves[name] |= {key: end[:-1].tolist() for key, end in zip(("mean", "low", "high"), band, strict=True)}
        curves[name]["area"] = [float(end[-1]) for end in band]
    return curves


def _shown_values(p: EvaluationProtocol, rollout: Rollout) -> dict[str, Tensor]:
    """Error, confidence and accuracy of the images shown at each moment, (T + 1, n) each."""

    @cache
    def completed(moment: int) -> Tensor:
        return complete(p.backbone, p.data, rollout, moment, p.config.sampling, p.seed)

    fill = "grey" if p.recogniser is None else p.recogniser.fill
    truth = p.data.images(rollout.tokens).float()
    shown = (shown_images(fill, rollout, moment, p.data, completed) for moment in range(len(rollout.visible)))
    values = {"mse": torch.stack([((images - truth) / 255).square().mean((1, 2, 3)) for images in shown])}
    if p.recogniser is not None:
        found = recognise(p.recogniser, rollout, p.data, completed)
        values |= {"confidence": found.confidence.cpu(), "accuracy": found.correct.cpu().float()}
    return values
