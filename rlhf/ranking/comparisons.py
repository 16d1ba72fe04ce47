"""From ratings, rankings and winners to who beat whom, and how often.

Shapes: K responses of a set, A annotators, M models.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


class Comparisons(NamedTuple):
    """The pairwise comparisons of a set's responses."""

    wins: FloatArray
    """``[K, K]``: entry [i, j] is how often response i beat response j, a tie counting half to either. So i and j were
    compared [i, j] + [j, i] times; the diagonal is 0."""
    ties: int
    """How many of the comparisons are ties."""


def compare(
    count: int,
    ratings: Sequence[Sequence[float | None]] | None = None,
    rankings: Sequence[Sequence[int | Sequence[int]]] | None = None,
    winners: Sequence[Sequence[float]] | None = None,
) -> Comparisons:
    """Count the comparisons that the annotators made of ``count`` responses; the three kinds add up.

    Each annotator's view of a pair is one comparison; a pair of which an annotator rated or ranked one alone is none.

    Args:
        count: K.
        ratings: ``[K, A]``, None where an annotator gave no rating; a higher rating wins. Only their order counts,
        because
            annotators use the ends of a scale differently.
        rankings: per annotator, indices from best to worst; a sequence of indices is a tie.
        winners: entries (i, j, outcome), 1 where i beat j, 0 where it lost, 0.5 for a tie.

    """
    wins = np.zeros((count, count))
    ties = 0
    tables = [_ranks_as_ratings(count, ranking) for ranking in rankings or []]
    if ratings is not None:
        tables.append(np.array(ratings, dtype=np.float64).reshape(count, -1))
    for table in tables:
        first, second = table[:, None, :], table[None, :, :]
        # NaN is neither greater than nor equal to anything, which leaves its pairs out.
        equal = np.triu((first == second).sum(axis=2), k=1)
        wins += (first > second).sum(axis=2) + 0.5 * (equal + equal.T)
        ties += int(equal.sum())
    for i, j, outcome in winners or []:
        wins[int(i), int(j)] += outcome
        wins[int(j), int(i)] += 1 - outcome
        ties += outcome == 0.5
    return Comparisons(wins, ties)


def _ranks_as_ratings(count: int, ranking: Sequence[int | Sequence[int]]) -> FloatArray:
    """``[K, 1]``: the negative place of each response in a ranking, NaN where it is left out."""
    ratings = np.full((count, 1), np.nan)
    for place, members in enumerate(ranking):
        ratings[members] = -place
    return ratings


def pool_by_model(sets: Sequence[tuple[Sequence[str], FloatArray]]) -> tuple[list[str], FloatArray]:
    """Add up the wins of all sets' responses by the model that wrote each: names in order, and their ``[M, M]`` wins.

    Comparisons of two responses of one model say nothing of models and are left out.
    """
    names = sorted({name for models, _ in sets for name in models})
    number = {name: index for index, name in enumerate(names)}
    pooled = np.zeros((len(names), len(names)))
    for models, wins in sets:
        indices = np.array([number[name] for name in models])
        # Not ``+=``, which would count only one of a model's responses.
        np.add.at(pooled, (indices[:, None], indices[None, :]), wins)
    np.fill_diagonal(pooled, 0.0)
    return names, pooled
