"""Bradley-Terry strengths with a Gaussian prior, on the Elo scale.

The model (Bradley & Terry 1952, Biometrika 39:324, in logistic form): response i beats j with probability
σ(c (θ_i - θ_j)), where θ are strengths in Elo points and c = ln(10) / 400, so that 400 points are odds of ten to one.
The strengths maximise

    Σ_{i,j} W_ij ln σ(c (θ_i - θ_j)) - Σ_i θ_i² / (2 s²)

W_ij is how often i beat j and s the prior's deviation. The likelihood alone has no maximum where a response never
lost, and does not see a shift of all strengths; the prior makes the maximum exist, be unique, and have mean 0 (Caron &
Doucet 2012, arXiv:1011.1761, use a prior for the same reason).

Shapes: B independent sets, K responses of each.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

ELO_SCALE = math.log(10) / 400
"""Nats of log-odds per Elo point."""

GRADIENT_TOLERANCE = 1e-10
MAX_NEWTON_STEPS = 100


class Strengths(NamedTuple):
    """Strengths and how well they are known."""

    elo: FloatArray
    """``[B, K]``, Elo points; each set has mean 0."""
    standard_errors: FloatArray
    """``[B, K]``, Elo points: of a strength relative to the mean of its set."""


def fit(wins: FloatArray, prior_elo: float) -> Strengths:
    """Find the strengths of B independent sets at once, by Newton's method.

    Standard errors are those of Laplace's approximation: the inverse of Fisher information and prior precision, with
    the common shift projected out, which no comparison informs. They take comparisons as independent; one annotator's
    comparisons of K responses are less than that, so the errors are lower bounds.

    Args:
        wins: ``[B, K, K]``, how often i beat j; the diagonal is 0.
        prior_elo: s, in Elo points; greater than 0.

    """
    sets, size, _ = wins.shape
    precision = 1.0 / (ELO_SCALE * prior_elo) ** 2
    theta = np.zeros((sets, size))  # in nats throughout
    value = _objective(theta, wins, precision)
    for _ in range(MAX_NEWTON_STEPS):
        gradient = _gradient(theta, wins, precision)
        if np.abs(gradient).max(initial=0.0) < GRADIENT_TOLERANCE * max(1.0, wins.sum(axis=2).max(initial=0.0)):
            break
        information = _information(theta, wins, precision)
        step = np.linalg.solve(information, gradient[..., None])[..., 0].astype(np.float64)
        theta, value = _line_search(theta, step, value, gradient, wins, precision)
    else:
        raise AssertionError("Newton's method converges on a strictly concave objective")
    covariance = np.linalg.inv(_information(theta, wins, precision))
    # All-ones is an eigenvector of the covariance with value 1 / precision: projecting it out leaves the set's centre
    # fixed.
    variance = np.diagonal(covariance, axis1=1, axis2=2) - 1.0 / (precision * size)
    theta -= theta.mean(axis=1, keepdims=True)
    return Strengths(theta / ELO_SCALE, np.sqrt(np.maximum(variance, 0.0)) / ELO_SCALE)


def _line_search(
    theta: FloatArray, step: FloatArray, value: FloatArray, gradient: FloatArray, wins: FloatArray, precision: float
) -> tuple[FloatArray, FloatArray]:
    """Halve each set's Newton step until its objective grows (Armijo's condition); a far start would overshoot."""
    length = np.ones(len(theta))
    promised = (gradient * step).sum(axis=1)
    # Near the maximum the promised growth drowns in rounding, and the full step is right.
    slack = 1e-12 * (1.0 + np.abs(value))
    while True:
        candidate = theta + length[:, None] * step
        candidate_value = _objective(candidate, wins, precision)
        short = candidate_value < value + 1e-4 * length * promised - slack
        if not short.any():
            return candidate, candidate_value
        length[short] /= 2


def _objective(theta: FloatArray, wins: FloatArray, precision: float) -> FloatArray:
    """``[B]``: log-posterior up to a constant, in nats."""
    difference = theta[:, :, None] - theta[:, None, :]
    likelihood = -(wins * np.logaddexp(0.0, -difference)).sum(axis=(1, 2))
    return likelihood - 0.5 * precision * (theta**2).sum(axis=1)


def _gradient(theta: FloatArray, wins: FloatArray, precision: float) -> FloatArray:
    """``[B, K]``: wins less expected wins, less the prior's pull."""
    compared = wins + wins.transpose(0, 2, 1)
    return (wins - compared * _win_probability(theta)).sum(axis=2) - precision * theta


def _information(theta: FloatArray, wins: FloatArray, precision: float) -> FloatArray:
    """``[B, K, K]``: Fisher information (observed and expected are the same here) plus the prior's precision."""
    probability = _win_probability(theta)
    weight = (wins + wins.transpose(0, 2, 1)) * probability * (1.0 - probability)
    information = -weight
    diagonal = np.arange(theta.shape[1])
    information[:, diagonal, diagonal] += weight.sum(axis=2) + precision
    return information


def _win_probability(theta: FloatArray) -> FloatArray:
    """``[B, K, K]``: σ(θ_i - θ_j), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * (theta[:, :, None] - theta[:, None, :])))


def fit_each(wins: list[FloatArray], prior_elo: float) -> list[tuple[FloatArray, FloatArray]]:
    """Strengths and standard errors, ``[K]`` each and in Elo points, of sets of different sizes, in their order."""
    fitted: dict[int, tuple[FloatArray, FloatArray]] = {}
    for size in {len(matrix) for matrix in wins}:
        indices = [index for index, matrix in enumerate(wins) if len(matrix) == size]
        for index, elo, error in zip(indices, *fit(np.stack([wins[i] for i in indices]), prior_elo), strict=True):
            fitted[index] = (elo, error)
    return [fitted[index] for index in range(len(wins))]
