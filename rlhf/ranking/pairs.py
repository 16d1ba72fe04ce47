"""Pairs out of ranked sets, for losses that look at two responses at a time."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Pair(NamedTuple):
    """Two responses to one prompt, the stronger first."""

    prompt: Any
    chosen: str
    rejected: str
    gap: float
    """The difference of their strengths, above 0."""


def draw_pairs(sets: Sequence[Mapping[str, Any]], pairs_per_response: float, seed: int) -> list[Pair]:
    """Draw about ``pairs_per_response`` · N / 2 pairs of each pool's N responses, each response in about equally many.

    Responses of sets that share a prompt are drawn together where ``rank`` has put them on one scale, which it says in
    each set's ``pool``. Equal strengths make no pair.
    """
    pools: defaultdict[int, list[tuple[Any, str, float]]] = defaultdict(list)
    for one in sets:
        pools[one["pool"]] += [
            (one["prompt"], response, strength)
            for response, strength in zip(one["responses"], one["strengths"], strict=True)
        ]
    drawn: list[Pair] = []
    for pool, items in pools.items():
        rng = np.random.default_rng([seed, pool])
        for first, second in _matches(len(items), pairs_per_response, rng):
            stronger, weaker = sorted((items[first], items[second]), key=lambda item: -item[2])
            if stronger[2] > weaker[2]:
                drawn.append(Pair(stronger[0], stronger[1], weaker[1], stronger[2] - weaker[2]))
    return drawn


def _matches(count: int, per_item: float, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Distinct pairs of ``count`` items, about ``per_item`` · count / 2 of them, spread evenly over the items."""
    wanted = min(round(per_item * count / 2), count * (count - 1) // 2)
    found: dict[tuple[int, int], None] = {}
    while len(found) < wanted:
        # Neighbours in a random order: two rounds of a shuffle give every item one match each.
        order = rng.permutation(count)
        for first, second in zip(order[::2], order[1::2], strict=False):
            if len(found) < wanted:
                found[min(first, second), max(first, second)] = None
    return list(found)
