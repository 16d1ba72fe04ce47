"""Strengths of responses by the model of the settings: Bradley-Terry, Elo or Plackett-Luce.

**Elo ratings** as a stream of comparisons moves them (Elo 1978, The Rating of Chessplayers). After each comparison
of i and j, with outcome s = 1 where i won, ½ where it was a tie, 0 where it lost,

    R_i ← R_i + K (s - σ(c (R_i - R_j)))        c = ln(10) / 400

and R_j by as much the other way. Ratings depend on the order of the comparisons, which for answers to one prompt means
nothing: they are averaged over orders. Where all comparisons are known at once, maximum likelihood
(:mod:`rlhf.ranking.bradley_terry`) uses them better (Boubdir et al. 2023, arXiv:2311.17295).

**Plackett-Luce** strengths see a whole ranking as a series of choices (Luce 1959; Plackett 1975, Applied Statistics
24:193): the best of a set is drawn with probability e^θ_i / Σ e^θ_j, then the best of those that remain, and so on. A
ranking of K responses is K - 1 such choices and not K (K - 1) / 2 comparisons, which would take one annotator's views
for independent. Of two responses it is Bradley-Terry. Tied responses count by Efron's approximation (1977, JASA
72:557): the l-th of d that are tied, from 0, is drawn when l / d of each of them is gone. So they are drawn towards
each other; a tie of two is a win for either.

A choice's information diag(p) - p pᵀ is the Laplacian of the weights p_i p_j, so that
:mod:`rlhf.ranking.uncertainty` fits it like any other likelihood of differences.

**Crowd-BT** fits the reliability of each annotator with the strengths (Chen, Bennett, Collins-Thompson & Horvitz 2013,
Pairwise ranking aggregation in a crowdsourced setting, WSDM, Eq. 4): annotator a reports a comparison as the model has
it with probability η_a, and reversed otherwise,

    P(a says i beats j) = η_a P(i beats j) + (1 - η_a) P(j beats i)

A reversed tie is the same tie, so ties do not inform η. The paper goes through comparisons one by one; here all are
fitted at once, by expectation maximisation (Dempster, Laird & Rubin 1977): whether a report is reversed is the hidden
variable. Given those probabilities the strengths are a fit of comparisons, each counted partly as reported and partly
as reversed, and η_a is the share of a's reports that are not reversed. Each round raises the posterior.

Shapes: N responses, E pairs or rows of comparisons, A annotators, S comparisons in a stream, O orders, V rankings of L
responses each. Strengths are in nats of log-odds.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from rlhf.config.data import RankSettings
from rlhf.errors import StageError
from rlhf.randomness import stream
from rlhf.ranking.bradley_terry import (
    ELO_SCALE,
    FIRST_TIE,
    PairLikelihood,
    Strengths,
    TieModel,
    fit,
    pair_terms,
    prior_precision,
    sigmoid,
)
from rlhf.ranking.comparisons import NOBODY, Comparisons, FloatArray, IntArray, add_up, merge
from rlhf.ranking.scales import Pooled, fit_each_annotator
from rlhf.ranking.uncertainty import Terms, components_of, fit_posterior, most_probable, variances


class Crowd(NamedTuple):
    """Strengths, and how reliable each annotator is."""

    strengths: Strengths
    reliability: FloatArray
    """``[A]``: η, from 0 (always reversed) over 0.5 (a coin) to 1."""
    comparisons: FloatArray
    """``[A]``: how many comparisons each annotator made, ties included."""


def strengths_of(
    settings: RankSettings, pooled: Pooled, tie_parameter: float | None = None
) -> tuple[Strengths, Crowd | None]:
    """Fit the strengths of all responses; the second result is None unless annotators count by their reliability.

    tie_parameter  the model's parameter of ties where it is known; None fits it with the strengths
    """
    if settings.model == "plackett-luce":
        unranked = pooled.comparisons.rows(pooled.comparisons.annotator == NOBODY)
        rankings = rankings_of(pooled.tables, pooled.starts[:-1].tolist())
        return fit_rankings(pooled.responses, rankings, unranked, settings.prior_elo), None
    if settings.normalise == "annotator":
        alone = partial(fit, prior_elo=settings.prior_elo, ties=settings.ties, tie_parameter=tie_parameter)
        return fit_each_annotator(pooled.responses, pooled.comparisons, alone), None
    return of_comparisons(settings, pooled.responses, pooled.comparisons, tie_parameter)


def of_comparisons(
    settings: RankSettings, count: int, comparisons: Comparisons, tie_parameter: float | None = None
) -> tuple[Strengths, Crowd | None]:
    """Fit the strengths of ``count`` responses, or models, from comparisons alone, as :func:`strengths_of` does."""
    if settings.model == "elo":
        return fit_online(count, comparisons, settings.k_factor, settings.orders, settings.seed), None
    if settings.annotators == "reliability":
        crowd = fit_crowd(count, comparisons, settings.prior_elo, settings.ties, tie_parameter)
        return crowd.strengths, crowd
    return fit(count, comparisons, settings.prior_elo, settings.ties, tie_parameter), None


def fit_online(count: int, comparisons: Comparisons, k_factor: float, orders: int, seed: int) -> Strengths:
    """Return the Elo ratings of ``count`` responses, averaged over orders; the mean of all is 0.

    Comparisons of one row have their mean outcome. Standard errors are the deviations over as many streams drawn from
    the comparisons with replacement (the bootstrap), each in an order of its own.
    """
    times = np.maximum(np.rint(comparisons.counts), 1).astype(np.int64)
    first, second = np.repeat(comparisons.first, times), np.repeat(comparisons.second, times)
    outcome = np.repeat((comparisons.wins + 0.5 * comparisons.ties) / comparisons.counts, times)
    rng = stream("online orders", seed)
    permuted = np.stack([rng.permutation(len(first)) for _ in range(orders)])
    order = np.concatenate([permuted, rng.integers(len(first), size=(orders, len(first)))])  # [2 O, S]
    ratings = np.zeros((len(order), count))
    every = np.arange(len(order))
    for now in order.T:
        i, j = first[now], second[now]
        expected = 1 / (1 + np.exp(ELO_SCALE * (ratings[every, j] - ratings[every, i])))
        moved = k_factor * (outcome[now] - expected)
        ratings[every, i] += moved
        ratings[every, j] -= moved
    return Strengths(ratings[:orders].mean(axis=0), ratings[orders:].std(axis=0, ddof=1), None)


class Rankings(NamedTuple):
    """Rankings of equally many responses."""

    responses: IntArray
    """``[V, L]``"""
    remaining: FloatArray
    """``[V, L, L]``: the share of response j that remains when i is drawn: 1 for those after it and itself, 0 for
    those before it, 1 - l / d among d that are tied."""


def rankings_of(tables: Sequence[FloatArray], starts: Sequence[int]) -> list[Rankings]:
    """Turn tables ``[K, A]`` of ratings, a higher one being better, NaN where an annotator gave none, into rankings.

    starts  of each table, the number of its first response
    """
    by_length: defaultdict[int, list[tuple[IntArray, FloatArray]]] = defaultdict(list)
    for table, start in zip(tables, starts, strict=True):
        for column in table.T:
            rated = np.flatnonzero(~np.isnan(column))
            if len(rated) > 1:
                order = rated[np.argsort(-column[rated], kind="stable")]
                by_length[len(order)].append((order + start, column[order]))
    rankings: list[Rankings] = []
    for _, group in sorted(by_length.items()):
        responses, values = (np.stack(arrays) for arrays in zip(*group, strict=True))
        tied = values[:, :, None] == values[:, None, :]
        share = 1 - np.tril(tied, -1).sum(axis=2) / tied.sum(axis=2)
        rankings.append(Rankings(responses, np.where(tied, share[:, :, None], values[:, None, :] < values[:, :, None])))
    return rankings


def fit_rankings(count: int, rankings: Sequence[Rankings], comparisons: Comparisons, prior_elo: float) -> Strengths:
    """Fit the strengths of ``count`` responses, with their standard errors.

    comparisons  those that are in no ranking, a tie counting as half a win
    prior_elo    the prior's deviation, in Elo points; greater than 0
    """
    posterior = fit_posterior(ChoiceLikelihood(count, rankings, comparisons), prior_precision(prior_elo))
    return Strengths(posterior.theta / ELO_SCALE, posterior.standard_errors / ELO_SCALE, None)


class ChoiceLikelihood:
    """The likelihood of rankings and, beside them, of comparisons that belong to no ranking."""

    def __init__(self, count: int, rankings: Sequence[Rankings], comparisons: Comparisons) -> None:
        self.count = count
        self._rankings = rankings
        self._pairs = PairLikelihood(count, merge(count, comparisons), "half", fits_tie=False)
        parts = [self._pairs.first * count + self._pairs.second]
        for ranking in rankings:
            i, j = np.triu_indices(ranking.responses.shape[1], k=1)
            a, b = ranking.responses[:, i], ranking.responses[:, j]
            parts.append((np.minimum(a, b) * count + np.maximum(a, b)).ravel())
        pairs, row = np.unique(np.concatenate(parts), return_inverse=True)
        self.first: IntArray = pairs // count
        self.second: IntArray = pairs % count
        self._rows: list[IntArray] = np.split(row, np.cumsum([len(part) for part in parts])[:-1])

    def terms(self, theta: FloatArray, tie: float) -> Terms:
        """Evaluate at strengths θ ``[N]``; there is no parameter of ties."""
        pairs = self._pairs.terms(theta, tie)
        value, gradient = pairs.value, pairs.gradient.copy()
        weights = add_up(self._rows[0], pairs.weights, len(self.first))
        for (responses, remaining), rows in zip(self._rankings, self._rows[1:], strict=True):
            given = theta[responses]
            highest = given.max(axis=1, keepdims=True)
            odds = np.exp(given - highest)
            total = np.einsum("vij,vj->vi", remaining, odds)
            value += float((given - highest - np.log(total)).sum())
            # [V, i, j]: the probability that j is drawn where i was.
            drawn = remaining * odds[:, None, :] / total[:, :, None]
            gradient += add_up(responses.ravel(), (1 - drawn.sum(axis=1)).ravel(), self.count)
            i, j = np.triu_indices(odds.shape[1], k=1)
            weights += add_up(rows, (drawn.transpose(0, 2, 1) @ drawn)[:, i, j].ravel(), len(self.first))
        return Terms(value, gradient, weights)


PRIOR_HONEST = 9.0
PRIOR_REVERSED = 1.0
"""The prior of a reliability counts as this many reports as the model has them, and reversed: a beta distribution with
mode 0.9. An annotator of few comparisons stays near it."""
MAX_ROUNDS = 1000
SMALLEST_CHANGE = 1e-5
"""Change of a reliability, and of a strength in nats, from one round to the next, below which the fit ends."""


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
