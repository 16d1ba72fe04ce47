"""The experience of one iteration: rollouts of all ranks, what the models said of them, and what PPO learns from them.

Shapes: S samples of the global batch; ids ``[S, prompt + time]``; everything else ``[S, time]``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlhf.config.ppo import PpoSettings
from rlhf.randomness import stream
from rlhf.rollout.sequences import Sequences
from rlhf.zero import group

S = TypeVar("S", bound=Sequences)
S_co = TypeVar("S_co", bound=Sequences, covariant=True)


@dataclass(frozen=True)
class PolicyExperience(Sequences):
    """What the policy's updates of an iteration learn from."""

    logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor


@dataclass(frozen=True)
class Experience(PolicyExperience):
    """What the updates of policy and value model learn from."""

    values: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Minibatch(Generic[S_co]):
    """This rank's share of the samples of one optimiser step."""

    parts: Sequence[S_co]
    """Micro batches."""
    num_tokens: int
    """Real response tokens of the whole minibatch, over all ranks."""


def shuffled(experience: S, settings: PpoSettings, iteration: int) -> Iterator[tuple[int, Minibatch[S]]]:
    """Yield the minibatches of an iteration's epochs, numbered; a new order each epoch."""
    for epoch in range(settings.epochs):
        order = (settings.seed, iteration, epoch)
        parts = minibatches(experience, settings.minibatches, settings.micro_batch_size, *order)
        yield from enumerate(parts, start=epoch * settings.minibatches)


def minibatches(experience: S, count: int, micro_batch_size: int, *seed: int) -> Iterator[Minibatch[S]]:
    """Split the shuffled samples into ``count`` minibatches; each rank gets its share of each, in micro batches.

    The order is a function of ``seed`` alone.
    """
    order = stream("minibatches", *seed).permutation(len(experience.ids))
    for indices in np.split(order, count):
        yield minibatch_of(experience, indices.tolist(), micro_batch_size)


def minibatch_of(sequences: S, indices: Sequence[int], micro_batch_size: int) -> Minibatch[S]:
    """The samples at ``indices`` as a minibatch: this rank's share in micro batches.

    A minibatch must be a multiple of the world size: then all ranks have equally many micro batches, as the collectives
    inside each need.
    """
    parts = list(sequences.micro_batches(torch.tensor(group.share_of(list(indices))), micro_batch_size))
    return Minibatch(parts, num_tokens=int(sequences.mask[torch.tensor(indices)].sum()))
