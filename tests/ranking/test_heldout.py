from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.ranking.quality import heldout_accuracy, heldout_pairs

Set = dict[str, Any]


@st.composite
def ranked_sets(draw: st.DrawFn) -> list[Set]:
    """A few sets in a few pools, with ratings (some absent) or strengths alone."""
    sets: list[Set] = []
    for _ in range(draw(st.integers(1, 4))):
        size, annotators = draw(st.integers(2, 4)), draw(st.integers(1, 5))
        rating = st.sampled_from([None, -2, -1, 0, 1, 2])
        strengths = draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size))
        row = st.lists(rating, min_size=annotators, max_size=annotators)
        ratings = draw(st.none() | st.lists(row, min_size=size, max_size=size))
        pool = draw(st.integers(0, 1)) if ratings else 2 + len(sets)
        texts = [f"{len(sets)} {number}" for number in range(size)]
        one = {"prompt": "p", "responses": texts, "strengths": [value / 2 for value in strengths]}
        sets.append(one | ({"ratings": ratings} if ratings else {}) | {"pool": pool})
    return sets


def slow(sets: list[Set], scores: list[float]) -> dict[str, float]:
    """Every pair of one pool, as the definition reads."""
    items = [(one, index, number) for number, one in enumerate(sets) for index in range(len(one["responses"]))]
    right: dict[str, list[float]] = {
        name: [] for name in ("eval/accuracy", "eval/accuracy_confident", "eval/accuracy_within")
    }
    for a, b in combinations(range(len(items)), 2):
        (one, i, first), (other, j, second) = items[a], items[b]
        if one["pool"] != other["pool"]:
            continue
        mean, other_mean = people_think(one, i), people_think(other, j)
        if mean is None or other_mean is None or mean == other_mean:
            continue
        gap = mean - other_mean
        agreeing = judging = 0
        if first == second and "ratings" in one:
            for x, y in zip(one["ratings"][i], one["ratings"][j], strict=True):
                if x is not None and y is not None:
                    judging += 1
                    agreeing += (x - y) * gap > 0
        correct = 0.5 if scores[a] == scores[b] else float((scores[a] - scores[b]) * gap > 0)
        right["eval/accuracy"].append(correct)
        if first == second:
            right["eval/accuracy_within"].append(correct)
        if abs(gap) >= 1 - 1e-9 or (agreeing >= 3 and agreeing >= 0.75 * judging):
            right["eval/accuracy_confident"].append(correct)
    return {name: float(np.mean(values)) for name, values in right.items() if values}


def people_think(one: Set, index: int) -> float | None:
    if "ratings" not in one:
        return one["strengths"][index]
    given = [rating for rating in one["ratings"][index] if rating is not None]
    return sum(given) / len(given) if given else None


@given(ranked_sets(), st.randoms(use_true_random=False))
def test_accuracy_is_that_of_all_pairs_counted_one_by_one(sets: list[Set], random: Any) -> None:
    """Asked for more pairs than there are, it counts all: of one pool, with different means, ties of scores half."""
    scores = [random.randint(0, 3) / 2 for one in sets for _ in one["responses"]]
    found = heldout_accuracy(sets, scores, n_pairs=10_000, seed=0)
    expected = slow(sets, scores)
    if not expected:
        assert np.isnan(found["eval/accuracy"])
    else:
        assert found == pytest.approx(expected)


def test_a_sample_of_pairs_is_seeded_and_near_the_whole() -> None:
    """4,000 of 79,800 pairs tell the accuracy within two points."""
    rng = np.random.default_rng(0)
    sets: list[Set] = [
        {
            "responses": [f"{number}{letter}" for letter in "abcd"],
            "ratings": rng.normal(size=(4, 5)).tolist(),
            "pool": 0,
        }
        for number in range(100)
    ]
    means = np.concatenate([np.mean(one["ratings"], axis=1) for one in sets])
    scores = means + rng.normal(0, 0.5, 400)
    whole = heldout_accuracy(sets, scores, 10**6, seed=0)
    sample = heldout_accuracy(sets, scores, 4000, seed=0)
    assert sample == heldout_accuracy(sets, scores, 4000, seed=0)
    assert sample != heldout_accuracy(sets, scores, 4000, seed=1)
    assert sample["eval/accuracy"] == pytest.approx(whole["eval/accuracy"], abs=0.02)
    assert sample["eval/accuracy_confident"] > sample["eval/accuracy"]


def pool_of(number: int, size: int) -> Set:
    return {"responses": [f"{number} {i}" for i in range(size)], "strengths": list(range(size)), "pool": number}


def test_pools_give_pairs_by_how_many_they_have() -> None:
    """All different, each of one pool, rounded up so that the smallest pool is heard; a lone response has no pair."""
    sizes = [40, 20, 1, 3]
    _, pairs = heldout_pairs([pool_of(number, size) for number, size in enumerate(sizes)], 300, 0)
    pools = np.repeat(np.arange(len(sizes)), sizes)[pairs]
    assert (pools[:, 0] == pools[:, 1]).all()
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert len({frozenset(pair) for pair in pairs.tolist()}) == len(pairs)
    possible = [size * (size - 1) // 2 for size in sizes]
    expected = [-(-300 * pairs_there // sum(possible)) for pairs_there in possible]
    assert np.bincount(pools[:, 0], minlength=len(sizes)).tolist() == expected
    assert heldout_pairs([pool_of(0, 1)], 300, 0)[1].shape == (0, 2)


def test_pools_of_one_size_draw_other_pairs() -> None:
    """Each pool draws by a seed of its own, and another seed draws other pairs."""
    _, pairs = heldout_pairs([pool_of(0, 30), pool_of(1, 30)], 200, 0)
    first, second = ({frozenset(pair) for pair in (pairs[pairs[:, 0] // 30 == n] - 30 * n).tolist()} for n in (0, 1))
    assert first != second
    assert not np.array_equal(pairs, heldout_pairs([pool_of(0, 30), pool_of(1, 30)], 200, 1)[1])


def test_identical_texts_of_a_pool_are_half_right_and_of_two_pools_apart() -> None:
    """The same string twice has no order for scores, which rounding may tell apart; other prompts are other texts."""
    same: Set = {"responses": ["text", "text"], "ratings": [[2.0], [0.0]], "pool": 0}
    for scores in ([0.1, 0.0], [0.0, 0.1]):
        found = heldout_accuracy([same], scores, 10, seed=0)
        assert found == {"eval/accuracy": 0.5, "eval/accuracy_confident": 0.5, "eval/accuracy_within": 0.5}
    other: Set = {"responses": ["text", "else"], "ratings": [[2.0], [0.0]], "pool": 1}
    found = heldout_accuracy(
        [{"responses": ["text", "b"], "ratings": [[0.0], [2.0]], "pool": 0}, other], [0, 9, 9, 5], 10, 0
    )
    assert found["eval/accuracy"] == 1
