import numpy as np
import pytest

from rlhf.ranking.bradley_terry import fit
from rlhf.ranking.comparisons import FloatArray, compare, rating_table
from rlhf.ranking.normalise import normalised
from rlhf.ranking.shared_scales import ComparedSet, Ranked, pool

PRIOR = 200.0


def rated_set(prompt: str, ratings: list[list[float | None]]) -> ComparedSet:
    table = rating_table(len(ratings), ratings, None)
    return ComparedSet(prompt, len(ratings), compare(len(ratings), ratings=ratings), table, table)


def strengths_of(sets: list[ComparedSet], bridges: int) -> list[Ranked]:
    pooled = pool(sets, bridges, seed=0)
    strengths = fit(pooled.responses, pooled.comparisons, PRIOR)
    return pooled.share(strengths.elo, normalised("dataset", strengths, pooled.pool_of_response, 1.0))


def noisy(level: float, seed: int) -> list[list[float | None]]:
    rng = np.random.default_rng(seed)
    return [[float(level + shift + noise) for noise in rng.normal(0, 1, 8)] for shift in (-0.5, 0.0, 0.5)]


GOOD, BAD = rated_set("p", noisy(+2, 0)), rated_set("p", noisy(-2, 1))


def test_a_set_of_good_and_a_set_of_bad_responses_end_apart() -> None:
    """With one prompt and ratings they share a pool about 0, whose every good response beats every bad one."""
    good, bad = strengths_of([GOOD, BAD], bridges=4)
    assert good.pool == bad.pool
    assert good.elo.min() > bad.elo.max() + 100
    assert np.concatenate([good.elo, bad.elo]).mean() == pytest.approx(0, abs=1e-6)


def test_without_bridges_each_set_is_a_pool_of_its_own() -> None:
    """Then only the order within a set counts, and both end about 0: a good response looks like a bad one."""
    good, bad = strengths_of([GOOD, BAD], bridges=0)
    assert good.pool != bad.pool
    for ranked, one in ((good, GOOD), (bad, BAD)):
        assert ranked.elo.mean() == pytest.approx(0, abs=1e-6)
        np.testing.assert_allclose(ranked.elo, fit(3, one.comparisons, PRIOR).elo, atol=1e-6)


def test_sets_of_other_prompts_or_without_ratings_keep_to_themselves() -> None:
    """They come out as if alone, in their order, whatever their neighbours; a number as a prompt is only a text."""
    places = rating_table(2, None, [[1, 0]])
    ranking = ComparedSet("p", 2, compare(2, rankings=[[1, 0]]), np.empty((2, 0)), places)
    elsewhere, odd = rated_set("q", noisy(3, 2)), rated_set("2", noisy(0, 3))
    found = strengths_of([GOOD, elsewhere, ranking, BAD, odd], bridges=2)
    pools = [ranked.pool for ranked in found]
    assert pools[0] == pools[3]
    assert len(set(pools)) == 4
    for index, one in ((1, elsewhere), (2, ranking), (4, odd)):
        alone = fit(one.size, one.comparisons, PRIOR)
        np.testing.assert_allclose(found[index].elo, alone.elo, atol=1e-6)
        np.testing.assert_allclose(found[index].standard_errors, alone.standard_errors, atol=1e-6)


def test_a_response_that_nobody_rated_spoils_no_pool() -> None:
    """It keeps the prior's strength, and all others stay finite."""
    unrated = rated_set("p", [[1.0, 2.0], [None, None], [0.0, 0.0]])
    found = strengths_of([GOOD, unrated], bridges=4)
    elo: FloatArray = np.concatenate([ranked.elo for ranked in found])
    assert np.isfinite(elo).all()
    assert np.isfinite(np.concatenate([ranked.standard_errors for ranked in found])).all()
    assert found[1].elo[0] > found[1].elo[2]
