from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.ranking.pairs import draw_pairs


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


@given(
    st.lists(st.tuples(st.integers(2, 9), st.integers(0, 3)), min_size=1, max_size=6),
    st.floats(0.5, 12),
    st.integers(0, 5),
    st.sampled_from([2, 1000]),
)
def test_a_pair_is_two_responses_of_one_pool_the_stronger_first(
    shapes: list[tuple[int, int]], per_response: float, seed: int, levels: int
) -> None:
    """Strengths of two pools say nothing of each other, and equal ones not who is better; no pair comes twice."""
    sets = ranked_sets([size for size, _ in shapes], [pool for _, pool in shapes], levels)
    strength = {text: value for one in sets for text, value in zip(one["responses"], one["strengths"], strict=True)}
    pool = {text: one["pool"] for one in sets for text in one["responses"]}
    pairs = draw_pairs(sets, per_response, seed)
    for pair in pairs:
        assert pool[pair.chosen] == pool[pair.rejected]
        assert pair.prompt == f"prompt {pool[pair.chosen]}"
        assert pair.gap == pytest.approx(strength[pair.chosen] - strength[pair.rejected])
        assert pair.gap > 0
    assert len({frozenset((pair.chosen, pair.rejected)) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("per_response", [1.0, 2.0, 5.0])
def test_each_response_is_in_about_equally_many_pairs(per_response: float) -> None:
    """Otherwise some texts would be learned by heart and others not seen."""
    sets = ranked_sets([5] * 40, [0] * 40, levels=10**9)
    pairs = draw_pairs(sets, per_response, seed=0)
    assert len(pairs) == round(per_response * 200 / 2)
    counts = Counter(text for pair in pairs for text in (pair.chosen, pair.rejected))
    assert len(counts) == 200
    assert max(counts.values()) - min(counts.values()) <= 1 + per_response / 2


def test_asking_for_more_than_all_gives_all() -> None:
    """K (K - 1) / 2 pairs of K responses, and not one more."""
    assert len(draw_pairs(ranked_sets([4, 3], [0, 1], levels=10**9), 100.0, seed=0)) == 6 + 3


def test_the_seed_and_the_pool_decide_which_pairs() -> None:
    """The same seed draws the same; another draws others; a pool's pairs do not depend on the other pools."""
    sets = ranked_sets([9, 9, 9], [0, 1, 0], levels=10**9)
    pairs = draw_pairs(sets, 2.0, seed=0)
    assert pairs == draw_pairs(sets, 2.0, seed=0)
    assert pairs != draw_pairs(sets, 2.0, seed=1)
    alone = draw_pairs([sets[0], sets[2]], 2.0, seed=0)
    assert alone == [pair for pair in pairs if pair.prompt == "prompt 0"]
