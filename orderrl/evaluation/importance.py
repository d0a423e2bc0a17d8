"""Orders and scores against the classifier's importance of blocks (labels=classifier): the notes' first ablation."""

from __future__ import annotations

import torch
from torch import Tensor

from orderrl.agents.play import Rollout
from orderrl.backbones import Backbone
from orderrl.backbones.protocol import backbone_device
from orderrl.data import TokenSet
from orderrl.envs.observation import observed
from orderrl.factory import Setup
from orderrl.labels import find_classifier
from orderrl.metrics.calibration import rank_correlation
from orderrl.oracle import clustered_importance
from orderrl.planner import OrderHead


def class_importance(setup: Setup, data: TokenSet) -> Tensor:
    """Importance of every block of some images as the labels' settings have it, (n, B) float32 on the CPU."""
    settings, geometry, found = setup.labels, setup.backbone.geometry, []
    classifier = find_classifier(setup, settings)
    for rows in torch.arange(len(data)).split(settings.batch_size):
        tokens, labels = data.tokens[rows], data.labels[rows]
        found.append(clustered_importance(classifier, geometry, settings, tokens, labels, (rows,)).cpu())
    return torch.cat(found)


def early_agreement(rollout: Rollout, worth: Tensor) -> Tensor:
    """Rank correlation of being revealed early with importance (n, B), of each image: (n,) float64."""
    return _agreement(-rollout.order.argsort(1).float().cpu(), worth)


def _agreement(scores: Tensor, worth: Tensor) -> Tensor:
    """Rank correlation over all blocks, (n,) float64; 0 where scores are equal."""
    return rank_correlation(scores, worth, torch.ones_like(worth, dtype=torch.bool)).nan_to_num()


@torch.no_grad()
def content_agreement(
    planner: OrderHead, backbone: Backbone, data: TokenSet, worth: Tensor, batch_size: int = 64
) -> dict[str, Tensor]:
    """What a planner's scores owe to an image's content, for analyses alone: it is shown the whole true image.

    Returns:
        content_spearman, rank correlation with importance (n, B) of the scores of states in which everything is
        visible, and content_match, that of these scores with those of the empty image; (n,) float64 each.
    """
    blocks, device = backbone.geometry.num_blocks, backbone_device(backbone)
    scores: dict[str, list[Tensor]] = {"empty": [], "true": []}
    for rows in torch.arange(len(data)).split(batch_size):
        tokens, labels = data.tokens[rows].to(device), data.labels[rows].to(device)
        every = torch.arange(blocks, device=device).expand(len(rows), -1)
        none = torch.zeros_like(every, dtype=torch.bool)
        for name, count in {"empty": 0, "true": blocks}.items():
            prefix = backbone.start(labels)
            if count:
                prefix = backbone.extend(prefix, tokens, every, torch.full((len(rows),), count))
            states, entropy = backbone.observe(prefix, every)
            scores[name].append(planner(observed(states.float(), entropy.float(), none, labels)).scores.cpu())
    empty, true = (torch.cat(parts) for parts in scores.values())
    return {"content_spearman": _agreement(true, worth), "content_match": _agreement(true, empty)}
