"""How well scores order held-out responses, measured on pairs as people see them."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf.textstats import confident_pairs, pair_accuracy, seeded_pairs

Floats = npt.NDArray[np.float64]


def heldout_accuracy(
    sets: Sequence[Mapping[str, Any]], scores: npt.ArrayLike, n_pairs: int, seed: int
) -> dict[str, float]:
    """``eval/accuracy``, ``_within`` and ``_confident``: how often scores order two responses as people do.

    sets     ranked comparison sets; where annotators gave ratings their mean decides the order, else the strengths
    scores   one a response, in the order of the sets
    n_pairs  drawn by the seed among responses of one pool: to the same prompt, of one set or of several

    A pair counts where both were rated and the annotators' means are not equal. It is *confident* where the means lie
    at least 1 apart, or where 3 of 4 annotators who rated both agree, which only responses of one set can show.
    ``_within`` is of all pairs of one set. Identical texts have one score, so they count half.
    """
    scores = one_score_a_text(sets, scores)
    means, pairs = heldout_pairs(sets, n_pairs, seed)
    set_of = np.repeat(np.arange(len(sets)), [len(one["responses"]) for one in sets])
    confident = confident_pairs(means, pairs)
    same = np.flatnonzero((set_of[pairs[:, 0]] == set_of[pairs[:, 1]]) & ~confident)
    starts = np.searchsorted(set_of, np.arange(len(sets)))
    for number in same:
        index = int(set_of[pairs[number, 0]])
        if sets[index].get("ratings") is not None:
            local = (pairs[number] - starts[index])[None]
            confident[number] = confident_pairs(mean_ratings(sets[index]), local, ratings=_ratings(sets[index]))[0]
    found = {"eval/accuracy": pair_accuracy(scores, means, pairs)}
    if (means[pairs[confident, 0]] != means[pairs[confident, 1]]).any():
        found["eval/accuracy_confident"] = pair_accuracy(scores, means, pairs[confident])
    within = pairs_within(sets, means)
    if (means[within[:, 0]] != means[within[:, 1]]).any():
        found["eval/accuracy_within"] = pair_accuracy(scores, means, within)
    return found


def one_score_a_text(sets: Sequence[Mapping[str, Any]], scores: npt.ArrayLike) -> Floats:
    """Scores ``[N]`` with identical texts of one pool at their mean, so that padding and packing order none of them."""
    place: dict[tuple[int, str], int] = {}
    texts = np.array([place.setdefault((one["pool"], text), len(place)) for one in sets for text in one["responses"]])
    values = np.asarray(scores, dtype=np.float64)
    return (np.bincount(texts, values) / np.bincount(texts))[texts]


def pairs_within(sets: Sequence[Mapping[str, Any]], means: Floats) -> npt.NDArray[np.int64]:
    """All pairs ``[P, 2]`` of rated responses of one set; means ``[N]`` are NaN where nobody rated."""
    sizes = [len(one["responses"]) for one in sets]
    starts = np.cumsum([0, *sizes[:-1]])
    pairs = [np.stack(np.triu_indices(size, k=1), axis=1) + start for size, start in zip(sizes, starts, strict=True)]
    together = np.concatenate(pairs)
    return together[~np.isnan(means[together]).any(axis=1)]


def heldout_pairs(sets: Sequence[Mapping[str, Any]], n_pairs: int, seed: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """People's means ``[N]`` of all sets' responses, and seeded pairs ``[P, 2]`` of rated responses of one pool."""
    means: Floats = np.concatenate([mean_ratings(one) for one in sets])
    pairs = _pairs([one["pool"] for one in sets for _ in one["responses"]], n_pairs, seed)
    return means, pairs[~np.isnan(means[pairs]).any(axis=1)]


def _ratings(one: Mapping[str, Any]) -> Floats:
    return np.array([[np.nan if value is None else value for value in row] for row in one["ratings"]], dtype=np.float64)


def mean_ratings(one: Mapping[str, Any]) -> Floats:
    """Of each response of a set, its annotators' mean rating, NaN where there is none; strengths without ratings."""
    if one.get("ratings") is None:
        return np.asarray(one["strengths"], dtype=np.float64)
    ratings = _ratings(one)
    with np.errstate(invalid="ignore"):  # nan is the mean of a response that nobody rated
        return np.nansum(ratings, axis=1) / (~np.isnan(ratings)).sum(axis=1)


def _pairs(pools: Sequence[int], n_pairs: int, seed: int) -> npt.NDArray[np.int64]:
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for index, pool in enumerate(pools):
        groups[pool].append(index)
    possible = sum(len(group) * (len(group) - 1) // 2 for group in groups.values())
    share = n_pairs / max(possible, 1)
    drawn = [
        np.asarray(group)[
            seeded_pairs(len(group), int(np.ceil(share * len(group) * (len(group) - 1) / 2)), seed + number)
        ]
        for number, group in enumerate(groups.values())
        if len(group) > 1
    ]
    return np.concatenate(drawn) if drawn else np.empty((0, 2), np.int64)
