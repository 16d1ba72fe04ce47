import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.data import RankSettings
from rlhf.data.records import ComparisonSet
from rlhf.ranking.bradley_terry import Strengths
from rlhf.ranking.comparisons import FloatArray, IntArray
from rlhf.ranking.scales import bridges, compared_sets, pool
from rlhf.ranking.strengths import strengths_of


def rated(sets: list[list[list[float]]]) -> tuple[list[FloatArray], IntArray]:
    ratings = [np.array(row, dtype=float) for one in sets for row in one]
    return ratings, np.repeat(np.arange(len(sets)), [len(one) for one in sets])


def test_equal_ratings_bridge_as_ties() -> None:
    """Two responses rated alike beat each other equally often; all adds up to the lesser number of raters a round."""
    edges = bridges(*rated([[[1, 2, 3]], [[1, 2, 3, 1, 2, 3]]]), per_response=3, seed=0)
    np.testing.assert_allclose(edges.wins, 1 / 3)
    np.testing.assert_allclose(edges.losses, 1 / 3)
    np.testing.assert_allclose(edges.ties, 1 / 3)


@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 30))
def test_bridges_are_as_many_comparisons_as_there_are_ratings_whatever_the_rounds(
    rounds: int, raters: int, sets: int
) -> None:
    """A rating that is compared again says nothing new: sets of one response, of which each meets two a round."""
    edges = bridges(*rated([[[1.0] * raters]] * sets), per_response=rounds, seed=0)
    assert edges.total == pytest.approx(raters * sets)


@pytest.mark.parametrize(("raters", "rounds"), [(3, 4), (20, 4), (20, 1), (20, 12)])
def test_intervals_of_bridged_strengths_cover_as_often_as_they_say(raters: int, rounds: int) -> None:
    """Two crowds of raters, who share what one thinks of a set, rate the same responses: their strengths differ by
    their errors. With every round counted in full, 20 raters' 95 % intervals covered 0.81 (4 rounds) and 0.58 (12).
    """
    rng = np.random.default_rng(0)
    quality = rng.normal(size=(100, 1)) + rng.normal(size=(100, 5))

    def crowd(seed: int) -> Strengths:
        seen = quality[:, :, None] + 0.3 * rng.normal(size=(100, 1, raters)) + rng.normal(size=(100, 5, raters))
        sets = [
            ComparisonSet(prompt="p", responses=list("abcde"), ratings=np.clip(np.rint(one), -4.0, 4.0).tolist())
            for one in seen
        ]
        settings = RankSettings(bridges=rounds)
        return strengths_of(settings, pool(compared_sets(sets, "train.jsonl", {}), rounds, seed))[0]

    one, other = crowd(0), crowd(1)
    apart = np.abs(one.elo - other.elo) / np.hypot(one.standard_errors, other.standard_errors)
    assert 0.91 <= np.mean(apart < 1.96) <= 0.985


@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=6),
    st.lists(st.integers(-4, 4), min_size=1, max_size=6),
    st.integers(0, 5),
    st.integers(1, 4),
)
def test_a_bridge_is_the_share_of_pairs_of_raters_and_rises_with_a_rating(
    a: list[int], b: list[int], which: int, more: int
) -> None:
    """The definition, rater by rater; a better rating never lowers it."""

    def share(first: list[int]) -> float:
        # Two responses on a circle meet twice in the round, in either order.
        edges = bridges(*rated([[list(map(float, first))], [list(map(float, b))]]), per_response=1, seed=0)
        won = np.where(edges.first == 0, edges.wins, edges.losses) + edges.ties / 2
        compared = edges.wins + edges.losses + edges.ties
        np.testing.assert_allclose(compared, min(len(first), len(b)))
        np.testing.assert_allclose(won, won[0])
        return float(won[0] / compared[0])

    slow = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert share(a) == pytest.approx(slow)
    better = [*a]
    better[which % len(a)] += more
    assert share(better) >= share(a) - 1e-12


def test_bridges_join_other_sets_only_and_follow_the_seed() -> None:
    """Within a set its own annotators decide; nobody rated means nobody met."""
    rng = np.random.default_rng(0)
    sets = [[list(rng.normal(size=3)) for _ in range(4)] for _ in range(6)]
    sets[0][0] = []
    ratings, set_of = rated(sets)
    edges = bridges(ratings, set_of, per_response=5, seed=7)
    assert (set_of[edges.first] != set_of[edges.second]).all()
    assert 0 not in {*edges.first, *edges.second}
    assert np.isfinite([edges.wins, edges.losses, edges.ties]).all()
    again, other = bridges(ratings, set_of, 5, seed=7), bridges(ratings, set_of, 5, seed=8)
    np.testing.assert_array_equal(edges.first, again.first)
    assert not np.array_equal(edges.first, other.first)
