import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binom

from rlhf.ranking.bradley_terry import ELO_SCALE, TIE_MODELS, TieModel, fit
from rlhf.ranking.comparisons import NOBODY, Comparisons, FloatArray
from rlhf.ranking.strengths import PRIOR_HONEST, PRIOR_REVERSED, fit_crowd
from tests.ranking.drawn import drawn, outcome_probabilities, random_pairs

PRIOR = 200.0
every_model = pytest.mark.parametrize("model", TIE_MODELS)


def reported(
    rng: np.random.Generator, truth: FloatArray, reliability: FloatArray, comparisons: int, model: TieModel
) -> Comparisons:
    """Comparisons of random pairs by random annotators, who reverse them as their reliability says."""
    said = drawn(rng, truth, *random_pairs(rng, len(truth), comparisons), model, parameter=1.6)
    annotator = rng.integers(0, len(reliability), comparisons)
    reversed_ = rng.random(comparisons) > reliability[annotator]
    return said._replace(
        wins=np.where(reversed_, said.losses, said.wins),
        losses=np.where(reversed_, said.wins, said.losses),
        annotator=annotator,
    )


def centred_strengths(rng: np.random.Generator, count: int) -> FloatArray:
    truth = rng.normal(0, PRIOR, count)
    return truth - truth.mean()


@every_model
def test_a_coin_and_a_reverser_among_honest_annotators_are_found(model: TieModel) -> None:
    """The reverser comes out below the coin, the coin below all others, and strengths come closer to the truth."""
    rng = np.random.default_rng(0)
    truth = centred_strengths(rng, 60)
    said = reported(rng, truth, np.array([0.5, 0.03, *[0.97] * 8]), 5000, model)
    found, equal = fit_crowd(60, said, PRIOR, model), fit(60, said, PRIOR, model)
    assert found.reliability[1] < 0.2
    assert 0.35 < found.reliability[0] < 0.7
    assert found.reliability[2:].min() > 0.85
    assert found.comparisons.sum() == said.total
    error, error_of_equal = (np.sqrt(np.mean((elo - truth) ** 2)) for elo in (found.strengths.elo, equal.elo))
    assert error < 0.6 * error_of_equal


@every_model
def test_strengths_of_a_joined_graph_lie_within_their_intervals_whoever_reported(model: TieModel) -> None:
    """Sixty responses in 200 comparisons each, five times: 95 % intervals hold 19 of 20 strengths.

    Errors are given the reliabilities, so the comparisons must be many. As strengths of one graph share errors, they
    count as half as many independent ones in the binomial distribution's bound.
    """
    rng = np.random.default_rng(1)
    repetitions, count, inside = 5, 60, 0
    for _ in range(repetitions):
        truth = centred_strengths(rng, count)
        said = reported(rng, truth, np.array([0.5, 0.1, *[0.95] * 8]), 6000, model)
        strengths = fit_crowd(count, said, PRIOR, model).strengths
        inside += int((np.abs(strengths.elo - truth) < 1.96 * strengths.standard_errors).sum())
    low, high = binom.ppf([0.001, 0.999], repetitions * count // 2, 0.95)
    assert low <= inside / 2 <= high


@every_model
def test_the_result_is_a_maximum_of_the_paper_s_posterior(model: TieModel) -> None:
    """No small step in a strength or a reliability raises the posterior, written out report by report."""
    rng = np.random.default_rng(2)
    truth = centred_strengths(rng, 6)
    said = reported(rng, truth, np.array([0.3, 0.9, 0.9]), 150, model)
    crowd = fit_crowd(6, said, PRIOR, model)
    parameter = crowd.strengths.tie_parameter or 1.0

    def posterior(point: FloatArray) -> float:
        elo, reliability = point[:6], point[6:]
        gap = ELO_SCALE * (elo[said.first] - elo[said.second])
        win, loss, tie = outcome_probabilities(gap, model, parameter)
        honest = reliability[said.annotator]
        value = (said.wins * np.log(honest * win + (1 - honest) * loss)).sum()
        value += (said.losses * np.log(honest * loss + (1 - honest) * win)).sum()
        of_ties = np.log(tie) if model != "half" else (np.log(win) + np.log(loss)) / 2
        value += (said.ties * np.where(said.ties > 0, of_ties, 0.0)).sum() - (elo**2).sum() / (2 * PRIOR**2)
        return float(value + (PRIOR_HONEST * np.log(reliability) + PRIOR_REVERSED * np.log(1 - reliability)).sum())

    point = np.concatenate([crowd.strengths.elo, crowd.reliability])
    steps = np.diag([1.0] * 6 + [0.01] * 3)
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = [(posterior(point + step) - posterior(point - step)) / 2 for step in steps]
        assert all(posterior(point) > posterior(point + sign * step) for step in steps for sign in (-1, 1))
    np.testing.assert_allclose(slopes, 0, atol=0.005)


def test_without_annotators_it_is_the_plain_fit() -> None:
    """What is nobody's is believed, and an annotator of one comparison nearly so."""
    rng = np.random.default_rng(3)
    said = drawn(rng, centred_strengths(rng, 10), *random_pairs(rng, 10, 100))
    crowd, plain = fit_crowd(10, said, PRIOR), fit(10, said, PRIOR)
    assert (said.annotator == NOBODY).all()
    assert len(crowd.reliability) == 0
    np.testing.assert_allclose(crowd.strengths.elo, plain.elo, atol=1e-6)
    np.testing.assert_allclose(crowd.strengths.standard_errors, plain.standard_errors, atol=1e-6)
    each_once = fit_crowd(10, said._replace(annotator=np.arange(100)), PRIOR)
    assert each_once.reliability.min() > 0.8


@pytest.mark.parametrize("model", ["half", "davidson"])
def test_errors_come_from_fishers_information_of_what_was_reported(model: TieModel) -> None:
    """Two responses, outcome by outcome: the squared slope of its probability over that, by a difference in float64.

    Which does not depend on the outcome under these models; a tie that is half a win says what a comparison would.
    """
    wins, losses, ties = np.array([[9.0, 4.0, 2.0], [2.0, 3.0, 1.0], [3.0, 2.0, 1.0]])
    who = np.array([0, 1, NOBODY])
    said = Comparisons(np.zeros(3, np.int64), np.ones(3, np.int64), wins, losses, ties, who)
    crowd = fit_crowd(2, said, PRIOR, model)
    parameter = crowd.strengths.tie_parameter or 1.0
    gap = ELO_SCALE * float(crowd.strengths.elo[0] - crowd.strengths.elo[1])

    def reported_probabilities(gap: float, honest: float) -> FloatArray:
        win, loss, tie = outcome_probabilities(np.array([gap]), model, parameter)[:, 0]
        outcomes = np.array([honest * win + (1 - honest) * loss, honest * loss + (1 - honest) * win, tie])
        return outcomes[:2] if model == "half" else outcomes

    information = 0.0
    for row, honest in enumerate([*crowd.reliability, 1.0]):
        slope = (reported_probabilities(gap + 1e-5, honest) - reported_probabilities(gap - 1e-5, honest)) / 2e-5
        of_a_comparison = float((slope**2 / reported_probabilities(gap, honest)).sum())
        if model == "half":
            win, loss = reported_probabilities(gap, 1.0)
            information += (wins[row] + losses[row]) * of_a_comparison + ties[row] * win * loss
        else:
            information += (wins[row] + losses[row] + ties[row]) * of_a_comparison
    # Along (1, -1) / √2 the Laplacian of the pair has the eigenvalue twice its weight.
    error = math.sqrt(0.5 / (2 * information + 1 / (ELO_SCALE * PRIOR) ** 2)) / ELO_SCALE
    np.testing.assert_allclose(crowd.strengths.standard_errors, error, rtol=1e-6)


def test_a_reliability_of_nothing_but_ties_is_the_priors() -> None:
    """Nine in ten; each is counted with as many comparisons as they made."""
    first, second = np.zeros(3, np.int64), np.ones(3, np.int64)
    counts = np.array([[0.0, 6.0, 3.0], [0.0, 1.0, 0.0], [4.0, 2.0, 0.0]])
    wins, losses, ties = counts
    crowd = fit_crowd(2, Comparisons(first, second, wins, losses, ties, np.array([0, 1, NOBODY])), PRIOR)
    assert crowd.reliability[0] == pytest.approx(0.9)
    assert crowd.comparisons.tolist() == [4, 9]


def test_a_reliability_settles_though_it_moves_no_strength() -> None:
    """A thousand million comparisons of nobody's leave a gap of ln 2 where it is; ten reports all say the opposite.

    The posterior's slope in η is 9 / η - 1 / (1 - η) + 10 (1/3 - 2/3) / (η / 3 + (1 - η) 2/3) there, and 0.
    """
    first, second, ties = np.zeros(2, np.int64), np.ones(2, np.int64), np.zeros(2)
    said = Comparisons(first, second, np.array([2e9, 0.0]), np.array([1e9, 10.0]), ties, np.array([NOBODY, 0]))
    (honest,) = fit_crowd(2, said, PRIOR).reliability
    expected = brentq(lambda n: 9 / n - 1 / (1 - n) - 10 / 3 / (n / 3 + (1 - n) * 2 / 3), 0.01, 0.99)
    assert honest == pytest.approx(expected, abs=1e-4)
    assert honest < 0.85


def test_without_comparisons_nobody_is_known_and_nothing_of_strengths() -> None:
    """As in a plain fit."""
    none, never = np.zeros(0, np.int64), np.zeros(0)
    nothing = Comparisons(none, none, never, never, never, none)
    crowd = fit_crowd(3, nothing, PRIOR)
    assert crowd.strengths.elo.tolist() == [0, 0, 0]
    np.testing.assert_allclose(crowd.strengths.standard_errors, PRIOR)
    assert len(crowd.reliability) == len(crowd.comparisons) == 0


def test_huge_contradictory_reports_end_in_finite_numbers() -> None:
    """Two annotators of a billion comparisons each, who say the opposite."""
    first, second = np.array([0, 0, 1, 1]), np.array([1, 1, 2, 2])
    many, none = np.full(4, 1e9), np.zeros(4)
    wins = np.where([True, False, True, False], many, none)
    said = Comparisons(first, second, wins, many - wins, none, np.array([0, 1, 0, 1]))
    crowd = fit_crowd(3, said, PRIOR)
    numbers = [*crowd.strengths.elo, *crowd.strengths.standard_errors, *crowd.reliability]
    assert all(map(math.isfinite, numbers))
