from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from rlhf.rollout.sampling import InverseTransformSampling, uniforms
from rlhf.rollout.speak import answers

IDS = torch.zeros((1, 3), dtype=torch.long)


def sampled(logits: torch.Tensor, numbers: torch.Tensor, temperature: float) -> torch.Tensor:
    """The tokens that the processor leaves standing, one a number."""
    count = len(numbers)
    processor = InverseTransformSampling(numbers[:, None], prompt_length=3, temperature=temperature)
    scores = processor(IDS.expand(count, -1), logits.expand(count, -1))
    assert (scores.isfinite().sum(-1) == 1).all()
    return scores.argmax(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_distributed_as_softmax(temperature: float) -> None:
    """Pearson's chi-squared test over 50,000 samples of 40 tokens does not tell the two apart."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0))
    tokens = sampled(logits, uniforms(0, range(50_000), 1)[:, 0], temperature)
    observed = torch.bincount(tokens, minlength=40).numpy()
    expected = torch.softmax(logits.double() / temperature, -1).numpy() * 50_000
    assert stats.chisquare(observed, expected).pvalue > 0.01
    wrong = torch.softmax(logits.double() / (1.1 * temperature), -1).numpy() * 50_000
    assert stats.chisquare(observed, wrong).pvalue < 1e-6


def test_impossible_tokens_are_never_sampled_at_either_end() -> None:
    """Numbers 0 and just below 1 fall on the first and last token that have any probability."""
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf])
    numbers = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert sampled(logits, numbers, 1.0).tolist() == [1, 3]


def test_a_sample_s_numbers_are_its_own() -> None:
    """They follow from the seed and the sample's index: not from its neighbours, nor from how many are drawn."""
    whole = uniforms(7, range(20), 16)
    assert torch.equal(uniforms(7, [11, 3], 16), whole[[11, 3]])
    assert torch.equal(uniforms(7, range(20), 9), whole[:, :9])
    assert not (uniforms(8, range(20), 16) == whole).any()
    assert len(whole.unique()) == whole.numel()
    assert whole.min() >= 0
    assert whole.max() < 1
    assert stats.kstest(uniforms(7, range(500), 16).flatten().numpy(), "uniform").pvalue > 0.01


def test_a_response_does_not_depend_on_its_neighbours_in_the_batch(tiny: Path) -> None:
    """A prompt alone, beside others, and padded for a longer one is answered alike; another seed answers otherwise."""
    prompts = ["a film", "the joy of a film of two halves", "dull"]
    together = answers(tiny, prompts, 1.0, max_new_tokens=12, seed=0)
    assert answers(tiny, prompts[:1], 1.0, max_new_tokens=12, seed=0) == together[:1]
    assert answers(tiny, prompts[:2], 1.0, max_new_tokens=12, seed=0) == together[:2]
    assert answers(tiny, prompts, 1.0, max_new_tokens=12, seed=1) != together
    greedy = answers(tiny, prompts, 0.0, max_new_tokens=12, seed=0)
    assert greedy == answers(tiny, prompts, 0.0, max_new_tokens=12, seed=1)
    assert greedy == answers(tiny, prompts, 1e-4, max_new_tokens=12, seed=2)
