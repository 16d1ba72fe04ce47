"""Losses of a reward model over lists of responses to a prompt, each response encoded once (Ouyang et al. 2022,
arXiv:2203.02155, §3.4), and the batches of such lists.

Every loss is a mean within a list, so that a long list counts as much as a short one, and depends on differences of
strengths alone.

Shapes: B lists of at most K responses, R responses in all, padded to T tokens. ``scores`` and ``strengths`` are ``[B,
K]``, ``present`` is True for responses and False for padding, and a loss is ``[B]``, 0 for a list without a preference.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlhf.models.text import pad


class ListBatch(NamedTuple):
    """Lists of responses with people's preferences."""

    input_ids: Tensor
    """``[R, T]``"""
    attention_mask: Tensor
    """``[R, T]``"""
    present: Tensor
    """``[B, K]``: whether the entry is a response; the R responses are in the order of these entries."""
    strengths: Tensor
    """``[B, K]``, 0 where there is no response."""
    preferences: Tensor
    """``[B, i, j]``: the probability that i is preferred to j; NaN where it is unknown."""

    def arranged(self, values: Tensor) -> Tensor:
        """Arrange a value for each response ``[R]`` as ``[B, K]``, with 0 for padding."""
        zeros = torch.zeros(self.present.shape, dtype=values.dtype, device=values.device)
        return zeros.masked_scatter(self.present, values)


ListLoss = Callable[[Tensor, ListBatch], Tensor]
"""From scores ``[B, K]`` and their lists to losses ``[B]``."""

COLUMNS = ("ids", "strengths", "preferences")
"""Of a list: its responses' token ids, strengths, and preferences where the loss needs them."""


def collate(lists: Sequence[Mapping[str, Any]], padding: int) -> dict[str, Tensor]:
    """Return the fields of a :class:`ListBatch` from rows with :data:`COLUMNS`."""
    ids, mask = pad([ids for row in lists for ids in row["ids"]], padding, "right")
    most = max(len(row["ids"]) for row in lists)
    present = torch.zeros(len(lists), most, dtype=torch.bool)
    strengths = torch.zeros(len(lists), most)
    preferences = torch.full((len(lists), most, most), torch.nan)
    for index, row in enumerate(lists):
        count = len(row["ids"])
        present[index, :count] = True
        strengths[index, :count] = torch.tensor(row["strengths"])
        if "preferences" in row:
            preferences[index, :count, :count] = torch.tensor(row["preferences"])
    return ListBatch(ids, mask, present, strengths, preferences)._asdict()


def pairwise(scores: Tensor, strengths: Tensor, present: Tensor, margin: float = 0.0, smoothing: float = 0.0) -> Tensor:
    """Return -log σ(r_i - r_j - m (s_i - s_j)) over pairs where i is stronger (Ouyang et al. 2022, eq. 1; the margin is
    that of Llama 2, arXiv:2307.09288, eq. 2).

    smoothing  the probability ε that annotators mean the opposite (Wang et al. 2024, arXiv:2401.06080)
    """
    gap = _differences(strengths)
    better = _pairs(present) & (gap > 0)
    logit = _differences(scores) - margin * gap
    return _mean((1 - smoothing) * softplus(-logit) + smoothing * softplus(logit), better)


def soft(scores: Tensor, preferences: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of σ(r_i - r_j) against the probability that i is preferred to j (Christiano et al.
    2017, arXiv:1706.03741, §2.2.3).

    preferences  ``[B, K, K]``, those probabilities; NaN where they are unknown, on the diagonal, and for padding
    smoothing    ε as in :func:`pairwise`
    """
    logit = _differences(scores)
    known = ~preferences.isnan() & torch.ones_like(preferences, dtype=torch.bool).tril(-1)
    # NaN times 0 is NaN, in the gradient too.
    wanted = preferences.nan_to_num(0.5) * (1 - 2 * smoothing) + smoothing
    return _mean(wanted * softplus(-logit) + (1 - wanted) * softplus(logit), known)


def listwise(scores: Tensor, strengths: Tensor, present: Tensor) -> Tensor:
    """Return minus the Plackett-Luce log-likelihood of the order by strength, over K - 1: of drawing the strongest
    first, then the strongest of the rest (ListMLE of Xia et al. 2008, ICML; Luce 1959, Plackett 1975).

    Each of equally strong responses counts as drawn before the others (Breslow 1974, Biometrics 30:89).
    """
    # [B, i, j]: whether j remains when i is drawn.
    remaining = _pairs(present) & (_differences(strengths) >= 0)
    among = torch.logsumexp(scores[:, None, :].masked_fill(~remaining, -torch.inf), dim=-1)
    surprise = (among - scores).masked_fill(~present, 0.0)
    is_ordered = (_differences(strengths) != 0).logical_and(_pairs(present)).any(dim=(1, 2))
    return surprise.sum(dim=1) / (present.sum(dim=1) - 1).clamp(min=1) * is_ordered


def regression(scores: Tensor, targets: Tensor, present: Tensor) -> Tensor:
    """Return (r - s)², where targets are strengths less their mean over all training sets."""
    return ((scores - targets) ** 2).masked_fill(~present, 0.0).sum(dim=1) / present.sum(dim=1)


def centring(scores: Tensor, present: Tensor) -> Tensor:
    """Return (r_i + r_j)² over pairs (Eisenstein et al. 2023, arXiv:2312.09244), which keeps scores near 0."""
    return _mean((scores[:, :, None] + scores[:, None, :]) ** 2, _pairs(present).tril(-1))


def accuracy(scores: Tensor, strengths: Tensor, present: Tensor) -> Tensor:
    """Return the share of a list's pairs of unequal strength that scores order as strengths do, 0 to 1."""
    better = _pairs(present) & (_differences(strengths) > 0)
    return _mean((_differences(scores) > 0).float(), better)


def _differences(values: Tensor) -> Tensor:
    """``[B, i, j]``: x_i - x_j."""
    return values[:, :, None] - values[:, None, :]


def _pairs(present: Tensor) -> Tensor:
    return present[:, :, None] & present[:, None, :]


def _mean(values: Tensor, pairs: Tensor) -> Tensor:
    """Return the mean ``[B]`` of ``[B, K, K]`` over ``pairs``."""
    return values.masked_fill(~pairs, 0.0).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)
