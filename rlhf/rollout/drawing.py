"""Draw tokens from logits with random numbers keyed by seed and sample, each token with a number of its own."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.randomness import stream

BLOCK = 256
"""Tokens of the vocabulary whose probabilities are summed before any is looked at by itself."""
BELOW_ONE = 1 - 2**-53
"""The largest float64 below 1: times a float64 it gives the next one below."""


class Responses(NamedTuple):
    """Sampled responses; both tensors are ``[sample, time]``."""

    ids: Tensor
    """Token ids, EOS included, with padding after it."""
    logprobs: Tensor
    """Log-probabilities of these tokens under the distributions they were drawn from, nats; 0 on padding."""


def uniforms(seed: int, samples: Sequence[int], length: int) -> Tensor:
    """Return float64 in [0, 1), ``[sample, length]``, of a counter-based generator keyed by seed and sample index."""
    return torch.from_numpy(np.stack([stream("sampling", seed, sample).random(length) for sample in samples]))


def drawn(logits: Tensor, numbers: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return tokens ``[batch]`` and their log-probabilities, nats, under softmax(logits / temperature).

    The arguments are those of :func:`inverse_transform`, but temperature 0 takes the likeliest token, ignores the
    numbers, and sets the log-probability to 0. All is computed where the logits are, and the host waits for nothing.
    """
    if not temperature:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros_like(tokens, dtype=torch.float32)
    probabilities = _probabilities(logits, temperature)
    tokens = _inverse(probabilities, numbers)
    return tokens, probabilities.gather(-1, tokens[:, None]).squeeze(-1).log()


def inverse_transform(logits: Tensor, numbers: Tensor, temperature: float) -> Tensor:
    """Return the first token whose cumulative probability under softmax(logits / temperature) exceeds its number.

    logits       ``[batch, vocabulary]``; -inf means probability 0
    numbers      ``[batch]``, float64 in [0, 1), on the logits' device
    temperature  above 0
    returns      token ids ``[batch]``
    """
    return _inverse(_probabilities(logits, temperature), numbers)


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    scaled = logits.float()
    return torch.softmax(scaled if temperature == 1 else scaled / temperature, dim=-1)


def _inverse(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Find the token in two steps, the block that holds it and its place there: sums in float64 over the whole
    vocabulary would be the dearest part of a step.
    """
    width = min(BLOCK, probabilities.shape[-1])
    missing = -probabilities.shape[-1] % width
    padded = torch.nn.functional.pad(probabilities, (0, missing)) if missing else probabilities
    blocks = padded.unflatten(-1, (-1, width))
    # A GPU sums in float32 four times as fast; a block's sum is then as exact as the probabilities are.
    dtype = torch.float32 if blocks.is_cuda else torch.float64
    sums = blocks.sum(dim=-1, dtype=dtype).cumsum(dim=-1, dtype=torch.float64)
    # Rounding leaves the last sum a little off 1; scaling by it keeps every number below it.
    threshold = numbers[:, None] * sums[:, -1:]
    block = torch.searchsorted(sums, threshold, right=True)
    before = torch.nn.functional.pad(sums, (1, 0)).gather(-1, block)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, width)).squeeze(1).cumsum(dim=-1, dtype=torch.float64)
    # Rounding may move the rest to the block's last sum or beyond: that finds the place where the sum is first reached,
    # and never one behind it, which has probability 0.
    rest = torch.minimum(threshold - before, inside[:, -1:] * BELOW_ONE)
    return torch.add(torch.searchsorted(inside, rest, right=True), block, alpha=width).squeeze(-1)
