"""In which order a training stage learns from its rows, and at which learning rate. Pure."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from rlhf.randomness import stream


def learning_order(lengths: Sequence[int], batch_size: int, epochs: float, seed: int) -> list[int]:
    """The numbers of the rows, batch after batch, all of one size, through all epochs: a function of these arguments.

    Each epoch has every row once, in an order of its own. Its last batch is filled up with rows of its first: what
    fills it must not be for whoever splits batches among ranks to decide. Rows of a batch stand in falling order of
    their lengths, so that micro batches hold rows of about one length; which rows make a batch is chance.

    lengths  of each row, at least one
    epochs   above 0; a part of an epoch is its first batches
    """
    batches = -(-len(lengths) // batch_size)
    lengths_of = np.asarray(lengths)
    found: list[int] = []
    for epoch in range(math.ceil(epochs)):
        order = np.resize(stream("learning order", seed, epoch).permutation(len(lengths)), (batches, batch_size))
        for batch in order:
            found += batch[np.argsort(-lengths_of[batch], kind="stable")].tolist()
    return found[: math.ceil(epochs * batches) * batch_size]


def learning_rate_share(
    done: int, total: int, schedule: Literal["linear", "cosine", "constant"], warmup_fraction: float = 0.0
) -> float:
    """The share in (0, 1] for update number ``done``, counted from 0, of ``total``.

    Over the first ``warmup_fraction`` of the updates it rises along a line, and the first update already moves. Then it
    falls towards 0, which only an update after the last would have: along a line, along half a cosine (Loshchilov and
    Hutter 2016, arXiv:1608.03983, eq. 5), or not at all.
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
