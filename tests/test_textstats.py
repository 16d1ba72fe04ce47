import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlhf.textstats import confident_pairs, distinct_ngrams, pair_accuracy, paired_interval, seeded_pairs

WORDS = st.lists(st.sampled_from(["a", "film", "that", "is", "moving"]), max_size=8).map(" ".join)
HALVES = st.integers(-8, 8).map(lambda n: n / 2)


@given(texts=st.lists(WORDS, max_size=6), n=st.integers(1, 3))
def test_distinct_n_is_what_a_plain_count_gives(texts: list[str], n: int):
    """Against the definition, written out: every window of n words of every text, then the different ones."""
    ngrams: list[str] = []
    for text in texts:
        words = text.split()
        ngrams += [" ".join(words[start : start + n]) for start in range(len(words) - n + 1)]
    expected = len(set(ngrams)) / len(ngrams) if ngrams else 0.0
    assert distinct_ngrams(texts, n) == expected


def test_repeating_every_text_divides_distinct_n():
    """A policy that says everything three times is three times less varied, which is what the measure is for."""
    texts = ["A film of great warmth", "Nothing here is new at all"]
    assert distinct_ngrams(texts, 2) == 1.0
    assert distinct_ngrams(texts * 3, 2) == pytest.approx(1 / 3)


def test_case_and_punctuation_make_no_new_words_but_apostrophes_do():
    """Only words count: "Don't" is one, and a full stop is none."""
    assert distinct_ngrams(["Don't stop. DON'T STOP!"], 1) == 0.5
    assert distinct_ngrams(["don't", "don t"], 1) == 1.0


def test_distinct_n_of_no_words_is_zero_and_of_no_length_is_refused():
    """A policy that collapsed to silence is not varied; a zero-gram is a mistake."""
    assert distinct_ngrams(["", "one"], 2) == 0.0
    with pytest.raises(ValueError, match="at least one word"):
        distinct_ngrams(["one"], 0)


@given(pairs=st.lists(st.tuples(HALVES, HALVES), min_size=2, max_size=20), level=st.sampled_from([0.5, 0.9, 0.95]))
def test_the_interval_is_the_paired_t_tests(pairs: list[tuple[float, float]], level: float):
    """Against SciPy's paired t test; where all differences are equal the interval has no width."""
    before, after = map(list, zip(*pairs, strict=True))
    mean, low, high = paired_interval(before, after, level)
    differences = np.subtract(after, before)
    assert mean == pytest.approx(differences.mean())
    if np.ptp(differences) == 0:
        assert low == high == mean
    else:
        expected = stats.ttest_rel(after, before).confidence_interval(level)
        assert (low, high) == pytest.approx((expected.low, expected.high))


def test_an_interval_is_of_95_per_cent_unless_another_is_asked_for():
    """Of five pairs."""
    before, after = [1.0, 2.0, 0.0, 4.0, 2.0], [2.0, 2.5, 1.0, 3.0, 7.0]
    assert paired_interval(before, after) == paired_interval(before, after, 0.95)


def test_the_interval_holds_the_true_difference_as_often_as_it_says():
    """Nine in ten 90 % intervals of eight pairs hold the truth, though what all pairs share is far larger."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        before = rng.normal(50, 20, 8)
        _, low, high = paired_interval(before, before + rng.normal(0.7, 1, 8), level=0.9)
        held += low <= 0.7 <= high
    assert 0.87 < held / 1000 < 0.93


@pytest.mark.parametrize(("before", "after"), [([1.0], [2.0]), ([1.0, 2.0], [1.0]), ([1.0, 2.0], [1.0, 2.0, 3.0])])
def test_an_interval_of_unpaired_or_single_values_is_refused(before: list[float], after: list[float]):
    """One pair has no spread, and unequal lengths are not pairs, even where NumPy would broadcast them."""
    with pytest.raises(ValueError, match="two or more pairs"):
        paired_interval(before, after)


@given(n_items=st.integers(0, 40), n_pairs=st.integers(0, 1000), seed=st.integers(0, 2**32))
def test_seeded_pairs_are_different_pairs_of_different_items(n_items: int, n_pairs: int, seed: int):
    """No pair comes twice in either order, none is of an item with itself, and the seed decides them all."""
    pairs = seeded_pairs(n_items, n_pairs, seed)
    assert pairs.shape == (min(n_pairs, math.comb(n_items, 2)), 2)
    assert {frozenset(pair) for pair in pairs.tolist()} <= {
        frozenset(p) for p in itertools.combinations(range(n_items), 2)
    }
    assert len({frozenset(pair) for pair in pairs.tolist()}) == len(pairs)
    np.testing.assert_array_equal(pairs, seeded_pairs(n_items, n_pairs, seed))


def test_every_pair_is_as_likely_as_any_other():
    """The pairs are a fair sample: over many seeds, all ten pairs of five items come equally often."""
    drawn = [tuple(sorted(pair)) for seed in range(500) for pair in seeded_pairs(5, 4, seed).tolist()]
    counts = [drawn.count(pair) for pair in itertools.combinations(range(5), 2)]
    assert stats.chisquare(counts).pvalue > 0.001


@given(items=st.lists(st.tuples(HALVES, HALVES), min_size=2, max_size=12))
def test_pair_accuracy_is_what_a_plain_count_gives(items: list[tuple[float, float]]):
    """Against the definition, pair by pair: ties of the means left out, ties of the scores worth half."""
    scores, means = zip(*items, strict=True)
    points = [
        0.5 if scores[i] == scores[j] else float((scores[i] > scores[j]) == (means[i] > means[j]))
        for i, j in itertools.combinations(range(len(items)), 2)
        if means[i] != means[j]
    ]
    accuracy = pair_accuracy(scores, means, seeded_pairs(len(items), 10_000, seed=0))
    if points:
        assert accuracy == pytest.approx(sum(points) / len(points))
    else:
        assert math.isnan(accuracy)


def test_pair_accuracy_sees_only_the_order_of_the_scores():
    """Normalising or squashing a reward model's scores changes no accuracy; negating them mirrors it."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=50)
    scores = means + rng.normal(size=50)
    pairs = seeded_pairs(50, 500, seed=0)
    accuracy = pair_accuracy(scores, means, pairs)
    assert 0.6 < accuracy < 0.95
    assert pair_accuracy(np.tanh(scores / 3) * 7 + 2, means, pairs) == accuracy
    assert pair_accuracy(-scores, means, pairs) == pytest.approx(1 - accuracy)
    assert pair_accuracy(np.zeros(50), means, pairs) == 0.5
    np.testing.assert_array_equal(pair_accuracy(scores, means, pairs[:, ::-1]), accuracy)


NO = math.nan


@pytest.mark.parametrize(
    ("first", "second", "confident"),
    [
        ([1, 1, 1, 1], [0, 0, 0, 0], True),  # the means lie 1 apart
        ([1, 1, 1, 0], [0, 0, 0, 0], True),  # three of four
        ([1, 1, 0, 0], [0, 0, 0, 0], False),  # two of four
        ([2, 1, 1, 0], [0, 0, 0, 1], True),  # three of four, one against
        ([1, 1, 1, 0, 0], [0, 0, 0, 0, 0], False),  # three of five
        ([1, 1, 1, NO], [0, 0, 0, 4], True),  # three of the three who rated both
        ([1, 1, NO, NO], [0.5, 0.5, NO, NO], False),  # two people are too few to be sure
        ([0, 0, 0, 4], [1, 1, 1, 0.5], False),  # three of four, but against the means
        ([1, 0, 1, 0], [0, 1, 0, 1], False),  # equal means have no order to be sure of
    ],
)
def test_a_pair_is_confident_where_the_means_or_three_of_four_people_say_so(
    first: list[float], second: list[float], confident: bool
):
    """The two ways to be sure, and their edges; swapping the two texts changes nothing."""
    ratings = np.array([first, second], dtype=np.float64)
    means = np.nanmean(ratings, axis=1)
    if np.isnan(first).any() and confident:
        means = np.array([1.0, 0.5])  # the means alone must not decide this case
    for pairs in (np.array([[0, 1]]), np.array([[1, 0]])):
        assert confident_pairs(means, pairs, ratings).tolist() == [confident]


def test_without_ratings_only_the_means_decide_and_rounding_does_not():
    """Means are quotients: -7/15 and -22/15 lie exactly 1 apart, which floating point makes a little less."""
    means = np.array([-7 / 15, -22 / 15, -21 / 15])
    assert means[0] - means[1] < 1
    pairs = np.array([[0, 1], [0, 2], [1, 0]])
    assert confident_pairs(means, pairs).tolist() == [True, False, True]
