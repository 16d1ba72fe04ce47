import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.ranking.bradley_terry import ELO_SCALE, Strengths, fit, sigmoid
from rlhf.ranking.comparisons import NOBODY, Comparisons, FloatArray, compare, join, renumber
from rlhf.ranking.scales import fit_each_annotator, normalised, overall_deviation, with_partial_views

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
    # Whichever of a pair comes first.
    both_ways = compare(3, ratings=[[1], [2], [3]], winners=[[0, 1, 1], [1, 0, 1]])
    assert with_partial_views(3, both_ways).tolist() == [NOBODY]
    whole = compare(3, ratings=[[1, 2], [2, 2], [3, 1]])
    other = renumber(compare(2, ratings=[[1], [2]])._replace(annotator=np.array([1])), np.array([3, 4]))
    assert with_partial_views(6, join([whole, other])).tolist() == []


ELO = Strengths(np.array([30.0, -30.0, 0.0, 0.0, 5.0, -1.0, -4.0]), np.arange(1.0, 8.0), None)
POOLS = np.array([0, 0, 1, 1, 2, 2, 2])


def test_elo_points_and_errors_are_divided_by_the_data_sets_deviation() -> None:
    """The one that is given, which for held-out sets is not their own."""
    found = normalised("dataset", ELO, POOLS, 20.0)
    np.testing.assert_allclose(found.strengths, ELO.elo / 20)
    np.testing.assert_allclose(found.standard_errors, ELO.standard_errors / 20)


def test_each_pool_is_divided_by_its_own_deviation_and_one_of_alike_responses_by_the_data_sets() -> None:
    """The square root of the mean square: 30, none, and that of (25 + 1 + 16) / 3; so for the errors."""
    found = normalised("prompt", ELO, POOLS, 20.0)
    scale = np.array([30, 30, 20, 20, *[np.sqrt(14)] * 3])
    np.testing.assert_allclose(found.strengths, ELO.elo / scale)
    np.testing.assert_allclose(found.standard_errors, ELO.standard_errors / scale)
    nothing = normalised("prompt", Strengths(np.zeros(0), np.zeros(0), None), np.zeros(0, np.int64), 20.0)
    assert len(nothing.strengths) == len(nothing.standard_errors) == 0


def test_probabilities_have_errors_by_their_slope() -> None:
    """Against an equal of the pool's mean; the slope is taken by a difference in float64."""
    found = normalised("probability", ELO, POOLS, 20.0)
    slope = (sigmoid(ELO_SCALE * (ELO.elo + 1e-4)) - sigmoid(ELO_SCALE * (ELO.elo - 1e-4))) / 2e-4
    np.testing.assert_allclose(found.strengths, 1 / (1 + 10 ** (-ELO.elo / 400)))
    np.testing.assert_allclose(found.standard_errors, slope * ELO.standard_errors, rtol=1e-6)


def test_the_mean_over_annotators_is_that_of_their_own_fits_at_one_deviation() -> None:
    """Fitted one annotator at a time: who sees no difference keeps none; winners are an annotator more."""
    ratings = [
        [3, 1, 2, None],
        [1, 1, 2, None],
        [0, 2, 2, None],
        [None, None, None, 1],
        [None, None, None, 0],
        [None] * 4,
    ]
    said = compare(6, ratings=ratings, winners=[[0, 1, 1], [0, 1, 1], [1, 2, 0]])

    def with_prior(count: int, comparisons: Comparisons) -> Strengths:
        return fit(count, comparisons, 200.0)

    alone: list[tuple[list[int], Strengths]] = []
    for who in (NOBODY, 0, 1, 2, 3):
        mine = said.rows(said.annotator == who)
        seen = sorted({*mine.first.tolist(), *mine.second.tolist()})
        place = np.array([seen.index(response) if response in seen else -1 for response in range(6)])
        alone.append((seen, with_prior(len(seen), renumber(mine, place))))
    deviations = [overall_deviation(own.elo) for _, own in alone]
    usual = np.sqrt(np.mean([deviation**2 for deviation in deviations if deviation > 0]))
    found = fit_each_annotator(6, said, with_prior)
    for response in range(5):
        elo, squares = [], []
        for (seen, own), deviation in zip(alone, deviations, strict=True):
            if response in seen:
                scale = usual / deviation if deviation > 0 else 1.0
                elo.append(scale * own.elo[seen.index(response)])
                squares.append((scale * own.standard_errors[seen.index(response)]) ** 2)
        assert found.elo[response] == pytest.approx(np.mean(elo))
        assert found.standard_errors[response] == pytest.approx(np.sqrt(sum(squares)) / len(squares))
    assert found.elo[5] == 0
    assert found.standard_errors[5] == pytest.approx(max(own.standard_errors.max() for _, own in alone))


def test_annotators_without_a_preference_and_no_annotators_give_strengths_of_0() -> None:
    """There is no deviation to bring anybody to."""
    tied = compare(2, ratings=[[1.0, 2.0], [1.0, 2.0]])
    for said, count in ((tied, 2), (compare(3), 3)):
        found = fit_each_annotator(count, said, lambda count, comparisons: fit(count, comparisons, 200.0))
        assert found.elo.tolist() == [0.0] * count
