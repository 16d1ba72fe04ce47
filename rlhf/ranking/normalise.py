"""Strengths on a scale that training can use whatever the annotators and the prior: mean 0 and deviation 1."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def overall_deviation(strengths: FloatArray) -> float:
    """Root mean square of all responses' strengths, which have mean 0 in each pool; Elo points in and out.

    One number for the data set: a pool whose responses are alike keeps its small spread instead of having its noise
    blown up to deviation 1.
    """
    return float(np.sqrt(np.mean(strengths**2)))
