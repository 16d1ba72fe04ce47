import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize
from scipy.stats import binom

from rlhf.ranking.bradley_terry import (
    ELO_SCALE,
    TIE_MODELS,
    PairLikelihood,
    TieModel,
    fit,
    pair_terms,
    prior_precision,
)
from rlhf.ranking.comparisons import Comparisons, FloatArray, join, renumber
from tests.ranking.drawn import connected_matrices, drawn, from_wins, matrices, outcome_probabilities, random_pairs

PRIOR = 300.0
TIED: tuple[TieModel, ...] = ("rao-kupper", "davidson")
every_model = pytest.mark.parametrize("model", TIE_MODELS)
models_of_ties = pytest.mark.parametrize("model", TIED)


def fit_wins(wins: FloatArray, prior_elo: float = PRIOR) -> FloatArray:
    """``[2, K]``: strengths and standard errors of a matrix."""
    found = fit(len(wins), from_wins(wins), prior_elo)
    return np.stack([found.elo, found.standard_errors])


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
    elo = fit_wins(wins)[0]
    result = minimize(
        lambda x: -slow_log_posterior(x * 100, wins, PRIOR), np.zeros(len(wins)), method="BFGS", options={"gtol": 1e-7}
    )
    np.testing.assert_allclose(elo, result.x * 100, atol=0.05)
    # The objective's prior is in Elo points here and in nats there: the same number.
    assert slow_log_posterior(elo, wins, PRIOR) >= -result.fun - 1e-9


@given(connected_matrices)
def test_standard_errors_are_the_curvature_about_the_component_s_mean(wins: FloatArray) -> None:
    """Inverting a Hessian taken by finite differences, within the strengths that sum to 0, gives the same errors."""
    elo, errors = fit_wins(wins)
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


@every_model
@given(
    st.floats(-8, 8),
    st.floats(0.05, 4),
    st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30)).filter(any),
)
def test_the_derivatives_are_those_of_the_value(
    model: TieModel, gap: float, tie: float, said: tuple[int, int, int]
) -> None:
    """First and second derivatives by gap and parameter, against central differences in float64."""
    wins, losses, tied = (np.array([float(count)]) for count in said)

    def at(gap: float, tie: float) -> FloatArray:
        return np.array([column[0] for column in pair_terms(np.array([gap]), tie, wins, losses, tied, model)])

    def close(found: float, slow: float) -> None:
        assert found == pytest.approx(slow, rel=1e-5, abs=1e-6 * sum(said))

    step = 1e-5
    by_gap = (at(gap + step, tie) - at(gap - step, tie)) / (2 * step)
    by_tie = (at(gap, tie + step) - at(gap, tie - step)) / (2 * step)
    found = at(gap, tie)
    close(found[1], by_gap[0])
    close(found[2], -by_gap[1])
    close(found[3], by_tie[0])
    close(found[4], -by_tie[3])
    close(found[5], -by_tie[1])
    close(found[5], -by_gap[3])


@every_model
@settings(max_examples=25)
@given(st.integers(0, 2**32), st.floats(0.1, 2))
def test_the_likelihood_s_gradient_is_that_of_its_value(model: TieModel, seed: int, tie: float) -> None:
    """All strengths and the parameter of ties at once, against central differences in float64."""
    rng = np.random.default_rng(seed)
    first, second = random_pairs(rng, 5, 12)
    wins, losses, ties = rng.integers(0, 4, (3, 12)).astype(np.float64)
    said = Comparisons(first, second, wins, losses, ties, np.zeros(12, dtype=np.int64))
    likelihood = PairLikelihood(5, said, model, fits_tie=True)
    point = np.append(rng.normal(0, 1, 5), tie)

    def value(x: FloatArray) -> float:
        return likelihood.terms(x[:5], float(x[5])).value

    slow = np.array([(value(point + 1e-6 * axis) - value(point - 1e-6 * axis)) / 2e-6 for axis in np.eye(6)])
    terms = likelihood.terms(point[:5], tie)
    np.testing.assert_allclose(terms.gradient, slow[:5], atol=1e-6)
    np.testing.assert_allclose(0.0 if terms.tie is None else terms.tie.gradient, slow[5], atol=1e-6)


@every_model
@given(st.floats(-20, 20), st.floats(0.01, 5))
def test_probabilities_are_those_of_the_papers(model: TieModel, gap: float, tie: float) -> None:
    """The exponential of each outcome's value is its probability as the paper writes it."""
    expected = outcome_probabilities(np.array([gap]), model, math.exp(tie))
    outcomes = np.eye(3)[:2] if model == "half" else np.eye(3)
    for said, probability in zip(outcomes, expected[:, 0], strict=False):
        wins, losses, tied = said[:, None]
        value = pair_terms(np.array([gap]), tie, wins, losses, tied, model).value[0]
        assert math.exp(value) == pytest.approx(probability, abs=1e-12)


@every_model
def test_known_strengths_are_recovered_within_their_own_intervals(model: TieModel) -> None:
    """In 2,000 repetitions of five responses, strengths of known parameter lie within 95 % intervals 19 times of 20.

    The repetitions are sets of one fit, which share nothing but the parameter of ties; one response of each is counted,
    so that counts are independent, and the bound is the binomial distribution's.
    """
    rng = np.random.default_rng(1)
    sets, size, rounds = 2000, 5, 20
    truth = rng.normal(0, 150, (sets, size))
    truth -= truth.mean(axis=1, keepdims=True)
    i, j = np.triu_indices(size, k=1)
    starts = np.arange(sets)[:, None] * size
    first, second = (np.tile((starts + index).ravel(), rounds) for index in (i, j))
    found = fit(sets * size, drawn(rng, truth.ravel(), first, second, model, parameter=1.6), 1000.0, model)
    inside = np.abs(found.elo - truth.ravel()) < 1.96 * found.standard_errors
    low, high = binom.ppf([0.001, 0.999], sets, 0.95)
    assert low <= inside.reshape(sets, size)[:, 0].sum() <= high
    if model != "half":
        assert found.tie_parameter == pytest.approx(1.6, rel=0.02)


@models_of_ties
def test_errors_know_that_the_parameter_of_ties_was_fitted(model: TieModel) -> None:
    """With three comparisons it is poorly known, and the errors are those of the whole Hessian's inverse."""
    comparisons = from_wins(np.array([[0.0, 3.0, 1.0], [1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]))
    comparisons = comparisons._replace(ties=np.array([1.0, 0.0, 2.0]))
    found = fit(3, comparisons, PRIOR, model)
    assert found.tie_parameter is not None
    likelihood = PairLikelihood(3, comparisons, model, fits_tie=True)
    point = np.append(found.elo * ELO_SCALE, math.log(found.tie_parameter))

    def gradient(x: FloatArray) -> FloatArray:
        terms = likelihood.terms(x[:3], float(x[3]))
        assert terms.tie is not None
        return np.append(terms.gradient - prior_precision(PRIOR) * x[:3], terms.tie.gradient)

    np.testing.assert_allclose(gradient(point), 0, atol=1e-9)
    hessian = np.stack([(gradient(point + 1e-5 * axis) - gradient(point - 1e-5 * axis)) / -2e-5 for axis in np.eye(4)])
    variance = np.diag(np.linalg.inv(hessian))[:3] - 1 / (3 * prior_precision(PRIOR))
    np.testing.assert_allclose(found.standard_errors * ELO_SCALE, np.sqrt(variance), rtol=1e-6)
    given_parameter = fit(3, comparisons, PRIOR, model, found.tie_parameter)
    np.testing.assert_allclose(given_parameter.elo, found.elo, atol=1e-6)
    assert (given_parameter.standard_errors <= found.standard_errors + 1e-9).all()


@models_of_ties
@pytest.mark.parametrize("tied", [0.0, 1.0, 1e9])
@pytest.mark.parametrize("decided", [0.0, 1.0, 1e9])
def test_nothing_and_everything_tied_end_in_finite_numbers(model: TieModel, tied: float, decided: float) -> None:
    """The likelihood alone would send the parameter to an end of its range."""
    comparisons = from_wins(np.triu(np.full((3, 3), decided + 1e-300), k=1))
    found = fit(3, comparisons._replace(ties=np.full(3, tied)), PRIOR, model)
    assert found.tie_parameter is not None
    assert np.isfinite([*found.elo, *found.standard_errors, found.tie_parameter]).all()
    assert found.tie_parameter > (1 if model == "rao-kupper" else 0)


@models_of_ties
def test_without_ties_the_models_of_ties_are_bradley_terry_s(model: TieModel) -> None:
    """Their parameter then goes to where ties have no probability."""
    rng = np.random.default_rng(3)
    truth = rng.normal(0, 200, 30)
    comparisons = drawn(rng, truth, *random_pairs(rng, 30, 20_000))
    np.testing.assert_allclose(fit(30, comparisons, PRIOR, model).elo, fit(30, comparisons, PRIOR).elo, atol=0.1)


@every_model
@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_the_order_of_comparisons_and_of_a_pair_does_not_matter(model: TieModel, seed: int) -> None:
    """Rows shuffled, turned round and joined in any order are the same comparisons."""
    rng = np.random.default_rng(seed)
    said = drawn(rng, np.linspace(-200, 200, 30), *random_pairs(rng, 30, 300), model, parameter=1.5)
    order = rng.permutation(300)
    shuffled = said.rows(order)
    turned = shuffled._replace(first=shuffled.second, second=shuffled.first, wins=shuffled.losses, losses=shuffled.wins)
    parts = [turned.rows(part) for part in (slice(0, 100), slice(100, 300))]
    expected, found = fit(30, said, PRIOR, model), fit(30, join(parts), PRIOR, model)
    np.testing.assert_allclose(found.elo, expected.elo, atol=1e-6)
    np.testing.assert_allclose(found.standard_errors, expected.standard_errors, atol=1e-6)


@every_model
@pytest.mark.parametrize("prior", [10.0, 200.0, 1e4, 1e6])
def test_huge_and_contradictory_data_converge(model: TieModel, prior: float) -> None:
    """A circle of billions of wins, undefeated responses, and single comparisons beside them; nothing overflows."""
    wins = np.zeros((6, 6))
    wins[0, 1] = wins[1, 2] = wins[2, 0] = 1e9
    wins[2, 3] = 1.0
    wins[3, 4] = 1e9
    wins[4, 5] = wins[5, 4] = 1e-3
    found = fit(6, from_wins(wins), prior, model)
    assert np.isfinite([*found.elo, *found.standard_errors]).all()
    assert (found.standard_errors > 0).all()
    assert found.elo[:3] == pytest.approx(found.elo[0], abs=1e-3)
    assert found.elo[3] > found.elo[4]


def test_400_points_are_odds_of_ten_to_one() -> None:
    """The Elo scale, where the prior is too weak to matter."""
    elo = fit_wins(np.array([[0.0, 1000.0], [100.0, 0.0]]), 1e5)[0]
    assert elo[0] - elo[1] == pytest.approx(400, abs=0.1)


@given(matrices, st.randoms(use_true_random=False))
def test_the_order_of_responses_does_not_matter(wins: FloatArray, random: Any) -> None:
    """Renaming responses renames their strengths and nothing else."""
    order = list(range(len(wins)))
    random.shuffle(order)
    np.testing.assert_allclose(fit_wins(wins[np.ix_(order, order)]), fit_wins(wins)[:, order], atol=1e-6)


@given(st.lists(matrices, min_size=1, max_size=6))
def test_sets_fitted_together_do_not_influence_each_other(sets: list[FloatArray]) -> None:
    """Many sets of many sizes at once equal each alone, in their order, where no parameter of ties joins them."""
    starts = np.cumsum([0, *map(len, sets)])
    parts = [
        renumber(from_wins(wins), np.arange(start, start + len(wins)))
        for wins, start in zip(sets, starts, strict=False)
    ]
    together = fit(int(starts[-1]), join(parts), PRIOR)
    for wins, start in zip(sets, starts, strict=False):
        of_set = slice(start, start + len(wins))
        found = np.stack([together.elo[of_set], together.standard_errors[of_set]])
        np.testing.assert_allclose(found, fit_wins(wins), atol=1e-6)


@given(matrices)
def test_each_component_has_mean_zero_and_a_reversed_set_reversed_strengths(wins: FloatArray) -> None:
    """Nothing fixes the level of a set, so it is 0; losing is the mirror of winning."""
    elo = fit_wins(wins)[0]
    assert elo.mean() == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(fit_wins(wins.T)[0], -elo, atol=1e-6)


@pytest.mark.parametrize("prior", [10.0, 200.0, 1000.0, 1e4])
@pytest.mark.parametrize("games", [1.0, 30.0, 1e6])
def test_an_undefeated_response_has_a_finite_strength(prior: float, games: float) -> None:
    """Separated data, for which the likelihood alone has no maximum, at any amount of it and any prior."""
    found = fit_wins(np.triu(np.full((5, 5), games), k=1), prior)
    assert np.isfinite(found).all()
    assert (np.diff(found[0]) < 0).all()


def test_responses_that_were_never_compared_keep_the_prior() -> None:
    """Their strength is 0, and their error the prior's deviation: there is no component to be measured against."""
    elo, errors = fit_wins(np.zeros((4, 4)))
    np.testing.assert_array_equal(elo, 0)
    np.testing.assert_allclose(errors, PRIOR)


def test_each_component_has_mean_0_and_none_moves_another() -> None:
    """Comparisons say nothing of strengths that no chain of comparisons joins; who was never met has strength 0."""
    one = from_wins(np.array([[0.0, 3.0], [1.0, 0.0]]))
    other = from_wins(np.array([[0.0, 5.0, 4.0], [1.0, 0.0, 2.0], [0.0, 2.0, 0.0]]))
    found = fit(6, join([one, renumber(other, np.array([2, 3, 4]))]), PRIOR)
    assert found.elo[:2].mean() == pytest.approx(0, abs=1e-9)
    assert found.elo[2:5].mean() == pytest.approx(0, abs=1e-9)
    assert found.elo[5] == 0
    assert found.standard_errors[5] == pytest.approx(PRIOR)
    np.testing.assert_allclose(found.elo[:2], fit(2, one, PRIOR).elo, atol=1e-6)


def test_more_comparisons_mean_smaller_errors() -> None:
    """Errors fall with the square root of the number of comparisons."""
    wins = np.array([[0, 6, 5], [4, 0, 7], [5, 3, 0]], dtype=float)
    few, many = (fit_wins(wins * times, 1e4)[1] for times in (1, 100))
    np.testing.assert_allclose(few / many, 10, rtol=0.01)


def test_a_large_connected_set_is_fitted() -> None:
    """Two hundred models, each met by a few others: the strengths come out in the right order."""
    rng = np.random.default_rng(1)
    truth = np.linspace(-400, 400, 200)
    elo = fit(200, drawn(rng, truth, *random_pairs(rng, 200, 6000)), 400.0).elo
    assert np.corrcoef(elo, truth)[0, 1] > 0.95


@pytest.mark.parametrize("model", ["rao-kupper", "davidson"])
def test_without_data_equals_tie_every_other_time(model: TieModel) -> None:
    """The prior of τ: of two comparisons of equals one was tied, and the other is half won and half lost."""
    likelihood = PairLikelihood(2, from_wins(np.zeros((2, 2))), model, fits_tie=True)

    def slope(tie: float) -> float:
        terms = likelihood.terms(np.zeros(2), tie).tie
        assert terms is not None
        return terms.gradient

    tie = float(brentq(slope, 0.01, 5.0))  # pyright: ignore[reportArgumentType] - not full_output
    nothing, one = np.zeros(1), np.ones(1)
    tied = pair_terms(nothing, tie, nothing, nothing, one, model).value[0]
    assert np.exp(tied) == pytest.approx(0.5, abs=1e-6)
