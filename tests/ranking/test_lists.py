from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.ranking.lists import ResponseIndex, draw_lists, draw_pairs


def ranked_sets(sizes: list[int], pools: list[int], levels: int = 1000) -> list[dict[str, Any]]:
    """Sets with responses named by set and number; strengths are drawn from so many levels."""
    rng = np.random.default_rng(0)
    return [
        {
            "prompt": f"prompt {pool}",
            "responses": [f"{number}.{index}" for index in range(size)],
            "strengths": [float(value) for value in rng.integers(0, levels, size) / levels],
            "pool": pool,
        }
        for number, (size, pool) in enumerate(zip(sizes, pools, strict=True))
    ]


shapes = st.lists(st.tuples(st.integers(2, 9), st.integers(0, 3)), min_size=1, max_size=6)


@given(shapes, st.integers(2, 6), st.floats(0.5, 12), st.integers(0, 5), st.sampled_from([2, 1000]))
def test_a_list_is_of_one_pool_and_says_something(
    shapes: list[tuple[int, int]], size: int, per_response: float, seed: int, levels: int
) -> None:
    """Strengths of two pools say nothing of each other, and equal ones not who is better; no list comes twice."""
    sets = ranked_sets([size for size, _ in shapes], [pool for _, pool in shapes], levels)
    lists = draw_lists(sets, size, per_response, seed)
    for places in lists:
        assert len({sets[place.set]["pool"] for place in places}) == 1
        assert len({sets[place.set]["strengths"][place.response] for place in places}) > 1
        assert len(set(places)) == len(places) <= size
    assert len({frozenset(places) for places in lists}) == len(lists)


@pytest.mark.parametrize("size", [2, 5, 8])
@pytest.mark.parametrize("per_response", [1.0, 2.0, 5.0])
def test_each_response_is_in_about_equally_many_lists(per_response: float, size: int) -> None:
    """Otherwise some texts would be learned by heart and others not seen."""
    sets = ranked_sets([5] * 40, [0] * 40, levels=10**9)
    lists = draw_lists(sets, size, per_response, seed=0)
    assert len(lists) == round(per_response * 200 / size)
    counts = Counter(place for places in lists for place in places)
    assert len(counts) == 200
    assert max(counts.values()) - min(counts.values()) <= 1 + per_response / 2


def test_asking_for_more_than_all_gives_all() -> None:
    """K (K - 1) / 2 pairs of K responses, and not one more; a pool smaller than a list is one list."""
    sets = ranked_sets([4, 3], [0, 1], levels=10**9)
    assert len(draw_lists(sets, 2, 100.0, seed=0)) == 6 + 3
    assert [len(places) for places in draw_lists(sets, 9, 100.0, seed=0)] == [4, 3]


def test_without_a_size_every_set_is_a_list() -> None:
    """Whole and in order, but for one whose responses are all alike."""
    sets = [*ranked_sets([3, 2], [0, 0]), {"responses": ["a", "b"], "strengths": [1.0, 1.0], "pool": 1}]
    found = draw_lists(sets, None, 1.0, seed=0)
    assert found == [
        [ResponseIndex(0, 0), ResponseIndex(0, 1), ResponseIndex(0, 2)],
        [ResponseIndex(1, 0), ResponseIndex(1, 1)],
    ]


def test_the_seed_and_the_pool_decide_which_lists() -> None:
    """The same seed draws the same; another draws others; a pool's lists do not depend on the other pools."""
    sets = ranked_sets([9, 9, 9], [0, 1, 0], levels=10**9)
    lists = draw_lists(sets, 3, 2.0, seed=0)
    assert lists == draw_lists(sets, 3, 2.0, seed=0)
    assert lists != draw_lists(sets, 3, 2.0, seed=1)
    alone = draw_lists([sets[0], sets[2]], 3, 2.0, seed=0)
    assert [[ResponseIndex(2 * place.set, place.response) for place in places] for places in alone] == [
        places for places in lists if sets[places[0].set]["pool"] == 0
    ]


def test_there_is_a_list_of_every_pool_however_few_are_asked_for() -> None:
    """Not a response would be learned from otherwise; and never more than were asked for."""
    sets = ranked_sets([5, 4], [0, 1], levels=10**9)
    assert [len(places) for places in draw_lists(sets, 2, 0.01, seed=0)] == [2, 2]
    assert len(draw_lists(sets, 2, 1.2, seed=0)) == 3 + 2


@pytest.mark.parametrize("size", [None, 3])
def test_lists_of_a_task_come_as_often_as_its_weight_says(size: int | None) -> None:
    """The lists themselves are those that are drawn without tasks."""
    sets = ranked_sets([4] * 8, [*range(8)], levels=10**9)
    plain = [tuple(places) for places in draw_lists(sets, size, 3.0, seed=0)]
    weights = [{"task": "a", "weight": 2.0}] * 4 + [{"task": "b", "weight": 0.5}] * 4
    lists = draw_lists([row | more for row, more in zip(sets, weights, strict=True)], size, 3.0, seed=0)
    counts = Counter(map(tuple, lists))
    assert counts.keys() <= {*plain}
    of_b = [places for places in plain if places[0].set >= 4]
    assert [counts[places] for places in plain if places[0].set < 4] == [2] * (len(plain) - len(of_b))
    assert sum(counts[places] for places in of_b) == len(of_b) / 2
    assert max(counts[places] for places in of_b) == 1


@given(shapes, st.floats(0.5, 12), st.integers(0, 5), st.sampled_from([2, 1000]))
def test_of_a_pair_the_stronger_response_is_chosen(
    shapes: list[tuple[int, int]], per_response: float, seed: int, levels: int
) -> None:
    """It answers the same prompt; pairs are the lists of two, but for those of equal texts, which are counted."""
    sets = ranked_sets([size for size, _ in shapes], [pool for _, pool in shapes], levels)
    sets[0]["responses"] = ["equal"] * len(sets[0]["responses"])
    pairs, equal = draw_pairs(sets, per_response, seed)
    for chosen, rejected in pairs:
        better, worse = (sets[place.set]["strengths"][place.response] for place in (chosen, rejected))
        assert better > worse
        assert sets[chosen.set]["prompt"] == sets[rejected.set]["prompt"]
    lists = {frozenset(places) for places in draw_lists(sets, 2, per_response, seed)}
    alike = {places for places in lists if {place.set for place in places} == {0}}
    assert {frozenset(pair) for pair in pairs} == lists - alike
    assert equal == len(alike)
