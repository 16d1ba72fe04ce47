"""The most probable strengths under a Gaussian prior, and how well they are known, for any likelihood of differences.

All responses are fitted at once, however many pools they are of: a parameter of ties belongs to all of them. Newton's
method maximises

    ln L(θ, τ) - λ Σ_i θ_i² / 2

where the likelihood L sees differences of strengths and τ, and λ is the prior's precision. The likelihood alone has no
maximum where a response never lost, and does not see a shift of a component's strengths; the prior makes the maximum
exist, be unique, and have mean 0 in every component (Caron & Doucet 2012, arXiv:1011.1761, use a prior for the same
reason). ln L must be concave.

Shapes: N responses, E pairs. Strengths are in nats of log-odds.
"""

from typing import NamedTuple, Protocol

import numpy as np

from rlhf.ranking.comparisons import FloatArray, IntArray
from rlhf.ranking.covariance import variances
from rlhf.ranking.information import Components, Sparse, components_of, information, solve

MAX_NEWTON_STEPS = 300
SMALLEST_STEP = 1e-8
"""In nats. Convergence is quadratic: the error that such a step leaves is far below it."""
LINEAR_TOLERANCE = 1e-8


class TieTerms(NamedTuple):
    """How the likelihood changes with the parameter of ties, τ."""

    gradient: float
    """∂ ln L / ∂τ"""
    curvature: float
    """-∂² ln L / ∂τ²"""
    border: FloatArray
    """``[N]``: -∂² ln L / ∂θ ∂τ"""


class Terms(NamedTuple):
    """A likelihood at one point."""

    value: float
    """ln L, in nats; -inf where τ is out of its range, and then the other terms do not count."""
    gradient: FloatArray
    """``[N]``: ∂ ln L / ∂θ"""
    weights: FloatArray
    """``[E]``: of the pairs, so that -∂² ln L / ∂θ² is their Laplacian; none below 0."""
    tie: TieTerms | None = None
    """None where there is no parameter of ties, or where it is given."""


class Likelihood(Protocol):
    """A probability of what annotators said, as a function of differences of strengths."""

    @property
    def count(self) -> int:
        """N."""
        ...

    @property
    def first(self) -> IntArray:
        """``[E]``: one response of each pair."""
        ...

    @property
    def second(self) -> IntArray:
        """``[E]``: the other."""
        ...

    def terms(self, theta: FloatArray, tie: float) -> Terms:
        """The likelihood at strengths θ ``[N]`` and τ."""
        ...


class Posterior(NamedTuple):
    """The maximum, and the curvature there."""

    theta: FloatArray
    """``[N]``, nats; each component has mean 0."""
    tie: float
    """τ"""
    standard_errors: FloatArray
    """``[N]``, nats: see :mod:`rlhf.ranking.covariance`."""


class _Step(NamedTuple):
    theta: FloatArray
    tie: float
    promised: float
    """Twice the growth of the objective if it were quadratic."""


def most_probable(
    likelihood: Likelihood, precision: float, tie: float = 0.0, start: FloatArray | None = None
) -> tuple[FloatArray, float]:
    """Maximise over θ, and over τ where the likelihood has terms for it; from ``start`` ``[N]`` (0) and ``tie``."""
    components = components_of(likelihood.count, likelihood.first, likelihood.second)
    theta = np.zeros(likelihood.count) if start is None else start
    terms = likelihood.terms(theta, tie)
    for _ in range(MAX_NEWTON_STEPS):
        value = terms.value - 0.5 * precision * theta @ theta
        step = _newton_step(likelihood, components, terms, theta, precision)
        # Near the maximum the promised growth drowns in rounding, and the full step is right.
        slack = 1e-12 * (1.0 + abs(value))
        length = 1.0
        while True:
            candidate, candidate_tie = theta + length * step.theta, tie + length * step.tie
            terms = likelihood.terms(candidate, candidate_tie)
            grown = terms.value - 0.5 * precision * candidate @ candidate
            if grown >= value + 1e-4 * length * step.promised - slack:  # Armijo's condition
                break
            length /= 2
        theta, tie = candidate, candidate_tie
        largest = max(np.abs(step.theta).max(initial=0.0), abs(step.tie))
        if length * largest < SMALLEST_STEP or step.promised < 1e-15 * (1.0 + abs(value)):
            return components.centred(theta[:, None])[:, 0], tie
    raise AssertionError("Newton's method converges on a strictly concave objective")


def fit_posterior(likelihood: Likelihood, precision: float, tie: float = 0.0) -> Posterior:
    """The most probable strengths with standard errors, from the observed information at the maximum."""
    theta, tie = most_probable(likelihood, precision, tie)
    terms = likelihood.terms(theta, tie)
    components = components_of(likelihood.count, likelihood.first, likelihood.second)
    variance = variances(likelihood.first, likelihood.second, terms.weights, components, precision)
    if terms.tie is not None:
        # The inverse of the bordered matrix [[A, b], [bᵀ, c]] adds (A⁻¹b)² / (c - bᵀA⁻¹b) to the diagonal of A⁻¹.
        matrix = _matrix(likelihood, terms, precision)
        moved = solve(matrix, terms.tie.border[:, None], LINEAR_TOLERANCE)[:, 0]
        variance = variance + moved**2 / (terms.tie.curvature - terms.tie.border @ moved)
    return Posterior(theta, tie, np.sqrt(variance))


def _matrix(likelihood: Likelihood, terms: Terms, precision: float) -> Sparse:
    return information(likelihood.count, likelihood.first, likelihood.second, terms.weights, precision)


def _newton_step(
    likelihood: Likelihood, components: Components, terms: Terms, theta: FloatArray, precision: float
) -> _Step:
    # The sum over a component is 0 but for rounding, which a weak prior would blow up into a shift.
    columns = [terms.gradient - precision * theta]
    if terms.tie is not None:
        columns.append(terms.tie.border)
    right = components.centred(np.stack(columns, axis=1))
    moved = components.centred(solve(_matrix(likelihood, terms, precision), right, LINEAR_TOLERANCE))
    if terms.tie is None:
        return _Step(moved[:, 0], 0.0, float(right[:, 0] @ moved[:, 0]))
    gradient, curvature, border = terms.tie
    tie = float((gradient - border @ moved[:, 0]) / (curvature - border @ moved[:, 1]))
    step = moved[:, 0] - tie * moved[:, 1]
    return _Step(step, tie, float(right[:, 0] @ step) + gradient * tie)
