"""What latent reasoning does: what the scratchpad knows after every pass, and what scores are worth without it.

- `latent_probes`: linear probes of the scratchpad latents, against the same probes of the mean block token.
- `latent_ablation`: scores with other numbers of passes, and with latents that carry nothing from pass to pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orderrl.agents.policies import PlannerPolicy
from orderrl.agents.registry import NamedPolicy
from orderrl.envs.observation import labelled
from orderrl.evaluation.comparison import Pair, compare
from orderrl.evaluation.protocol import EvaluationProtocol
from orderrl.evaluation.row_entries import image_average, image_means, image_sums
from orderrl.geometry import BlockGrid
from orderrl.metrics.calibration import rank_correlation, regret
from orderrl.metrics.statistics import bootstrap_sums, ratio, sums_difference
from orderrl.oracle import utilities
from orderrl.planner import OrderHead

if TYPE_CHECKING:
    from tensordict import TensorDict

PASSES = (0, 1, 2, 4)
COMPONENTS = 32
"""Principal components that every probe reads, so that no features win by their number."""
FOLDS = 5
_RIDGE = np.logspace(-2, 4, 13)

# ---------------------------------------------------------------------- inside the planner


class Pass(NamedTuple):
    """The tokens after a pass of the core."""

    blocks: Tensor  # (m, B, dim)
    latents: Tensor  # (m, L, dim)


@torch.no_grad()
def run_passes(planner: OrderHead, observation: TensorDict) -> list[Pass]:
    """The tokens before the first pass and after each of the R passes of a planner, R + 1 of them; R >= 1."""
    seen: list[Tensor] = []

    def record(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.extend([output] if seen else [inputs[0], output])

    handle = planner.core.register_forward_hook(record)
    try:
        planner.encode(observation)
    finally:
        handle.remove()
    blocks = planner.config.num_blocks
    return [Pass(tokens[:, :blocks].cpu(), tokens[:, blocks:].cpu()) for tokens in seen]


@contextmanager
def edited_latents(planner: OrderHead, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Passes hand on `edit(latents)` instead of the latents, (m, L, dim) both."""
    blocks = planner.config.num_blocks

    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.cat([output[:, :blocks], edit(output[:, blocks:])], dim=1)

    handle = planner.core.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------------- ablation


class Variant(NamedTuple):
    """Agreement of a variant's scores with the hindsight oracle, means over the states of each image."""

    spearman: Tensor  # (images,) float64; NaN for images with a state in which all scores are equal
    regret: Tensor  # (images,) float64, nats per image token


@torch.no_grad()
def variant_scores(planner: OrderHead, observation: TensorDict) -> dict[str, Tensor]:
    """Block scores (m, B) of a planner as it was trained ("trained"), and of its variants.

    "R = 0" and so on change the number of passes (those of `PASSES` that it was not trained with); "reset" begins every
    pass with the initial scratchpad; "mean" with the mean of the latents over the states, so that they still say which
    pass it is, but nothing about the state.
    """
    scores = {"trained": planner(observation).scores}
    for passes in PASSES:
        if passes != planner.config.reasoning_steps:
            scores[f"R = {passes}"] = planner(observation, passes).scores
    with edited_latents(planner, lambda latents: planner.scratchpad.expand_as(latents)):
        scores["reset"] = planner(observation).scores
    with edited_latents(planner, lambda latents: latents.mean(0, keepdim=True).expand_as(latents)):
        scores["mean"] = planner(observation).scores
    return {name: values.cpu().float() for name, values in scores.items()}


def latent_ablation(planner: OrderHead, states: TensorDict, geometry: BlockGrid) -> dict[str, Variant]:
    """Compare a planner's variants, see `variant_scores`, with the hindsight oracle in labelled states, batch (m,)."""
    hidden, image = ~states["visible"], states["image"]
    utility = utilities(states["gains"], geometry)
    found = {}
    for name, scores in variant_scores(planner, _observed(planner, states)).items():
        first = scores.masked_fill(~hidden, -torch.inf).argmax(-1)
        found[name] = Variant(
            image_average(rank_correlation(scores, utility, hidden), image),
            image_average(regret(first, utility, hidden), image),
        )
    return found


# ---------------------------------------------------------------------- probes


def probe_targets(states: TensorDict, geometry: BlockGrid) -> dict[str, Tensor]:
    """What probes are asked for in labelled states, batch (m,).

    Returns:
        "class", (m,) int64; and float32: "remaining loss", (m, 1), of all hidden blocks, nats; "centre of loss",
        (m, 2), row and column of the mean place of hidden blocks, weighted by their loss: where there is something to
        be drawn; "best block", (m, 2), row and column of the block with the largest utility (hindsight oracle).
    """
    hidden = ~states["visible"]
    loss = states["loss"] * hidden
    utility = utilities(states["gains"], geometry).masked_fill(~hidden, -torch.inf)
    remaining = loss.sum(1, keepdim=True)
    return {
        "class": states["label"],
        "remaining loss": remaining,
        "centre of loss": loss @ geometry.centres.to(loss) / remaining.clamp_min(1e-12),
        "best block": geometry.centres.to(loss)[utility.argmax(1)],
    }


def probe(features: Tensor, target: Tensor, image: Tensor) -> NDArray[np.float64]:
    """Sums over the states of each image, from which `probe_score` is made, of cross-validated linear predictions.

    No image is in two folds. Features are standardised and reduced to `COMPONENTS` principal components, in each fold
    from the images that the probe learns from.

    Args:
        features: (m, d).
        target: (m,) int64 for classes (logistic regression), (m, k) float (ridge, its strength cross-validated).
        image: (m,) int64.

    Returns:
        (2, images): correct, states; or (3 + k, images): squared errors, states, squares and k targets.

    Raises:
        ValueError: if the states are of fewer than two images.
    """
    from sklearn.decomposition import PCA  # takes long to import
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    images = len(image.unique())
    if images < 2:
        raise ValueError(f"probes need states of at least 2 images, got {images}")
    classes = target.dtype == torch.int64
    model = LogisticRegression(max_iter=2000) if classes else RidgeCV(_RIDGE)
    folds = GroupKFold(min(FOLDS, images))
    smallest = min(len(rows) for rows, _ in folds.split(features, groups=image))
    pipeline = make_pipeline(StandardScaler(), PCA(min(COMPONENTS, features.shape[1], smallest)), model)
    found = cross_val_predict(pipeline, features.double().numpy(), target.numpy(), groups=image.numpy(), cv=folds)
    predicted = torch.from_numpy(found).reshape(target.shape)
    count = torch.ones(1, len(image), dtype=torch.float64)
    if classes:
        return image_sums(torch.cat([(predicted == target)[None].double(), count]), image)
    centred = (target - target.mean(0)).double()
    error, squares = ((target.double() - predicted) ** 2).sum(1), (centred**2).sum(1)
    return image_sums(torch.cat([error[None], count, squares[None], centred.T]), image)


def probe_score(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Accuracy, or R^2 over all targets together, of sums over images from `probe`: (2 or 3 + k, ...) -> (...)."""
    if len(sums) == 2:
        return ratio(sums)
    error, count, squares, *targets = sums
    return 1 - error / (squares - sum(target**2 for target in targets) / count)


def latent_probes(
    planner: OrderHead, states: TensorDict, geometry: BlockGrid, resamples: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Probe the latents and the mean block token of a planner after every pass, in labelled states of held-out images.

    Args:
        planner: with R >= 1 passes.
        states: labelled contexts, batch (m,).
        resamples: bootstrap resamples; states of an image stay together.

    Returns:
        For each target that varies and each pass 0..R a dict of target, measure ("accuracy" or "r2"), pass, and with
        mean, low and high each: blocks; latents and difference, latents minus blocks, paired (None before the first
        pass, when the scratchpad is the same in every state).
    """
    image = states["image"]
    passes = run_passes(planner, _observed(planner, states))
    entries = []
    for name, target in probe_targets(states, geometry).items():
        if (target == target[0]).all():
            continue
        for number, tokens in enumerate(passes):
            blocks = probe(tokens.blocks.mean(1), target, image)
            entry: dict[str, Any] = {"target": name, "pass": number, "latents": None, "difference": None}
            entry["measure"] = "accuracy" if len(blocks) == 2 else "r2"
            entry["blocks"] = asdict(bootstrap_sums(blocks, probe_score, resamples, seed=seed))
            if number:
                latents = probe(tokens.latents.flatten(1), target, image)
                entry["latents"] = asdict(bootstrap_sums(latents, probe_score, resamples, seed=seed))
                entry["difference"] = asdict(sums_difference(latents, blocks, probe_score, resamples, seed))
            entries.append(entry)
    return entries


def _observed(planner: OrderHead, states: TensorDict) -> TensorDict:
    return labelled(states).to(planner.position.device)


# ---------------------------------------------------------------------- all planners


def latent_entries(p: EvaluationProtocol, policies: Sequence[NamedPolicy]) -> list[dict[str, Any]]:
    """One entry for each planner that reasons: its variants against the oracle, and probes of what its latents know.

    The family of comparisons, corrected by Holm, is all variants of all planners.
    """
    states, geometry = p.states, p.backbone.geometry
    assert states is not None
    found: list[dict[str, Any]] = []
    pairs: list[Pair] = []
    for named in policies:
        if not isinstance(named.policy, PlannerPolicy) or not named.reasoning_steps:
            continue
        planner = named.policy.planner
        variants = {name: variant._asdict() for name, variant in latent_ablation(planner, states, geometry).items()}
        known = torch.stack([variant["spearman"] for variant in variants.values()]).isfinite().all(0)
        for name, values in variants.items():
            values = {metric: x[known] for metric, x in values.items()}
            variants[name] = image_means(values, p.config.resamples, p.seed)
            if name == "trained":
                trained = values
                continue
            pairs += [
                Pair(f"{named.name}, {name} - trained", metric, x[None], trained[metric][None])
                for metric, x in values.items()
            ]
        probes = latent_probes(planner, states, geometry, p.config.resamples, p.seed)
        found.append({"policy": named.name, "variants": variants, "probes": probes})
    compared = iter(compare(pairs, p.config.resamples, p.seed))
    for entry in found:
        for name, variant in entry["variants"].items():
            for metric in ("spearman", "regret"):
                variant[f"{metric}_difference"] = None if name == "trained" else next(compared)
    return found
