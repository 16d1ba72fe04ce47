"""Elo ratings as a stream of comparisons moves them (Elo 1978, The Rating of Chessplayers).

After each comparison of i and j, with outcome s = 1 where i won, ½ where it was a tie, 0 where it lost,

    R_i ← R_i + K (s - σ(c (R_i - R_j)))        c = ln(10) / 400

and R_j by as much the other way. Ratings depend on the order of the comparisons, which for answers to one prompt means
nothing: they are averaged over orders. Where everything is known at once, maximum likelihood
(:mod:`rlhf.ranking.bradley_terry`) uses it better (Boubdir et al. 2023, arXiv:2311.17295).

Shapes: N responses, S comparisons in a stream, O orders.
"""

import numpy as np

from rlhf.randomness import stream
from rlhf.ranking.bradley_terry import ELO_SCALE, Strengths
from rlhf.ranking.comparisons import Comparisons, FloatArray, IntArray


def fit_online(count: int, comparisons: Comparisons, k_factor: float, orders: int, seed: int) -> Strengths:
    """The ratings of ``count`` responses, averaged over orders; the mean of all is 0.

    Standard errors are the deviations over as many streams drawn from the comparisons with replacement (the bootstrap),
    each in an order of its own.
    """
    first, second, outcome = _stream(comparisons)
    rng = stream("online orders", seed)
    permuted = np.stack([rng.permutation(len(first)) for _ in range(orders)])
    drawn = rng.integers(len(first), size=(orders, len(first)))
    ratings = _run(count, first, second, outcome, np.concatenate([permuted, drawn]), k_factor)
    return Strengths(ratings[:orders].mean(axis=0), ratings[orders:].std(axis=0, ddof=1), None)


def _stream(comparisons: Comparisons) -> tuple[IntArray, IntArray, FloatArray]:
    """One entry a comparison; those that were counted together have their mean outcome."""
    total = comparisons.wins + comparisons.losses + comparisons.ties
    times = np.maximum(np.rint(total), 1).astype(np.int64)
    mean = (comparisons.wins + 0.5 * comparisons.ties) / total
    return np.repeat(comparisons.first, times), np.repeat(comparisons.second, times), np.repeat(mean, times)


def _run(
    count: int, first: IntArray, second: IntArray, outcome: FloatArray, order: IntArray, k_factor: float
) -> FloatArray:
    """``[O, N]``: the ratings that each order ``[O, S]`` leads to."""
    ratings = np.zeros((len(order), count))
    every = np.arange(len(order))
    for now in order.T:
        i, j = first[now], second[now]
        expected = 1 / (1 + np.exp(ELO_SCALE * (ratings[every, j] - ratings[every, i])))
        moved = k_factor * (outcome[now] - expected)
        ratings[every, i] += moved
        ratings[every, j] -= moved
    return ratings
