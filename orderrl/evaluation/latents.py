"""What latent reasoning does: what scores are worth after other numbers of passes, and without what latents carry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orderrl.agents.policies import PlannerPolicy
from orderrl.agents.registry import NamedPolicy
from orderrl.envs.observation import labelled
from orderrl.evaluation.comparison import Pair, compare
from orderrl.evaluation.protocol import EvaluationProtocol
from orderrl.evaluation.row_entries import image_average, image_means
from orderrl.geometry import BlockGrid
from orderrl.metrics.calibration import rank_correlation, regret
from orderrl.oracle import utilities
from orderrl.planner import OrderHead

if TYPE_CHECKING:
    from tensordict import TensorDict

PASSES = (0, 1, 2, 4)


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


def latent_ablation(planner: OrderHead, states: TensorDict, geometry: BlockGrid) -> dict[str, dict[str, Tensor]]:
    """Compare a planner's variants, see `variant_scores`, with the hindsight oracle in labelled states, batch (m,).

    Returns:
        For each variant spearman and regret (nats per image token), means over the states of each image, (images,)
        float64 both; spearman is NaN for images with a state in which all scores are equal.
    """
    hidden, image = ~states["visible"], states["image"]
    utility = utilities(states["gains"], geometry)
    found = {}
    for name, scores in variant_scores(planner, labelled(states).to(planner.position.device)).items():
        first = scores.masked_fill(~hidden, -torch.inf).argmax(-1)
        found[name] = {
            "spearman": image_average(rank_correlation(scores, utility, hidden), image),
            "regret": image_average(regret(first, utility, hidden), image),
        }
    return found


def latent_entries(p: EvaluationProtocol, policies: Sequence[NamedPolicy]) -> list[dict[str, Any]]:
    """One entry for each planner that reasons: its variants against the oracle.

    The family of comparisons, corrected by Holm, is all variants of all planners.
    """
    assert p.states is not None
    found: list[dict[str, Any]] = []
    pairs: list[Pair] = []
    for named in policies:
        if not isinstance(named.policy, PlannerPolicy) or not named.reasoning_steps:
            continue
        measured = latent_ablation(named.policy.planner, p.states, p.backbone.geometry)
        known = torch.stack([values["spearman"] for values in measured.values()]).isfinite().all(0)
        measured = {name: {key: x[known] for key, x in values.items()} for name, values in measured.items()}
        trained = measured["trained"]
        pairs += [
            Pair(f"{named.name}, {name} - trained", key, x[None], trained[key][None])
            for name, values in measured.items()
            if name != "trained"
            for key, x in values.items()
        ]
        variants = {name: image_means(values, p.config.resamples, p.seed) for name, values in measured.items()}
        found.append({"policy": named.name, "variants": variants})
    compared = iter(compare(pairs, p.config.resamples, p.seed))
    for entry in found:
        for name, variant in entry["variants"].items():
            for key in ("spearman", "regret"):
                variant[f"{key}_difference"] = None if name == "trained" else next(compared)
    return found
