"""Comparison sets with one prompt, brought onto one scale where their annotators' ratings allow it."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from rlhf.data.records import ComparisonSet
from rlhf.errors import RecordError
from rlhf.ranking.comparisons import (
    NOBODY,
    Comparisons,
    FloatArray,
    IntArray,
    compare,
    join,
    rating_table,
    renumber,
)
from rlhf.ranking.cross_set_comparisons import bridges
from rlhf.ranking.normalise import Normalised

MOST_RESPONSES = 1000
"""Of a set with ratings or rankings: half a million pairs for each annotator."""


class Ranked(NamedTuple):
    """A set's strengths; those of one pool share a scale."""

    strengths: FloatArray
    """``[K]``, normalised."""
    standard_errors: FloatArray
    """``[K]``, of those."""
    elo: FloatArray
    """``[K]``, Elo points."""
    pool: int
    """Which pool the set is of: only strengths of one pool can be compared."""


class ComparedSet(NamedTuple):
    """What pooling needs of a comparison set."""

    prompt: Any
    size: int
    """K, how many responses."""
    comparisons: Comparisons
    """Of responses numbered from 0."""
    ratings_table: FloatArray
    """``[K, annotators]``, NaN where there is no rating."""
    table: FloatArray
    """``[K, annotators]``: the ratings, then rankings as ratings by place."""


def compared_sets(records: Iterable[ComparisonSet], place: str, names: dict[str, int]) -> list[ComparedSet]:
    """The comparisons of every set; annotators are numbered through in ``names``, which new ones are added to.

    place  the file, for messages and for annotators without names

    Raises:
        RecordError: a set is too large for all its responses to be compared with each other.
    """
    found: list[ComparedSet] = []
    for row, one in enumerate(records, start=1):
        size, where = len(one.responses), f"{place}:{row}"
        if size > MOST_RESPONSES and (one.ratings or one.rankings):
            raise RecordError(
                f"a set has {size} responses, and all pairs of more than {MOST_RESPONSES} are too many to compare",
                where,
                "split it into sets with the same prompt: their ratings join them; or write comparisons as winners",
            )
        said = compare(size, one.ratings, one.rankings, one.winners)
        numbers = [names.setdefault(name, len(names)) for name in _annotators(one, where)]
        # The last entry is that of NOBODY, which is -1.
        said = said._replace(annotator=np.array([*numbers, NOBODY])[said.annotator])
        ratings = rating_table(size, one.ratings, None)
        table = rating_table(size, one.ratings, one.rankings)
        found.append(ComparedSet(one.prompt, size, said, ratings, table))
    return found


def _annotators(one: ComparisonSet, where: str) -> list[str]:
    """Whose the columns of ratings are, then the rankings; in a set that does not say, they are its own."""
    columns, rankings = len(one.ratings[0]) if one.ratings else 0, len(one.rankings or [])
    if one.annotators is None:
        return [f"{where}, annotator {number}" for number in range(columns + rankings)]
    return one.annotators[:columns] + one.annotators[:rankings]


class Pooled(NamedTuple):
    """All comparisons of many sets, their responses numbered through."""

    starts: IntArray
    """``[sets + 1]``: the number of each set's first response, and at the end the number of all responses."""
    pools: list[int]
    """The pool of each set."""
    comparisons: Comparisons
    """Within sets and across."""
    tables: list[FloatArray]
    """Of each set, as :class:`ComparedSet` has them."""

    @property
    def responses(self) -> int:
        """How many responses there are."""
        return int(self.starts[-1])

    @property
    def pool_of_response(self) -> IntArray:
        """``[responses]``"""
        return np.repeat(self.pools, np.diff(self.starts))

    def share(self, elo: FloatArray, strengths: Normalised) -> list[Ranked]:
        """Give each set what is its own."""
        return [
            Ranked(strengths.strengths[start:end], strengths.standard_errors[start:end], elo[start:end], pool)
            for (start, end), pool in zip(pairwise(self.starts), self.pools, strict=True)
        ]


def pool(sets: Sequence[ComparedSet], bridges_per_response: int, seed: int) -> Pooled:
    """Join the comparisons of all sets, and bridge those with ratings and the same prompt, which are one pool.

    Any other set is a pool of its own.
    """
    members: defaultdict[str | int, list[int]] = defaultdict(list)
    for index, one in enumerate(sets):
        bridged = bridges_per_response > 0 and one.ratings_table.size > 0
        members[str(one.prompt) if bridged else index].append(index)
    starts = np.cumsum([0, *(one.size for one in sets)])
    within = [
        renumber(one.comparisons, np.arange(start, start + one.size)) for one, start in zip(sets, starts, strict=False)
    ]
    across = [_across(sets, indices, starts, bridges_per_response, seed) for indices in members.values()]
    pool_of = {index: number for number, indices in enumerate(members.values()) for index in indices}
    return Pooled(
        starts, [pool_of[index] for index in range(len(sets))], join([*within, *across]), [one.table for one in sets]
    )


def _across(
    sets: Sequence[ComparedSet], indices: list[int], starts: IntArray, per_response: int, seed: int
) -> Comparisons:
    """The bridges of one pool's sets."""
    ratings = [row[~np.isnan(row)] for index in indices for row in sets[index].ratings_table]
    set_of = np.repeat(indices, [sets[index].size for index in indices])
    number = np.concatenate([np.arange(starts[index], starts[index + 1]) for index in indices])
    rounds = per_response if len(indices) > 1 else 0
    return renumber(bridges(ratings, set_of, rounds, seed), number)
