from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.ranking.bradley_terry import ELO_SCALE, fit, prior_precision
from rlhf.ranking.comparisons import Comparisons, FloatArray, compare
from rlhf.ranking.strengths import ChoiceLikelihood, fit_rankings, rankings_of
from tests.ranking.drawn import from_wins

NOTHING = from_wins(np.zeros((2, 2)))


def slow(theta: FloatArray, column: FloatArray) -> float:
    """ln of Efron's likelihood of one annotator's ratings, choice by choice."""
    rated = [index for index in range(len(column)) if not np.isnan(column[index])]
    total = 0.0
    for value in sorted({column[index] for index in rated}, reverse=True):
        tied = [index for index in rated if column[index] == value]
        remaining = [index for index in rated if column[index] <= value]
        everything, theirs = np.exp(theta[remaining]).sum(), np.exp(theta[tied]).sum()
        total += theta[tied].sum()
        total -= sum(np.log(everything - number / len(tied) * theirs) for number in range(len(tied)))
    return float(total)


ratings = st.none() | st.integers(-2, 2).map(float)
tables = st.integers(2, 5).flatmap(
    lambda size: st.lists(st.lists(ratings, min_size=size, max_size=size), min_size=1, max_size=3)
)


@given(tables, st.integers(0, 100))
def test_value_gradient_and_curvature_are_those_of_the_definition(columns: list[list[float | None]], seed: int) -> None:
    """By slow sums, and by differences of them; a second set and comparisons of nobody's beside."""
    table = np.array(columns, dtype=np.float64).T
    count = len(table) + 2
    other = compare(2, winners=[[0, 1, 1], [1, 0, 0.5]])._replace(
        first=np.array([0, len(table)]), second=np.array([1, len(table) + 1])
    )
    likelihood = ChoiceLikelihood(count, rankings_of([table, np.array([[1.0], [2.0]])], [0, len(table)]), other)
    theta = np.random.default_rng(seed).normal(0, 1, count)

    def value(at: FloatArray) -> float:
        ranked = sum(slow(at[: len(table)], column) for column in table.T) + slow(
            at[len(table) :], np.array([1.0, 2.0])
        )
        won, tied = at[0] - at[1], at[len(table)] - at[len(table) + 1]
        return ranked - np.log1p(np.exp(-won)) - 0.5 * (np.log1p(np.exp(tied)) + np.log1p(np.exp(-tied)))

    terms = likelihood.terms(theta, 0.0)
    assert terms.value == pytest.approx(value(theta), abs=1e-9)
    step = 1e-5
    each = np.eye(count) * step
    slope = np.array([value(theta + move) - value(theta - move) for move in each]) / (2 * step)
    np.testing.assert_allclose(terms.gradient, slope, atol=1e-7)
    laplacian = np.zeros((count, count))
    for first, second, weight in zip(likelihood.first, likelihood.second, terms.weights, strict=True):
        laplacian[[first, second], [first, second]] += weight
        laplacian[[first, second], [second, first]] -= weight
    gradients = np.array(
        [likelihood.terms(theta + move, 0.0).gradient - likelihood.terms(theta - move, 0.0).gradient for move in each]
    )
    np.testing.assert_allclose(-gradients / (2 * step), laplacian, atol=1e-6)


def test_the_orders_of_a_set_have_probabilities_that_add_up_to_one() -> None:
    """It is a likelihood."""
    theta = np.array([0.3, -1.0, 0.7, 0.0])
    values = [
        ChoiceLikelihood(4, rankings_of([np.array(order, dtype=np.float64)[:, None]], [0]), NOTHING)
        .terms(theta, 0.0)
        .value
        for order in permutations(range(4))
    ]
    assert np.exp(values).sum() == pytest.approx(1)


def test_rankings_of_two_are_bradley_terrys_comparisons() -> None:
    """A tie is a win for either."""
    rng = np.random.default_rng(0)
    columns = [
        np.where(np.isin(np.arange(5), rng.choice(5, 2, replace=False)), rng.integers(0, 2, 5), np.nan)
        for _ in range(40)
    ]
    table = np.stack(columns, axis=1)
    one = fit_rankings(5, rankings_of([table], [0]), NOTHING, 200.0)
    said = compare(5, ratings=[[None if np.isnan(value) else value for value in row] for row in table.tolist()])
    wins = said._replace(wins=said.wins + said.ties, losses=said.losses + said.ties, ties=np.zeros(len(said.ties)))
    other = fit(5, wins, 200.0)
    np.testing.assert_allclose(one.elo, other.elo, atol=1e-6)
    np.testing.assert_allclose(one.standard_errors, other.standard_errors, atol=1e-6)


def test_strengths_are_those_of_choix() -> None:
    """Another library's maximum, with the same prior."""
    choix = pytest.importorskip("choix", reason="choix is of the dev extra: pip install -e '.[dev]'")
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, 8)
    orders = [np.argsort(-(truth + rng.gumbel(size=8)))[: rng.integers(2, 9)] for _ in range(60)]
    table = np.full((8, 60), np.nan)
    for column, order in enumerate(orders):
        table[order, column] = -np.arange(len(order))
    expected = choix.opt_rankings(
        8, [order.tolist() for order in orders], alpha=prior_precision(200.0) / 2, method="Newton-CG", tol=1e-10
    )
    found = fit_rankings(8, rankings_of([table], [0]), NOTHING, 200.0).elo * ELO_SCALE
    np.testing.assert_allclose(found, expected - expected.mean(), atol=1e-5)


def test_intervals_hold_the_truth_nineteen_times_in_twenty() -> None:
    """Rankings of five by fifteen annotators, drawn from the model with strengths from the prior."""
    rng = np.random.default_rng(1)
    held: list[bool] = []
    for _ in range(60):
        truth = rng.normal(0, 200, 5)
        truth -= truth.mean()
        table = ELO_SCALE * truth[:, None] + rng.gumbel(size=(5, 15))
        found = fit_rankings(5, rankings_of([table], [0]), NOTHING, 200.0)
        held += (np.abs(found.elo - truth) < 1.96 * found.standard_errors).tolist()
    assert 0.91 < np.mean(held) < 0.99


def test_many_rankings_of_many_sets_stay_in_their_sets() -> None:
    """A set's strengths do not depend on those beside it."""
    rng = np.random.default_rng(0)
    tables = [rng.integers(-3, 4, (size, 6)).astype(np.float64) for size in (3, 5, 3)]
    starts = [0, 3, 8]
    together = fit_rankings(11, rankings_of(tables, starts), NOTHING, 200.0)
    for table, start in zip(tables, starts, strict=True):
        alone = fit_rankings(len(table), rankings_of([table], [0]), NOTHING, 200.0)
        np.testing.assert_allclose(together.elo[start : start + len(table)], alone.elo, atol=1e-6)


def test_what_is_nobodys_counts_beside_rankings() -> None:
    """Winners and bridges are in no ranking."""
    comparisons: Comparisons = compare(2, winners=[[0, 1, 1]] * 3)
    found = fit_rankings(2, [], comparisons, 200.0)
    np.testing.assert_allclose(found.elo, fit(2, comparisons, 200.0).elo, atol=1e-6)
