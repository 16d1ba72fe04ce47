import time
import tracemalloc

import numpy as np
import pytest
from scipy.stats import binom

from rlhf.ranking import uncertainty
from rlhf.ranking.bradley_terry import TIE_MODELS, PairLikelihood, TieModel, fit
from rlhf.ranking.comparisons import FloatArray, IntArray
from rlhf.ranking.uncertainty import components_of, information, most_probable, solve, variances
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


@pytest.mark.parametrize("at_once", [1, 5000, 2**22])
def test_components_are_exact_up_to_the_largest_that_is_inverted_however_many_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of 60 where 60 is the largest, in chunks of one and of all."""
    monkeypatch.setattr(uncertainty, "LARGEST_DENSE", 60)
    monkeypatch.setattr(uncertainty, "ENTRIES_AT_ONCE", at_once)
    rng = np.random.default_rng(1)
    count, first, second = several_components(rng)
    weights = rng.exponential(1, len(first))
    found = variances(first, second, weights, components_of(count, first, second), 0.3)
    np.testing.assert_allclose(found, slow_variances(count, first, second, weights, 0.3), rtol=1e-9)


def test_large_components_are_sampled_beside_small_ones_that_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of 60, mixed up among the others, come near their own variances, and the others to theirs."""
    monkeypatch.setattr(uncertainty, "LARGEST_DENSE", 59)
    monkeypatch.setattr(uncertainty, "PROBES", 320)
    rng = np.random.default_rng(2)
    count, first, second = several_components(rng)
    weights = rng.uniform(0.5, 1.5, len(first))
    components = components_of(count, first, second)
    ratio = variances(first, second, weights, components, 0.3) / slow_variances(count, first, second, weights, 0.3)
    large = components.sizes[components.label] == 60
    np.testing.assert_allclose(ratio[~large], 1, rtol=1e-9)
    assert ratio[large].mean() == pytest.approx(1, abs=0.01)
    assert np.sqrt(np.mean((ratio[large] - 1) ** 2)) < 0.03
    assert (ratio[large] != 1).all()


def test_conjugate_gradients_solve_each_right_hand_side_to_its_tolerance() -> None:
    """Against the dense solution; one that is 0 is solved by 0, beside one that is a billion times another."""
    rng = np.random.default_rng(0)
    first, second = random_pairs(rng, 40, 200)
    matrix = information(40, first, second, rng.exponential(1, 200), 0.01)
    right = rng.normal(size=(40, 4)) * [1.0, 0.0, 1e9, 1.0]
    expected = np.linalg.solve(matrix.toarray(), right)
    diagonal = matrix.diagonal()[:, None]
    for tolerance in (1e-2, 1e-6):
        found = solve(matrix, right, tolerance)
        residual = (((matrix @ found - right) ** 2 / diagonal).sum(axis=0)) ** 0.5
        whole = ((right**2 / diagonal).sum(axis=0)) ** 0.5
        assert (residual <= 1.01 * tolerance * whole).all()
        assert (residual[[0, 2, 3]] > 1e-4 * tolerance * whole[[0, 2, 3]]).all(), "no more is done than is asked for"
    np.testing.assert_allclose(solve(matrix, right, 1e-12), expected, rtol=1e-6, atol=1e-12)


def test_wherever_the_search_starts_the_maximum_is_the_same() -> None:
    """Far from it, Newton's full step would go astray."""
    rng = np.random.default_rng(0)
    said = drawn(rng, np.linspace(-300, 300, 8), *random_pairs(rng, 8, 100), "davidson", 1.5)
    likelihood = PairLikelihood(8, said, "davidson", fits_tie=True)
    theta, tie = most_probable(likelihood, 0.5, 0.5)
    for start, first_tie in ((20 * rng.normal(size=8), 3.0), (np.full(8, 7.0), -4.0)):
        other, other_tie = most_probable(likelihood, 0.5, first_tie, start)
        np.testing.assert_allclose(other, theta, atol=1e-8)
        assert other_tie == pytest.approx(tie, abs=1e-8)


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
    monkeypatch.setattr(uncertainty, "LARGEST_DENSE", 100)
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
