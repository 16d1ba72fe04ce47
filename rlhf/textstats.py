"""Statistics of evaluation: the variety of texts, intervals of differences, the agreement of scores with people."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from rlhf.randomness import stream

_WORD = re.compile(r"\w+(?:['’-]\w+)*")

Floats = npt.NDArray[np.float64]
Pairs = npt.NDArray[np.int64]


def distinct_ngrams(texts: Sequence[str], n: int) -> float:
    """Return distinct-n of Li et al. 2016 (arXiv:1510.03055, section 5.3): different n-grams / all n-grams, 0 to 1.

    Words are maximal runs of letters, digits and underscores, joined by inner apostrophes and hyphens and lower-cased;
    punctuation is ignored, and no n-gram spans two texts. Texts without any n-gram give 0.

    The ratio falls as texts are added, because words recur. Compare only equal numbers of texts of about equal length.
    """
    if n < 1:
        raise ValueError(f"an n-gram has at least one word, not {n}")
    total = 0
    different: set[tuple[str, ...]] = set()
    for text in texts:
        words = _WORD.findall(text.lower())
        ngrams = list(zip(*(words[start:] for start in range(n)), strict=False))
        total += len(ngrams)
        different.update(ngrams)
    return len(different) / total if total else 0.0


class Interval(NamedTuple):
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float


def paired_interval(before: npt.ArrayLike, after: npt.ArrayLike, level: float = 0.95) -> Interval:
    """Return the mean of ``after - before`` over pairs, with Student's t interval of that confidence level.

    Unlike a bootstrap, the t interval needs no seed and keeps its level with a handful of pairs, where a percentile
    bootstrap is too narrow; the mean of bounded ratings over the usual hundred prompts is nearly normal.

    Raises ValueError unless both have the same length of at least two.
    """
    if np.shape(before) != np.shape(after) or np.ndim(before) != 1 or np.size(before) < 2:
        raise ValueError(f"an interval needs two or more pairs: got shapes {np.shape(before)} and {np.shape(after)}")
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    mean = float(differences.mean())
    half_width = float(stats.t.ppf((1 + level) / 2, len(differences) - 1) * stats.sem(differences))
    return Interval(mean, mean - half_width, mean + half_width)


def win_rate(outcomes: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean of outcomes of independent prompts, each from 0 to 1, with Wilson's score interval.

    Wilson 1927, Journal of the American Statistical Association 22:209. Unlike Student's interval it has a width where
    all outcomes are equal. Ties, as 0.5, vary less than the wins and losses it assumes, so that it is then a little
    wide.
    """
    count, mean = len(outcomes), float(np.mean(outcomes))
    z = float(stats.norm.ppf((1 + level) / 2))
    centre = (mean + z**2 / (2 * count)) / (1 + z**2 / count)
    half_width = z / (1 + z**2 / count) * float(np.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2)))
    return Interval(mean, centre - half_width, centre + half_width)


def seeded_pairs(n_items: int, n_pairs: int, seed: int) -> Pairs:
    """Return ``n_pairs`` different pairs of two items each, shape [pairs, 2], or all pairs where there are fewer."""
    n_possible = n_items * (n_items - 1) // 2
    rng = stream("pairs", seed)
    if not n_possible:
        return np.empty((0, 2), np.int64)
    index = rng.choice(n_possible, size=min(n_pairs, n_possible), replace=False)
    # Pair number k in the order (1, 0), (2, 0), (2, 1), (3, 0), ... : row i starts at i (i - 1) / 2.
    items = np.arange(n_items, dtype=np.int64)
    starts = items * (items - 1) // 2
    larger = np.searchsorted(starts[1:], index, side="right")
    return np.stack([larger, index - starts[larger]], axis=1)


def pair_accuracy(scores: npt.ArrayLike, means: npt.ArrayLike, pairs: Pairs) -> float:
    """Return the fraction of pairs that the scores order as the annotators' means do, 0 to 1; nan without any pair.

    Pairs with equal means have no right order and are left out; equal scores count half, like the toss of a coin.

    scores, means  one value an item
    pairs          two items a row, shape [pairs, 2]
    """
    mean_gap = _gaps(means, pairs)
    agreement = np.sign(mean_gap) * np.sign(_gaps(scores, pairs))
    decided = agreement[mean_gap != 0]
    return float(((decided + 1) / 2).mean()) if len(decided) else float("nan")


def confident_pairs(means: npt.ArrayLike, pairs: Pairs, ratings: npt.ArrayLike | None = None) -> npt.NDArray[np.bool_]:
    """Return which pairs people order beyond doubt: the means differ by 1 or more, or 3 of 4 annotators agree.

    An annotator agrees if their own two ratings differ in the direction of the means. At least three must agree, and
    three quarters of the annotators who rated both items; without ratings the means decide alone.

    ratings  shape [items, annotators], nan for no rating. A column is one person in both rows of a pair, so pairs must
             not mix items whose columns stand for different people.
    """
    mean_gap = _gaps(means, pairs)
    # Means are quotients: a gap of exactly 1 may come out a rounding error short.
    confident = np.abs(mean_gap) >= 1 - 1e-9
    if ratings is None:
        return confident
    rating_gap = _gaps(ratings, pairs)
    agreeing = (np.sign(rating_gap) == np.sign(mean_gap)[:, None]).sum(axis=1)
    judging = (~np.isnan(rating_gap)).sum(axis=1)
    return confident | ((mean_gap != 0) & (agreeing >= 3) & (agreeing >= 0.75 * judging))


def _gaps(values: npt.ArrayLike, pairs: Pairs) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    return array[pairs[:, 0]] - array[pairs[:, 1]]
