"""Prompts with their responses as tensors, experience, and minibatches of it.

Prompts are padded on the left and responses on the right, so that the response's tokens are the last ``time`` columns.
A micro batch may also hold its samples end to end, without padding; what is computed of it has the padded shape anyway.

Shapes: S samples of the global batch; ids ``[S, prompt + time]``; everything else ``[S, time]``.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from rlhf.attempt import liveness
from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.models import text
from rlhf.models.capacity import AT_ONCE
from rlhf.models.micro_batches import MicroBatch, PackedSamples, in_order
from rlhf.randomness import stream
from rlhf.rl.advantages import masked_moments, whiten
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
    count: int | None = field(default=None, kw_only=True)
    """Of a micro batch: real response tokens of the rank that has most of them at this turn."""
    packed: PackedSamples | None = field(default=None, kw_only=True)
    """Of a micro batch: the samples end to end, where models read them so."""

    @property
    def time(self) -> int:
        """Return the responses' padded length."""
        return self.mask.shape[1]

    def rows(self, indices: Tensor) -> Self:
        """Return the samples at ``indices``, without columns that are padding in all of them."""
        picked: dict[str, Any] = {name: tensor[indices] for name, tensor in self._tensors().items()}
        time = max(1, int(picked["mask"].sum(-1).max()))
        prompt = self.ids.shape[1] - self.time
        start = int(picked["attention_mask"][:, :prompt].sum(0).ne(0).long().argmax()) if prompt else 0
        for name, tensor in picked.items():
            columns = slice(start, prompt + time) if name in ("ids", "attention_mask") else slice(0, time)
            picked[name] = tensor[:, columns] if tensor.dim() > 1 else tensor
        return type(self)(**picked)

    @classmethod
    def of(cls, sequences: "Sequences", **tensors: Any) -> Self:
        """Return the sequences with further tensors, by the names of the class's own fields."""
        return cls(ids=sequences.ids, attention_mask=sequences.attention_mask, mask=sequences.mask, **tensors)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> Self:
        """Return the samples on a device."""
        packed = self.packed and self.packed.to(device)
        return replace(self, packed=packed, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def by_length(self, indices: Tensor) -> Tensor:
        """Return the indices sorted by falling length, so that micro batches hold little padding."""
        # The longest first, so that a lack of memory appears at once.
        return indices[self.attention_mask[indices].sum(-1).argsort(descending=True, stable=True)]

    def micro_batches(self, cut: Sequence[Tensor], *, packed: bool) -> list[Self]:
        """Return this rank's micro batches, on its device.

        cut     the samples of each turn, ``[sample, rank]``
        packed  whether samples lie end to end
        """
        # All at once: a copy to a GPU waits for what it computes.
        return [self._micro_batch(turn, packed=packed).to(group.device()) for turn in cut]

    def _micro_batch(self, turn: Tensor, *, packed: bool) -> Self:
        rows, count = self.rows(turn[:, group.rank()]), max(1, int(self.mask[turn].sum((0, 2)).max()))
        samples = PackedSamples.of(rows.ids, rows.attention_mask, rows.time, count) if packed else None
        return replace(rows, count=count, packed=samples)

    def scored(self, micro_batch: MicroBatch, compute: Callable[[Self], Tensor]) -> Tensor:
        """Compute a result of each sample without gradients, each rank its share; return all, on the CPU. A collective.

        micro_batch  without gradients several fit at a time, and shorter samples more of them
        compute      returns the results of a part, ``[sample, …, its time]``; 0 is added beyond its longest response
        """
        tokens = micro_batch.tokens or micro_batch.samples * self.ids.shape[1]
        at_once = replace(micro_batch, tokens=tokens).times(AT_ONCE)
        cut = at_once.cut(self.by_length(torch.arange(len(self.ids))), self.lengths())
        results: list[Tensor] = []
        for part in self.micro_batches(cut, packed=at_once.packed):
            result = compute(part)
            results.append(torch.nn.functional.pad(result, (0, self.time - result.shape[-1])))
            liveness.beat()
        return in_order(results, cut, len(self.ids))

    def lengths(self) -> Tensor:
        """Return the lengths of each prompt and response, ``[sample, 2]``."""
        responses = self.mask.sum(-1)
        return torch.stack([self.attention_mask.sum(-1) - responses, responses], dim=1)


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


E = TypeVar("E", bound=PolicyExperience)


def whitened(experience: E, rows: Tensor) -> E:
    """Return the experience with advantages that are whitened over the samples at ``rows``."""
    advantages, mask = experience.advantages, experience.mask
    moments = masked_moments(advantages[rows], mask[rows])
    return replace(experience, advantages=whiten(advantages, mask, moments))


@dataclass(frozen=True)
class Minibatch(Generic[S_co]):
    """This rank's share of the samples of one optimiser step."""

    parts: Sequence[S_co]
    """Micro batches, on this rank's device."""
    num_tokens: int
    """Real response tokens of the whole minibatch, over all ranks."""


def shuffled(
    experience: S,
    settings: PolicyGradientSettings,
    iteration: int,
    prepare: Callable[[S, Tensor], S] = lambda experience, _: experience,
) -> Iterator[tuple[int, Minibatch[S]]]:
    """Yield the minibatches of an iteration's epochs with their numbers in the run; a new order each epoch.

    prepare  as of :func:`minibatches`
    """
    micro_batch = MicroBatch.of(settings)
    for epoch in range(settings.epochs):
        order = (settings.seed, iteration, epoch)
        parts = minibatches(experience, settings.minibatches, micro_batch, *order, prepare=prepare)
        yield from enumerate(parts, start=iteration * settings.updates + epoch * settings.minibatches)


def minibatches(
    experience: S,
    count: int,
    micro_batch: MicroBatch,
    *seed: int,
    prepare: Callable[[S, Tensor], S] = lambda experience, _: experience,
) -> Iterator[Minibatch[S]]:
    """Split the samples, shuffled by ``seed`` alone, into ``count`` minibatches; each rank gets its share of each.

    prepare  changes the experience for the minibatch of the samples at some indices, the ranks' all together
    """
    order = stream("minibatches", *seed).permutation(len(experience.ids))
    for indices in np.split(order, count):
        yield minibatch_of(prepare(experience, torch.from_numpy(indices)), indices.tolist(), micro_batch)


def minibatch_of(sequences: S, indices: Sequence[int], micro_batch: MicroBatch) -> Minibatch[S]:
    """Return the samples at ``indices`` as a minibatch: this rank's share in micro batches of similar lengths.

    Their number must be a multiple of the world size: all ranks then have equally many micro batches, which the
    collectives inside each need.
    """
    assert not len(indices) % group.world_size()
    order = sequences.by_length(torch.tensor(indices))
    cut = micro_batch.cut(order, sequences.lengths())
    parts = sequences.micro_batches(cut, packed=micro_batch.packed)
    return Minibatch(parts, num_tokens=int(sequences.mask[order].sum()))
