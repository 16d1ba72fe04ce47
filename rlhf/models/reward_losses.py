"""Losses of a reward model that sees the K responses of a list side by side, each encoded once (Ouyang et al. 2022,
arXiv:2203.02155, §3.4), and the batches of such lists.

Every loss is a mean within a list, so that a long list counts as much as a short one, and depends on differences of
strengths alone. Pairs and places of a list are compared all at once.

Shapes: B lists of at most K responses, R responses in all, padded to T tokens. ``scores`` and ``strengths`` are ``[B,
K]``, ``present`` says which entries are responses and not padding, and a loss is ``[B]``, 0 for a list that says
nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

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


def pairwise(scores: Tensor, strengths: Tensor, present: Tensor, margin: float = 0.0, smoothing: float = 0.0) -> Tensor:
    """-log σ(r_i - r_j - m (s_i - s_j)) over pairs where i is the stronger (Ouyang et al. 2022, eq. 1; the margin is
    that of Llama 2, arXiv:2307.09288, eq. 2).

    smoothing  the probability ε that annotators mean the opposite (Wang et al. 2024, arXiv:2401.06080)
    """
    gap = _differences(strengths)
    better = _pairs(present) & (gap > 0)
    logit = _differences(scores) - margin * gap
    return _mean((1 - smoothing) * softplus(-logit) + smoothing * softplus(logit), better)


def soft(scores: Tensor, preferences: Tensor, smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of σ(r_i - r_j) against the probability that i is preferred to j (Christiano et al. 2017,
    arXiv:1706.03741, §2.2.3).

    preferences  ``[B, K, K]``, those probabilities; NaN where they are unknown, on the diagonal, and for padding
    smoothing    ε as in :func:`pairwise`
    """
    logit = _differences(scores)
    known = ~preferences.isnan() & torch.ones_like(preferences, dtype=torch.bool).tril(-1)
    # NaN times 0 is NaN, in the gradient too.
    wanted = preferences.nan_to_num(0.5) * (1 - 2 * smoothing) + smoothing
    return _mean(wanted * softplus(-logit) + (1 - wanted) * softplus(logit), known)


def listwise(scores: Tensor, strengths: Tensor, present: Tensor) -> Tensor:
    """The Plackett-Luce likelihood of the order by strength, over K - 1: of drawing the strongest first, then the
    strongest of the rest (ListMLE of Xia et al. 2008, ICML; Luce 1959, Plackett 1975).

    Of equally strong responses each is taken as drawn before the others (Breslow 1974, Biometrics 30:89).
    """
    # [B, i, j]: j is still there when i is drawn.
    remaining = _pairs(present) & (_differences(strengths) >= 0)
    among = torch.logsumexp(scores[:, None, :].masked_fill(~remaining, -torch.inf), dim=-1)
    surprise = (among - scores).masked_fill(~present, 0.0)
    said = (_differences(strengths) != 0).logical_and(_pairs(present)).any(dim=(1, 2))
    return surprise.sum(dim=1) / (present.sum(dim=1) - 1).clamp(min=1) * said


def regression(scores: Tensor, targets: Tensor, present: Tensor) -> Tensor:
    """(r - s)², where targets are strengths less their mean over all training sets."""
    return ((scores - targets) ** 2).masked_fill(~present, 0.0).sum(dim=1) / present.sum(dim=1)


def centring(scores: Tensor, present: Tensor) -> Tensor:
    """(r_i + r_j)² over pairs (Eisenstein et al. 2023, arXiv:2312.09244), which keeps scores near 0."""
    return _mean((scores[:, :, None] + scores[:, None, :]) ** 2, _pairs(present).tril(-1))


def accuracy(scores: Tensor, strengths: Tensor, present: Tensor) -> Tensor:
    """The share of a list's pairs of unequal strength that scores order likewise, 0 to 1."""
    better = _pairs(present) & (_differences(strengths) > 0)
    return _mean((_differences(scores) > 0).float(), better)


def _differences(values: Tensor) -> Tensor:
    """``[B, i, j]``: x_i - x_j."""
    return values[:, :, None] - values[:, None, :]


def _pairs(present: Tensor) -> Tensor:
    return present[:, :, None] & present[:, None, :]


def _mean(values: Tensor, which: Tensor) -> Tensor:
    """``[B]``: over the chosen entries of ``[B, K, K]``."""
    return values.masked_fill(~which, 0.0).sum(dim=(1, 2)) / which.sum(dim=(1, 2)).clamp(min=1)
