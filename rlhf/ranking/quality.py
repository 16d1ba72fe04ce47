"""Quality of strengths on held-out comparisons, beside the annotators' own agreement.

Shapes: N responses of all held-out sets, P pairs, A annotators. Scores are a reward model's, in nats of log-odds if it
was trained on comparisons.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import comb
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from rlhf.ranking.bradley_terry import sigmoid
from rlhf.ranking.comparisons import FloatArray, IntArray, compare, rating_table
from rlhf.textstats import confident_pairs, pair_accuracy, seeded_pairs

Document = dict[str, Any]

FEWEST_DRAWS = 10
"""Below which groups of sets with the same raters are too few for an interval over them."""


def quality(
    sets: Sequence[Mapping[str, Any]], scores: npt.ArrayLike, lengths: npt.ArrayLike, n_pairs: int, seed: int
) -> Document:
    """Measure how well scores ``[N]`` order held-out responses; lengths ``[N]`` are in tokens.

    Figures that the data does not give, such as annotators' own accuracy where each response has one rater, are absent.
    """
    values, tokens = one_score_a_text(sets, scores), np.asarray(lengths, dtype=np.float64)
    starts = np.cumsum([0, *(len(record["responses"]) for record in sets)])
    means, drawn = heldout_pairs(sets, n_pairs, seed)
    within = _pairs_within(starts, means)
    # Sets with the same named raters are one draw of the population: they were drawn together, as the blocks of the
    # movie snippets are, and may share errors of raters and scores alike.
    raters = [number if row.get("annotators") is None else tuple(row["annotators"]) for number, row in enumerate(sets)]
    number_of: dict[Any, int] = {}
    draws = np.array([number_of.setdefault(names, len(number_of)) for names in raters])
    draw_of = np.repeat(draws if len(number_of) >= FEWEST_DRAWS else np.arange(len(sets)), np.diff(starts))
    pairs, inside = (Pairs.of(values, means, draw_of, indices) for indices in (drawn, within))
    rated = ~np.isnan(means)
    return {
        "accuracy": pairs.share(),
        "accuracy_within": inside.share(),
        "accuracy_by_gap": pairs.share_by_gap(),
        "beside_people": {
            "all": _beside_people(sets, values, starts, drawn),
            "within": _beside_people(sets, values, starts, within),
        },
        **_kendall(means, values, starts),
        **_calibration(sets, values, starts),
        "length_correlation": {
            "scores": _spearman(values[rated], tokens[rated]),
            "people": _spearman(means[rated], tokens[rated]),
        },
    }


def heldout_accuracy(
    sets: Sequence[Mapping[str, Any]], scores: npt.ArrayLike, n_pairs: int, seed: int
) -> dict[str, float]:
    """Return ``eval/accuracy``, ``_within`` and ``_confident``: how often scores order two responses as people do.

    sets     ranked comparison sets; where annotators gave ratings their mean decides the order, else the strengths
    scores   one a response, in the order of the sets
    n_pairs  drawn by the seed among responses of one pool: to the same prompt, of one set or of several

    A pair counts where both were rated and the annotators' means are not equal. It is *confident* where the means are
    at least 1 apart, or where 3 of 4 annotators who rated both agree, which only responses of one set can show.
    ``_within`` is over all pairs of one set. Identical texts have one score, so they count half.
    """
    scores = one_score_a_text(sets, scores)
    means, pairs = heldout_pairs(sets, n_pairs, seed)
    starts = np.cumsum([0, *(len(record["responses"]) for record in sets)])
    set_of = np.repeat(np.arange(len(sets)), np.diff(starts))
    confident = confident_pairs(means, pairs)
    for number in np.flatnonzero((set_of[pairs[:, 0]] == set_of[pairs[:, 1]]) & ~confident):
        index = int(set_of[pairs[number, 0]])
        if (ratings := sets[index].get("ratings")) is not None:
            start, end = starts[index : index + 2]
            table = rating_table(end - start, ratings)
            confident[number] = confident_pairs(means[start:end], pairs[number : number + 1] - start, table)[0]
    accuracies = {"eval/accuracy": pair_accuracy(scores, means, pairs)}
    for name, part in (("confident", pairs[confident]), ("within", _pairs_within(starts, means))):
        if (means[part[:, 0]] != means[part[:, 1]]).any():
            accuracies[f"eval/accuracy_{name}"] = pair_accuracy(scores, means, part)
    return accuracies


def one_score_a_text(sets: Sequence[Mapping[str, Any]], scores: npt.ArrayLike) -> FloatArray:
    """Replace scores ``[N]`` of identical texts of a pool by their mean, so that padding and packing order none."""
    number_of: dict[tuple[int, str], int] = {}
    pooled = [(record["pool"], text) for record in sets for text in record["responses"]]
    texts = np.array([number_of.setdefault(text, len(number_of)) for text in pooled])
    values = np.asarray(scores, dtype=np.float64)
    return (np.bincount(texts, values) / np.bincount(texts))[texts]


def heldout_pairs(sets: Sequence[Mapping[str, Any]], n_pairs: int, seed: int) -> tuple[FloatArray, IntArray]:
    """Return people's means ``[N]`` of all sets' responses, and seeded pairs ``[P, 2]`` of rated responses of one pool.

    The mean is that of the annotators' ratings, NaN without any; in a set without ratings, the strength.
    """
    means: list[FloatArray] = []
    groups: defaultdict[int, list[int]] = defaultdict(list)
    start = 0
    for record in sets:
        count = len(record["responses"])
        groups[record["pool"]] += range(start, start + count)
        start += count
        if record.get("ratings") is None:
            means.append(np.asarray(record["strengths"], dtype=np.float64))
            continue
        table = rating_table(count, record["ratings"])
        with np.errstate(invalid="ignore"):  # 0 / 0, NaN, is the mean of a response without ratings
            means.append(np.nansum(table, axis=1) / (~np.isnan(table)).sum(axis=1))
    share = n_pairs / max(sum(comb(len(group), 2) for group in groups.values()), 1)
    pairs = np.concatenate(
        [
            np.asarray(group)[
                seeded_pairs(len(group), int(np.ceil(share * len(group) * (len(group) - 1) / 2)), seed + number)
            ]
            for number, group in enumerate(groups.values())
        ]
    )
    joined = np.concatenate(means)
    return joined, pairs[~np.isnan(joined[pairs]).any(axis=1)]


def _pairs_within(starts: IntArray, means: FloatArray) -> IntArray:
    """Return all pairs ``[P, 2]`` of rated responses of one set; set s has those from ``starts[s]`` to the next."""
    pairs = np.concatenate([start + np.stack(np.triu_indices(end - start, k=1), 1) for start, end in pairwise(starts)])
    return pairs[~np.isnan(means[pairs]).any(axis=1)]


GAP_BINS = 4
CALIBRATION_BINS = 10
LEVEL = 0.95


class Pairs(NamedTuple):
    """Held-out pairs with an order, and whether scores have it."""

    right: FloatArray
    """``[P]``: 1 where scores order the pair as people's mean does, 0 where not, 0.5 where they are equal."""
    gap: FloatArray
    """``[P]``: the distance of the means, above 0."""
    draws: IntArray
    """``[P, 2]``: which draw of the population each response came with."""

    @classmethod
    def of(cls, scores: FloatArray, means: FloatArray, draw_of: IntArray, indices: IntArray) -> "Pairs":
        """Compare scores with means on those pairs of responses ``[P, 2]`` whose means differ."""
        gap = means[indices[:, 0]] - means[indices[:, 1]]
        indices, gap = indices[gap != 0], gap[gap != 0]
        agreement = np.sign(gap) * np.sign(scores[indices[:, 0]] - scores[indices[:, 1]])
        return cls((agreement + 1) / 2, np.abs(gap), draw_of[indices])

    def share(self) -> Document:
        """Return the share that is right with its 95 % interval; pairs that share a draw are not independent.

        The variance of the mean sums the products of the residuals of any two pairs that share a draw (Fafchamps &
        Gubert 2007, Journal of Development Economics 83:326; Aronow, Samii & Assenova 2015, Political Analysis
        23:564), and is at least that of independent pairs. A pair of two draws is in the sums of both, so its square
        is subtracted once. The interval is Student's, and absent where all pairs are of one draw.
        """
        number = len(self.right)
        if not number:
            return {"pairs": 0}
        share = float(self.right.mean())
        residual = self.right - share
        draws = len(np.unique(self.draws))
        document: Document = {"share": share, "pairs": number, "draws": draws}
        if draws < 2:
            return document
        across = self.draws[:, 0] != self.draws[:, 1]
        count = int(self.draws.max()) + 1
        of_draw = np.bincount(self.draws[:, 0], residual, count)
        of_draw += np.bincount(self.draws[across, 1], residual[across], count)
        variance = draws / (draws - 1) * float((of_draw**2).sum()) - float((residual[across] ** 2).sum())
        error = np.sqrt(max(variance, float((residual**2).sum()))) / number
        half = float(stats.t.ppf((1 + LEVEL) / 2, draws - 1)) * error
        return document | {"low": float(max(0.0, share - half)), "high": float(min(1.0, share + half))}

    def share_by_gap(self) -> list[Document]:
        """Return the share of each quarter of the pairs, from the closest means to the farthest."""
        if len(self.gap) < GAP_BINS:
            return []
        edges = np.unique(np.quantile(self.gap, np.linspace(0, 1, GAP_BINS + 1)))
        rows: list[Document] = []
        for number, (low, high) in enumerate(pairwise(edges)):
            inside = (self.gap >= low) & ((self.gap < high) | (number == len(edges) - 2))
            part = Pairs(self.right[inside], self.gap[inside], self.draws[inside])
            rows.append({"gap_from": float(low), "gap_to": float(high)} | part.share())
        return rows


def _beside_people(
    sets: Sequence[Mapping[str, Any]], scores: FloatArray, starts: IntArray, pairs: IntArray
) -> Document:
    """Return how often a rater orders pairs ``[P, 2]`` as the mean of the others does, and how often scores do.

    Both answer the same questions: a pair, and the order of its means without the raters asked. A pair is asked of
    all who rated both responses. Without such a rater, as across sets, it is asked as if any rater of the first were
    any rater of the second, which assumes, as bridges do, that a rating means the same in every set. A pair's questions
    together weigh as much as another's. Whether it is asked must not depend on the rater's own rating, so pairs with
    equal means of all raters are asked too. Identical texts have no order for any rater.

    Returns ``ties_half``, where a rater's tie counts half like a tie of scores, and ``ties_left_out``, of the questions
    on which the rater has a preference; either is absent without such questions.
    """
    tables = [rating_table(len(record["responses"]), record.get("ratings")) for record in sets]
    # Of the columns of each table; raters without names are their set's own.
    names = [
        np.array((record.get("annotators") or [f"{number}/{column}" for column in range(width)])[:width], np.str_)
        for number, (record, width) in enumerate(zip(sets, (table.shape[1] for table in tables), strict=True))
    ]
    texts = [text for record in sets for text in record["responses"]]
    set_of = np.searchsorted(starts, pairs, side="right") - 1
    answers: dict[str, list[FloatArray]] = {"ties_half": [], "ties_left_out": []}
    for (i, j), (first, second) in zip(pairs, set_of, strict=True):
        a, b = tables[first][i - starts[first]], tables[second][j - starts[second]]
        if min((~np.isnan(a)).sum(), (~np.isnan(b)).sum()) < 2:
            continue  # no mean is left without the rater asked
        rated = ~np.isnan(a)[:, None] & ~np.isnan(b)
        both = rated & (names[first][:, None] == names[second])
        rater, other = np.nonzero(both if both.any() else rated)
        mean = np.sign(_mean_of_others(a)[rater] - _mean_of_others(b)[other])
        own = mean * np.sign(a[rater] - b[other]) * (texts[i] != texts[j])
        ours = mean * np.sign(scores[i] - scores[j])
        for name, asked in (("ties_half", mean != 0), ("ties_left_out", own != 0)):
            sums = np.array([asked.sum(), (own[asked] + 1).sum() / 2, (ours[asked] + 1).sum() / 2])
            answers[name].append(sums / len(mean))
    document: Document = {}
    for name, rows in answers.items():
        asked, human, ours = np.sum(rows, axis=0) if rows else np.zeros(3)
        if asked > 0:
            number = sum(bool(row[0]) for row in rows)
            document[name] = {"human": float(human / asked), "scores": float(ours / asked), "pairs": number}
    return document


def _mean_of_others(ratings: FloatArray) -> FloatArray:
    """Return ``[A]``: the mean rating without each rater's own, of two raters or more; NaN for a missing rating."""
    return (np.nansum(ratings) - ratings) / ((~np.isnan(ratings)).sum() - 1)


def _kendall(means: FloatArray, scores: FloatArray, starts: IntArray) -> Document:
    """Return Kendall's τ_b (1945) of scores and people's means within a set: its mean over sets, Student's interval."""
    values: list[float] = []
    for start, end in pairwise(starts):
        rated = start + np.flatnonzero(~np.isnan(means[start:end]))
        if len(rated) > 1 and np.ptp(means[rated]) > 0 and np.ptp(scores[rated]) > 0:
            tau: Any = stats.kendalltau(scores[rated], means[rated])
            values.append(float(tau.statistic))
    if len(values) < 2:
        return {}
    mean = float(np.mean(values))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))
    return {"kendall_tau": {"mean": mean, "low": mean - half, "high": mean + half, "sets": len(values)}}


def _calibration(sets: Sequence[Mapping[str, Any]], scores: FloatArray, starts: IntArray) -> Document:
    """Compare how often a response is preferred with σ(r_i - r_j), over all annotators' comparisons within sets.

    The expected calibration error is the mean distance of predicted and observed, over bins of the predicted (Guo et
    al. 2017, arXiv:1706.04599, eq. 3). Each comparison is turned so that the higher score comes first.
    """
    parts: list[FloatArray] = []
    for record, start in zip(sets, starts, strict=False):
        made = compare(len(record["responses"]), record.get("ratings"), record.get("rankings"), record.get("winners"))
        gap = scores[start + made.first] - scores[start + made.second]
        # Of equal scores neither comes first.
        won = np.where(gap > 0, made.wins, np.where(gap < 0, made.losses, 0.5 * (made.wins + made.losses)))
        parts.append(np.stack([sigmoid(np.abs(gap)), won + 0.5 * made.ties, made.counts]))
    claimed, won, number = np.concatenate(parts, axis=1)
    if not number.any():
        return {}
    # Probabilities of the higher score's response run from a half to 1.
    edges = np.linspace(0.5, 1.0, CALIBRATION_BINS + 1)
    bin_of = np.clip(np.searchsorted(edges, claimed, side="right") - 1, 0, CALIBRATION_BINS - 1)
    weight, predicted, observed = (
        np.bincount(bin_of, values, CALIBRATION_BINS) for values in (number, number * claimed, won)
    )
    rows = [
        {"predicted": float(p / w), "observed": float(o / w), "comparisons": float(w)}
        for p, o, w in zip(predicted, observed, weight, strict=True)
        if w > 0
    ]
    error = float(np.abs(predicted - observed).sum() / number.sum())
    return {"calibration": {"expected_error": error, "bins": rows}}


def _spearman(first: FloatArray, second: FloatArray) -> float | None:
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    rho: Any = stats.spearmanr(first, second)
    return float(rho.statistic)
