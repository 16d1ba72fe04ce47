import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.ranking.normalise import FloatArray, normalise, overall_deviation

sets = st.lists(
    st.lists(st.integers(-500, 500), min_size=2, max_size=6).map(lambda values: np.array(values, dtype=float)),
    min_size=1,
    max_size=8,
).filter(lambda sets: overall_deviation(sets) > 0)


def whole(strengths: list[FloatArray]) -> FloatArray:
    deviation = overall_deviation(strengths)
    return np.concatenate([normalise(elo, deviation) for elo in strengths])


@given(sets)
def test_the_whole_data_set_has_mean_0_and_deviation_1(strengths: list[FloatArray]) -> None:
    """And so has every set mean 0."""
    normalised = whole(strengths)
    assert normalised.mean() == pytest.approx(0, abs=1e-9)
    assert normalised.std() == pytest.approx(1)
    for elo in strengths:
        assert normalise(elo, 1.0).mean() == pytest.approx(0, abs=1e-9)


@given(sets, st.floats(-1000, 1000), st.floats(0.1, 10))
def test_shifting_any_set_or_stretching_all_changes_nothing(
    strengths: list[FloatArray], shift: float, stretch: float
) -> None:
    """The level of a set and the unit of the scale are arbitrary."""
    changed = [elo * stretch + shift * index for index, elo in enumerate(strengths)]
    np.testing.assert_allclose(whole(changed), whole(strengths), atol=1e-6)


def test_a_set_of_alike_responses_stays_alike() -> None:
    """A set's small spread must not be blown up to deviation 1."""
    alike, apart = np.array([1.0, -1.0]), np.array([300.0, -300.0])
    deviation = overall_deviation([alike, apart])
    assert np.ptp(normalise(alike, deviation)) / np.ptp(normalise(apart, deviation)) == pytest.approx(1 / 300)
