"""Bradley-Terry strengths of many responses that are compared here and there: a sparse graph instead of matrices.

The objective is that of :mod:`rlhf.ranking.bradley_terry`; memory and time a step are linear in the comparisons.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from rlhf.ranking.bradley_terry import ELO_SCALE, FloatArray

IntArray = NDArray[np.int64]


class Edges(NamedTuple):
    """Comparisons of pairs of responses; a pair may occur more than once. Shape ``[E]`` each."""

    first: IntArray
    second: IntArray
    wins: FloatArray
    """How often first beat second, a tie counting half."""
    losses: FloatArray
    """How often second beat first, a tie counting half."""


def edges_of(wins: FloatArray, indices: IntArray) -> Edges:
    """The edges of one set's ``[K, K]`` wins, its responses numbered by ``indices`` ``[K]``."""
    first, second = np.nonzero(np.triu(wins + wins.T, k=1))
    return Edges(indices[first], indices[second], wins[first, second], wins[second, first])


def join(parts: list[Edges]) -> Edges:
    """All edges of several graphs over the same responses."""
    return Edges(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def bridges(ratings: list[FloatArray], set_of: IntArray, per_response: int, seed: int) -> Edges:
    """Compare responses of different sets by their ratings, as if any rater of one met any rater of the other.

    Ratings on one anchored scale say more than the order within a set: where a set holds only good or only bad
    responses, they alone tell it from another. A pair counts as many comparisons as the lesser number of its raters,
    shared as the ratings' probability of superiority (Mann & Whitney 1947): P(a > b) + P(a = b) / 2.

    ratings       one array a response, of its raters' scores
    set_of        ``[N]``, each response's set; responses of one set are not bridged
    per_response  rounds, in each of which every response meets up to two others; one without ratings meets none
    """
    rng = np.random.default_rng([seed, len(ratings)])
    parts: list[tuple[int, int, float, float]] = []
    for _ in range(per_response):
        circle = rng.permutation(len(ratings))
        for first, second in zip(circle, np.roll(circle, -1), strict=True):
            a, b = ratings[first], ratings[second]
            count = min(len(a), len(b))
            if set_of[first] == set_of[second] or count == 0:
                continue
            share = float((a[:, None] > b).mean() + 0.5 * (a[:, None] == b).mean())
            parts.append((first, second, count * share, count * (1 - share)))
    columns = np.array(parts, dtype=np.float64).reshape(-1, 4)
    return Edges(columns[:, 0].astype(np.int64), columns[:, 1].astype(np.int64), columns[:, 2], columns[:, 3])


def fit_graph(count: int, edges: Edges, prior_elo: float) -> tuple[FloatArray, FloatArray]:
    """Strengths ``[count]`` in Elo points, each connected component about mean 0, and their standard errors.

    A standard error is that of a response given the strengths of those it met, so a lower bound.
    """
    precision = 1.0 / (ELO_SCALE * prior_elo) ** 2
    first, second, wins, losses = edges

    def negative_log_posterior(theta: FloatArray) -> tuple[float, FloatArray]:
        gap = theta[first] - theta[second]
        value = (wins * np.logaddexp(0.0, -gap) + losses * np.logaddexp(0.0, gap)).sum()
        pull = wins - (wins + losses) * _probability(gap)
        gradient = precision * theta - np.bincount(first, pull, count) + np.bincount(second, pull, count)
        return float(value + 0.5 * precision * (theta**2).sum()), gradient

    found = minimize(
        negative_log_posterior,
        np.zeros(count),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 2000, "maxfun": 4000, "ftol": 0.0, "gtol": 1e-7 * (wins + losses).max(initial=1.0)},
    )
    theta: FloatArray = found.x
    probability = _probability(theta[first] - theta[second])
    weight = (wins + losses) * probability * (1 - probability)
    information = precision + np.bincount(first, weight, count) + np.bincount(second, weight, count)
    errors: FloatArray = 1.0 / (ELO_SCALE * np.sqrt(information, dtype=np.float64))
    return theta / ELO_SCALE, errors


def _probability(gap: FloatArray) -> FloatArray:
    """σ(gap), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * gap))
