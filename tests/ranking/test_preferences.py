from typing import Any

import numpy as np
import pytest

from rlhf.ranking.bradley_terry import ELO_SCALE
from rlhf.ranking.lists import ResponseIndex, by_share, by_strength

RATED: dict[str, Any] = {"responses": ["a", "b", "c"], "ratings": [[3, 1, 2], [1, 1, 3], [None, None, None]], "pool": 0}
OTHER: dict[str, Any] = {"responses": ["d", "e"], "ratings": [[0, 2], [5, 5]], "pool": 0}
ELSEWHERE: dict[str, Any] = {"responses": ["f", "g"], "winners": [[1, 0, 1], [0, 1, 0.5]], "pool": 1}
SETS = [RATED, OTHER, ELSEWHERE]


def test_strengths_give_the_models_probability() -> None:
    """400 Elo points are ten to one, whichever sets the responses are of."""
    found = by_strength([{"elo": [100.0, -300.0]}, {"elo": [100.0]}])(
        [ResponseIndex(0, 0), ResponseIndex(0, 1), ResponseIndex(1, 0)]
    )
    assert found[0, 1] == pytest.approx(10 / 11)
    assert found[1, 0] == pytest.approx(1 / 11)
    assert found[0, 2] == pytest.approx(0.5)
    assert np.isnan(np.diagonal(found)).all()
    assert pytest.approx(np.log(10)) == ELO_SCALE * 400


def test_shares_are_of_those_who_compared_the_two() -> None:
    """One for, one against and a tie make a half; of a response that nobody rated nothing is known."""
    share = by_share(SETS)
    within = share([ResponseIndex(0, 0), ResponseIndex(0, 1), ResponseIndex(0, 2)])
    assert within[0, 1] == within[1, 0] == 0.5
    assert np.isnan(within[2]).all()
    assert np.isnan(within[:, 2]).all()
    winners = share([ResponseIndex(2, 0), ResponseIndex(2, 1)])
    assert winners[1, 0] == 0.75
    assert winners[0, 1] == 0.25


def test_across_sets_of_one_scale_shares_are_of_pairs_of_ratings() -> None:
    """Nobody saw both; across pools nothing is known at all."""
    share = by_share(SETS)
    across = share([ResponseIndex(0, 0), ResponseIndex(1, 0)])
    assert across[0, 1] == pytest.approx((1 + 1 + 1 + 0 + 1 + 0.5) / 6)
    assert across[0, 1] + across[1, 0] == pytest.approx(1)
    assert np.isnan(share([ResponseIndex(0, 0), ResponseIndex(2, 0)])).all()


def test_a_single_comparison_is_known_and_a_rating_of_another_scale_is_not() -> None:
    """Whoever won it; pools are not compared though both have ratings, nor responses that nobody rated."""
    once: dict[str, Any] = {"responses": ["a", "b"], "winners": [[1, 0, 1]], "pool": 0}
    share = by_share([once, RATED, RATED | {"pool": 1}, OTHER])
    assert share([ResponseIndex(0, 0), ResponseIndex(0, 1)])[1].tolist()[0] == 1.0
    assert share([ResponseIndex(0, 0), ResponseIndex(0, 1)])[0].tolist()[1] == 0.0
    for other in (ResponseIndex(2, 0), ResponseIndex(0, 0)):
        assert np.isnan(share([ResponseIndex(1, 0), other])).tolist()[0][1]
    for one, other in ((ResponseIndex(1, 2), ResponseIndex(3, 0)), (ResponseIndex(3, 0), ResponseIndex(1, 2))):
        assert np.isnan(share([one, other])).tolist()[0][1]
