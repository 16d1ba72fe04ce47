"""Put strengths on one scale: across sets that share a prompt, across annotators, and across priors.

Shapes: K responses of a set, N responses of all sets, A annotators.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf.data.records import ComparisonRow, ComparisonSet
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

MOST_RESPONSES = 1000
"""Of a set with ratings or rankings: half a million pairs for each annotator."""


class ComparedSet(NamedTuple):
    """A comparison set, without its texts."""

    prompt: Any
    size: int
    """K."""
    comparisons: Comparisons
    """Of responses numbered from 0."""
    ratings_table: FloatArray
    """``[K, A]``, NaN where there is no rating."""
    table: FloatArray
    """``[K, A]``: the ratings, then rankings as ratings by place."""
    task: str | None = None
    """The task that the set belongs to, if any."""


def compared_sets(records: Iterable[ComparisonSet], place: str, names: dict[str, int]) -> list[ComparedSet]:
    """Return the comparisons of every set.

    place  the file, for messages and for annotators without names
    names  numbers the annotators of all sets; new names are added

    Raises:
        RecordError: a set is too large for all its responses to be compared with each other.
    """
    compared: list[ComparedSet] = []
    for row, record in enumerate(records, start=1):
        size, where = len(record.responses), f"{place}:{row}"
        if size > MOST_RESPONSES and (record.ratings or record.rankings):
            raise RecordError(
                f"a set has {size} responses, and all pairs of more than {MOST_RESPONSES} are too many to compare",
                where,
                "split it into sets with the same prompt: their ratings join them; or write comparisons as winners",
            )
        # Of the columns of ratings, then of the rankings. In a set without names, annotators are its own.
        columns, rankings = len(record.ratings[0]) if record.ratings else 0, len(record.rankings or [])
        if record.annotators is None:
            annotators = [f"{where}, annotator {number}" for number in range(columns + rankings)]
        else:
            annotators = record.annotators[:columns] + record.annotators[:rankings]
        numbers = [names.setdefault(name, len(names)) for name in annotators]
        comparisons = compare(size, record.ratings, record.rankings, record.winners)
        # The last entry is that of NOBODY, which is -1.
        comparisons = comparisons._replace(annotator=np.array([*numbers, NOBODY])[comparisons.annotator])
        ratings, table = rating_table(size, record.ratings), rating_table(size, record.ratings, record.rankings)
        task = record.task if isinstance(record, ComparisonRow) else None
        compared.append(ComparedSet(record.prompt, size, comparisons, ratings, table, task))
    return compared


class Normalised(NamedTuple):
    """Strengths as the reward model learns them."""

    strengths: FloatArray
    """``[N]``: of mean 0 in each pool, or probabilities."""
    standard_errors: FloatArray
    """``[N]``, in the same unit."""


class Ranked(NamedTuple):
    """A set's strengths; those of one pool share a scale."""

    strengths: FloatArray
    """``[K]``, normalised."""
    standard_errors: FloatArray
    """``[K]``, of those."""
    elo: FloatArray
    """``[K]``, Elo points."""
    pool: int
    """Only strengths of one pool can be compared."""


class Pooled(NamedTuple):
    """All comparisons of many sets, their responses numbered through."""

    starts: IntArray
    """``[sets + 1]``: the number of each set's first response, and at the end the number of all responses."""
    pools: list[int]
    """The pool of each set."""
    comparisons: Comparisons
    """Within sets and across."""
    tables: list[FloatArray]
    """The ``table`` of each :class:`ComparedSet`."""

    @property
    def responses(self) -> int:
        """N."""
        return int(self.starts[-1])

    @property
    def pool_of_response(self) -> IntArray:
        """``[N]``"""
        return np.repeat(self.pools, np.diff(self.starts))

    def share(self, elo: FloatArray, strengths: Normalised) -> list[Ranked]:
        """Split the strengths by set."""
        return [
            Ranked(strengths.strengths[start:end], strengths.standard_errors[start:end], elo[start:end], pool)
            for (start, end), pool in zip(pairwise(self.starts), self.pools, strict=True)
        ]


def pool(sets: Sequence[ComparedSet], bridges_per_response: int, seed: int) -> Pooled:
    """Join the comparisons of all sets, and bridge those with ratings and the same prompt, which form one pool.

    Of several tasks each has pools of its own: what its ratings mean is its own. Any other set is a pool of its own.
    """
    members: defaultdict[tuple[str | None, str] | int, list[int]] = defaultdict(list)
    for index, compared in enumerate(sets):
        bridged = bridges_per_response > 0 and compared.ratings_table.size > 0
        members[(compared.task, str(compared.prompt)) if bridged else index].append(index)
    starts = np.cumsum([0, *(compared.size for compared in sets)])
    numbers = [np.arange(start, end) for start, end in pairwise(starts)]
    parts = [renumber(compared.comparisons, number) for compared, number in zip(sets, numbers, strict=True)]
    pools = [0] * len(sets)
    for number, indices in enumerate(members.values()):
        for index in indices:
            pools[index] = number
        ratings = [row[~np.isnan(row)] for index in indices for row in sets[index].ratings_table]
        set_of = np.repeat(indices, [sets[index].size for index in indices])
        across = bridges(ratings, set_of, bridges_per_response if len(indices) > 1 else 0, seed)
        parts.append(renumber(across, np.concatenate([numbers[index] for index in indices])))
    return Pooled(starts, pools, join(parts), [compared.table for compared in sets])


def bridges(ratings: list[FloatArray], set_of: IntArray, per_response: int, seed: int) -> Comparisons:
    """Compare responses of different sets by their ratings, as if any rater of one met any rater of the other.

    Ratings on one anchored scale say more than the order within a set: where a set holds only good or only bad
    responses, they alone distinguish it from another. A pair is shared out as pairs of its ratings are won, lost and
    tied: so a win and half a tie have the ratings' probability of superiority (Mann & Whitney 1947).

    Every round compares the same ratings again, so a pair counts as the lesser number of its raters divided by the
    number of rounds: all bridges together are about as many comparisons as there are ratings. More rounds then average
    over the draw of pairs and claim no more information.

    ratings       one array a response, of its raters' scores
    set_of        ``[N]``, each response's set; responses of one set are not bridged
    per_response  rounds, in each of which every response meets up to two others; a response without ratings meets none
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


def with_partial_views(count: int, comparisons: Comparisons) -> IntArray:
    """Return the annotators, :data:`~rlhf.ranking.comparisons.NOBODY` among them, who compared only a part.

    That is some, not all, of the responses that a chain of any annotators' comparisons joins. Their own strengths have
    mean 0 over that part, so a mean over annotators would put a good part level with a bad one.
    """
    label = components_of(count, comparisons.first, comparisons.second).label
    compared, annotator = np.concatenate([comparisons.first, comparisons.second]), np.tile(comparisons.annotator, 2)
    sizes = np.bincount(label[np.unique(compared)], minlength=count)
    views = np.unique(np.stack([annotator, label[compared], compared]), axis=1)[:2]
    (annotators, labels), seen = np.unique(views, axis=1, return_counts=True)
    return np.unique(annotators[seen < sizes[labels]])


def fit_each_annotator(count: int, comparisons: Comparisons, fit: Callable[[int, Comparisons], Strengths]) -> Strengths:
    """Average each response's strength over the annotators who compared it, each fitted alone, at equal deviation.

    So an annotator who sees everything as black or white counts no more than one who sees fine shades. Winners and
    bridges, of :data:`~rlhf.ranking.comparisons.NOBODY`, count as one annotator more. The mean is scaled back to the
    annotators' usual deviation; errors take annotators as independent. A response that was never compared has strength
    0, as in any fit, and the largest error. Right where :func:`with_partial_views` returns no annotator.

    fit  fits the strengths of a number of responses to comparisons of them
    """
    annotator = comparisons.annotator - comparisons.annotator.min(initial=0)
    seen = np.concatenate([annotator * count + comparisons.first, annotator * count + comparisons.second])
    nodes, place = np.unique(seen, return_inverse=True)
    first, second = np.split(place, 2)
    alone = fit(len(nodes), comparisons._replace(first=first, second=second))
    of_annotator, response = nodes // count, nodes % count

    people = int(of_annotator.max(initial=-1)) + 1
    number = np.maximum(np.bincount(of_annotator, minlength=people), 1)
    deviation = np.sqrt(add_up(of_annotator, alone.elo**2, people) / number)
    usual = float(np.sqrt(np.mean(deviation[deviation > 0] ** 2))) if deviation.any() else 1.0
    scale = usual / np.where(deviation > 0, deviation, usual)[of_annotator]
    times = np.bincount(response, minlength=count)
    elo = add_up(response, alone.elo * scale, count) / np.maximum(times, 1)
    error = np.sqrt(add_up(response, (alone.standard_errors * scale) ** 2, count)) / np.maximum(times, 1)
    return Strengths(elo, np.where(times > 0, error, alone.standard_errors.max(initial=0.0)), alone.tie_parameter)


def overall_deviation(strengths: FloatArray) -> float:
    """Return the root mean square of all responses' strengths, which have mean 0 in each pool, in their unit.

    One number for the data set: a pool whose responses are alike keeps its small spread instead of having its noise
    blown up to deviation 1.
    """
    return float(np.sqrt(np.mean(strengths**2)))


Normalisation = Literal["dataset", "prompt", "annotator", "probability"]


def normalised(how: Normalisation, strengths: Strengths, pools: IntArray, deviation: float) -> Normalised:
    """Bring strengths onto a scale.

    pools      ``[N]``: the pool of each response
    deviation  that of the training sets, in Elo points, for held-out ones too

    ``prompt`` divides each pool by its own deviation; a pool whose responses are all alike stays 0. ``probability`` is
    that of being preferred to a response of its pool's mean strength, σ(c θ), with errors to first order.
    """
    if how == "probability":
        probability = sigmoid(ELO_SCALE * strengths.elo)
        slope = ELO_SCALE * probability * (1 - probability)
        return Normalised(probability, slope * strengths.standard_errors)
    scale: FloatArray | float = deviation
    if how == "prompt":
        count = int(pools.max(initial=-1)) + 1
        mean_square = add_up(pools, strengths.elo**2, count) / np.maximum(np.bincount(pools, minlength=count), 1)
        scale = np.where(mean_square > 0, np.sqrt(mean_square), deviation)[pools]
    return Normalised(strengths.elo / scale, strengths.standard_errors / scale)
