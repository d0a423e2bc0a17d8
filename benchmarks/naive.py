"""The naive twins: the same numbers, batched just as well, with every prefix encoded again."""

from __future__ import annotations

import torch
from torch import Tensor

from orderrl.backbones import Backbone, RasterTransformer, Sampling
from orderrl.backbones.protocol import backbone_device
from orderrl.data import TokenSet
from orderrl.oracle import Contexts


@torch.no_grad()
def naive_label(backbone: Backbone, data: TokenSet, contexts: Contexts) -> Tensor:
    """Gains of contexts of one length (m, C, C - 1): for every candidate its whole context is encoded from nothing."""
    device = backbone_device(backbone)
    visible = int(contexts.length[0])
    tokens, labels = data.tokens[contexts.image].to(device), data.labels[contexts.image].to(device)
    shown, hidden = contexts.order[:, :visible].to(device), contexts.order[:, visible:].to(device)
    before, _ = backbone.context_loss(_prefix(backbone, tokens, labels, shown), tokens, hidden)
    count = hidden.shape[1]
    others = torch.arange(count - 1)[None] + (torch.arange(count - 1)[None] >= torch.arange(count)[:, None])
    gains = []
    for row in range(len(tokens)):  # the candidates of a state at once
        own, classes = tokens[row].expand(count, *tokens[row].shape), labels[row].expand(count)
        context = torch.cat([shown[row].expand(count, -1), hidden[row][:, None]], 1)
        targets = hidden[row][others.to(device)]
        after, _ = backbone.context_loss(_prefix(backbone, own, classes, context), own, targets)
        gains.append(before.loss[row][others.to(device)] - after.loss)
    return torch.stack(gains)


def _prefix(backbone: Backbone, tokens: Tensor, labels: Tensor, shown: Tensor) -> object:
    prefix = backbone.start(labels)
    if shown.shape[1]:
        prefix = backbone.extend(prefix, tokens, shown, torch.full_like(labels, shown.shape[1]))
    return prefix


@torch.no_grad()
def naive_episode(backbone: Backbone, data: TokenSet, orders: Tensor) -> None:
    """Context losses of an episode (orders (m, B)) when every step encodes its whole prefix again."""
    index = torch.arange(len(orders)) % len(data)
    tokens, labels = data.tokens[index].to(orders.device), data.labels[index].to(orders.device)
    for step in range(orders.shape[1]):
        backbone.context_loss(_prefix(backbone, tokens, labels, orders[:, :step]), tokens, orders[:, step:])


@torch.no_grad()
def raster_images(model: RasterTransformer, labels: Tensor) -> Tensor:
    """Images by plain cached decoding, one token at a time."""
    uniforms = torch.rand(len(labels), model.geometry.num_tokens, generator=torch.Generator().manual_seed(0))
    device = backbone_device(model)
    steps = model.decode_steps(labels.to(device), uniforms.to(device), Sampling(), guided=False)
    return torch.stack([token for token, _ in steps], 1)
