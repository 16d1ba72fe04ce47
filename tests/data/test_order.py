import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rlhf.training.loop import learning_order

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=40)


@given(lengths, st.integers(1, 12), st.integers(0, 5))
def test_an_epoch_has_every_row_and_only_full_batches(lengths: list[int], batch_size: int, seed: int) -> None:
    """What fills the last one up has been in the epoch already; within a batch the longest comes first."""
    order = learning_order(lengths, batch_size, 2, seed)
    size = math.ceil(len(lengths) / batch_size) * batch_size
    assert len(order) == 2 * size
    for epoch in (order[:size], order[size:]):
        times = np.bincount(epoch, minlength=len(lengths))
        assert times.min() >= 1
        if size < 2 * len(lengths):
            assert times.max() <= 2
            assert (times == 2).sum() == size - len(lengths)
        for start in range(0, size, batch_size):
            seen = [lengths[row] for row in epoch[start : start + batch_size]]
            assert seen == sorted(seen, reverse=True)


def test_batches_are_drawn_anew_for_each_epoch_and_seed() -> None:
    """Which rows stand together does not follow from their lengths or their places in the file."""
    rows = list(range(1, 41))

    def batches(seed: int) -> list[frozenset[int]]:
        order = learning_order(rows, 4, 2, seed)
        return [frozenset(order[start : start + 4]) for start in range(0, 80, 4)]

    first = batches(0)
    assert first == batches(0)
    assert not set(first) & set(batches(1))
    assert not set(first[:10]) & set(first[10:])


def test_a_part_of_an_epoch_is_its_first_batches() -> None:
    """A half of five batches is three, as transformers counts steps."""
    whole = learning_order([1] * 10, 2, 1, 0)
    assert learning_order([1] * 10, 2, 0.5, 0) == whole[:6]
    assert learning_order([1] * 10, 2, 1.5, 0)[:10] == whole
    assert len(learning_order([1] * 10, 2, 1.5, 0)) == 16
