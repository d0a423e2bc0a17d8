"""Drawing tokens from logits: guidance and its schedules, temperature, top-k, top-p."""

from dataclasses import dataclass

import torch
from torch import Tensor

from orderrl.runtime.values import Settings, at_least, between, one_of, setting

SCHEDULES = ("constant", "linear")
LOWEST_TEMPERATURE = 1e-3  # below, logits divided by it overflow


@dataclass(frozen=True)
class Sampling(Settings):
    """How tokens are drawn.

    Temperature 0 takes the most likely token, of equal ones the first; for continuous tokens the temperature scales the
    noise of the reverse steps, not the starting noise. Guidance is unconditional + guidance * (conditional -
    unconditional) and needs no unconditional pass where it is 1. The linear schedule is of RandAR, ARPG and MAR, the
    interval of LlamaGen.
    """

    temperature: float = setting(
        1.0, "Temperature of generated tokens; 0 takes the most likely one (greedy)", at_least(0)
    )
    top_k: int = setting(0, "Number of most likely tokens that are kept; 0 keeps all", at_least(0))
    top_p: float = setting(
        1.0, "Probability of the smallest set of tokens that is kept; 1 keeps all", between("(0, 1]")
    )
    guidance: float = setting(1.0, "Scale of classifier-free guidance; 1 is none", between("[0, 1000]"))
    guidance_schedule: str = setting(
        "constant",
        "Guidance schedule: constant, or linear (rises from 1 with the share of visible tokens)",
        one_of(SCHEDULES),
    )
    guidance_interval: int = setting(
        -1,
        "Guidance interval: tokens with more than this many + 1 before them are drawn without guidance; -1 guides all",
        at_least(-1),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"temperature must be 0 (the most likely token) or at least {LOWEST_TEMPERATURE}, "
                f"got {self.temperature}"
            )

    def scale(self, decided: Tensor, total: int) -> Tensor:
        """Guidance scale of tokens about to be drawn, float32, of an image of `total` tokens; 1 is no guidance.

        Before the step `decided` tokens were drawn, int64 of any shape, which is that of the result.
        """
        share = decided / total if self.guidance_schedule == "linear" else torch.ones_like(decided).float()
        scale = 1 + (self.guidance - 1) * share.float()
        if self.guidance_interval < 0:
            return scale
        return torch.where(decided > self.guidance_interval + 1, 1.0, scale)


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set the logits of excluded tokens to minus infinity, top-k first, then top-p on what is left.

    The token that crosses the threshold p is kept (Holtzman et al., 2020), ties at rank k too.
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability > top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), -torch.inf)
    return logits


def guide(logits: Tensor, unconditional: Tensor | None, scale: Tensor, sampling: Sampling) -> Tensor:
    """Classifier-free guidance: unconditional + scale * (conditional - unconditional).

    Args:
        logits: (..., vocab), conditional.
        unconditional: (..., vocab), under the dropped label; needed when guidance is not 1.
        scale: broadcasts to (...), as `Sampling.scale` gives it; where it is 1 the logits stay as they are.
        sampling: names the guidance in the error.

    Raises:
        ValueError: if guidance is asked for without unconditional logits.
    """
    if unconditional is None:
        if sampling.guidance != 1:
            raise ValueError(
                f"guidance={sampling.guidance} needs the unconditional logits too; give them or use guidance=1"
            )
        return logits
    scale = scale[..., None]
    return torch.where(scale == 1, logits, unconditional + scale * (logits - unconditional))


def sample_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution at given uniform numbers.

    logits (..., vocab), uniforms (...) in [0, 1) -> (...) int64; equal numbers give equal tokens, whatever the batch.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = filter_logits(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    target = uniforms.double()[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True)[..., 0].clamp_max(logits.shape[-1] - 1)
