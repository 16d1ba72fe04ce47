from itertools import pairwise

import numpy as np
import pytest

from rlhf.config.data import RankSettings
from rlhf.ranking.leaderboard import leaderboard, pool_by_model
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
    wins = np.zeros((3, 3))
    for i, j, chance in ((0, 1, 0.75), (1, 2, 0.75), (0, 2, 0.9)):
        wins[i, j] = rng.binomial(200, chance)
        wins[j, i] = 200 - wins[i, j]
    rows = leaderboard(settings, [(["best", "middle", "worst"], from_wins(wins))])
    assert [row["model"] for row in rows] == ["best", "middle", "worst"]
    for above, below in pairwise(rows):
        assert above["low"] > below["high"]
        assert above["elo"] - below["elo"] == pytest.approx(191, abs=60)
    assert [row["comparisons"] for row in rows] == [400, 400, 400]
