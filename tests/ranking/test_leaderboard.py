from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from rlhf.config.data import RankSettings
from rlhf.ranking.comparisons import Comparisons, FloatArray, compare
from rlhf.ranking.report import leaderboard, pool_by_model
from rlhf.ranking.strengths import of_comparisons
from tests.ranking.drawn import as_wins, from_wins


def test_wins_are_pooled_by_model() -> None:
    """Responses of one model are no match for each other; the others' wins add up over sets."""
    names, pooled = pool_by_model(
        [
            (["x", "y", "x"], from_wins(np.array([[0, 2, 5], [1, 0, 3], [5, 4, 0]], dtype=float))),
            (["z", "y"], from_wins(np.array([[0, 1], [0, 0]], dtype=float))),
        ]
    )
    assert names == ["x", "y", "z"]
    np.testing.assert_array_equal(as_wins(3, pooled), [[0, 6, 0], [4, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize("settings", [RankSettings(), RankSettings(model="elo"), RankSettings(model="plackett-luce")])
def test_the_intervals_hold_the_true_order(settings: RankSettings) -> None:
    """Models of known strength, each compared 200 times with each: best first, apart by more than their errors."""
    rng = np.random.default_rng(0)
    sets: list[tuple[list[str], Comparisons]] = []
    for _ in range(20):
        wins = np.zeros((3, 3))
        for i, j, chance in ((0, 1, 0.75), (1, 2, 0.75), (0, 2, 0.9)):
            wins[i, j] = rng.binomial(10, chance)
            wins[j, i] = 10 - wins[i, j]
        sets.append((["best", "middle", "worst"], from_wins(wins)))
    rows = leaderboard(settings, sets)
    assert [row["model"] for row in rows] == ["best", "middle", "worst"]
    for above, below in pairwise(rows):
        assert above["low"] > below["high"]
        assert above["elo"] - below["elo"] == pytest.approx(191, abs=60)
    assert [row["comparisons"] for row in rows] == [400, 400, 400]


def test_ties_are_comparisons_of_a_model() -> None:
    """Of three raters one sees a tie: each of the two models was compared three times."""
    rows = leaderboard(RankSettings(), [(["x", "y"], compare(2, ratings=[[1, 1, 2], [1, 0, 3]]))])
    assert [row["comparisons"] for row in rows] == [3, 3]


def drawn_sets(rng: np.random.Generator, prompts: int, raters: int) -> list[tuple[list[str], Comparisons]]:
    """Three models, whose response to a prompt is better or worse than the model by as much as raters differ."""
    sets: list[tuple[list[str], Comparisons]] = []
    for _ in range(prompts):
        response = np.array([0.3, 0.0, -0.3]) + rng.normal(size=3)
        ratings = response[:, None] + rng.normal(size=(3, raters))
        sets.append((["a", "b", "c"], compare(3, ratings=ratings.tolist())))
    return sets


@pytest.mark.parametrize(("prompts", "raters"), [(20, 1), (20, 20), (100, 3)])
def test_errors_of_models_are_those_over_new_prompts_however_many_raters(prompts: int, raters: int) -> None:
    """Twenty raters of one response are not twenty responses: over 80 draws of everything, strengths spread by the
    errors that the first of the draws state, and the interval is Student's of those.
    """
    rng = np.random.default_rng(0)
    settings, elo, stated = RankSettings(), list[FloatArray](), list[FloatArray]()
    groups = min(prompts, 30)
    for draw in range(80):
        sets = drawn_sets(rng, prompts, raters)
        elo.append(of_comparisons(settings, 3, pool_by_model(sets)[1])[0].elo)
        if draw < 3:
            rows = sorted(leaderboard(settings, sets), key=lambda row: row["model"])
            np.testing.assert_allclose([row["elo"] for row in rows], elo[-1])
            stated.append(np.array([row["standard_error"] for row in rows]))
            for row in rows:
                half = stats.t.ppf(0.975, groups - 1) * row["standard_error"]
                assert (row["low"], row["high"]) == pytest.approx((row["elo"] - half, row["elo"] + half))
    assert np.sqrt(np.mean(np.square(stated))) == pytest.approx(float(np.std(elo, axis=0).mean()), rel=0.25)


def test_errors_of_models_leave_each_group_of_sets_out_once() -> None:
    """The jackknife of as many groups as sets, fit by fit; a model of one set alone is at 0 without it."""
    rng = np.random.default_rng(1)
    sets = [*drawn_sets(rng, 9, 4), (["a", "d", "c"], compare(3, ratings=[[1.0], [2.0], [0.0]]))]
    settings = RankSettings()
    without = np.zeros((10, 4))
    for left_out in range(10):
        names, pooled = pool_by_model(sets[:left_out] + sets[left_out + 1 :])
        without[left_out, ["abcd".index(name) for name in names]] = of_comparisons(settings, len(names), pooled)[0].elo
    variance = 9 / 10 * ((without - without.mean(axis=0)) ** 2).sum(axis=0)
    own = of_comparisons(settings, 4, pool_by_model(sets)[1])[0].standard_errors
    rows = sorted(leaderboard(settings, sets), key=lambda row: row["model"])
    np.testing.assert_allclose([row["standard_error"] for row in rows], np.maximum(np.sqrt(variance), own))
    assert (np.sqrt(variance)[:3] > own[:3]).all()


def test_one_set_alone_has_no_interval_and_alike_sets_that_of_their_comparisons() -> None:
    """Nothing is known of how models differ from prompt to prompt; eight sets that agree are not certain either."""
    agreed = (["a", "b"], compare(2, ratings=[[1.0, 1.0], [0.0, 0.0]]))
    for row in leaderboard(RankSettings(), [agreed]):
        assert (row["standard_error"], row["low"], row["high"]) == (None, None, None)
    own = of_comparisons(RankSettings(), 2, pool_by_model([agreed] * 8)[1])[0].standard_errors
    for row in leaderboard(RankSettings(), [agreed] * 2):
        assert row["low"] < row["elo"] < row["high"]
    rows = leaderboard(RankSettings(), [agreed] * 8)
    np.testing.assert_allclose([row["standard_error"] for row in rows], own)
