"""Variances of strengths about the mean of their component: the diagonal of an inverse that is not kept.

Laplace's approximation: the covariance of strengths is the inverse of A, their observed information and prior precision
(:mod:`rlhf.ranking.information`), with the shift of each connected component projected out, which no comparison
informs. Small components are inverted. Large ones are sampled, in memory linear in responses and pairs.

A response that nobody compared is a component of its own. Nothing is left of it without its shift, so it keeps the
prior's variance.

Shapes: N responses, E pairs, B components of one size K, R probes. Variances are in nats².
"""

import numpy as np

from rlhf.randomness import stream
from rlhf.ranking.comparisons import FloatArray, IntArray, add_up
from rlhf.ranking.information import Components, Sparse, components_of, information, solve

LARGEST_DENSE = 1000
"""Responses of the largest component that is inverted: one matrix of it is 8 MB."""
ENTRIES_AT_ONCE = 2**22
PROBES = 32
PROBES_AT_ONCE = 16
PROBE_TOLERANCE = 1e-3


def variances(
    first: IntArray, second: IntArray, weights: FloatArray, components: Components, precision: float
) -> FloatArray:
    """``[N]``: the variance of each strength less its component's mean; weights ``[E]`` are those of the Laplacian."""
    count = len(components.label)
    matrix = information(count, first, second, weights, precision)
    size = components.sizes[components.label]
    found = np.full(count, 1.0 / precision)
    # Components of one size stand one after the other, and their members together.
    order = np.lexsort((components.label, size))
    for k in np.unique(size):
        members = order[np.searchsorted(size[order], k, "left") : np.searchsorted(size[order], k, "right")]
        if 1 < k <= LARGEST_DENSE:
            some = max(1, ENTRIES_AT_ONCE // int(k) ** 2) * int(k)
            for start in range(0, len(members), some):
                chunk = members[start : start + some]
                found[chunk] = _inverted(matrix[chunk][:, chunk], int(k), precision)
    large = size > LARGEST_DENSE
    if large.any():
        inside = large[first]
        place = np.cumsum(large) - 1
        found[large] = _sampled(place[first[inside]], place[second[inside]], weights[inside], precision)
    return found


def _inverted(matrix: Sparse, size: int, precision: float) -> FloatArray:
    """``[B K]``: exact, from dense inverses of the B blocks, of ``size`` responses each, that ``matrix`` is."""
    entries = matrix.tocoo()
    dense = np.zeros((matrix.shape[0] // size, size, size))
    dense[entries.row // size, entries.row % size, entries.col % size] = entries.data
    # The shift is an eigenvector. Its eigenvalue λ may be tiny beside the others: raised by ``lift`` it leaves the rest
    # of the inverse as it is, and nothing large has to cancel.
    lift = np.maximum(np.trace(dense, axis1=1, axis2=2) / size, precision)
    inverse = np.linalg.inv(dense + (lift / size)[:, None, None])
    of_shift = 1.0 / (size * (precision + lift))
    return (np.diagonal(inverse, axis1=1, axis2=2) - of_shift[:, None]).ravel()


def _sampled(first: IntArray, second: IntArray, weights: FloatArray, precision: float) -> FloatArray:
    """``[N]``: an estimate for large components, by Rao-Blackwellised sampling.

    A random vector z with covariance A is easily drawn: each pair's √w and each prior's √λ with a random sign. So
    x = A⁻¹z has covariance A⁻¹. Of the variance of x_i, 1 / A_ii is what is left when all other strengths are given;
    the rest is the variance of what they make x_i, which is x_i - z_i / A_ii, and only that is estimated by its mean
    square over probes (Sidén, Lindgren, Bolin & Villani 2018, arXiv:1705.08656). The relative deviation of
    the rest is about √(2 / probes); in a well-connected graph the rest is small. With the shift projected out of z, in
    a component of n responses, the first part becomes 1 / A_ii - (2 / A_ii - λ / A_ii²) / n.
    """
    count = int(max(first.max(), second.max())) + 1
    components = components_of(count, first, second)
    matrix = information(count, first, second, weights, precision)
    diagonal: FloatArray = matrix.diagonal()
    rng = stream("probes")
    root = np.sqrt(weights)
    square = np.zeros(count)
    for _ in range(0, PROBES, PROBES_AT_ONCE):
        drawn = np.empty((count, PROBES_AT_ONCE))
        for probe in range(PROBES_AT_ONCE):
            pull = root * _signs(rng, len(root))
            of_prior = np.sqrt(precision) * _signs(rng, count)
            drawn[:, probe] = add_up(first, pull, count) - add_up(second, pull, count) + of_prior
        drawn = components.centred(drawn)
        given_others = solve(matrix, drawn, PROBE_TOLERANCE) - drawn / diagonal[:, None]
        square += (given_others**2).sum(axis=1)
    size = components.sizes[components.label]
    return 1.0 / diagonal + square / PROBES - (2.0 / diagonal - precision / diagonal**2) / size


def _signs(rng: np.random.Generator, count: int) -> FloatArray:
    return np.where(rng.integers(0, 2, count, dtype=np.int8) == 1, 1.0, -1.0)
