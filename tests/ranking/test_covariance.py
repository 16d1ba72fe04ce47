import time
import tracemalloc

import numpy as np
import pytest
from scipy.stats import binom

from rlhf.ranking import covariance
from rlhf.ranking.bradley_terry import TIE_MODELS, TieModel, fit
from rlhf.ranking.comparisons import FloatArray, IntArray
from rlhf.ranking.covariance import variances
from rlhf.ranking.information import components_of, information
from tests.ranking.drawn import drawn, random_pairs


def slow_variances(count: int, first: IntArray, second: IntArray, weights: FloatArray, precision: float) -> FloatArray:
    """The diagonal of a dense inverse, less the part along each component's shift."""
    inverse = np.linalg.inv(information(count, first, second, weights, precision).toarray())
    components = components_of(count, first, second)
    size = components.sizes[components.label]
    return np.diag(inverse) - np.where(size > 1, 1 / (precision * size), 0)


def several_components(rng: np.random.Generator) -> tuple[int, IntArray, IntArray]:
    """Sizes 60, 60, 25, twenty times 2, and 3 responses alone, in no order."""
    pairs, start = list[tuple[IntArray, IntArray]](), 0
    for size, edges in ((60, 300), (60, 300), (25, 60), *[(2, 1)] * 20):
        first, second = random_pairs(rng, size, edges)
        path = np.arange(size - 1)
        pairs.append((start + np.append(first, path), start + np.append(second, path + 1)))
        start += size
    order = rng.permutation(start + 3)
    first, second = (order[np.concatenate(column)] for column in zip(*pairs, strict=True))
    return start + 3, first, second


def test_small_components_are_exact_and_keep_their_places() -> None:
    """Components of several sizes, mixed up among each other, against one dense inverse."""
    rng = np.random.default_rng(0)
    count, first, second = several_components(rng)
    weights = rng.exponential(1, len(first))
    found = variances(first, second, weights, components_of(count, first, second), 0.3)
    np.testing.assert_allclose(found, slow_variances(count, first, second, weights, 0.3), rtol=1e-9)


def test_a_prior_that_says_next_to_nothing_costs_no_digits() -> None:
    """Then the shift's variance is a billion times the others': they are those of the pseudo-inverse."""
    rng = np.random.default_rng(0)
    first, second = random_pairs(rng, 30, 200)
    weights = rng.exponential(1, 200)
    found = variances(first, second, weights, components_of(30, first, second), 1e-12)
    laplacian = information(30, first, second, weights, 0.0).toarray()
    np.testing.assert_allclose(found, np.diag(np.linalg.pinv(laplacian)), rtol=1e-8)


@pytest.mark.parametrize("shape", ["random", "path"])
@pytest.mark.parametrize("precision", [1.0, 1e-3])
def test_large_components_are_estimated_without_bias(
    shape: str, precision: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On average right to a few per cent; single ones within some 2 % in a well-connected graph, 25 % on a path."""
    monkeypatch.setattr(covariance, "LARGEST_DENSE", 100)
    rng = np.random.default_rng(0)
    if shape == "random":
        first, second = random_pairs(rng, 400, 4000)
    else:
        first, second = np.arange(399), np.arange(1, 400)
    weights = rng.uniform(0.5, 1.5, len(first))
    found = variances(first, second, weights, components_of(400, first, second), precision)
    ratio = found / slow_variances(400, first, second, weights, precision)
    assert ratio.mean() == pytest.approx(1, abs=0.01 if shape == "random" else 0.1)
    assert np.sqrt(np.mean((ratio - 1) ** 2)) < (0.03 if shape == "random" else 0.3)


@pytest.mark.parametrize("model", TIE_MODELS)
def test_strengths_of_a_large_graph_lie_within_their_intervals(model: TieModel) -> None:
    """In one component of 4,000 responses, 19 of 20 lie in their sampled 95 % intervals.

    The strengths are drawn from the prior. Neighbours share about a tenth of their variance, so the responses count as
    half as many independent ones, which the bound allows for.
    """
    rng = np.random.default_rng(2)
    count = 4000
    truth = rng.normal(0, 200, count)
    truth -= truth.mean()
    said = drawn(rng, truth, *random_pairs(rng, count, 10 * count), model, parameter=1.5)
    found = fit(count, said, 200.0, model)
    inside = np.abs(found.elo - truth) < 1.96 * found.standard_errors
    low, high = binom.ppf([0.001, 0.999], count // 2, 0.95) / (count // 2)
    assert low <= inside.mean() <= high


def test_twenty_thousand_responses_are_fitted_in_seconds_and_little_memory() -> None:
    """200,000 comparisons: memory is linear, where one 20,000 by 20,000 matrix alone would be 3.2 GB."""
    count, comparisons = 20_000, 200_000
    rng = np.random.default_rng(3)
    truth = rng.normal(0, 200, count)
    said = drawn(rng, truth, *random_pairs(rng, count, comparisons))
    start = time.process_time()
    tracemalloc.start()
    elo = fit(count, said, 200.0).elo
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.process_time() - start < 20
    assert peak < 100e6
    assert np.corrcoef(elo, truth)[0, 1] > 0.85
