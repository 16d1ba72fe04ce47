"""How good scores are, beside how good people are: with intervals, by how clear the case is, and how calibrated.

Shapes: N responses of all held-out sets, P pairs. Scores are a reward model's, in nats of log-odds if it was trained on
comparisons.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from rlhf.randomness import stream
from rlhf.ranking.bradley_terry import sigmoid
from rlhf.ranking.comparisons import compare, rating_table
from rlhf.ranking.heldout import heldout_pairs, mean_ratings

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Document = dict[str, Any]

RESAMPLES = 1000
GAP_BINS = 4
CALIBRATION_BINS = 10
LEVEL = 0.95


class Pairs(NamedTuple):
    """Held-out pairs with an order, and whether scores have it."""

    right: Floats
    """``[P]``: 1 where scores order the pair as people's mean does, 0 where not, 0.5 where they are equal."""
    gap: Floats
    """``[P]``: the distance of the means, above 0."""
    sets: Ints
    """``[P, 2]``: whose sets' responses they are."""


def quality(
    sets: Sequence[Mapping[str, Any]], scores: npt.ArrayLike, lengths: npt.ArrayLike, n_pairs: int, seed: int
) -> Document:
    """All that is known of how well scores ``[N]`` order held-out responses; lengths ``[N]`` are in tokens.

    Numbers that the data does not give, such as the annotators' own accuracy where there is one a set, are absent.
    """
    values, tokens = np.asarray(scores, dtype=np.float64), np.asarray(lengths, dtype=np.float64)
    starts = np.cumsum([0, *(len(one["responses"]) for one in sets)])
    pairs = _decided_pairs(sets, values, starts, n_pairs, seed)
    found: Document = {"accuracy": _share(pairs, len(sets), seed), "accuracy_by_gap": _by_gap(pairs, len(sets), seed)}
    found |= _beside_annotators(sets, values, starts)
    found |= _kendall(sets, values, starts)
    found |= _calibration(sets, values, starts)
    people = np.concatenate([mean_ratings(one) for one in sets])
    rated = ~np.isnan(people)
    found["length_correlation"] = {
        "scores": _spearman(values[rated], tokens[rated]),
        "people": _spearman(people[rated], tokens[rated]),
    }
    return found


def _decided_pairs(sets: Sequence[Mapping[str, Any]], scores: Floats, starts: Ints, n_pairs: int, seed: int) -> Pairs:
    means, indices = heldout_pairs(sets, n_pairs, seed)
    gap = means[indices[:, 0]] - means[indices[:, 1]]
    indices, gap = indices[gap != 0], gap[gap != 0]
    agreement = np.sign(gap) * np.sign(scores[indices[:, 0]] - scores[indices[:, 1]])
    return Pairs((agreement + 1) / 2, np.abs(gap), np.searchsorted(starts, indices, side="right") - 1)


def _share(pairs: Pairs, n_sets: int, seed: int) -> Document:
    """A share of pairs with its interval, by the bootstrap over sets: pairs that share a set are not independent.

    A pair of two sets counts as often as both were drawn (Owen 2007, Annals of Applied Statistics 1:386).
    """
    if not len(pairs.right):
        return {"pairs": 0}
    drawn = stream("sets drawn", seed).multinomial(n_sets, np.full(n_sets, 1 / n_sets), RESAMPLES)
    shares: list[float] = []
    for times in drawn:
        weight = times[pairs.sets[:, 0]] * np.where(pairs.sets[:, 0] == pairs.sets[:, 1], 1, times[pairs.sets[:, 1]])
        if weight.any():
            shares.append(float(np.average(pairs.right, weights=weight)))
    low, high = np.quantile(shares, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"share": float(pairs.right.mean()), "low": float(low), "high": float(high), "pairs": len(pairs.right)}


def _by_gap(pairs: Pairs, n_sets: int, seed: int) -> list[Document]:
    """The same for a quarter of the pairs each, from the closest means to the farthest."""
    if len(pairs.gap) < GAP_BINS:
        return []
    edges = np.unique(np.quantile(pairs.gap, np.linspace(0, 1, GAP_BINS + 1)))
    rows: list[Document] = []
    for number, (low, high) in enumerate(pairwise(edges)):
        inside = (pairs.gap >= low) & ((pairs.gap < high) | (number == len(edges) - 2))
        part = Pairs(pairs.right[inside], pairs.gap[inside], pairs.sets[inside])
        rows.append({"gap_from": float(low), "gap_to": float(high)} | _share(part, n_sets, seed))
    return rows


def _beside_annotators(sets: Sequence[Mapping[str, Any]], scores: Floats, starts: Ints) -> Document:
    """How often one annotator orders two responses of a set as the mean of the others does, and how often scores do.

    Both are asked about the same pairs and measured by the same mean, which the annotator has no part in.
    """
    of_annotator, of_scores = [], []
    for one, start in zip(sets, starts, strict=False):
        if one.get("ratings") is None:
            continue
        table = rating_table(len(one["responses"]), one["ratings"], None)
        i, j = np.triu_indices(len(table), k=1)
        for annotator in range(table.shape[1]):
            others = np.delete(table, annotator, axis=1)
            known = (~np.isnan(others)).sum(axis=1)
            means = np.divide(np.nansum(others, axis=1), known, out=np.full(len(known), np.nan), where=known > 0)
            own, mean = np.sign(table[i, annotator] - table[j, annotator]), np.sign(means[i] - means[j])
            # NaN is unequal to 0 and fails the first comparison.
            asked = (np.abs(own) > 0) & (np.abs(mean) > 0)
            of_annotator.append((own[asked] == mean[asked]).astype(np.float64))
            order = np.sign(scores[start + i] - scores[start + j])[asked]
            of_scores.append((order * mean[asked] + 1) / 2)
    theirs, ours = (np.concatenate([np.empty(0), *parts]) for parts in (of_annotator, of_scores))
    if not len(theirs):
        return {}
    return {"annotators": {"share": float(theirs.mean()), "scores": float(ours.mean()), "pairs": len(theirs)}}


def _kendall(sets: Sequence[Mapping[str, Any]], scores: Floats, starts: Ints) -> Document:
    """Kendall's τ_b (1945) of scores and people's means within a set, its mean over sets, with Student's interval."""
    values: list[float] = []
    for one, (start, end) in zip(sets, pairwise(starts), strict=True):
        means = mean_ratings(one)
        rated = ~np.isnan(means)
        if rated.sum() > 1 and np.ptp(means[rated]) > 0 and np.ptp(scores[start:end][rated]) > 0:
            tau: Any = stats.kendalltau(scores[start:end][rated], means[rated])
            values.append(float(tau.statistic))
    if len(values) < 2:
        return {}
    mean = float(np.mean(values))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))
    return {"kendall_tau": {"mean": mean, "low": mean - half, "high": mean + half, "sets": len(values)}}


def _calibration(sets: Sequence[Mapping[str, Any]], scores: Floats, starts: Ints) -> Document:
    """Is a response preferred as often as σ(r_i - r_j) says? Every annotator's comparison within a set counts.

    The expected calibration error is the mean distance of what was said and what was seen, over bins of what was said
    (Guo et al. 2017, arXiv:1706.04599, eq. 3). Each comparison is turned so that the higher score comes first.
    """
    said_parts, won_parts, number_parts = [], [], []
    for one, start in zip(sets, starts, strict=False):
        made = compare(len(one["responses"]), one.get("ratings"), one.get("rankings"), one.get("winners"))
        gap = scores[start + made.first] - scores[start + made.second]
        won = np.where(gap >= 0, made.wins, made.losses) + 0.5 * made.ties
        said_parts.append(sigmoid(np.abs(gap)))
        won_parts.append(won)
        number_parts.append(made.wins + made.losses + made.ties)
    said, won, number = map(np.concatenate, (said_parts, won_parts, number_parts))
    if not number.any():
        return {}
    # Probabilities of the higher score's response run from a half to 1.
    edges = np.linspace(0.5, 1.0, CALIBRATION_BINS + 1)
    bin_of = np.clip(np.searchsorted(edges, said, side="right") - 1, 0, CALIBRATION_BINS - 1)
    weight, predicted, observed = (
        np.bincount(bin_of, values, CALIBRATION_BINS) for values in (number, number * said, won)
    )
    filled = weight > 0
    rows = [
        {"predicted": float(p / w), "observed": float(o / w), "comparisons": float(w)}
        for p, o, w in zip(predicted[filled], observed[filled], weight[filled], strict=True)
    ]
    error = float(np.abs(predicted - observed).sum() / number.sum())
    return {"calibration": {"expected_error": error, "bins": rows}}


def _spearman(one: Floats, other: Floats) -> float | None:
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    rho: Any = stats.spearmanr(one, other)
    return float(rho.statistic)
