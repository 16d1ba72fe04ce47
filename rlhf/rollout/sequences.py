"""Prompts with their responses as tensors, experience, and minibatches of it.

Prompts are padded on the left and responses on the right, so that the response's tokens are the last ``time`` columns.

Shapes: S samples of the global batch; ids ``[S, prompt + time]``; everything else ``[S, time]``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlhf.attempt import liveness
from rlhf.config.ppo import PpoSettings
from rlhf.models import text
from rlhf.randomness import stream
from rlhf.zero import group


@dataclass(frozen=True)
class Sequences:
    """Samples ordered by global index, all of them on every rank, since they are small beside a model.

    Subclasses add tensors, each ``[sample]`` or ``[sample, time]``.
    """

    ids: Tensor
    """``[sample, prompt + time]``"""
    attention_mask: Tensor
    """``[sample, prompt + time]``, 1 on real tokens."""
    mask: Tensor
    """``[sample, time]``, True on real response tokens, EOS included."""

    @property
    def time(self) -> int:
        """Return the responses' padded length."""
        return self.mask.shape[1]

    def rows(self, indices: Tensor) -> Self:
        """Return the samples at ``indices``, without columns that are padding in all of them."""
        picked = {field.name: getattr(self, field.name)[indices] for field in fields(self)}
        time = max(1, int(picked["mask"].sum(-1).max()))
        prompt = self.ids.shape[1] - self.time
        start = int(picked["attention_mask"][:, :prompt].sum(0).ne(0).long().argmax()) if prompt else 0
        for name, tensor in picked.items():
            columns = slice(start, prompt + time) if name in ("ids", "attention_mask") else slice(0, time)
            picked[name] = tensor[:, columns] if tensor.dim() > 1 else tensor
        return type(self)(**picked)

    def micro_batches(self, indices: Tensor, size: int) -> Iterator[Self]:
        """Yield the samples at ``indices``, ``size`` at a time."""
        for part in indices.split(size):
            yield self.rows(part)
            liveness.beat()

    @classmethod
    def of(cls, sequences: "Sequences", **tensors: Tensor) -> Self:
        """Return the sequences with further tensors, by the names of the class's own fields."""
        return cls(ids=sequences.ids, attention_mask=sequences.attention_mask, mask=sequences.mask, **tensors)

    def to(self, device: torch.device) -> Self:
        """Return the samples on a device."""
        return type(self)(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def mine(self, size: int) -> Iterator[Self]:
        """Yield this rank's share on its device, ``size`` samples at a time; every rank has equally many parts."""
        for part in self.micro_batches(group.my_rows(len(self.ids)), size):
            yield part.to(group.device())

    def gather(self, results: Sequence[Tensor]) -> Tensor:
        """Return the results of all ranks' :meth:`mine`, whole on every rank and on the CPU. A collective.

        results  of each micro batch, ``[sample, …, its time]``; 0 is added beyond a micro batch's longest response
        """
        padded = [torch.nn.functional.pad(result, (0, self.time - result.shape[-1])) for result in results]
        return group.gather_rows(torch.cat(padded), len(self.ids))


def lay_out(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad: int) -> Sequences:
    """Return rows of token ids as padded tensors."""
    prompt_ids, prompt_mask = text.pad(prompts, pad, "left")
    response_ids, response_mask = text.pad(responses, pad, "right")
    return Sequences(
        ids=torch.cat([prompt_ids, response_ids], dim=1),
        attention_mask=torch.cat([prompt_mask, response_mask], dim=1),
        mask=response_mask.bool(),
    )


S = TypeVar("S", bound=Sequences)
S_co = TypeVar("S_co", bound=Sequences, covariant=True)


@dataclass(frozen=True)
class PolicyExperience(Sequences):
    """The samples that an iteration's updates of the policy learn from."""

    logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor


@dataclass(frozen=True)
class Experience(PolicyExperience):
    """The samples that the updates of policy and value model learn from."""

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
    """Split the samples, shuffled by ``seed`` alone, into ``count`` minibatches; each rank gets its share of each."""
    order = stream("minibatches", *seed).permutation(len(experience.ids))
    for indices in np.split(order, count):
        yield minibatch_of(experience, indices.tolist(), micro_batch_size)


def minibatch_of(sequences: S, indices: Sequence[int], micro_batch_size: int) -> Minibatch[S]:
    """Return the samples at ``indices`` as a minibatch: this rank's share in micro batches.

    Their number must be a multiple of the world size: all ranks then have equally many micro batches, which the
    collectives inside each need.
    """
    parts = list(sequences.micro_batches(torch.tensor(group.share_of(list(indices))), micro_batch_size))
    return Minibatch(parts, num_tokens=int(sequences.mask[torch.tensor(indices)].sum()))
