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


@dataclass(frozen=True)
class Experience(Sequences):
    """What the updates of an iteration learn from."""

    logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @classmethod
    def of(cls, sequences: Sequences, *tensors: Tensor) -> "Experience":
        """Sequences with what else is known of them, in the order of the fields."""
        return cls(sequences.ids, sequences.attention_mask, sequences.mask, *tensors)

    def shuffled(self, settings: PpoSettings, iteration: int) -> Iterator[tuple[int, "Minibatch[Experience]"]]:
        """The minibatches of an iteration's epochs, numbered; a new order each epoch."""
        for epoch in range(settings.epochs):
            order = (settings.seed, iteration, epoch)
            minibatches = self.minibatches(settings.minibatches, settings.micro_batch_size, *order)
            yield from enumerate(minibatches, start=epoch * settings.minibatches)

    def minibatches(self, count: int, micro_batch_size: int, *seed: int) -> Iterator["Minibatch[Experience]"]:
        """Split the shuffled samples into ``count`` minibatches; each rank gets its share of each, in micro batches.

        The order is a function of ``seed`` alone.
        """
        order = stream("minibatches", *seed).permutation(len(self.ids))
        for indices in np.split(order, count):
            yield minibatch_of(self, indices.tolist(), micro_batch_size)


@dataclass(frozen=True)
class Minibatch(Generic[S]):
    """This rank's share of the samples of one optimiser step."""

    parts: list[S]
    """Micro batches."""
    num_tokens: int
    """Real response tokens of the whole minibatch, over all ranks."""


def minibatch_of(sequences: S, indices: Sequence[int], micro_batch_size: int) -> Minibatch[S]:
    """The samples at ``indices`` as a minibatch: this rank's share in micro batches.

    A minibatch must be a multiple of the world size: then all ranks have equally many micro batches, as the collectives
    inside each need.
    """
    parts = list(sequences.micro_batches(torch.tensor(group.share_of(list(indices))), micro_batch_size))
    return Minibatch(parts, num_tokens=int(sequences.mask[torch.tensor(indices)].sum()))
