"""Sampling by random numbers that depend on the seed and the sample's global index, never on rank or batch.

The logits' rounding may differ with what shares the batch, and then so does what is drawn: docs/ppo.md says how often.
Each token of each sample has one uniform number of its own; the token is where the cumulative distribution passes it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from rlhf.randomness import stream


def uniforms(seed: int, samples: Sequence[int], length: int) -> Tensor:
    """Float64 in [0, 1), ``[sample, length]``, of a counter-based generator keyed by seed and sample index."""
    rows = [stream("sampling", seed, sample).random(length) for sample in samples]
    return torch.from_numpy(np.stack(rows))


class InverseTransformSampling(LogitsProcessor):
    """Leaves only the sampled token standing, so that a greedy search picks it.

    The token is the first whose cumulative probability under softmax(logits / temperature) exceeds the uniform number.
    """

    def __init__(self, uniforms: Tensor, prompt_length: int, temperature: float) -> None:
        self._uniforms = uniforms
        self._prompt_length = prompt_length
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] - Tensor is torch's LongTensor's base
        """Scores ``[batch, vocabulary]`` with everything but the sampled token at -inf."""
        step = input_ids.shape[1] - self._prompt_length
        cumulative = torch.softmax(scores.float() / self._temperature, dim=-1).cumsum(dim=-1, dtype=torch.float64)
        # Rounding leaves the last sum a little off 1; scaling by it keeps every number inside.
        threshold = self._uniforms[:, step, None].to(scores.device) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True)
        return torch.full_like(scores, float("-inf")).scatter(-1, tokens, 0.0)
