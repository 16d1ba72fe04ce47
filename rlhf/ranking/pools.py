"""Comparison sets with one prompt, brought onto one scale where their annotators' ratings allow it."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from rlhf.ranking.bradley_terry import FloatArray, fit_each
from rlhf.ranking.graph import bridges, edges_of, fit_graph, join


class Ranked(NamedTuple):
    """A set's strengths."""

    elo: FloatArray
    """``[K]``, Elo points; those of one pool share a scale and have mean 0."""
    standard_errors: FloatArray
    """``[K]``, Elo points."""
    pool: int
    """Which pool the set is of: only strengths of one pool can be compared."""


class RatedSet(NamedTuple):
    """What pooling needs of a comparison set."""

    prompt: Any
    wins: FloatArray
    """``[K, K]``, see :class:`rlhf.ranking.comparisons.Comparisons`."""
    ratings: Sequence[Sequence[float | None]] | None
    """``[K, annotators]``, None where there are none."""


def strengths_of(sets: Sequence[RatedSet], prior_elo: float, bridges_per_response: int, seed: int) -> list[Ranked]:
    """The strengths of each set, in order.

    Sets with ratings and the same prompt are one pool; any other set is a pool of its own.
    """
    pools: defaultdict[str | int, list[int]] = defaultdict(list)
    for index, one in enumerate(sets):
        bridged = bridges_per_response > 0 and one.ratings is not None
        pools[str(one.prompt) if bridged else index].append(index)
    alone = [members[0] for members in pools.values() if len(members) == 1]
    found = dict(zip(alone, fit_each([sets[index].wins for index in alone], prior_elo), strict=True))
    for members in pools.values():
        if len(members) > 1:
            fitted = _fit_pool([sets[index] for index in members], prior_elo, bridges_per_response, seed)
            found |= dict(zip(members, fitted, strict=True))
    pool_of = {index: number for number, members in enumerate(pools.values()) for index in members}
    return [Ranked(*found[index], pool_of[index]) for index in range(len(sets))]


def _fit_pool(
    sets: Sequence[RatedSet], prior_elo: float, bridges_per_response: int, seed: int
) -> list[tuple[FloatArray, FloatArray]]:
    sizes = [len(one.wins) for one in sets]
    starts = np.cumsum([0, *sizes])
    within = [
        edges_of(one.wins, np.arange(start, start + len(one.wins))) for one, start in zip(sets, starts, strict=False)
    ]
    ratings = [
        np.array([value for value in row if value is not None], dtype=np.float64)
        for one in sets
        for row in one.ratings or ()
    ]
    across = bridges(ratings, np.repeat(np.arange(len(sets)), sizes), bridges_per_response, seed)
    elo, errors = fit_graph(int(starts[-1]), join([*within, across]), prior_elo)
    elo -= elo.mean()
    return [(elo[start:end], errors[start:end]) for start, end in pairwise(starts)]
