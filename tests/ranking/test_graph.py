import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.ranking.bradley_terry import FloatArray, fit
from rlhf.ranking.graph import Edges, IntArray, bridges, edges_of, fit_graph, join

PRIOR = 300.0


@st.composite
def connected_wins(draw: st.DrawFn) -> FloatArray:
    """A small symmetric-support matrix of wins in which a path joins all responses."""
    size = draw(st.integers(2, 6))
    entries = draw(st.lists(st.integers(0, 12), min_size=size * size, max_size=size * size))
    wins = np.array(entries, dtype=float).reshape(size, size) / 2 * (1 - np.eye(size))
    for index in range(size - 1):
        wins[index, index + 1] += 1
    return wins


def random_graph(count: int, comparisons: int, truth: FloatArray, seed: int) -> Edges:
    """Single comparisons of random pairs, won with Bradley-Terry's probability."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, count, comparisons)
    second = (first + rng.integers(1, count, comparisons)) % count
    won = (rng.random(comparisons) < 1 / (1 + 10 ** ((truth[second] - truth[first]) / 400))).astype(float)
    return Edges(first, second, won, 1 - won)


@given(connected_wins())
def test_a_graph_has_the_strengths_of_the_same_matrix(wins: FloatArray) -> None:
    """One objective, two algorithms: L-BFGS on edges and Newton's method on matrices."""
    size = len(wins)
    elo, _ = fit_graph(size, edges_of(wins, np.arange(size)), PRIOR)
    np.testing.assert_allclose(elo, fit(wins[None], PRIOR).elo[0], atol=0.01)


@given(connected_wins())
def test_standard_errors_are_conditional_and_so_below_those_of_the_whole_matrix(wins: FloatArray) -> None:
    """They are the inverse root of the curvature along one strength, taken here by finite differences."""
    size, c = len(wins), np.log(10) / 400
    elo, errors = fit_graph(size, edges_of(wins, np.arange(size)), PRIOR)

    def slow(elo: FloatArray) -> float:
        gaps = c * (elo[:, None] - elo[None, :])
        return float(-(wins * np.log1p(np.exp(-gaps))).sum() - (elo**2).sum() / (2 * PRIOR**2))

    for index, step in enumerate(np.eye(size)):
        curvature = 2 * slow(elo) - slow(elo + step) - slow(elo - step)
        assert errors[index] == pytest.approx(curvature**-0.5, rel=1e-3), index


def test_known_strengths_are_recovered() -> None:
    """With 400 comparisons of each of 100 responses, strengths come out within a few errors of the truth."""
    truth = np.random.default_rng(0).normal(0, 150, 100)
    truth -= truth.mean()
    elo, errors = fit_graph(100, random_graph(100, 20_000, truth, seed=1), 1000.0)
    assert np.corrcoef(elo, truth)[0, 1] > 0.99
    assert 0.9 < np.mean(np.abs(elo - truth) < 2 * errors) <= 1.0


def test_each_component_has_mean_0_and_none_moves_another() -> None:
    """Comparisons say nothing of strengths that no chain of comparisons joins; who was never met has strength 0."""
    one = edges_of(np.array([[0.0, 3.0], [1.0, 0.0]]), np.array([0, 1]))
    other = edges_of(np.array([[0.0, 5.0, 4.0], [1.0, 0.0, 2.0], [0.0, 2.0, 0.0]]), np.array([2, 3, 4]))
    elo, errors = fit_graph(6, join([one, other]), PRIOR)
    assert elo[:2].mean() == pytest.approx(0, abs=1e-3)
    assert elo[2:5].mean() == pytest.approx(0, abs=1e-3)
    assert elo[5] == 0
    assert errors[5] == pytest.approx(PRIOR)
    np.testing.assert_allclose(elo[:2], fit_graph(2, one, PRIOR)[0], atol=0.01)


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_the_order_of_comparisons_and_of_a_pair_does_not_matter(seed: int) -> None:
    """Edges shuffled, turned round and joined in any order are the same comparisons."""
    rng = np.random.default_rng(seed)
    edges = random_graph(30, 300, np.linspace(-200, 200, 30), seed=2)
    order = rng.permutation(300)
    turned = rng.random(300) < 0.5
    changed = Edges(
        np.where(turned, edges.second, edges.first)[order],
        np.where(turned, edges.first, edges.second)[order],
        np.where(turned, edges.losses, edges.wins)[order],
        np.where(turned, edges.wins, edges.losses)[order],
    )
    np.testing.assert_allclose(fit_graph(30, changed, PRIOR)[0], fit_graph(30, edges, PRIOR)[0], atol=0.01)


def test_twenty_thousand_responses_are_fitted_in_seconds_and_little_memory() -> None:
    """200,000 comparisons: memory is linear, where one 20,000 by 20,000 matrix alone would be 3.2 GB."""
    count, comparisons = 20_000, 200_000
    truth = np.random.default_rng(3).normal(0, 200, count)
    edges = random_graph(count, comparisons, truth, seed=4)
    start = time.process_time()
    tracemalloc.start()
    elo, _ = fit_graph(count, edges, 200.0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.process_time() - start < 20
    assert peak < 100e6
    assert np.corrcoef(elo, truth)[0, 1] > 0.85


def rated(sets: list[list[list[float]]]) -> tuple[list[FloatArray], IntArray]:
    ratings = [np.array(row, dtype=float) for one in sets for row in one]
    return ratings, np.repeat(np.arange(len(sets)), [len(one) for one in sets])


def test_equal_ratings_bridge_as_ties() -> None:
    """Two responses rated alike beat each other equally often, as often as the lesser number of raters."""
    edges = bridges(*rated([[[1, 2, 3]], [[1, 2, 3, 1, 2, 3]]]), per_response=3, seed=0)
    np.testing.assert_allclose(edges.wins, 1.5)
    np.testing.assert_allclose(edges.losses, 1.5)


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
        # Two responses on a circle meet twice a round, in either order.
        edges = bridges(*rated([[list(map(float, first))], [list(map(float, b))]]), per_response=1, seed=0)
        won = np.where(edges.first == 0, edges.wins, edges.losses)
        compared = edges.wins + edges.losses
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
    assert np.isfinite([edges.wins, edges.losses]).all()
    again, other = bridges(ratings, set_of, 5, seed=7), bridges(ratings, set_of, 5, seed=8)
    np.testing.assert_array_equal(edges.first, again.first)
    assert not np.array_equal(edges.first, other.first)
