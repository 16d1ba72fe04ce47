"""Lists of responses for losses that compare a list's responses with each other, and preferences for soft labels.

Shapes: K responses of a list.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf.randomness import stream
from rlhf.ranking.bradley_terry import ELO_SCALE, sigmoid
from rlhf.ranking.comparisons import FloatArray, compare


class Place(NamedTuple):
    """Where a response stands: the number of its set, and its number in the set."""

    set: int
    response: int


def draw_lists(
    sets: Sequence[Mapping[str, Any]], size: int | None, lists_per_response: float, seed: int
) -> list[list[Place]]:
    """Lists of places whose strengths are not all equal.

    size                None takes each set as it is. A number draws lists of so many responses out of each pool: sets
                        that share a prompt are drawn from together where ``rank`` has put them on one scale, which it
                        says in each set's ``pool``.
    lists_per_response  about how many of the drawn lists each response is in, as far as there are different lists
    """
    if size is None:
        found = [
            [Place(number, response) for response in range(len(one["responses"]))] for number, one in enumerate(sets)
        ]
    else:
        found = _drawn(sets, size, lists_per_response, seed)
    return [places for places in found if len({sets[place.set]["strengths"][place.response] for place in places}) > 1]


def _drawn(sets: Sequence[Mapping[str, Any]], size: int, per_response: float, seed: int) -> list[list[Place]]:
    pools: defaultdict[int, list[Place]] = defaultdict(list)
    for number, one in enumerate(sets):
        pools[one["pool"]] += [Place(number, response) for response in range(len(one["responses"]))]
    return [
        [places[index] for index in group]
        for pool, places in pools.items()
        for group in _groups(len(places), min(size, len(places)), per_response, stream("lists", seed, pool))
    ]


def _groups(count: int, size: int, per_item: float, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Distinct groups of ``size`` of ``count`` items, about ``per_item`` · count / size of them, spread evenly."""
    wanted = min(max(1, round(per_item * count / size)), math.comb(count, size))
    found: dict[tuple[int, ...], None] = {}
    while len(found) < wanted:
        # Neighbours in a random order: each shuffle puts every item into one group, but for a rest.
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            if len(found) < wanted:
                found[tuple(sorted(order[start : start + size].tolist()))] = None
    return list(found)


Preferences = Callable[[Sequence[Place]], FloatArray]
"""Of a list: ``[K, K]``, the probability that the one is preferred to the other; NaN where nothing tells it, and on the
diagonal."""


def by_strength(sets: Sequence[Mapping[str, Any]]) -> Preferences:
    """That of the Bradley-Terry model, from strengths in Elo points: σ(c (θ_i - θ_j))."""

    def of_list(places: Sequence[Place]) -> FloatArray:
        elo = np.array([sets[place.set]["elo"][place.response] for place in places])
        found = sigmoid(ELO_SCALE * (elo[:, None] - elo[None, :]))
        np.fill_diagonal(found, np.nan)
        return found

    return of_list


def by_share(sets: Sequence[Mapping[str, Any]]) -> Preferences:
    """The share of people who prefer it, a tie being half.

    Of two responses of one set, the share among those who compared them. Of different sets nobody compared them: there
    it is the share of pairs of their ratings, which is known for sets on one scale only.
    """
    within = [_shares(one) for one in sets]

    def of_list(places: Sequence[Place]) -> FloatArray:
        return np.array([[_preferred(sets, within, one, other) for other in places] for one in places])

    return of_list


def _shares(one: Mapping[str, Any]) -> FloatArray:
    """``[K, K]``: among those who compared two responses of a set."""
    count = len(one["responses"])
    said = compare(count, one.get("ratings"), one.get("rankings"), one.get("winners"))
    wins, compared = np.zeros((count, count)), np.zeros((count, count))
    np.add.at(wins, (said.first, said.second), said.wins + 0.5 * said.ties)
    np.add.at(wins, (said.second, said.first), said.losses + 0.5 * said.ties)
    total = said.wins + said.losses + said.ties
    np.add.at(compared, (said.first, said.second), total)
    np.add.at(compared, (said.second, said.first), total)
    return np.divide(wins, compared, out=np.full((count, count), np.nan), where=compared > 0)


def _preferred(sets: Sequence[Mapping[str, Any]], within: Sequence[FloatArray], one: Place, other: Place) -> float:
    if one.set == other.set:
        return float(within[one.set][one.response, other.response])
    ours, theirs = _ratings(sets, one), _ratings(sets, other)
    if sets[one.set]["pool"] != sets[other.set]["pool"] or not len(ours) or not len(theirs):
        return float("nan")
    return float(((ours[:, None] > theirs) + 0.5 * (ours[:, None] == theirs)).mean())


def _ratings(sets: Sequence[Mapping[str, Any]], place: Place) -> FloatArray:
    ratings = sets[place.set].get("ratings")
    return np.array([rating for rating in ratings[place.response] if rating is not None] if ratings else [])
