from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.ranking.comparisons import NOBODY, Comparisons, FloatArray, compare, merge
from tests.ranking.drawn import as_wins

Table = list[list[float | None]]


@st.composite
def tables(draw: st.DrawFn) -> Table:
    responses, annotators = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    rating = st.none() | st.integers(-2, 2).map(float)
    return draw(
        st.lists(st.lists(rating, min_size=annotators, max_size=annotators), min_size=responses, max_size=responses)
    )


def counted(count: int, comparisons: Comparisons) -> tuple[FloatArray, int]:
    """Who beat whom, a tie counting half to either, and the number of ties."""
    return as_wins(count, comparisons), int(comparisons.ties.sum())


def slow_wins(ratings: Table) -> tuple[np.ndarray[Any, Any], int]:
    """Pair by pair and annotator by annotator, as the definition reads."""
    wins, ties = np.zeros((len(ratings), len(ratings))), 0
    for i, j in combinations(range(len(ratings)), 2):
        for first, second in zip(ratings[i], ratings[j], strict=True):
            if first is None or second is None:
                continue
            if first == second:
                wins[i, j] += 0.5
                wins[j, i] += 0.5
                ties += 1
            elif first > second:
                wins[i, j] += 1
            else:
                wins[j, i] += 1
    return wins, ties


@given(tables())
def test_ratings_count_as_the_slow_definition_says(ratings: Table) -> None:
    """One comparison a pair and annotator; an absent rating compares with nothing."""
    wins, ties = counted(len(ratings), compare(len(ratings), ratings=ratings))
    expected_wins, expected_ties = slow_wins(ratings)
    np.testing.assert_array_equal(wins, expected_wins)
    assert ties == expected_ties


@given(tables(), st.sampled_from([lambda x: 3 * x + 7, lambda x: x**3, lambda x: np.exp(x)]))
def test_only_the_order_of_an_annotator_s_ratings_counts(ratings: Table, stretch: Any) -> None:
    """Shifting or stretching one's scale must not change what one said."""
    stretched = [[None if rating is None else float(stretch(rating)) for rating in row] for row in ratings]
    original, other = compare(len(ratings), ratings=ratings), compare(len(ratings), ratings=stretched)
    for one, same in zip(original, other, strict=True):
        np.testing.assert_array_equal(one, same)


@given(tables())
def test_a_ranking_says_what_the_ratings_it_was_made_of_say(ratings: Table) -> None:
    """Ratings, rankings with ties, and winners of the same judgements are the same comparisons."""
    count = len(ratings)
    rankings: list[list[list[int]]] = []
    winners: list[list[float]] = []
    for column in zip(*ratings, strict=True):
        levels = sorted({rating for rating in column if rating is not None}, reverse=True)
        rankings.append([[index for index in range(count) if column[index] == level] for level in levels])
        for i, j in combinations(range(count), 2):
            first, second = column[i], column[j]
            if first is not None and second is not None:
                winners.append([i, j, 0.5 + 0.5 * np.sign(first - second)])
    expected = merge(count, compare(count, ratings=ratings))
    for other in (compare(count, rankings=rankings), compare(count, winners=winners)):
        for one, same in zip(expected, merge(count, other), strict=True):
            np.testing.assert_array_equal(one, same)


def test_the_kinds_add_up() -> None:
    """A set may hold ratings of some annotators and rankings of others."""
    said = compare(2, ratings=[[1], [0]], rankings=[[1, 0]], winners=[[0, 1, 0.5]])
    wins, ties = counted(2, said)
    np.testing.assert_array_equal(wins, [[0, 1.5], [1.5, 0]])
    assert ties == 1
    np.testing.assert_array_equal(said.annotator, [0, 1, NOBODY])


@given(tables(), st.randoms(use_true_random=False))
def test_merged_rows_say_the_same(ratings: Table, random: Any) -> None:
    """One row a pair, in order; which way round a pair was written is no matter."""
    count = len(ratings)
    said = compare(count, ratings=ratings)
    turned = np.array([random.random() < 0.5 for _ in said.first], dtype=bool)
    other = said._replace(
        first=np.where(turned, said.second, said.first),
        second=np.where(turned, said.first, said.second),
        wins=np.where(turned, said.losses, said.wins),
        losses=np.where(turned, said.wins, said.losses),
    )
    merged = merge(count, other)
    assert (merged.first < merged.second).all()
    assert len({*zip(merged.first, merged.second, strict=True)}) == len(merged.first)
    np.testing.assert_array_equal(as_wins(count, merged), as_wins(count, said))
    assert merged.total == said.total


def test_a_tie_written_as_a_list_of_one_is_no_tie() -> None:
    """Parquet needs lists everywhere; [[0], [1]] is the ranking [0, 1]."""
    np.testing.assert_array_equal(compare(2, rankings=[[[0], [1]]]), compare(2, rankings=[[0, 1]]))


@pytest.mark.parametrize("outcome", [0, 0.5, 1])
def test_every_comparison_shares_out_one_win(outcome: float) -> None:
    """So that i and j were compared wins[i, j] + wins[j, i] times."""
    wins = as_wins(3, compare(3, winners=[[2, 0, outcome]]))
    assert wins[2, 0] == outcome
    assert wins.sum() == 1
