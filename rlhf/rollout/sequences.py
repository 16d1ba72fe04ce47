"""Prompts with their responses as tensors, and what a model says of each response token.

Prompts are padded on the left and responses on the right, so that the response's tokens are the last ``time`` columns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from rlhf.attempt import liveness
from rlhf.models import text
from rlhf.zero import group


@dataclass(frozen=True)
class Sequences:
    """Samples in the order of their global index; every rank holds all of them, since they are small beside a model.

    Children add tensors of their own, each ``[sample]`` or ``[sample, time]``.
    """

    ids: Tensor
    """``[sample, prompt + time]``"""
    attention_mask: Tensor
    """``[sample, prompt + time]``, 1 on real tokens."""
    mask: Tensor
    """``[sample, time]``, True on real response tokens, EOS included."""

    @property
    def time(self) -> int:
        """The responses' padded length."""
        return self.mask.shape[1]

    def rows(self, indices: Tensor) -> Self:
        """The samples at ``indices``, trimmed of columns that are padding in all of them."""
        picked = {field.name: getattr(self, field.name)[indices] for field in fields(self)}
        time = max(1, int(picked["mask"].sum(-1).max()))
        prompt = self.ids.shape[1] - self.time
        start = int(picked["attention_mask"][:, :prompt].sum(0).ne(0).long().argmax()) if prompt else 0
        for name, tensor in picked.items():
            columns = slice(start, prompt + time) if name in ("ids", "attention_mask") else slice(0, time)
            picked[name] = tensor[:, columns] if tensor.dim() > 1 else tensor
        return type(self)(**picked)

    def micro_batches(self, indices: Tensor, size: int) -> Iterator[Self]:
        """The samples at ``indices``, ``size`` at a time."""
        for part in indices.split(size):
            yield self.rows(part)
            liveness.beat()

    @classmethod
    def of(cls, sequences: "Sequences", **tensors: Tensor) -> Self:
        """Return the sequences with what else is known of them, by the names of the class's own fields."""
        return cls(ids=sequences.ids, attention_mask=sequences.attention_mask, mask=sequences.mask, **tensors)

    def to(self, device: torch.device) -> Self:
        """Return the samples on a device."""
        return type(self)(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def mine(self, size: int) -> Iterator[Self]:
        """Yield this rank's share on its device, ``size`` samples at a time; every rank has equally many parts."""
        for part in self.micro_batches(group.my_rows(len(self.ids)), size):
            yield part.to(group.device())

    def gather(self, answers: Sequence[Tensor]) -> Tensor:
        """Return what all ranks computed of :meth:`mine`, whole on every rank and on the CPU. A collective.

        answers  of each micro batch, ``[sample, …, its time]``; the result is 0 beyond a micro batch's longest response
        """
        padded = [torch.nn.functional.pad(answer, (0, self.time - answer.shape[-1])) for answer in answers]
        return group.gather_rows(torch.cat(padded), len(self.ids))


def lay_out(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad: int) -> Sequences:
    """Rows of token ids as padded tensors."""
    prompt_ids, prompt_mask = text.pad(prompts, pad, "left")
    response_ids, response_mask = text.pad(responses, pad, "right")
    return Sequences(
        ids=torch.cat([prompt_ids, response_ids], dim=1),
        attention_mask=torch.cat([prompt_mask, response_mask], dim=1),
        mask=response_mask.bool(),
    )
