"""In which order a stage learns from its rows. Pure."""

import math
from collections.abc import Sequence

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
