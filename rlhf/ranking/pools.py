"""Comparison sets with one prompt, brought onto one scale where their annotators' ratings allow it."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from rlhf.ranking.bradley_terry import Strengths
from rlhf.ranking.bridges import bridges
from rlhf.ranking.comparisons import Comparisons, FloatArray, IntArray, join, renumber


class Ranked(NamedTuple):
    """A set's strengths."""

    elo: FloatArray
    """``[K]``, Elo points; those of one pool share a scale and have mean 0."""
    standard_errors: FloatArray
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
    ratings: Sequence[Sequence[float | None]] | None
    """``[K, annotators]``, None where there are none."""


class Pooled(NamedTuple):
    """All comparisons of many sets, their responses numbered through."""

    starts: IntArray
    """``[sets + 1]``: the number of each set's first response, and at the end the number of all responses."""
    pools: list[int]
    """The pool of each set."""
    comparisons: Comparisons
    """Within sets and across."""

    @property
    def responses(self) -> int:
        """How many responses there are."""
        return int(self.starts[-1])

    def share(self, strengths: Strengths) -> list[Ranked]:
        """Give each set its own strengths."""
        return [
            Ranked(strengths.elo[start:end], strengths.standard_errors[start:end], pool)
            for (start, end), pool in zip(pairwise(self.starts), self.pools, strict=True)
        ]


def pool(sets: Sequence[ComparedSet], bridges_per_response: int, seed: int) -> Pooled:
    """Join the comparisons of all sets, and bridge those with ratings and the same prompt, which are one pool.

    Any other set is a pool of its own.
    """
    members: defaultdict[str | int, list[int]] = defaultdict(list)
    for index, one in enumerate(sets):
        bridged = bridges_per_response > 0 and one.ratings is not None
        members[str(one.prompt) if bridged else index].append(index)
    starts = np.cumsum([0, *(one.size for one in sets)])
    within = [
        renumber(one.comparisons, np.arange(start, start + one.size)) for one, start in zip(sets, starts, strict=False)
    ]
    across = [_across(sets, indices, starts, bridges_per_response, seed) for indices in members.values()]
    pool_of = {index: number for number, indices in enumerate(members.values()) for index in indices}
    return Pooled(starts, [pool_of[index] for index in range(len(sets))], join([*within, *across]))


def _across(
    sets: Sequence[ComparedSet], indices: list[int], starts: IntArray, per_response: int, seed: int
) -> Comparisons:
    """The bridges of one pool's sets."""
    ratings = [
        np.array([value for value in row if value is not None], dtype=np.float64)
        for index in indices
        for row in (sets[index].ratings or [[]] * sets[index].size)
    ]
    set_of = np.repeat(indices, [sets[index].size for index in indices])
    number = np.concatenate([np.arange(starts[index], starts[index + 1]) for index in indices])
    rounds = per_response if len(indices) > 1 else 0
    return renumber(bridges(ratings, set_of, rounds, seed), number)
