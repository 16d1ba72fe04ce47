"""Cut samples into micro batches, equally many on all ranks, and lay a micro batch's samples end to end in one row.

A turn is the micro batches that the ranks compute at one time: ``[sample, rank]``, indices of samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from rlhf.config.policy_gradient import PolicyGradientSettings
from rlhf.models.packing import bins
from rlhf.zero import group


@dataclass(frozen=True)
class MicroBatch:
    """The most that a rank computes at a time: samples, or tokens where these are counted."""

    samples: int
    tokens: int | None = None
    """In place of ``samples``."""
    packed: bool = False
    """Whether samples lie end to end, so that there is no padding to count."""

    @classmethod
    def of(cls, settings: PolicyGradientSettings) -> Self:
        """Return what the settings say: at most a rank's share of a minibatch, in tokens where samples are packed."""
        samples = min(settings.micro_batch, max(1, settings.rollouts // settings.minibatches // settings.trainers))
        tokens, packed = settings.micro_batch_tokens, bool(settings.packing)
        return cls(samples, samples * settings.longest if packed and tokens is None else tokens, packed)

    def times(self, factor: int) -> Self:
        """Return several micro batches in one."""
        tokens = None if self.tokens is None else factor * self.tokens
        return replace(self, samples=factor * self.samples, tokens=tokens)

    def cut(self, order: Tensor, lengths: Tensor) -> list[Tensor]:
        """Cut samples into turns of at most this size on each rank, or of one sample.

        order    the samples by falling length; the last is repeated where there is no multiple of the ranks
        lengths  of each sample's prompt and response, which are padded by themselves, ``[sample, 2]``
        """
        table = dealt(order)
        if self.tokens is None:
            return list(table.split(self.samples))
        if self.packed:
            # Ranks of a turn have about equally many tokens: neighbours by length.
            return [table[rows] for rows in bins(lengths[table].sum(-1).amax(1).tolist(), self.tokens)]
        return _cut_padded(table, lengths, self.tokens)


def _cut_padded(table: Tensor, lengths: Tensor, tokens: int) -> list[Tensor]:
    sizes, widest = [0], torch.zeros(2, dtype=torch.long)
    for longest in lengths[table].amax(1):
        wider = torch.maximum(widest, longest)
        if sizes[-1] and (sizes[-1] + 1) * int(wider.sum()) > tokens:
            sizes.append(0)
            wider = longest
        sizes[-1] += 1
        widest = wider
    return list(table.split(sizes))


def dealt(order: Tensor) -> Tensor:
    """Return samples as ``[row, rank]``, the last one repeated where there is no multiple of the ranks."""
    world = group.world_size()
    return order[torch.arange(-(-len(order) // world) * world).clamp(max=len(order) - 1)].view(-1, world)


def in_order(results: Sequence[Tensor], cut: Sequence[Tensor], count: int) -> Tensor:
    """Return all ranks' results of all turns in the order of the samples, on the CPU. A collective.

    results  this rank's, of each turn
    count    of samples
    """
    samples, places = torch.cat(list(cut)).flatten().sort(stable=True)
    gathered = group.gather_rows(torch.cat(list(results)), len(samples))
    return gathered[places[torch.searchsorted(samples, torch.arange(count))]]


@dataclass(frozen=True)
class PackedSamples:
    """Prompts with their responses end to end in a row, without padding."""

    ids: Tensor
    """``[1, token]``"""
    positions: Tensor
    """``[1, token]``: a token's place in its sample."""
    offsets: Tensor
    """``[sample + 1]``, int32: each sample's first token, and the number of all tokens."""
    longest: int
    """Tokens of the longest sample."""
    before: Tensor
    """``[count]``: the places of the tokens before those of the responses, then 0."""
    tokens: Tensor
    """``[count]``: ids of the responses' tokens, then 0."""
    cells: Tensor
    """``[response token]``: places in ``[sample, time]``, flattened."""
    time: int

    @classmethod
    def of(cls, ids: Tensor, attention_mask: Tensor, time: int, count: int) -> Self:
        """Pack samples that are on the CPU.

        ids, attention_mask  ``[sample, prompt + time]``, prompts padded on the left, responses on the right
        count                tokens to compute of the responses, at least as many as they have
        """
        real = attention_mask.bool()
        places = real.long().cumsum(-1) - 1
        offsets = torch.nn.functional.pad(real.sum(-1).cumsum(0), (1, 0))
        responses = real[:, -time:]
        before = (offsets[:-1, None] + places[:, -time:])[responses] - 1
        more = 0, count - len(before)
        return cls(
            ids=ids[real][None],
            positions=places[real][None],
            offsets=offsets.int(),
            longest=int(offsets.diff().max()),
            before=torch.nn.functional.pad(before, more),
            tokens=torch.nn.functional.pad(ids[:, -time:][responses], more),
            cells=responses.flatten().nonzero().squeeze(-1),
            time=time,
        )

    def to(self, device: torch.device) -> Self:
        """Return the samples on a device."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def padded(self, results: Tensor) -> Tensor:
        """Return results ``[count]`` of the responses' tokens as ``[sample, time]``, 0 on padding."""
        cells = results.new_zeros((len(self.offsets) - 1) * self.time)
        return cells.index_copy(0, self.cells, results[: len(self.cells)]).view(-1, self.time)
