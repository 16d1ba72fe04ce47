"""Information matrices of strengths: graph Laplacians with the prior's precision on the diagonal.

A comparison of two responses informs their difference alone, so observed information is Σ w_e (e_i - e_j)(e_i - e_j)ᵀ
over pairs: the Laplacian of the graph of who was compared with whom. The prior adds its precision λ to the diagonal.
The shift of all strengths of a connected component is an eigenvector, with eigenvalue λ: no comparison informs it.

Shapes: N responses, E pairs, R right-hand sides, C components. Strengths are in nats of log-odds.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from rlhf.ranking.comparisons import FloatArray, IntArray, add_up

Sparse = Any
"""A ``scipy.sparse.csr_array``, which has no types of its own."""

MAX_CONJUGATE_GRADIENT_STEPS = 2000


class Components(NamedTuple):
    """Which responses a chain of comparisons joins."""

    label: IntArray
    """``[N]``: the component of each response."""
    sizes: IntArray
    """``[C]``"""

    def centred(self, values: FloatArray) -> FloatArray:
        """``[N, R]``: without each component's mean, which is the part along its shift."""
        means = np.stack([add_up(self.label, column, len(self.sizes)) for column in values.T], axis=1)
        return values - (means / self.sizes[:, None])[self.label]


def components_of(count: int, first: IntArray, second: IntArray) -> Components:
    """The connected components of ``count`` responses whose pairs ``first``, ``second`` were compared."""
    graph = sparse.coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(count, count))
    number, label = connected_components(graph, directed=False)
    return Components(label.astype(np.int64), np.bincount(label, minlength=number))


def information(count: int, first: IntArray, second: IntArray, weights: FloatArray, precision: float) -> Sparse:
    """``[N, N]``, sparse: the Laplacian of the pairs' weights ``[E]``, and λ on the diagonal."""
    degree = add_up(first, weights, count) + add_up(second, weights, count)
    every = np.arange(count)
    return sparse.coo_array(
        (
            np.concatenate([-weights, -weights, degree + precision]),
            (np.concatenate([first, second, every]), np.concatenate([second, first, every])),
        ),
        shape=(count, count),
    ).tocsr()


def solve(matrix: Sparse, right: FloatArray, tolerance: float) -> FloatArray:
    """``[N, R]``: conjugate gradients (Hestenes & Stiefel 1952) for R right-hand sides side by side.

    The diagonal preconditions. A column is done where its residual, in the norm of the inverse diagonal, has fallen to
    ``tolerance`` of what it was; after ``MAX_CONJUGATE_GRADIENT_STEPS`` all are, and are directions of ascent as well.
    Memory is linear in N R beside the matrix.
    """
    scale = 1.0 / matrix.diagonal()[:, None]
    found = np.zeros_like(right)
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
        found += length * direction
        residual -= length * image
        preconditioned = scale * residual
        before, norm = norm, (residual * preconditioned).sum(axis=0)
        direction *= np.divide(norm, before, out=np.zeros_like(norm), where=before > 0)
        direction += preconditioned
    return found
