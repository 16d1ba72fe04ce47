"""Strengths and the reliability of each annotator, fitted together (Crowd-BT).

Chen, Bennett, Collins-Thompson & Horvitz 2013 (Pairwise ranking aggregation in a crowdsourced setting, WSDM, Eq. 4):
annotator a reports a comparison as the model has it with probability η_a, and reversed otherwise,

    P(a says i beats j) = η_a P(i beats j) + (1 - η_a) P(j beats i)

A reversed tie is the same tie, so ties do not inform η. The paper goes through comparisons one by one; here all are
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
"""The prior of a reliability counts as this many reports as the model has them, and reversed: a beta distribution with
mode 0.9. An annotator of few comparisons stays near it."""
MAX_ROUNDS = 1000
SMALLEST_CHANGE = 1e-5
"""Change of a reliability, and of a strength in nats, from one round to the next, below which the fit ends."""


class Crowd(NamedTuple):
    """Strengths, and how reliable each annotator is."""

    strengths: Strengths
    reliability: FloatArray
    """``[A]``: η, from 0 (always reversed) over 0.5 (a coin) to 1."""
    comparisons: FloatArray
    """``[A]``: how many comparisons each annotator made, ties included."""


def fit_crowd(
    count: int, comparisons: Comparisons, prior_elo: float, ties: TieModel = "half", tie_parameter: float | None = None
) -> Crowd:
    """Fit strengths and reliabilities; the arguments are those of :func:`rlhf.ranking.bradley_terry.fit`.

    Comparisons of :data:`~rlhf.ranking.comparisons.NOBODY` are taken as the model has them. Standard errors come from
    the expected information, because the observed information of a report that contradicts the strengths is below 0;
    reliabilities and the parameter of ties are taken as known.
    """
    precision = prior_precision(prior_elo)
    annotators = int(comparisons.annotator.max(initial=NOBODY)) + 1
    reliability = np.full(annotators, PRIOR_HONEST / (PRIOR_HONEST + PRIOR_REVERSED))

    def strongest(believed: Comparisons, tie: float, start: FloatArray | None) -> tuple[FloatArray, float]:
        likelihood = PairLikelihood(count, merge(count, believed), ties, fits_tie=tie_parameter is None)
        return most_probable(likelihood, precision, tie, start)

    # Every annotator is believed at first: strengths of 0 would make all reliabilities alike.
    theta, tie = strongest(comparisons, FIRST_TIE if tie_parameter is None else math.log(tie_parameter), None)
    for _ in range(MAX_ROUNDS):
        reports = _reports(theta, tie, comparisons, ties, reliability)
        before, theta_before = reliability, theta
        theta, tie = strongest(reports.believed, tie, theta)
        honest = comparisons.wins * reports.honest_wins + comparisons.losses * reports.honest_losses
        honest = _of_annotators(honest, comparisons, annotators)
        decided = _of_annotators(comparisons.wins + comparisons.losses, comparisons, annotators)
        reliability = (PRIOR_HONEST + honest) / (PRIOR_HONEST + PRIOR_REVERSED + decided)
        changes = (np.abs(reliability - before).max(initial=0.0), np.abs(theta - theta_before).max(initial=0.0))
        if max(changes) < SMALLEST_CHANGE:
            break
    else:
        raise StageError(
            f"the annotators' reliabilities did not settle in {MAX_ROUNDS} rounds",
            "rank.annotators",
            "rank.annotators=equal, or a smaller rank.prior_elo",
        )

    reports = _reports(theta, tie, comparisons, ties, reliability)
    weights = _expected_information(reports, tie, comparisons, ties)
    components = components_of(count, comparisons.first, comparisons.second)
    variance = variances(comparisons.first, comparisons.second, weights, components, precision)
    strengths = Strengths(theta / ELO_SCALE, np.sqrt(variance) / ELO_SCALE, None if ties == "half" else math.exp(tie))
    return Crowd(strengths, reliability, _of_annotators(comparisons.counts, comparisons, annotators))


class _Reports(NamedTuple):
    """The reports of each row, given its gap and its annotator's reliability; ``[E]`` each."""

    gap: FloatArray
    log_win: FloatArray
    log_loss: FloatArray
    slope: FloatArray
    """∂ (ln P(win) - ln P(loss)) / ∂d"""
    log_odds: FloatArray
    """ln η / (1 - η)"""
    honest_wins: FloatArray
    """The probability that a reported win is not reversed."""
    honest_losses: FloatArray
    believed: Comparisons
    """Each report counted as it is and as its reverse, by their probabilities."""


def _reports(
    theta: FloatArray, tie: float, comparisons: Comparisons, ties: TieModel, reliability: FloatArray
) -> _Reports:
    gap = theta[comparisons.first] - theta[comparisons.second]
    once, never = np.ones_like(gap), np.zeros_like(gap)
    win, loss = pair_terms(gap, tie, once, never, never, ties), pair_terms(gap, tie, never, once, never, ties)
    # The prior keeps η off 0 and 1. The last entry is that of NOBODY, which is -1.
    log_odds = np.append(np.log(reliability / (1 - reliability)), np.inf)[comparisons.annotator]
    # Bayes' rule: the log-odds of honesty before the report, and of the report if honest against if reversed.
    for_win = win.value - loss.value
    honest_wins, honest_losses = sigmoid(log_odds + for_win), sigmoid(log_odds - for_win)
    believed = comparisons._replace(
        wins=comparisons.wins * honest_wins + comparisons.losses * (1 - honest_losses),
        losses=comparisons.losses * honest_losses + comparisons.wins * (1 - honest_wins),
    )
    slope = win.gap_gradient - loss.gap_gradient
    return _Reports(gap, win.value, loss.value, slope, log_odds, honest_wins, honest_losses, believed)


def _of_annotators(values: FloatArray, comparisons: Comparisons, annotators: int) -> FloatArray:
    """Return ``[A]``: the sum of each annotator's rows ``[E]``."""
    named = comparisons.annotator != NOBODY
    return add_up(comparisons.annotator[named], values[named], annotators)


def _expected_information(reports: _Reports, tie: float, comparisons: Comparisons, ties: TieModel) -> FloatArray:
    """Return ``[E]``: the information of each row's reports on its gap, on average over their possible outcomes.

    That of the comparisons if it were known which are reversed, less the information missing on that (Louis 1982, JRSS
    B 44:226): with outcomes Q = η P + (1 - η) P', η (1 - η) P(win) P(loss) (1 / Q(win) + 1 / Q(loss)) times the square
    of the slope of ln P(win) - ln P(loss).
    """
    believed = reports.believed
    complete = pair_terms(reports.gap, tie, believed.wins, believed.losses, believed.ties, ties).gap_curvature
    # η P(win) / Q(win) is the probability that a reported win is honest.
    missing = np.exp(reports.log_loss) * sigmoid(-reports.log_odds) * reports.honest_wins
    missing += np.exp(reports.log_win) * sigmoid(-reports.log_odds) * reports.honest_losses
    compared = comparisons.wins + comparisons.losses + (comparisons.ties if ties != "half" else 0.0)
    # Rao and Kupper's curvature depends on the outcome, and the difference may come out below 0.
    return np.maximum(complete - compared * missing * reports.slope**2, 0.0)
