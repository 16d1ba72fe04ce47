from typing import Any

import numpy as np
import pytest

from rlhf.config.data import RankSettings
from rlhf.data.records import ComparisonSet
from rlhf.errors import RecordError
from rlhf.ranking.bradley_terry import fit
from rlhf.ranking.comparisons import NOBODY, FloatArray, compare, rating_table
from rlhf.ranking.scales import ComparedSet, Ranked, compared_sets, normalised, pool
from rlhf.ranking.strengths import fit_crowd, fit_online, fit_rankings, rankings_of
from rlhf.ranking.strengths import strengths_of as strengths_by

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


def record(**row: Any) -> ComparisonSet:
    return ComparisonSet.model_validate({"prompt": "p"} | row)


def test_annotators_are_numbered_by_their_names_over_all_sets() -> None:
    """Columns of ratings, then rankings, both by the set's names; those without names are of their set alone."""
    ratings = [[1.0, 2.0], [2.0, 1.0]]
    names = {"zoe": 0}
    both = record(responses=["a", "b"], ratings=ratings, rankings=[[0, 1], [1, 0]], annotators=["ann", "zoe"])
    nameless = record(responses=["a", "b"], ratings=ratings, rankings=[[1, 0]], winners=[[0, 1, 1]])
    found = compared_sets([both, nameless, both], "here.jsonl", names)
    said = [one.comparisons.annotator.tolist() for one in found]
    assert said == [[1, 0, 1, 0], [2, 3, 4, NOBODY], [1, 0, 1, 0]]
    assert list(names) == ["zoe", "ann", *(f"here.jsonl:2, annotator {number}" for number in range(3))]
    np.testing.assert_array_equal(found[1].ratings_table, ratings)
    np.testing.assert_array_equal(found[1].table, [[1, 2, -1], [2, 1, 0]])
    assert [(one.prompt, one.size) for one in found] == [("p", 2)] * 3


def test_a_thousand_rated_or_ranked_responses_are_compared_and_no_more() -> None:
    """Every pair of them for each annotator, at the place where it is said; winners are as many as are written."""
    texts = [str(number) for number in range(1001)]
    most = record(responses=texts[:1000], rankings=[list(range(1000))])
    (found,) = compared_sets([most], "here.jsonl", {})
    assert found.comparisons.total == 1000 * 999 / 2
    for said in ({"ratings": [[float(number)] for number in range(1001)]}, {"rankings": [list(range(1001))]}):
        with pytest.raises(RecordError, match="1001 responses, and all pairs of more than 1000") as caught:
            compared_sets([most, record(responses=texts, **said)], "here.jsonl", {})
        assert caught.value.where == "here.jsonl:2"
    (found,) = compared_sets([record(responses=texts, winners=[[0, 1000, 1]])], "here.jsonl", {})
    assert found.comparisons.total == 1


def test_bridges_are_those_of_a_pools_own_responses() -> None:
    """One round is enough to join sets; a third set of another prompt in their midst takes no part in it."""
    single = [rated_set(prompt, [[float(number)]]) for prompt, number in (("p", 0), ("q", 1), ("p", 2))]
    pooled = pool(single, 1, seed=0)
    assert pooled.starts.tolist() == [0, 1, 2, 3]
    assert pooled.pools == [0, 1, 0]
    assert pooled.pool_of_response.tolist() == [0, 1, 0]
    assert pooled.responses == 3
    said = pooled.comparisons
    # Two on a circle meet twice; the one rated 2 wins.
    assert sorted(zip(said.first.tolist(), said.second.tolist(), said.wins.tolist(), strict=True)) == [
        (0, 2, 0),
        (2, 0, 1),
    ]
    assert said.total == 2


def test_each_set_is_given_its_own_numbers() -> None:
    """In its order, with those of the sets before it left to them."""
    pooled = pool([GOOD, rated_set("q", [[1.0], [2.0]])], 0, seed=0)
    strengths = fit(5, pooled.comparisons, PRIOR)
    scaled = normalised("dataset", strengths, pooled.pool_of_response, 7.0)
    for ranked, place in zip(pooled.share(strengths.elo, scaled), (slice(0, 3), slice(3, 5)), strict=True):
        np.testing.assert_array_equal(ranked.elo, strengths.elo[place])
        np.testing.assert_array_equal(ranked.strengths, strengths.elo[place] / 7)
        np.testing.assert_array_equal(ranked.standard_errors, strengths.standard_errors[place] / 7)


@pytest.mark.parametrize(
    "settings",
    [
        {"ties": "davidson", "prior_elo": 150.0},
        {"ties": "davidson", "prior_elo": 150.0, "annotators": "reliability"},
        {"model": "plackett-luce", "prior_elo": 150.0},
        {"model": "elo", "k_factor": 20.0, "orders": 3, "seed": 5},
    ],
)
def test_strengths_are_those_of_the_model_and_the_settings(settings: dict[str, Any]) -> None:
    """Each by its own function; the parameter of ties is the one that is given, and is fitted where none is."""
    tied = rated_set("q", [[1.0, 2.0, 2.0], [1.0, 2.0, 3.0]])
    names = [
        one._replace(comparisons=one.comparisons._replace(annotator=one.comparisons.annotator % 3))
        for one in (GOOD, tied)
    ]
    nobodys = ComparedSet("r", 2, compare(2, winners=[[0, 1, 1], [0, 1, 0.5]]), np.empty((2, 0)), np.empty((2, 0)))
    pooled = pool([*names, nobodys], 0, seed=0)
    said = pooled.comparisons
    for parameter in (None, 1.5):
        found, crowd = strengths_by(RankSettings(**settings), pooled, parameter)
        if settings.get("model") == "plackett-luce":
            rankings = rankings_of(pooled.tables, [0, 3, 5])
            expected = fit_rankings(7, rankings, said.rows(said.annotator == NOBODY), 150.0)
        elif settings.get("model") == "elo":
            expected = fit_online(7, said, 20.0, 3, 5)
        elif "annotators" in settings:
            slow = fit_crowd(7, said, 150.0, "davidson", parameter)
            assert crowd is not None
            np.testing.assert_array_equal(crowd.reliability, slow.reliability)
            expected = slow.strengths
        else:
            expected = fit(7, said, 150.0, "davidson", parameter)
        assert ("annotators" in settings) == (crowd is not None)
        np.testing.assert_array_equal(found.elo, expected.elo)
        np.testing.assert_array_equal(found.standard_errors, expected.standard_errors)
        assert found.tie_parameter == expected.tie_parameter


def test_annotators_fitted_each_alone_are_fitted_by_the_settings_too() -> None:
    """One annotator alone is an ordinary fit, with the settings' prior and way to see a tie."""
    pooled = pool([rated_set("p", [[1.0], [2.0], [2.0]])], 0, seed=0)
    settings = RankSettings(normalise="annotator", ties="davidson", prior_elo=150.0)
    for parameter in (None, 1.5):
        found, _ = strengths_by(settings, pooled, parameter)
        expected = fit(3, pooled.comparisons, 150.0, "davidson", parameter)
        np.testing.assert_allclose(found.elo, expected.elo, atol=1e-9)
        np.testing.assert_allclose(found.standard_errors, expected.standard_errors, atol=1e-9)
        assert found.tie_parameter == expected.tie_parameter
