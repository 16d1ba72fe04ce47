"""The order of a training stage's rows, and its learning rate. Pure functions."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from rlhf.randomness import stream


def learning_order(lengths: Sequence[int], batch_size: int, epochs: float, seed: int) -> list[int]:
    """Return row numbers, batch after batch of one size, for all epochs: a function of these arguments alone.

    Each epoch has every row once, in an order of its own. Its last batch is filled up with rows of its first, here and
    not where batches are split among ranks. Rows of a batch are sorted by falling length, so that micro batches hold
    rows of similar length; which rows make a batch is random.

    lengths  of each row; at least one row
    epochs   above 0; a part of an epoch is its first batches
    """
    batches = -(-len(lengths) // batch_size)
    lengths_of = np.asarray(lengths)
    rows: list[int] = []
    for epoch in range(math.ceil(epochs)):
        order = np.resize(stream("learning order", seed, epoch).permutation(len(lengths)), (batches, batch_size))
        for batch in order:
            rows += batch[np.argsort(-lengths_of[batch], kind="stable")].tolist()
    return rows[: math.ceil(epochs * batches) * batch_size]


def learning_rate_share(
    done: int, total: int, schedule: Literal["linear", "cosine", "constant"], warmup_fraction: float = 0.0
) -> float:
    """Return the share in (0, 1] of the peak learning rate for update ``done``, counted from 0, of ``total``.

    It rises linearly over the first ``warmup_fraction`` of the updates and is above 0 in the first. Then it falls
    towards 0, which an update after the last would have: linearly, along half a cosine (Loshchilov and Hutter 2016,
    arXiv:1608.03983, eq. 5), or not at all.
    """
    warmup = math.ceil(warmup_fraction * total)
    if done < warmup:
        return (done + 1) / (warmup + 1)
    progress = (done - warmup) / (total - warmup)
    match schedule:
        case "linear":
            return 1 - progress
        case "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        case "constant":
            return 1.0
