"""Comparisons for tests: out of matrices of wins, and drawn from known strengths."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from rlhf.ranking.bradley_terry import ELO_SCALE, TieModel
from rlhf.ranking.comparisons import NOBODY, Comparisons, FloatArray, IntArray


def from_wins(wins: FloatArray) -> Comparisons:
    """The comparisons of a ``[K, K]`` matrix of how often i beat j."""
    first, second = np.nonzero(np.triu(wins + wins.T, k=1))
    return Comparisons(
        first,
        second,
        wins[first, second],
        wins[second, first],
        np.zeros(len(first)),
        np.full(len(first), NOBODY),
    )


def as_wins(count: int, comparisons: Comparisons) -> FloatArray:
    """``[K, K]``: how often i beat j, a tie counting half to either."""
    wins = np.zeros((count, count))
    np.add.at(wins, (comparisons.first, comparisons.second), comparisons.wins + comparisons.ties / 2)
    np.add.at(wins, (comparisons.second, comparisons.first), comparisons.losses + comparisons.ties / 2)
    return wins


def outcome_probabilities(gap: FloatArray, model: TieModel, parameter: float) -> FloatArray:
    """``[3, E]``: of win, loss and tie at gaps in nats, in the papers' own terms."""
    first, second = np.exp(gap / 2), np.exp(-gap / 2)
    match model:
        case "half":
            win, loss = first / (first + second), second / (first + second)
        case "rao-kupper":
            win, loss = first / (first + parameter * second), second / (second + parameter * first)
        case "davidson":
            both = first + second + parameter * np.sqrt(first * second)
            win, loss = first / both, second / both
    return np.stack([win, loss, np.maximum(0.0, 1 - win - loss)])


def drawn(
    rng: np.random.Generator,
    elo: FloatArray,
    first: IntArray,
    second: IntArray,
    model: TieModel = "half",
    parameter: float = 1.0,
) -> Comparisons:
    """One comparison of each pair, with the model's probabilities."""
    win, loss, _ = outcome_probabilities(ELO_SCALE * (elo[first] - elo[second]), model, parameter)
    uniform = rng.random(len(first))
    won, lost = uniform < win, uniform >= 1 - loss
    wins, losses, ties = np.stack([won, lost, ~won & ~lost]).astype(np.float64)
    return Comparisons(first, second, wins, losses, ties, np.full(len(first), NOBODY))


def random_pairs(rng: np.random.Generator, count: int, pairs: int) -> tuple[IntArray, IntArray]:
    """Two different responses each."""
    first = rng.integers(0, count, pairs)
    return first, (first + rng.integers(1, count, pairs)) % count


def _square(entries: Sequence[int]) -> FloatArray:
    size = round(len(entries) ** 0.5)
    return np.array(entries, dtype=float).reshape(size, size) / 2 * (1 - np.eye(size))


matrices = st.integers(2, 5).flatmap(
    lambda size: st.lists(st.integers(0, 20), min_size=size * size, max_size=size * size).map(_square)
)
"""Wins of two to five responses."""

connected_matrices = matrices.map(lambda wins: wins + np.eye(len(wins), k=1))
"""The same, with a path that joins all responses."""
