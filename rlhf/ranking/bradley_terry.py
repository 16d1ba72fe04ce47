"""Bradley-Terry strengths with a Gaussian prior, on the Elo scale, and three models of ties.

The model (Bradley & Terry 1952, Biometrika 39:324, in logistic form): response i beats j with probability
σ(c (θ_i - θ_j)), where θ are strengths in Elo points and c = ln(10) / 400, so that 400 points are odds of ten to one.
Two models give a tie a probability of its own, with one parameter for all pairs, whose logarithm is τ here:

- ``rao-kupper`` (Rao & Kupper 1967, JASA 62:194): i is preferred where it is better by more than a threshold. With
  d = c (θ_i - θ_j) and the paper's parameter e^τ ≥ 1: P(win) = σ(d - τ), P(loss) = σ(-d - τ), and a tie is the rest,
  (e^{2τ} - 1) σ(d - τ) σ(-d - τ).
- ``davidson`` (Davidson 1970, JASA 65:317): P(win) : P(loss) : P(tie) = e^{d/2} : e^{-d/2} : e^τ, with the paper's
  parameter e^τ ≥ 0.
- ``half`` has no such probability: a tie counts as half a win for either.

All three log-likelihoods are concave in d and τ together.

Shapes: N responses, E pairs. Strengths are in nats of log-odds, or in Elo points where the name says so.
"""

import math
from typing import Literal, NamedTuple, get_args

import numpy as np

from rlhf.ranking.comparisons import Comparisons, FloatArray, IntArray, add_up, merge
from rlhf.ranking.uncertainty import Terms, TieTerms, fit_posterior

ELO_SCALE = math.log(10) / 400
"""Nats of log-odds per Elo point."""

TieModel = Literal["half", "rao-kupper", "davidson"]
TIE_MODELS: tuple[TieModel, ...] = get_args(TieModel)

FIRST_TIE = 0.5
"""τ at which a fit starts."""


class Strengths(NamedTuple):
    """Strengths and their standard errors."""

    elo: FloatArray
    """``[N]``, Elo points; each connected component has mean 0."""
    standard_errors: FloatArray
    """``[N]``, Elo points: of a strength relative to the mean of its component."""
    tie_parameter: float | None
    """Rao and Kupper's θ or Davidson's ν; None where a tie counts as half a win."""


def fit(
    count: int, comparisons: Comparisons, prior_elo: float, ties: TieModel = "half", tie_parameter: float | None = None
) -> Strengths:
    """Fit the strengths of ``count`` responses, with their standard errors, to the comparisons of all annotators.

    Standard errors take comparisons as independent, which one annotator's comparisons of K responses are not.

    prior_elo      the prior's deviation, in Elo points; greater than 0
    tie_parameter  the model's parameter where it is known; None fits it with the strengths
    """
    likelihood = PairLikelihood(count, merge(count, comparisons), ties, fits_tie=tie_parameter is None)
    tie = FIRST_TIE if tie_parameter is None else math.log(tie_parameter)
    posterior = fit_posterior(likelihood, prior_precision(prior_elo), tie)
    fitted = None if ties == "half" else math.exp(posterior.tie)
    return Strengths(posterior.theta / ELO_SCALE, posterior.standard_errors / ELO_SCALE, fitted)


def prior_precision(prior_elo: float) -> float:
    """Return the precision, in nats⁻², of a prior whose deviation is in Elo points."""
    return 1.0 / (ELO_SCALE * prior_elo) ** 2


class PairLikelihood:
    """The likelihood of comparisons, as a :class:`~rlhf.ranking.uncertainty.Likelihood`.

    Where τ is fitted, its prior is two comparisons of equals, a tie and a decision. So τ is finite where no comparison
    or every comparison is a tie, and among thousands of comparisons the prior does not count.
    """

    def __init__(self, count: int, comparisons: Comparisons, ties: TieModel, *, fits_tie: bool) -> None:
        self.count = count
        self.first: IntArray = comparisons.first
        self.second: IntArray = comparisons.second
        self._outcomes = (comparisons.wins, comparisons.losses, comparisons.ties)
        self._ties: TieModel = ties
        self._fits_tie = fits_tie and ties != "half"

    def terms(self, theta: FloatArray, tie: float) -> Terms:
        """Evaluate at strengths θ ``[N]`` and τ."""
        if self._ties == "rao-kupper" and tie <= 0:
            return Terms(-math.inf, np.zeros(self.count), np.zeros(len(self.first)))
        pairs = pair_terms(theta[self.first] - theta[self.second], tie, *self._outcomes, self._ties)
        terms = Terms(float(pairs.value.sum()), self._per_response(pairs.gap_gradient), pairs.gap_curvature)
        if not self._fits_tie:
            return terms
        prior = pair_terms(np.zeros(1), tie, np.full(1, 0.5), np.full(1, 0.5), np.ones(1), self._ties)
        tie_terms = TieTerms(
            float(pairs.tie_gradient.sum() + prior.tie_gradient[0]),
            float(pairs.tie_curvature.sum() + prior.tie_curvature[0]),
            self._per_response(pairs.mixed_curvature),
        )
        return terms._replace(value=terms.value + float(prior.value[0]), tie=tie_terms)

    def _per_response(self, of_gap: FloatArray) -> FloatArray:
        """Return derivatives by the strengths ``[N]`` from those by the gaps, first less second."""
        return add_up(self.first, of_gap, self.count) - add_up(self.second, of_gap, self.count)


class PairTerms(NamedTuple):
    """The log-likelihood of each pair's comparisons, and its derivatives by the gap d and τ; ``[E]`` each."""

    value: FloatArray
    gap_gradient: FloatArray
    gap_curvature: FloatArray
    """-∂²/∂d²"""
    tie_gradient: FloatArray
    tie_curvature: FloatArray
    """-∂²/∂τ²"""
    mixed_curvature: FloatArray
    """-∂²/∂d ∂τ"""


def pair_terms(
    gap: FloatArray, tie: float, wins: FloatArray, losses: FloatArray, tied: FloatArray, model: TieModel
) -> PairTerms:
    """Evaluate pairs, with counts ``[E]`` of comparisons won, lost and tied, at their gaps d ``[E]``.

    No difference of nearly equal numbers: counts may be large, and probabilities close to 0 or 1.
    """
    match model:
        case "half":
            won, lost = wins + 0.5 * tied, losses + 0.5 * tied
            win, loss, zero = sigmoid(gap), sigmoid(-gap), np.zeros_like(gap)
            value = won * _log_sigmoid(gap) + lost * _log_sigmoid(-gap)
            return PairTerms(value, won * loss - lost * win, (won + lost) * win * loss, zero, zero, zero)
        case "rao-kupper":
            return _rao_kupper(gap, tie, wins, losses, tied)
        case "davidson":
            return _davidson(gap, tie, wins, losses, tied)


def _rao_kupper(gap: FloatArray, tie: float, wins: FloatArray, losses: FloatArray, tied: FloatArray) -> PairTerms:
    # A tie has the factors of a win and of a loss, and a third of its own.
    not_won, not_lost = wins + tied, losses + tied
    above, below = gap - tie, -gap - tie
    pull_up, pull_down = not_won * sigmoid(-above), not_lost * sigmoid(-below)
    curve_up, curve_down = pull_up * sigmoid(above), pull_down * sigmoid(below)
    beyond = -math.expm1(-2 * tie)  # 1 - e^{-2τ}
    return PairTerms(
        not_won * _log_sigmoid(above) + not_lost * _log_sigmoid(below) + tied * (2 * tie + math.log(beyond)),
        pull_up - pull_down,
        curve_up + curve_down,
        tied * (2 / beyond) - pull_up - pull_down,
        curve_up + curve_down + tied * (4 * math.exp(-2 * tie) / beyond**2),
        curve_down - curve_up,
    )


def _davidson(gap: FloatArray, tie: float, wins: FloatArray, losses: FloatArray, tied: FloatArray) -> PairTerms:
    logits = np.stack([0.5 * gap, -0.5 * gap, np.full_like(gap, tie)])
    highest = logits.max(axis=0)
    log_win, log_loss, log_tie = logits - (highest + np.log(np.exp(logits - highest).sum(axis=0)))
    win, loss, draw = np.exp(log_win), np.exp(log_loss), np.exp(log_tie)
    compared, decided = wins + losses + tied, win + loss
    return PairTerms(
        wins * log_win + losses * log_loss + tied * log_tie,
        0.5 * (wins * (draw + 2 * loss) - losses * (draw + 2 * win) - tied * (win - loss)),
        0.25 * compared * (decided * draw + 4 * win * loss),
        tied * decided - (wins + losses) * draw,
        compared * draw * decided,
        -0.5 * compared * draw * (win - loss),
    )


def sigmoid(x: FloatArray) -> FloatArray:
    """Return σ(x), accurate close to 0 and without overflow."""
    tail = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, tail) / (1.0 + tail)


def _log_sigmoid(x: FloatArray) -> FloatArray:
    return np.minimum(x, 0.0) - np.log1p(np.exp(-np.abs(x)))
