"""The experience of one iteration: rollouts of all ranks, what the models said of them, and what PPO learns from them.

Shapes: S samples of the global batch; ids ``[S, prompt + time]``; everything else ``[S, time]`` or ``[S]``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from rlhf.zero import group


@dataclass(frozen=True)
class Experience:
    """Samples in the order of their global index; every rank holds all of them, since they are small beside a model."""

    ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    """``[S, time]``, True on real response tokens."""
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @property
    def time(self) -> int:
        """The responses' padded length."""
        return self.mask.shape[1]

    def rows(self, indices: Tensor) -> "Experience":
        """The samples at ``indices``, trimmed of columns that are padding in all of them."""
        picked = replace(self, **{field.name: getattr(self, field.name)[indices] for field in fields(self)})
        time = max(1, int(picked.mask.sum(-1).max()))
        prompt = picked.ids.shape[1] - self.time
        start = int(picked.attention_mask[:, :prompt].sum(0).ne(0).long().argmax()) if prompt else 0
        columns = slice(start, prompt + time)
        trimmed = {name: getattr(picked, name)[:, :time] for name in _PER_TOKEN}
        return replace(picked, ids=picked.ids[:, columns], attention_mask=picked.attention_mask[:, columns], **trimmed)

    def minibatches(self, count: int, micro_batch_size: int, *seed: int) -> Iterator["Minibatch"]:
        """Split the shuffled samples into ``count`` minibatches; each rank gets its share of each, in micro batches.

        The order is a function of ``seed`` alone. A minibatch must be a multiple of the world size: then all ranks have
        equally many micro batches, as the collectives inside each need.
        """
        order = np.random.default_rng(list(seed)).permutation(len(self.ids))
        for indices in np.split(order, count):
            mine = torch.from_numpy(np.array(group.share_of(list(indices))))
            parts = [self.rows(part) for part in mine.split(micro_batch_size)]
            yield Minibatch(parts, num_tokens=int(self.mask[torch.from_numpy(indices)].sum()))


_PER_TOKEN = ("mask", "logprobs", "values", "advantages", "returns")


@dataclass(frozen=True)
class Minibatch:
    """This rank's share of the samples of one optimiser step."""

    parts: list[Experience]
    """Micro batches."""
    num_tokens: int
    """Real response tokens of the whole minibatch, over all ranks."""
