"""Drawing tokens: filters keep what they should, and uniform numbers become the right frequencies."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orderrl.backbones.sampling import Sampling, filter_logits, sample_tokens

PARITY = Path(__file__).parents[3] / "shared" / "parity" / "llamagen_gpt_open.safetensors"
SETTINGS = [Sampling(), Sampling(temperature=0.5), Sampling(top_k=3), Sampling(top_p=0.7), Sampling(2.0, 4, 0.8)]


def test_filters_against_the_official_ones() -> None:
    if not PARITY.exists():
        pytest.skip(f"needs the parity fixtures of the official LlamaGen code at {PARITY}, not in the repository")
    tensors = load_file(PARITY)
    probabilities = filter_logits(tensors["io/filter_logits"] / 0.8, top_k=12, top_p=0.85).softmax(-1)
    assert torch.allclose(probabilities, tensors["io/filter_probs"], atol=1e-6)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_frequencies_match_probabilities(sampling: Sampling) -> None:
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, -3.0, 0.0])
    uniforms = (torch.arange(60000, dtype=torch.float64) + 0.5) / 60000
    drawn = sample_tokens(logits.expand(60000, -1), uniforms, sampling)
    wanted = filter_logits(logits / sampling.temperature, sampling.top_k, sampling.top_p).softmax(-1)
    assert torch.allclose(drawn.bincount(minlength=6) / 60000, wanted, atol=1e-4)


def test_top_p_keeps_the_token_that_crosses() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = [filter_logits(logits, 0, p).isfinite().sum().item() for p in (0.1, 0.6, 0.85, 0.97)]
    assert kept == [1, 2, 3, 4]


def test_excluded_tokens_are_never_drawn_at_the_edges() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(2, -1)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(logits, edges, Sampling()).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e-5}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"guidance": -1.0}, "g"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Sampling(**wrong)  # type: ignore[arg-type]
