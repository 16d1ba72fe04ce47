"""Lists of responses out of ranked sets, for losses that compare the responses of a list with each other."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf.randomness import stream


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
