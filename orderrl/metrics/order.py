"""What an order looks like: how far it jumps, how much of a block's surroundings is there, how it begins."""

import scipy
import torch
from torch import Tensor

from orderrl.agents.play import Rollout
from orderrl.geometry import BlockGrid


def consecutive_distance(order: Tensor, geometry: BlockGrid) -> Tensor:
    """Mean distance between the centres of blocks that follow each other in orders (n, B), (n,) float32, in blocks.

    Blocks of one step follow each other as the action listed them; B >= 2.
    """
    distances = geometry.distances.to(order.device)
    return distances[order[:, :-1], order[:, 1:]].mean(1)


def visible_neighbours(rollout: Rollout) -> Tensor:
    """Share of a block's 8-neighbours that were visible before the step that revealed it, by place in the order.

    Blocks of the same step do not count: the sampler does not see them either. At the rim a block has fewer neighbours,
    and the share is of those it has.

    Returns:
        (n, B) float32; column k is the k-th block of each image.
    """
    touching = rollout.geometry.touching.float().to(rollout.losses.device)
    neighbours = touching - torch.eye(len(touching), device=touching.device)
    count = (rollout.visible[:-1].float() @ neighbours).gather(0, rollout.reveal_step[None])[0]  # (n, B)
    share = count / neighbours.sum(1).clamp_min(1)  # a grid of one block has no neighbours
    return share.gather(1, rollout.order)


def first_choice_entropy(rollout: Rollout) -> float:
    """Entropy over images of the block that is revealed first, nats: 0 if it is always the same, at most log B.

    Computed from the frequencies among n images, which is too low by about (K - 1) / (2 n) for K blocks that occur.
    """
    counts = torch.bincount(rollout.order[:, 0], minlength=rollout.geometry.num_blocks)
    return float(scipy.stats.entropy(counts.cpu().numpy()))


def place_entropy(rollout: Rollout) -> float:
    """Entropy over images of the block at each place of the order, mean over the places, nats: 0 for a fixed order.

    How many orders a body that serves the policy must know; from frequencies, as `first_choice_entropy`.
    """
    counts = torch.nn.functional.one_hot(rollout.order, rollout.geometry.num_blocks).sum(0)  # (place, block)
    return float(scipy.stats.entropy(counts.cpu().numpy(), axis=1).mean())


def order_agreement(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of the places that two orders (n, B) of the same images give to blocks, (n,) float64."""
    places = torch.stack([first.argsort(1), second.argsort(1)]).double()  # every order is a permutation: no ties
    centred = places - places.mean(-1, keepdim=True)
    return (centred[0] * centred[1]).sum(-1) / centred[0].square().sum(-1)
