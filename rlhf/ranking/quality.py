"""Quality of strengths on held-out comparisons, beside the annotators' own agreement.

Shapes: N responses of all held-out sets, P pairs. Scores are a reward model's, in nats of log-odds if it was trained on
comparisons.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from rlhf.ranking.bradley_terry import sigmoid
from rlhf.ranking.comparisons import compare, rating_table
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


Ints = npt.NDArray[np.int64]
Document = dict[str, Any]

GAP_BINS = 4
CALIBRATION_BINS = 10
LEVEL = 0.95
FEWEST_DRAWS = 10
"""Below which groups of sets with the same raters are too few for an interval over them."""


class Pairs(NamedTuple):
    """Held-out pairs with an order, and whether scores have it."""

    right: Floats
    """``[P]``: 1 where scores order the pair as people's mean does, 0 where not, 0.5 where they are equal."""
    gap: Floats
    """``[P]``: the distance of the means, above 0."""
    draws: Ints
    """``[P, 2]``: which draw of the population each response came with."""


def quality(
    sets: Sequence[Mapping[str, Any]], scores: npt.ArrayLike, lengths: npt.ArrayLike, n_pairs: int, seed: int
) -> Document:
    """All that is known of how well scores ``[N]`` order held-out responses; lengths ``[N]`` are in tokens.

    Numbers that the data does not give, such as people's own accuracy where each response has one rater, are absent.
    """
    values, tokens = one_score_a_text(sets, scores), np.asarray(lengths, dtype=np.float64)
    starts = np.cumsum([0, *(len(one["responses"]) for one in sets)])
    means, drawn = heldout_pairs(sets, n_pairs, seed)
    within = pairs_within(sets, means)
    draw_of = np.repeat(_draws(sets), np.diff(starts))
    pairs, inside = (_judged(values, means, draw_of, rows) for rows in (drawn, within))
    found: Document = {
        "accuracy": _share(pairs),
        "accuracy_within": _share(inside),
        "accuracy_by_gap": _by_gap(pairs),
        "beside_people": {
            "all": _beside_people(sets, values, starts, drawn),
            "within": _beside_people(sets, values, starts, within),
        },
    }
    found |= _kendall(sets, values, starts)
    found |= _calibration(sets, values, starts)
    people = np.concatenate([mean_ratings(one) for one in sets])
    rated = ~np.isnan(people)
    found["length_correlation"] = {
        "scores": _spearman(values[rated], tokens[rated]),
        "people": _spearman(people[rated], tokens[rated]),
    }
    return found


def _draws(sets: Sequence[Mapping[str, Any]]) -> Ints:
    """``[sets]``: the number of the draw that each set is part of.

    Sets with the same named raters were drawn together, as the blocks of the movie snippets are, and may share errors
    of raters and scores alike. Where there are fewer than ``FEWEST_DRAWS`` such groups, each set is a draw.
    """
    raters = [number if one.get("annotators") is None else tuple(one["annotators"]) for number, one in enumerate(sets)]
    place: dict[Any, int] = {}
    draws = np.array([place.setdefault(names, len(place)) for names in raters], np.int64)
    return draws if len(place) >= FEWEST_DRAWS else np.arange(len(sets))


def _judged(scores: Floats, means: Floats, draw_of: Ints, indices: Ints) -> Pairs:
    gap = means[indices[:, 0]] - means[indices[:, 1]]
    indices, gap = indices[gap != 0], gap[gap != 0]
    agreement = np.sign(gap) * np.sign(scores[indices[:, 0]] - scores[indices[:, 1]])
    return Pairs((agreement + 1) / 2, np.abs(gap), draw_of[indices])


def _share(pairs: Pairs) -> Document:
    """Return a share of pairs with its 95 % interval; pairs that share a draw of the population are not independent.

    The variance of the mean sums the products of the residuals of any two pairs that share a draw (Fafchamps & Gubert
    2007, Journal of Development Economics 83:326; Aronow, Samii & Assenova 2015, Political Analysis 23:564), and is at
    least that of independent pairs. A pair of two draws is in the sums of both, so its square is subtracted once. The
    interval is Student's, and absent where all pairs are of one draw.
    """
    number = len(pairs.right)
    if not number:
        return {"pairs": 0}
    share = float(pairs.right.mean())
    residual = pairs.right - share
    draws = len(np.unique(pairs.draws))
    found: Document = {"share": share, "pairs": number, "draws": draws}
    if draws < 2:
        return found
    across = pairs.draws[:, 0] != pairs.draws[:, 1]
    count = int(pairs.draws.max()) + 1
    of_draw = np.bincount(pairs.draws[:, 0], residual, count)
    of_draw += np.bincount(pairs.draws[across, 1], residual[across], count)
    variance = draws / (draws - 1) * float((of_draw**2).sum()) - float((residual[across] ** 2).sum())
    error = np.sqrt(max(variance, float((residual**2).sum()))) / number
    half = float(stats.t.ppf((1 + LEVEL) / 2, draws - 1)) * error
    return found | {"low": float(max(0.0, share - half)), "high": float(min(1.0, share + half))}


def _by_gap(pairs: Pairs) -> list[Document]:
    """The same for a quarter of the pairs each, from the closest means to the farthest."""
    if len(pairs.gap) < GAP_BINS:
        return []
    edges = np.unique(np.quantile(pairs.gap, np.linspace(0, 1, GAP_BINS + 1)))
    rows: list[Document] = []
    for number, (low, high) in enumerate(pairwise(edges)):
        inside = (pairs.gap >= low) & ((pairs.gap < high) | (number == len(edges) - 2))
        part = Pairs(pairs.right[inside], pairs.gap[inside], pairs.draws[inside])
        rows.append({"gap_from": float(low), "gap_to": float(high)} | _share(part))
    return rows


def _beside_people(sets: Sequence[Mapping[str, Any]], scores: Floats, starts: Ints, pairs: Ints) -> Document:
    """How often one rater orders pairs ``[P, 2]`` as the mean of the others does, and how often scores do.

    Both answer the same questions: a pair, and the order of its means without the raters asked. A pair is asked of
    everybody who rated both responses. Where nobody did, as across sets, it is asked as if any rater of the first were
    any rater of the second, which assumes, as bridges do, that a rating means the same in every set. A pair's questions
    together weigh as much as another's. Whether it is asked must not depend on the rater's own rating, so pairs with
    equal means of all raters are asked too. Identical texts have no order for anybody.

    Returns ``ties_half``, where a rater's tie counts half like a tie of scores, and ``ties_left_out``, of the questions
    on which the rater has a preference; either is absent without such questions.
    """
    tables = [rating_table(len(one["responses"]), one.get("ratings"), None) for one in sets]
    names = [_raters(one, number, table.shape[1]) for number, (one, table) in enumerate(zip(sets, tables, strict=True))]
    texts = [text for one in sets for text in one["responses"]]
    set_of = np.searchsorted(starts, pairs, side="right") - 1
    answers: dict[str, list[Floats]] = {"ties_half": [], "ties_left_out": []}
    for (i, j), (first, second) in zip(pairs, set_of, strict=True):
        a, b = tables[first][i - starts[first]], tables[second][j - starts[second]]
        if min((~np.isnan(a)).sum(), (~np.isnan(b)).sum()) < 2:
            continue  # nobody's mean is left without the rater asked
        rated = ~np.isnan(a)[:, None] & ~np.isnan(b)
        both = rated & (names[first][:, None] == names[second])
        rater, other = np.nonzero(both if both.any() else rated)
        mean = np.sign(_mean_of_others(a)[rater] - _mean_of_others(b)[other])
        own = mean * np.sign(a[rater] - b[other]) * (texts[i] != texts[j])
        ours = mean * np.sign(scores[i] - scores[j])
        for name, asked in (("ties_half", mean != 0), ("ties_left_out", own != 0)):
            sums = np.array([asked.sum(), (own[asked] + 1).sum() / 2, (ours[asked] + 1).sum() / 2])
            answers[name].append(sums / len(mean))
    found: Document = {}
    for name, rows in answers.items():
        asked, human, ours = np.sum(rows, axis=0) if rows else np.zeros(3)
        if asked > 0:
            number = sum(bool(row[0]) for row in rows)
            found[name] = {"human": float(human / asked), "scores": float(ours / asked), "pairs": number}
    return found


def _raters(one: Mapping[str, Any], number: int, columns: int) -> npt.NDArray[np.str_]:
    """The names of a set's columns of ratings; those of a set without names are its own."""
    named = one.get("annotators")
    return np.array([f"{number}/{column}" for column in range(columns)] if named is None else named[:columns], np.str_)


def _mean_of_others(ratings: Floats) -> Floats:
    """``[A]``: the mean rating without each rater's own, of two raters or more; NaN for who gave none."""
    return (np.nansum(ratings) - ratings) / ((~np.isnan(ratings)).sum() - 1)


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
        # Of equal scores neither comes first.
        won = np.where(gap > 0, made.wins, np.where(gap < 0, made.losses, 0.5 * (made.wins + made.losses)))
        won += 0.5 * made.ties
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
