import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from rlhf.ranking.bradley_terry import FloatArray, fit, fit_each

PRIOR = 300.0
C = math.log(10) / 400

matrices = st.integers(2, 5).flatmap(
    lambda size: st.lists(st.integers(0, 20), min_size=size * size, max_size=size * size).map(
        lambda entries: np.array(entries, dtype=float).reshape(size, size) / 2 * (1 - np.eye(size))
    )
)


def slow_log_posterior(elo: Any, wins: FloatArray, prior: float) -> float:
    """The objective as written down, one comparison pair at a time, in float64."""
    total = 0.0
    for i in range(len(wins)):
        for j in range(len(wins)):
            total += wins[i, j] * -math.log1p(10 ** ((elo[j] - elo[i]) / 400))
    return total - sum(strength**2 for strength in elo) / (2 * prior**2)


@given(matrices)
def test_the_strengths_maximise_the_posterior(wins: FloatArray) -> None:
    """A general-purpose optimiser on the plainly written likelihood finds the same maximum."""
    elo = fit(wins[None], PRIOR).elo[0]
    result = minimize(
        lambda x: -slow_log_posterior(x * 100, wins, PRIOR), np.zeros(len(wins)), method="BFGS", options={"gtol": 1e-7}
    )
    np.testing.assert_allclose(elo, result.x * 100, atol=0.05)
    assert slow_log_posterior(elo, wins, PRIOR) >= -result.fun - 1e-9


@given(matrices)
def test_standard_errors_are_the_curvature_about_the_set_s_mean(wins: FloatArray) -> None:
    """Inverting a Hessian taken by finite differences, within the strengths that sum to 0, gives the same errors."""
    elo, errors = (values[0] for values in fit(wins[None], PRIOR))
    size = len(wins)
    basis = np.linalg.svd(np.ones((1, size)))[2][1:].T  # orthonormal, all columns sum to 0
    step = 1.0
    hessian = np.zeros((size - 1, size - 1))
    for i in range(size - 1):
        for j in range(size - 1):
            for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                point = elo + step * (a * basis[:, i] + b * basis[:, j])
                hessian[i, j] -= a * b * slow_log_posterior(point, wins, PRIOR) / (4 * step**2)
    covariance = basis @ np.linalg.inv(hessian) @ basis.T
    np.testing.assert_allclose(errors, np.sqrt(np.diag(covariance)), rtol=1e-3)


def test_known_strengths_are_recovered_within_their_standard_errors() -> None:
    """With many comparisons the truth lies within two standard errors about 95 times of 100."""
    rng = np.random.default_rng(0)
    sets, size, games = 400, 4, 200
    truth = rng.normal(0, 150, (sets, size))
    truth -= truth.mean(axis=1, keepdims=True)
    wins = np.zeros((sets, size, size))
    for i in range(size):
        for j in range(i):
            probability = 1 / (1 + 10 ** ((truth[:, j] - truth[:, i]) / 400))
            wins[:, i, j] = rng.binomial(games, probability)
            wins[:, j, i] = games - wins[:, i, j]
    strengths = fit(wins, 1000.0)
    within = np.abs(strengths.elo - truth) < 1.96 * strengths.standard_errors
    assert 0.93 < within.mean() < 0.97


def test_400_points_are_odds_of_ten_to_one() -> None:
    """The Elo scale, where the prior is too weak to matter."""
    elo = fit(np.array([[[0.0, 1000.0], [100.0, 0.0]]]), 1e5).elo[0]
    assert elo[0] - elo[1] == pytest.approx(400, abs=0.1)


@given(matrices, st.randoms(use_true_random=False))
def test_the_order_of_responses_does_not_matter(wins: FloatArray, random: Any) -> None:
    """Renaming responses renames their strengths and nothing else."""
    order = list(range(len(wins)))
    random.shuffle(order)
    shuffled = fit(wins[np.ix_(order, order)][None], PRIOR)
    original = fit(wins[None], PRIOR)
    np.testing.assert_allclose(shuffled.elo[0], original.elo[0][order], atol=1e-6)
    np.testing.assert_allclose(shuffled.standard_errors[0], original.standard_errors[0][order], atol=1e-6)


@given(st.lists(matrices, min_size=1, max_size=6))
def test_sets_fitted_together_do_not_influence_each_other(sets: list[FloatArray]) -> None:
    """Many sets of many sizes at once equal each alone, in their order."""
    for wins, (elo, errors) in zip(sets, fit_each(sets, PRIOR), strict=True):
        alone = fit(wins[None], PRIOR)
        np.testing.assert_allclose(elo, alone.elo[0], atol=1e-6)
        np.testing.assert_allclose(errors, alone.standard_errors[0], atol=1e-6)


@given(matrices)
def test_each_set_has_mean_zero_and_a_reversed_set_reversed_strengths(wins: FloatArray) -> None:
    """Nothing fixes the level of a set, so it is 0; losing is the mirror of winning."""
    elo = fit(wins[None], PRIOR).elo[0]
    assert elo.mean() == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(fit(wins.T[None], PRIOR).elo[0], -elo, atol=1e-6)


@pytest.mark.parametrize("prior", [10.0, 200.0, 1000.0, 1e4])
@pytest.mark.parametrize("games", [1.0, 30.0, 1e6])
def test_an_undefeated_response_has_a_finite_strength(prior: float, games: float) -> None:
    """Separated data, for which the likelihood alone has no maximum, at any amount of it and any prior."""
    wins = np.triu(np.full((5, 5), games), k=1)
    strengths = fit(wins[None], prior)
    assert np.isfinite(strengths.elo).all()
    assert np.isfinite(strengths.standard_errors).all()
    assert (np.diff(strengths.elo[0]) < 0).all()


def test_responses_that_were_never_compared_keep_the_prior() -> None:
    """No comparisons: strengths 0, and errors those of the prior about the mean of the set."""
    strengths = fit(np.zeros((1, 4, 4)), PRIOR)
    np.testing.assert_array_equal(strengths.elo, 0)
    np.testing.assert_allclose(strengths.standard_errors, PRIOR * math.sqrt(3 / 4))


def test_more_comparisons_mean_smaller_errors() -> None:
    """Errors fall with the square root of the number of comparisons."""
    wins = np.array([[0, 6, 5], [4, 0, 7], [5, 3, 0]], dtype=float)
    few, many = (fit(wins[None] * times, 1e4).standard_errors for times in (1, 100))
    np.testing.assert_allclose(few / many, 10, rtol=0.01)


def test_a_large_connected_set_is_fitted() -> None:
    """Two hundred models, each met by a few others: the strengths come out in the right order."""
    rng = np.random.default_rng(1)
    truth = np.linspace(-400, 400, 200)
    wins = np.zeros((200, 200))
    for _ in range(6000):
        i, j = rng.choice(200, 2, replace=False)
        won = rng.random() < 1 / (1 + 10 ** ((truth[j] - truth[i]) / 400))
        wins[i, j] += won
        wins[j, i] += not won
    elo = fit(wins[None], 400.0).elo[0]
    assert np.corrcoef(elo, truth)[0, 1] > 0.95
