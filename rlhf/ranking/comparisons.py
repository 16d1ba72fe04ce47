"""Comparisons of responses, counted from ratings, rankings and winners.

Shapes: K responses of a set, A annotators, E rows of comparisons, N responses of all sets.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

NOBODY = -1
"""The annotator of winners and of bridges, which have no annotator."""


class Comparisons(NamedTuple):
    """Comparisons of pairs of responses, ``[E]`` each; a pair may have several rows."""

    first: IntArray
    second: IntArray
    wins: FloatArray
    """How often first beat second."""
    losses: FloatArray
    """How often second beat first."""
    ties: FloatArray
    """How often neither was preferred."""
    annotator: IntArray
    """The annotator's number, or :data:`NOBODY`."""

    @property
    def counts(self) -> FloatArray:
        """``[E]``: how many comparisons each row holds."""
        return self.wins + self.losses + self.ties

    @property
    def total(self) -> float:
        """How many comparisons there are."""
        return float(self.counts.sum())

    def rows(self, which: NDArray[np.bool_] | IntArray | slice) -> "Comparisons":
        """Return a selection of the rows."""
        return Comparisons._make(column[which] for column in self)


def compare(
    count: int,
    ratings: Sequence[Sequence[float | None]] | None = None,
    rankings: Sequence[Sequence[int | Sequence[int]]] | None = None,
    winners: Sequence[Sequence[float]] | None = None,
) -> Comparisons:
    """Count the comparisons that the annotators made of ``count`` responses; the three kinds add up.

    Each annotator's view of a pair is one comparison; without both responses rated or ranked there is none.
    Annotators are numbered: first the columns of the ratings, then the rankings. Winners are :data:`NOBODY`'s.

    Args:
        count: K.
        ratings: ``[K, A]``, None where an annotator gave no rating; a higher rating wins. Only their order counts,
            because annotators use the ends of a scale differently.
        rankings: per annotator, indices from best to worst; a sequence of indices is a tie.
        winners: entries (i, j, outcome), 1 where i beat j, 0 where it lost, 0.5 for a tie.

    """
    i, j = np.triu_indices(count, k=1)
    table = rating_table(count, ratings, rankings)
    # NaN is neither greater than, nor equal to, nor less than anything, which leaves its pairs out.
    views = np.stack([table[i] > table[j], table[i] < table[j], table[i] == table[j]])
    pair, annotator = np.nonzero(views.any(axis=0))
    won, lost, tied = views[:, pair, annotator].astype(np.float64)
    parts = [Comparisons(i[pair], j[pair], won, lost, tied, annotator)]
    if winners:
        first, second, outcome = np.array(winners, dtype=np.float64).T
        won, lost, tied = np.stack([outcome == 1, outcome == 0, outcome == 0.5]).astype(np.float64)
        nobody = np.full(len(winners), NOBODY)
        parts.append(Comparisons(first.astype(np.int64), second.astype(np.int64), won, lost, tied, nobody))
    return join(parts)


def rating_table(
    count: int,
    ratings: Sequence[Sequence[float | None]] | None,
    rankings: Sequence[Sequence[int | Sequence[int]]] | None = None,
) -> FloatArray:
    """Return ``[K, A]``: ratings, then rankings as ratings by negative place; NaN where an annotator gave none."""
    tables = [np.empty((count, 0))]
    if ratings is not None:
        tables.append(np.array(ratings, dtype=np.float64).reshape(count, -1))
    for ranking in rankings or []:
        column = np.full((count, 1), np.nan)
        for place, members in enumerate(ranking):
            column[members] = -place
        tables.append(column)
    return np.concatenate(tables, axis=1)


def join(parts: Sequence[Comparisons]) -> Comparisons:
    """Return all rows of one part or more, in order."""
    return Comparisons._make(np.concatenate(columns) for columns in zip(*parts, strict=True))


def renumber(comparisons: Comparisons, indices: IntArray) -> Comparisons:
    """Replace each response's number by its entry in ``indices`` ``[K]``."""
    return comparisons._replace(first=indices[comparisons.first], second=indices[comparisons.second])


def merge(count: int, comparisons: Comparisons) -> Comparisons:
    """Return one row for each pair of ``count`` responses, over all annotators, the lower index first."""
    first, second, wins, losses, ties, _ = comparisons
    turned = first > second
    pairs, row = np.unique(np.where(turned, second * count + first, first * count + second), return_inverse=True)
    return Comparisons(
        pairs // count,
        pairs % count,
        add_up(row, np.where(turned, losses, wins), len(pairs)),
        add_up(row, np.where(turned, wins, losses), len(pairs)),
        add_up(row, ties, len(pairs)),
        np.full(len(pairs), NOBODY),
    )


def add_up(index: IntArray, values: FloatArray, count: int) -> FloatArray:
    """Return ``[count]``: the sum of the values ``[E]`` of each index ``[E]``."""
    return np.bincount(index, values, count).astype(np.float64, copy=False)
