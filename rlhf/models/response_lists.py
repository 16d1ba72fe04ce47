"""Batches of lists of responses: every response a row of token ids, every list a row of what is known of them.

Shapes: R responses of B lists of at most K, padded to T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.models.text import pad


class ListBatch(NamedTuple):
    """Lists of responses, and what people said of them."""

    input_ids: Tensor
    """``[R, T]``"""
    attention_mask: Tensor
    """``[R, T]``"""
    present: Tensor
    """``[B, K]``: whether the entry is a response; the R responses stand in the order of these entries."""
    strengths: Tensor
    """``[B, K]``, 0 where there is no response."""
    preferences: Tensor
    """``[B, K, K]``: the probability that the one is preferred to the other; NaN where it is unknown."""

    def arranged(self, values: Tensor) -> Tensor:
        """``[B, K]`` of one value a response ``[R]``; 0 where there is none."""
        found = torch.zeros(self.present.shape, dtype=values.dtype, device=values.device)
        return found.masked_scatter(self.present, values)


ListLoss = Callable[[Tensor, ListBatch], Tensor]
"""Of scores ``[B, K]`` and their lists: ``[B]``."""

COLUMNS = ("ids", "strengths", "preferences")
"""Of a list: token ids, strengths, and where the loss asks for them preferences; see :class:`ListBatch`."""


def collate(lists: Sequence[Mapping[str, Any]], padding: int) -> dict[str, Tensor]:
    """Make the fields of a :class:`ListBatch` of rows with :data:`COLUMNS`."""
    texts = [ids for one in lists for ids in one["ids"]]
    ids, mask = pad(texts, padding, "right")
    most = max(len(one["ids"]) for one in lists)
    present = torch.zeros(len(lists), most, dtype=torch.bool)
    strengths = torch.zeros(len(lists), most)
    preferences = torch.full((len(lists), most, most), torch.nan)
    for row, one in enumerate(lists):
        count = len(one["ids"])
        present[row, :count] = True
        strengths[row, :count] = torch.tensor(one["strengths"])
        if "preferences" in one:
            preferences[row, :count, :count] = torch.tensor(one["preferences"])
    return ListBatch(ids, mask, present, strengths, preferences)._asdict()
