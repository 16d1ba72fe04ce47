"""Posterior mode and covariance of strengths, for any likelihood of differences.

**Posterior mode.** All responses are fitted at once, in however many pools, because a parameter of ties belongs to all
of them. Newton's method maximises

    ln L(θ, τ) - λ Σ_i θ_i² / 2

where the likelihood L sees differences of strengths and τ, and λ is the prior's precision. The likelihood alone has no
maximum where a response never lost, and does not see a shift of a component's strengths; the prior makes the maximum
exist, be unique, and have mean 0 in every component (Caron & Doucet 2012, arXiv:1011.1761, use a prior for the same
reason). ln L must be concave.

**Information.** A comparison of two responses informs their difference alone, so observed information is Σ w_e (e_i -
e_j)(e_i - e_j)ᵀ over pairs: the Laplacian of the graph of compared responses. The prior adds its precision λ to the
diagonal. The shift of all strengths of a connected component is an eigenvector, with eigenvalue λ: no comparison
informs it.

**Covariance**, by Laplace's approximation: the inverse of A, the observed information and prior precision, with the
shift of each connected component projected out. Small components are inverted. Large ones are sampled, in memory linear
in responses and pairs. A response that was never compared is a component of its own, which is all shift, so it keeps
the prior's variance.

Shapes: N responses, E pairs, C components, B components of one size K, R right-hand sides or probes. Strengths are in
nats of log-odds, variances in nats².
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from rlhf.randomness import stream
from rlhf.ranking.comparisons import FloatArray, IntArray, add_up

MAX_NEWTON_STEPS = 300
SMALLEST_STEP = 1e-8
"""In nats. Convergence is quadratic: the error that such a step leaves is far below it."""
LINEAR_TOLERANCE = 1e-8


class TieTerms(NamedTuple):
    """Derivatives of the likelihood by the parameter of ties, τ."""

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
    """``[E]``, none below 0: -∂² ln L / ∂θ² is the Laplacian of the pairs with these weights."""
    tie: TieTerms | None = None
    """None where there is no parameter of ties, or where it is given."""


class Likelihood(Protocol):
    """The probability of the annotators' comparisons, as a function of differences of strengths."""

    count: int
    """N."""
    first: IntArray
    """``[E]``: the first response of each pair."""
    second: IntArray
    """``[E]``: the second."""

    def terms(self, theta: FloatArray, tie: float) -> Terms:
        """Evaluate at strengths θ ``[N]`` and τ."""
        ...


class Posterior(NamedTuple):
    """The maximum, and the curvature there."""

    theta: FloatArray
    """``[N]``, nats; each component has mean 0."""
    tie: float
    """τ"""
    standard_errors: FloatArray
    """``[N]``, nats: of a strength less its component's mean."""


def fit_posterior(likelihood: Likelihood, precision: float, tie: float = 0.0) -> Posterior:
    """Fit the most probable strengths, and standard errors from the observed information there."""
    count, first, second = likelihood.count, likelihood.first, likelihood.second
    theta, tie = most_probable(likelihood, precision, tie)
    terms = likelihood.terms(theta, tie)
    variance = variances(first, second, terms.weights, components_of(count, first, second), precision)
    if terms.tie is not None:
        # The inverse of the bordered matrix [[A, b], [bᵀ, c]] adds (A⁻¹b)² / (c - bᵀA⁻¹b) to the diagonal of A⁻¹.
        matrix = information(count, first, second, terms.weights, precision)
        moved = solve(matrix, terms.tie.border[:, None], LINEAR_TOLERANCE)[:, 0]
        variance = variance + moved**2 / (terms.tie.curvature - terms.tie.border @ moved)
    return Posterior(theta, tie, np.sqrt(variance))


def most_probable(
    likelihood: Likelihood, precision: float, tie: float = 0.0, start: FloatArray | None = None
) -> tuple[FloatArray, float]:
    """Maximise over θ, and over τ where the likelihood has terms for it, from ``start`` ``[N]`` (0) and ``tie``."""
    components = components_of(likelihood.count, likelihood.first, likelihood.second)
    theta = np.zeros(likelihood.count) if start is None else start
    terms = likelihood.terms(theta, tie)
    for _ in range(MAX_NEWTON_STEPS):
        value = terms.value - 0.5 * precision * theta @ theta
        matrix = information(likelihood.count, likelihood.first, likelihood.second, terms.weights, precision)
        columns = [terms.gradient - precision * theta]
        if terms.tie is not None:
            columns.append(terms.tie.border)
        # The sum over a component is 0 but for rounding, which a weak prior would blow up into a shift.
        right = components.centred(np.stack(columns, axis=1))
        moved = components.centred(solve(matrix, right, LINEAR_TOLERANCE))
        step, tie_step = moved[:, 0], 0.0
        if terms.tie is not None:
            gradient, curvature, border = terms.tie
            tie_step = float((gradient - border @ moved[:, 0]) / (curvature - border @ moved[:, 1]))
            step = moved[:, 0] - tie_step * moved[:, 1]
        # Twice the growth of the objective if it were quadratic. Near the maximum it drowns in rounding, and the full
        # step is right.
        promised = float(right[:, 0] @ step) + (0.0 if terms.tie is None else terms.tie.gradient * tie_step)
        slack = 1e-12 * (1.0 + abs(value))
        length = 1.0
        while True:
            candidate, candidate_tie = theta + length * step, tie + length * tie_step
            terms = likelihood.terms(candidate, candidate_tie)
            grown = terms.value - 0.5 * precision * candidate @ candidate
            if grown >= value + 1e-4 * length * promised - slack:  # Armijo's condition
                break
            length /= 2
        theta, tie = candidate, candidate_tie
        largest = max(np.abs(step).max(initial=0.0), abs(tie_step))
        if length * largest < SMALLEST_STEP or promised < 1e-15 * (1.0 + abs(value)):
            return components.centred(theta[:, None])[:, 0], tie
    raise AssertionError("Newton's method converges on a strictly concave objective")


Sparse = Any
"""A ``scipy.sparse.csr_array``, which has no types of its own."""

MAX_CONJUGATE_GRADIENT_STEPS = 2000


class Components(NamedTuple):
    """The connected components of the graph of compared responses."""

    label: IntArray
    """``[N]``: the component of each response."""
    sizes: IntArray
    """``[C]``"""

    def centred(self, values: FloatArray) -> FloatArray:
        """Return values ``[N, R]`` without each component's mean, which is the part along its shift."""
        means = np.stack([add_up(self.label, column, len(self.sizes)) for column in values.T], axis=1)
        return values - (means / self.sizes[:, None])[self.label]


def components_of(count: int, first: IntArray, second: IntArray) -> Components:
    """Return the connected components of ``count`` responses whose pairs ``first``, ``second`` were compared."""
    graph = sparse.coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(count, count))
    number, label = connected_components(graph, directed=False)
    return Components(label.astype(np.int64), np.bincount(label, minlength=number))


def information(count: int, first: IntArray, second: IntArray, weights: FloatArray, precision: float) -> Sparse:
    """Return the Laplacian ``[N, N]`` of the pairs' weights ``[E]``, with λ added to its diagonal."""
    degree = add_up(first, weights, count) + add_up(second, weights, count)
    every = np.arange(count)
    values = np.concatenate([-weights, -weights, degree + precision])
    indices = (np.concatenate([first, second, every]), np.concatenate([second, first, every]))
    return sparse.coo_array((values, indices), shape=(count, count)).tocsr()


def solve(matrix: Sparse, right: FloatArray, tolerance: float) -> FloatArray:
    """Solve for R right-hand sides ``[N, R]`` side by side by conjugate gradients (Hestenes & Stiefel 1952).

    The diagonal preconditions. A column is done where its residual, in the norm of the inverse diagonal, has fallen to
    ``tolerance`` of its first value; after ``MAX_CONJUGATE_GRADIENT_STEPS`` all are, and are directions of ascent as
    well. Memory is linear in N R beside the matrix.
    """
    scale = 1.0 / matrix.diagonal()[:, None]
    solution = np.zeros_like(right)
    residual = right.copy()
    preconditioned = scale * residual
    direction = preconditioned.copy()
    norm = (residual * preconditioned).sum(axis=0)
    enough = tolerance**2 * norm
    for _ in range(MAX_CONJUGATE_GRADIENT_STEPS):
        if (norm <= enough).all():
            break
        image = matrix @ direction
        curvature = (direction * image).sum(axis=0)
        # A column that is done has no direction left.
        length = np.divide(norm, curvature, out=np.zeros_like(norm), where=curvature > 0)
        solution += length * direction
        residual -= length * image
        preconditioned = scale * residual
        before, norm = norm, (residual * preconditioned).sum(axis=0)
        direction *= np.divide(norm, before, out=np.zeros_like(norm), where=before > 0)
        direction += preconditioned
    return solution


LARGEST_DENSE = 1000
"""Responses of the largest component that is inverted: its matrix takes 8 MB."""
ENTRIES_AT_ONCE = 2**22
PROBES = 32
PROBES_AT_ONCE = 16
PROBE_TOLERANCE = 1e-3


def variances(
    first: IntArray, second: IntArray, weights: FloatArray, components: Components, precision: float
) -> FloatArray:
    """Return the variance ``[N]`` of each strength less its component's mean, from the Laplacian's weights ``[E]``."""
    count = len(components.label)
    matrix = information(count, first, second, weights, precision)
    size = components.sizes[components.label]
    variance = np.full(count, 1.0 / precision)
    # Sort by size, so that components of one size follow each other, and within it by component.
    order = np.lexsort((components.label, size))
    for k in np.unique(size[(size > 1) & (size <= LARGEST_DENSE)]).tolist():
        members = order[np.searchsorted(size[order], k, "left") : np.searchsorted(size[order], k, "right")]
        at_once = max(1, ENTRIES_AT_ONCE // k**2) * k
        for start in range(0, len(members), at_once):
            chunk = members[start : start + at_once]
            entries = matrix[chunk][:, chunk].tocoo()
            blocks = np.zeros((len(chunk) // k, k, k))  # [B, K, K]
            blocks[entries.row // k, entries.row % k, entries.col % k] = entries.data
            # The shift is an eigenvector. Its eigenvalue λ may be tiny beside the others: raised by ``lift`` it leaves
            # the rest of the inverse as it is, and nothing large has to cancel.
            lift = np.maximum(np.trace(blocks, axis1=1, axis2=2) / k, precision)
            inverse = np.linalg.inv(blocks + (lift / k)[:, None, None])
            of_shift = 1.0 / (k * (precision + lift))
            variance[chunk] = (np.diagonal(inverse, axis1=1, axis2=2) - of_shift[:, None]).ravel()
    large = size > LARGEST_DENSE
    if large.any():
        inside = large[first]
        place = np.cumsum(large) - 1
        variance[large] = _sampled(place[first[inside]], place[second[inside]], weights[inside], precision)
    return variance


def _sampled(first: IntArray, second: IntArray, weights: FloatArray, precision: float) -> FloatArray:
    """Estimate the variances ``[N]`` of large components by Rao-Blackwellised sampling.

    A random vector z with covariance A is easily drawn: each pair's √w and each prior's √λ with a random sign. So
    x = A⁻¹z has covariance A⁻¹. Of the variance of x_i, 1 / A_ii remains when all other strengths are given;
    the rest is the variance of the mean of x_i given the others, which is x_i - z_i / A_ii, and only that is estimated
    by its mean square over probes (Sidén, Lindgren, Bolin & Villani 2018, arXiv:1705.08656). The relative deviation of
    the rest is about √(2 / probes); in a well-connected graph the rest is small. With the shift projected out of z, in
    a component of n responses, the first part becomes 1 / A_ii - (2 / A_ii - λ / A_ii²) / n.
    """
    count = int(max(first.max(), second.max())) + 1
    components = components_of(count, first, second)
    matrix = information(count, first, second, weights, precision)
    diagonal: FloatArray = matrix.diagonal()
    rng = stream("probes")
    roots = (np.sqrt(weights), np.full(count, np.sqrt(precision)))
    square = np.zeros(count)
    for _ in range(0, PROBES, PROBES_AT_ONCE):
        drawn = np.empty((count, PROBES_AT_ONCE))
        for probe in range(PROBES_AT_ONCE):
            pull, of_prior = (
                root * np.where(rng.integers(0, 2, len(root), dtype=np.int8) == 1, 1.0, -1.0) for root in roots
            )
            drawn[:, probe] = add_up(first, pull, count) - add_up(second, pull, count) + of_prior
        drawn = components.centred(drawn)
        given_others = solve(matrix, drawn, PROBE_TOLERANCE) - drawn / diagonal[:, None]
        square += (given_others**2).sum(axis=1)
    size = components.sizes[components.label]
    return 1.0 / diagonal + square / PROBES - (2.0 / diagonal - precision / diagonal**2) / size
