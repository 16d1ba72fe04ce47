"""Strengths on a scale that training can use whatever the annotators and the prior.

Shapes: N responses of all sets.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from rlhf.ranking.bradley_terry import ELO_SCALE, Strengths, sigmoid
from rlhf.ranking.comparisons import Comparisons, FloatArray, IntArray, add_up
from rlhf.ranking.information import components_of

Normalisation = Literal["dataset", "prompt", "annotator", "probability"]


class Normalised(NamedTuple):
    """Strengths as they are learned from."""

    strengths: FloatArray
    """``[N]``: of mean 0 in each pool, or probabilities."""
    standard_errors: FloatArray
    """``[N]``, in the same unit."""


def overall_deviation(strengths: FloatArray) -> float:
    """Root mean square of all responses' strengths, which have mean 0 in each pool; Elo points in and out.

    One number for the data set: a pool whose responses are alike keeps its small spread instead of having its noise
    blown up to deviation 1.
    """
    return float(np.sqrt(np.mean(strengths**2)))


def normalised(how: Normalisation, strengths: Strengths, pools: IntArray, deviation: float) -> Normalised:
    """Bring strengths onto the scale that is asked for.

    pools      ``[N]``: the pool of each response
    deviation  that of the training sets, in Elo points, for held-out ones too

    ``prompt`` divides each pool by its own deviation; one whose responses are all alike stays 0. ``probability`` is
    that of being preferred to a response of its pool's mean strength, σ(c θ), with errors to first order.
    """
    if how == "probability":
        probability = sigmoid(ELO_SCALE * strengths.elo)
        slope = ELO_SCALE * probability * (1 - probability)
        return Normalised(probability, slope * strengths.standard_errors)
    if how == "prompt":
        count = int(pools.max(initial=-1)) + 1
        mean_square = add_up(pools, strengths.elo**2, count) / np.maximum(np.bincount(pools, minlength=count), 1)
        scale = np.where(mean_square > 0, np.sqrt(mean_square), deviation)[pools]
        return Normalised(strengths.elo / scale, strengths.standard_errors / scale)
    return Normalised(strengths.elo / deviation, strengths.standard_errors / deviation)


def with_partial_views(count: int, comparisons: Comparisons) -> IntArray:
    """Return the annotators, :data:`~rlhf.ranking.comparisons.NOBODY` among them, who compared a part alone.

    That is some of the responses that a chain of anybody's comparisons joins, and not all. Their own strengths have
    mean 0 over that part, so a mean over annotators would put a good part level with a bad one.
    """
    label = components_of(count, comparisons.first, comparisons.second).label
    compared, annotator = np.concatenate([comparisons.first, comparisons.second]), np.tile(comparisons.annotator, 2)
    sizes = np.bincount(label[np.unique(compared)], minlength=count)
    views = np.unique(np.stack([annotator, label[compared], compared]), axis=1)[:2]
    (annotators, labels), seen = np.unique(views, axis=1, return_counts=True)
    return np.unique(annotators[seen < sizes[labels]])


def fit_each_annotator(count: int, comparisons: Comparisons, fit: Callable[[int, Comparisons], Strengths]) -> Strengths:
    """The mean, over the annotators who compared a response, of their own strengths brought to one deviation.

    So an annotator who sees everything as black or white counts no more than one of fine shades. What is nobody's,
    winners and bridges, counts as one annotator more. The mean is scaled back to the annotators' usual deviation;
    errors take annotators as independent. A response that nobody compared has strength 0, as in any fit, and the
    largest error. Right where nobody is :func:`with_partial_views`.

    fit  gives the strengths of so many responses
    """
    annotator = comparisons.annotator - comparisons.annotator.min(initial=0)
    seen = np.concatenate([annotator * count + comparisons.first, annotator * count + comparisons.second])
    nodes, place = np.unique(seen, return_inverse=True)
    first, second = np.split(place, 2)
    found = fit(len(nodes), comparisons._replace(first=first, second=second))
    of_annotator, response = nodes // count, nodes % count

    people = int(of_annotator.max(initial=-1)) + 1
    number = np.maximum(np.bincount(of_annotator, minlength=people), 1)
    deviation = np.sqrt(add_up(of_annotator, found.elo**2, people) / number)
    usual = float(np.sqrt(np.mean(deviation[deviation > 0] ** 2))) if deviation.any() else 1.0
    scale = usual / np.where(deviation > 0, deviation, usual)[of_annotator]
    times = np.bincount(response, minlength=count)
    elo = add_up(response, found.elo * scale, count) / np.maximum(times, 1)
    error = np.sqrt(add_up(response, (found.standard_errors * scale) ** 2, count)) / np.maximum(times, 1)
    return Strengths(elo, np.where(times > 0, error, found.standard_errors.max(initial=0.0)), found.tie_parameter)
