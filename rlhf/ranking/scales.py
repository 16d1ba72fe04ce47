"""Put strengths on one scale: across sets that share a prompt, and whatever annotators and prior.

Shapes: N responses of all sets.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf.data.records import ComparisonSet
from rlhf.errors import RecordError
from rlhf.randomness import stream
from rlhf.ranking.bradley_terry import ELO_SCALE, Strengths, sigmoid
from rlhf.ranking.comparisons import (
    NOBODY,
    Comparisons,
    FloatArray,
    IntArray,
    add_up,
    compare,
    join,
    rating_table,
    renumber,
)
from rlhf.ranking.uncertainty import components_of

Normalisation = Literal["dataset", "prompt", "annotator", "probability"]


class Normalised(NamedTuple):
    """Strengths as they are learned from."""

    strengths: FloatArray
    """``[N]``: of mean 0 in each pool, or probabilities."""
    standard_errors: FloatArray
    """``[N]``, in the same unit."""


def overall_deviation(strengths: FloatArray) -> float:
    """Root mean square of all responses' strengths, which have mean 0 in each pool; Elo points in and out.

    One number for the data set: a pool whose responses are alike keeps its small spread instead of having its noise
    blown up to deviation 1.
    """
    return float(np.sqrt(np.mean(strengths**2)))


def normalised(how: Normalisation, strengths: Strengths, pools: IntArray, deviation: float) -> Normalised:
    """Bring strengths onto the scale that is asked for.

    pools      ``[N]``: the pool of each response
    deviation  that of the training sets, in Elo points, for held-out ones too

    ``prompt`` divides each pool by its own deviation; one whose responses are all alike stays 0. ``probability`` is
    that of being preferred to a response of its pool's mean strength, σ(c θ), with errors to first order.
    """
    if how == "probability":
        probability = sigmoid(ELO_SCALE * strengths.elo)
        slope = ELO_SCALE * probability * (1 - probability)
        return Normalised(probability, slope * strengths.standard_errors)
    if how == "prompt":
        count = int(pools.max(initial=-1)) + 1
        mean_square = add_up(pools, strengths.elo**2, count) / np.maximum(np.bincount(pools, minlength=count), 1)
        scale = np.where(mean_square > 0, np.sqrt(mean_square), deviation)[pools]
        return Normalised(strengths.elo / scale, strengths.standard_errors / scale)
    return Normalised(strengths.elo / deviation, strengths.standard_errors / deviation)


def with_partial_views(count: int, comparisons: Comparisons) -> IntArray:
    """Return the annotators, :data:`~rlhf.ranking.comparisons.NOBODY` among them, who compared a part alone.

    That is some of the responses that a chain of anybody's comparisons joins, and not all. Their own strengths have
    mean 0 over that part, so a mean over annotators would put a good part level with a bad one.
    """
    label = components_of(count, comparisons.first, comparisons.second).label
    compared, annotator = np.concatenate([comparisons.first, comparisons.second]), np.tile(comparisons.annotator, 2)
    sizes = np.bincount(label[np.unique(compared)], minlength=count)
    views = np.unique(np.stack([annotator, label[compared], compared]), axis=1)[:2]
    (annotators, labels), seen = np.unique(views, axis=1, return_counts=True)
    return np.unique(annotators[seen < sizes[labels]])


def fit_each_annotator(count: int, comparisons: Comparisons, fit: Callable[[int, Comparisons], Strengths]) -> Strengths:
    """The mean, over the annotators who compared a response, of their own strengths brought to one deviation.

    So an annotator who sees everything as black or white counts no more than one of fine shades. What is nobody's,
    winners and bridges, counts as one annotator more. The mean is scaled back to the annotators' usual deviation;
    errors take annotators as independent. A response that nobody compared has strength 0, as in any fit, and the
    largest error. Right where nobody is :func:`with_partial_views`.

    fit  gives the strengths of so many responses
    """
    annotator = comparisons.annotator - comparisons.annotator.min(initial=0)
    seen = np.concatenate([annotator * count + comparisons.first, annotator * count + comparisons.second])
    nodes, place = np.unique(seen, return_inverse=True)
    first, second = np.split(place, 2)
    found = fit(len(nodes), comparisons._replace(first=first, second=second))
    of_annotator, response = nodes // count, nodes % count

    people = int(of_annotator.max(initial=-1)) + 1
    number = np.maximum(np.bincount(of_annotator, minlength=people), 1)
    deviation = np.sqrt(add_up(of_annotator, found.elo**2, people) / number)
    usual = float(np.sqrt(np.mean(deviation[deviation > 0] ** 2))) if deviation.any() else 1.0
    scale = usual / np.where(deviation > 0, deviation, usual)[of_annotator]
    times = np.bincount(response, minlength=count)
    elo = add_up(response, found.elo * scale, count) / np.maximum(times, 1)
    error = np.sqrt(add_up(response, (found.standard_errors * scale) ** 2, count)) / np.maximum(times, 1)
    return Strengths(elo, np.where(times > 0, error, found.standard_errors.max(initial=0.0)), found.tie_parameter)


def bridges(ratings: list[FloatArray], set_of: IntArray, per_response: int, seed: int) -> Comparisons:
    """Compare responses of different sets by their ratings, as if any rater of one met any rater of the other.

    Ratings on one anchored scale say more than the order within a set: where a set holds only good or only bad
    responses, they alone tell it from another. A pair is shared out as pairs of its ratings are won, lost and tied: so
    a win and half a tie have the ratings' probability of superiority (Mann & Whitney 1947).

    Every round compares the same ratings again, so a pair counts as the lesser number of its raters divided by the
    number of rounds: all bridges together are about as many comparisons as there are ratings. More rounds then average
    over the draw of pairs and claim no more information.

    ratings       one array a response, of its raters' scores
    set_of        ``[N]``, each response's set; responses of one set are not bridged
    per_response  rounds, in each of which every response meets up to two others; one without ratings meets none
    """
    rng = stream("bridges", seed, len(ratings))
    rows: list[tuple[int, int, float, float, float]] = []
    for _ in range(per_response):
        circle = rng.permutation(len(ratings))
        for first, second in zip(circle, np.roll(circle, -1), strict=True):
            a, b = ratings[first][:, None], ratings[second]
            count = min(len(a), len(b))
            if set_of[first] == set_of[second] or count == 0:
                continue
            won, lost, tied = (count / per_response * float(share.mean()) for share in (a > b, a < b, a == b))
            rows.append((first, second, won, lost, tied))
    columns = np.array(rows, dtype=np.float64).reshape(-1, 5).T
    first, second = columns[:2].astype(np.int64)
    won, lost, tied = columns[2:]
    return Comparisons(first, second, won, lost, tied, np.full(len(rows), NOBODY))


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
