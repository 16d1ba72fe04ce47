"""Lists of responses for losses that compare a list's responses with each other, and preferences for soft labels.

Shapes: K responses of a list.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf.data.mixture import Mixture
from rlhf.randomness import stream
from rlhf.ranking.bradley_terry import ELO_SCALE, sigmoid
from rlhf.ranking.comparisons import FloatArray, compare, rating_table


class ResponseIndex(NamedTuple):
    """A response's set, and its number in the set."""

    set: int
    response: int


def draw_lists(
    sets: Sequence[Mapping[str, Any]], size: int | None, lists_per_response: float, seed: int
) -> list[list[ResponseIndex]]:
    """Return lists of responses whose strengths are not all equal, each as often as its task's weight says.

    size                None takes each set as it is. A number draws lists of that many responses out of each pool: sets
                        that share a prompt are drawn from together where ``rank`` has put them on one scale, as each
                        set's ``pool`` says.
    lists_per_response  about how many of the drawn lists each response is in, as far as there are different lists
    """
    pools: defaultdict[int, list[ResponseIndex]] = defaultdict(list)
    for number, record in enumerate(sets):
        pool = number if size is None else record["pool"]
        pools[pool] += [ResponseIndex(number, response) for response in range(len(record["responses"]))]
    lists: list[list[ResponseIndex]] = []
    for pool, members in pools.items():
        groups = [tuple(range(len(members)))]
        if size is not None:
            rng = stream("lists", seed, pool)
            groups = _groups(len(members), min(size, len(members)), lists_per_response, rng)
        lists += [[members[index] for index in group] for group in groups]
    ordered = [members for members in lists if len({sets[i]["strengths"][j] for i, j in members}) > 1]
    # The responses of a pool are of one task.
    return [ordered[index] for index in Mixture(sets[members[0].set] for members in ordered).epoch(seed)]


class Pair(NamedTuple):
    """Two responses to one prompt, of which people prefer the first."""

    chosen: ResponseIndex
    rejected: ResponseIndex


def draw_pairs(sets: Sequence[Mapping[str, Any]], pairs_per_response: float, seed: int) -> tuple[list[Pair], int]:
    """Return pairs of responses of different strengths, and how many more are of equal texts, which teach nothing.

    Drawn as the lists of two of :func:`draw_lists`.
    """
    pairs: list[Pair] = []
    equal = 0
    for members in draw_lists(sets, 2, pairs_per_response, seed):
        rejected, chosen = sorted(members, key=lambda place: sets[place.set]["strengths"][place.response])
        if sets[chosen.set]["responses"][chosen.response] == sets[rejected.set]["responses"][rejected.response]:
            equal += 1
        else:
            pairs.append(Pair(chosen, rejected))
    return pairs, equal


def _groups(count: int, size: int, per_item: float, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Draw distinct groups of ``size`` of ``count`` items, about ``per_item`` · count / size of them, spread evenly."""
    wanted = min(max(1, round(per_item * count / size)), math.comb(count, size))
    groups: dict[tuple[int, ...], None] = {}
    while len(groups) < wanted:
        # Neighbours in a random order: each shuffle puts every item into one group, but for a rest.
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            if len(groups) < wanted:
                groups[tuple(sorted(order[start : start + size].tolist()))] = None
    return list(groups)


Preferences = Callable[[Sequence[ResponseIndex]], FloatArray]
"""Of a list: ``[K, K]``, the probability that the row's response is preferred to the column's; NaN where it is unknown,
and on the diagonal."""


def by_strength(sets: Sequence[Mapping[str, Any]]) -> Preferences:
    """Return the preferences of the Bradley-Terry model, from strengths in Elo points: σ(c (θ_i - θ_j))."""

    def of_list(members: Sequence[ResponseIndex]) -> FloatArray:
        elo = np.array([sets[i]["elo"][j] for i, j in members])
        preferred = sigmoid(ELO_SCALE * (elo[:, None] - elo[None, :]))
        np.fill_diagonal(preferred, np.nan)
        return preferred

    return of_list


def by_share(sets: Sequence[Mapping[str, Any]]) -> Preferences:
    """Return the shares of annotators who prefer a response to another, a tie being half.

    Of two responses of one set, the share among those who compared them. Responses of different sets were never
    compared: there it is the share of pairs of their ratings, which is known for sets on one scale only.
    """
    within, tables = list[FloatArray](), list[FloatArray]()
    for record in sets:
        count = len(record["responses"])
        tables.append(rating_table(count, record.get("ratings")))
        made = compare(count, record.get("ratings"), record.get("rankings"), record.get("winners"))
        wins, compared = np.zeros((count, count)), np.zeros((count, count))
        np.add.at(wins, (made.first, made.second), made.wins + 0.5 * made.ties)
        np.add.at(wins, (made.second, made.first), made.losses + 0.5 * made.ties)
        np.add.at(compared, (made.first, made.second), made.counts)
        compared += compared.T
        within.append(np.divide(wins, compared, out=np.full((count, count), np.nan), where=compared > 0))

    def preferred(first: ResponseIndex, second: ResponseIndex) -> float:
        if first.set == second.set:
            return float(within[first.set][first.response, second.response])
        a, b = tables[first.set][first.response], tables[second.set][second.response]
        a, b = a[~np.isnan(a)], b[~np.isnan(b)]
        if sets[first.set]["pool"] != sets[second.set]["pool"] or not len(a) or not len(b):
            return float("nan")
        return float(((a[:, None] > b) + 0.5 * (a[:, None] == b)).mean())

    return lambda members: np.array([[preferred(first, second) for second in members] for first in members])
