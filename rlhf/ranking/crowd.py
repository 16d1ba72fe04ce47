"""Strengths and the reliability of each annotator, found together (Crowd-BT).

Chen, Bennett, Collins-Thompson & Horvitz 2013 (Pairwise ranking aggregation in a crowdsourced setting, WSDM, Eq. 4):
annotator a reports a comparison as the model has it with probability η_a, and reversed otherwise,

    P(a says i beats j) = η_a P(i beats j) + (1 - η_a) P(j beats i)

A tie reversed is the same tie, so ties say nothing of η. The paper goes through comparisons one by one; here all are
fitted at once, by expectation maximisation (Dempster, Laird & Rubin 1977): whether a report is reversed is the hidden
variable. Given those probabilities the strengths are a fit of comparisons, each counted partly as reported and partly
as reversed, and η_a is the share of a's reports that are not reversed. Each round raises the posterior.

Shapes: N responses, E rows of comparisons, A annotators. Gaps are in nats of log-odds.
"""

import math
from typing import NamedTuple

import numpy as np

from rlhf.errors import StageError
from rlhf.ranking.bradley_terry import (
    ELO_SCALE,
    FIRST_TIE,
    PairLikelihood,
    Strengths,
    TieModel,
    pair_terms,
    prior_precision,
    sigmoid,
)
from rlhf.ranking.comparisons import NOBODY, Comparisons, FloatArray, add_up, merge
from rlhf.ranking.uncertainty import components_of, most_probable, variances

PRIOR_HONEST = 9.0
PRIOR_REVERSED = 1.0
"""Reports as the model has them, and reversed ones, that the prior of a reliability counts as: a beta distribution with
mode 0.9. An annotator of few comparisons stays near it."""
MAX_ROUNDS = 1000
SMALLEST_CHANGE = 1e-5
"""Of a reliability from one round to the next."""


class Crowd(NamedTuple):
    """What annotators said, and how far each is to be believed."""

    strengths: Strengths
    reliability: FloatArray
    """``[A]``: η, from 0 (always reversed) over 0.5 (a coin) to 1."""
    comparisons: FloatArray
    """``[A]``: how many comparisons each made, ties included."""


def fit_crowd(
    count: int,
    comparisons: Comparisons,
    prior_elo: float,
    ties: TieModel = "half",
    tie_parameter: float | None = None,
) -> Crowd:
    """Find strengths and reliabilities; the arguments are those of :func:`rlhf.ranking.bradley_terry.fit`.

    Comparisons that are nobody's are taken as the model has them. Standard errors come from the expected information,
    because a report that contradicts the strengths has an observed one below 0. They are given the reliabilities and
    the parameter of ties.
    """
    precision = prior_precision(prior_elo)
    annotators = int(comparisons.annotator.max(initial=NOBODY)) + 1
    reliability = np.full(annotators, PRIOR_HONEST / (PRIOR_HONEST + PRIOR_REVERSED))

    def strongest(believed: Comparisons, tie: float, start: FloatArray | None) -> tuple[FloatArray, float]:
        likelihood = PairLikelihood(count, merge(count, believed), ties, fits_tie=tie_parameter is None)
        return most_probable(likelihood, precision, tie, start)

    # Everybody is believed at first: from strengths of 0 no reliability could be told.
    theta, tie = strongest(comparisons, FIRST_TIE if tie_parameter is None else math.log(tie_parameter), None)
    for _ in range(MAX_ROUNDS):
        honest = _honest(_outcomes(theta, tie, comparisons, ties), _log_odds_of_honesty(reliability, comparisons))
        before, theta_before = reliability, theta
        theta, tie = strongest(honest.believed(comparisons), tie, theta)
        reliability = honest.share(comparisons, annotators)
        changes = (np.abs(reliability - before).max(initial=0.0), np.abs(theta - theta_before).max(initial=0.0))
        if max(changes) < SMALLEST_CHANGE:
            break
    else:
        raise StageError(
            f"the annotators' reliabilities did not settle in {MAX_ROUNDS} rounds",
            "rank.annotators",
            "rank.annotators=equal, or a smaller rank.prior_elo",
        )

    weights = _expected_information(theta, tie, comparisons, ties, reliability)
    components = components_of(count, comparisons.first, comparisons.second)
    variance = variances(comparisons.first, comparisons.second, weights, components, precision)
    strengths = Strengths(theta / ELO_SCALE, np.sqrt(variance) / ELO_SCALE, None if ties == "half" else math.exp(tie))
    said = comparisons.wins + comparisons.losses + comparisons.ties
    return Crowd(strengths, reliability, _of_annotators(said, comparisons, annotators))


class _Outcomes(NamedTuple):
    """Of each row, at its gap; ``[E]`` each."""

    log_win: FloatArray
    log_loss: FloatArray
    slope: FloatArray
    """∂ (ln P(win) - ln P(loss)) / ∂d"""


class _Honest(NamedTuple):
    """The probability that a report is not reversed; ``[E]`` each."""

    wins: FloatArray
    losses: FloatArray

    def believed(self, comparisons: Comparisons) -> Comparisons:
        """Each report counted as it is and as its reverse, by their probabilities."""
        wins, losses = comparisons.wins, comparisons.losses
        return comparisons._replace(
            wins=wins * self.wins + losses * (1 - self.losses), losses=losses * self.losses + wins * (1 - self.wins)
        )

    def share(self, comparisons: Comparisons, annotators: int) -> FloatArray:
        """``[A]``: the most probable reliabilities."""
        honest = _of_annotators(
            comparisons.wins * self.wins + comparisons.losses * self.losses, comparisons, annotators
        )
        decided = _of_annotators(comparisons.wins + comparisons.losses, comparisons, annotators)
        return (PRIOR_HONEST + honest) / (PRIOR_HONEST + PRIOR_REVERSED + decided)


def _outcomes(theta: FloatArray, tie: float, comparisons: Comparisons, ties: TieModel) -> _Outcomes:
    gap = theta[comparisons.first] - theta[comparisons.second]
    once, never = np.ones_like(gap), np.zeros_like(gap)
    win, loss = pair_terms(gap, tie, once, never, never, ties), pair_terms(gap, tie, never, once, never, ties)
    return _Outcomes(win.value, loss.value, win.gap_gradient - loss.gap_gradient)


def _log_odds_of_honesty(reliability: FloatArray, comparisons: Comparisons) -> FloatArray:
    """``[E]``: ln η / (1 - η) of each row's annotator; the prior keeps η off 0 and 1."""
    # The last entry is that of NOBODY, which is -1.
    return np.append(np.log(reliability / (1 - reliability)), np.inf)[comparisons.annotator]


def _honest(outcomes: _Outcomes, log_odds: FloatArray) -> _Honest:
    """Bayes' rule: the log-odds of honesty before the report, and of the report if honest against if reversed."""
    for_win = outcomes.log_win - outcomes.log_loss
    return _Honest(sigmoid(log_odds + for_win), sigmoid(log_odds - for_win))


def _of_annotators(values: FloatArray, comparisons: Comparisons, annotators: int) -> FloatArray:
    """``[A]``: the sum of each annotator's rows ``[E]``."""
    somebody = comparisons.annotator != NOBODY
    return add_up(comparisons.annotator[somebody], values[somebody], annotators)


def _expected_information(
    theta: FloatArray, tie: float, comparisons: Comparisons, ties: TieModel, reliability: FloatArray
) -> FloatArray:
    """``[E]``: what each row's reports say of its gap, on average over what they might have been.

    That of the comparisons, were it known which are reversed, less what is not known of that (Louis 1982, JRSS B
    44:226): with outcomes Q = η P + (1 - η) P', η (1 - η) P(win) P(loss) (1 / Q(win) + 1 / Q(loss)) times the square of
    the slope of ln P(win) - ln P(loss).
    """
    outcomes = _outcomes(theta, tie, comparisons, ties)
    log_odds = _log_odds_of_honesty(reliability, comparisons)
    honest = _honest(outcomes, log_odds)
    believed = honest.believed(comparisons)
    gap = theta[comparisons.first] - theta[comparisons.second]
    complete = pair_terms(gap, tie, believed.wins, believed.losses, believed.ties, ties).gap_curvature
    # η P(win) / Q(win) is the probability that a reported win is honest.
    missing = np.exp(outcomes.log_loss) * sigmoid(-log_odds) * honest.wins
    missing += np.exp(outcomes.log_win) * sigmoid(-log_odds) * honest.losses
    compared = comparisons.wins + comparisons.losses + (comparisons.ties if ties != "half" else 0.0)
    # Rao and Kupper's curvature depends on the outcome, and the difference may come out below 0.
    return np.maximum(complete - compared * missing * outcomes.slope**2, 0.0)
