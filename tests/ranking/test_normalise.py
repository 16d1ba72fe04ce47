import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.ranking.normalise import FloatArray, overall_deviation

pools = st.lists(
    st.lists(st.integers(-500, 500), min_size=2, max_size=6).map(
        lambda values: np.array(values, dtype=np.float64) - sum(values) / len(values)
    ),
    min_size=1,
    max_size=8,
).filter(lambda pools: overall_deviation(np.concatenate(pools)) > 1e-6)


@given(pools)
def test_divided_by_it_the_whole_data_set_has_mean_0_and_deviation_1(strengths: list[FloatArray]) -> None:
    """Pools have mean 0 already, so one number is enough."""
    elo = np.concatenate(strengths)
    normalised = elo / overall_deviation(elo)
    assert normalised.mean() == pytest.approx(0, abs=1e-9)
    assert normalised.std() == pytest.approx(1)


@given(pools, st.floats(0.1, 10))
def test_stretching_all_strengths_changes_nothing(strengths: list[FloatArray], stretch: float) -> None:
    """The unit of the scale, and with it the prior's width to first order, is arbitrary."""
    elo = np.concatenate(strengths)
    stretched = elo * stretch
    np.testing.assert_allclose(stretched / overall_deviation(stretched), elo / overall_deviation(elo), atol=1e-9)


def test_a_pool_of_alike_responses_stays_alike() -> None:
    """A pool's small spread must not be blown up to deviation 1."""
    alike, apart = np.array([1.0, -1.0]), np.array([300.0, -300.0])
    deviation = overall_deviation(np.concatenate([alike, apart]))
    assert np.ptp(alike / deviation) < 0.01
    assert deviation == pytest.approx(np.sqrt((1 + 300**2) / 2))
