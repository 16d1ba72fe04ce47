import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.ranking.bradley_terry import Strengths, fit
from rlhf.ranking.comparisons import NOBODY, Comparisons, FloatArray, compare, join, renumber
from rlhf.ranking.normalise import fit_each_annotator, overall_deviation, with_partial_views

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


def test_each_annotator_counts_alike_whatever_their_spread() -> None:
    """Two who agree and a third, who compared ten times as often, against them: the two win."""
    quiet = [compare(2, winners=[[0, 1, 1], [0, 1, 1]])._replace(annotator=np.full(2, who)) for who in (0, 1)]
    loud = compare(2, winners=[[1, 0, 1]] * 20)._replace(annotator=np.full(20, 2))

    def with_prior(count: int, comparisons: Comparisons) -> Strengths:
        return fit(count, comparisons, 200.0)

    together = join([*quiet, loud])
    assert with_prior(2, together).elo[0] < 0
    each = fit_each_annotator(3, together, with_prior)
    assert each.elo[0] == pytest.approx(-each.elo[1])
    assert each.elo[0] > 0
    assert each.elo[2] == 0
    assert each.standard_errors[2] == each.standard_errors.max()


def test_one_annotator_alone_is_an_ordinary_fit() -> None:
    """Brought to the usual deviation, which is then theirs."""
    said = compare(3, ratings=[[1.0], [2.0], [2.0]])
    one = fit_each_annotator(3, said, lambda count, comparisons: fit(count, comparisons, 200.0))
    np.testing.assert_allclose(one.elo, fit(3, said, 200.0).elo, atol=1e-9)
    np.testing.assert_allclose(one.standard_errors, fit(3, said, 200.0).standard_errors, atol=1e-9)


def test_annotators_who_saw_a_part_of_what_others_join_are_named() -> None:
    """Windows of a chain, a rating left out, winners of one pair beside ratings; two sets of two crowds are whole."""
    windows = compare(4, ratings=[[4, None], [3, 3], [None, 2], [None, 1]])
    assert with_partial_views(4, windows).tolist() == [0, 1]
    assert with_partial_views(3, compare(3, ratings=[[1, 2], [2, 3], [3, None]])).tolist() == [1]
    assert with_partial_views(3, compare(3, ratings=[[1], [2], [3]], winners=[[0, 1, 1]])).tolist() == [NOBODY]
    whole = compare(3, ratings=[[1, 2], [2, 2], [3, 1]])
    other = renumber(compare(2, ratings=[[1], [2]])._replace(annotator=np.array([1])), np.array([3, 4]))
    assert with_partial_views(6, join([whole, other])).tolist() == []
