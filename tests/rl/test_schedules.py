import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.training.loop import learning_rate_share

SCHEDULES = ("linear", "cosine", "constant")


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(total=st.integers(1, 300), warmup=st.floats(0, 0.9))
def test_every_update_moves_and_none_exceeds_the_peak(schedule: str, total: int, warmup: float) -> None:
    """A share of 0 would waste an update; it rises to 1 and never rises again."""
    shares = [learning_rate_share(done, total, schedule, warmup) for done in range(total)]  # pyright: ignore[reportArgumentType]
    assert all(0 < share <= 1 for share in shares)
    peak = shares.index(max(shares))
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)


def test_without_warm_up_the_first_update_is_at_the_peak() -> None:
    """As linear decay to 0 always was; half a cosine is at half height half-way."""
    assert [learning_rate_share(done, 4, "linear") for done in range(4)] == [1, 0.75, 0.5, 0.25]
    assert learning_rate_share(2, 4, "cosine") == pytest.approx(0.5)
    assert {learning_rate_share(done, 4, "constant") for done in range(4)} == {1.0}


def test_warm_up_is_a_line_from_0_to_the_peak() -> None:
    """Of its updates, the first is not at 0 and the one after the last is at the peak."""
    shares = [learning_rate_share(done, 10, "constant", 0.3) for done in range(5)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_what_follows_warm_up_begins_at_the_peak_and_takes_the_updates_that_are_left() -> None:
    """Of 10 updates 3 rise; the other 7 fall along a line, or along half a cosine."""
    assert [learning_rate_share(done, 10, "linear", 0.3) for done in range(3, 10)] == pytest.approx(
        [1 - left / 7 for left in range(7)]
    )
    assert [learning_rate_share(done, 10, "cosine", 0.3) for done in range(3, 10)] == pytest.approx(
        [(1 + math.cos(math.pi * left / 7)) / 2 for left in range(7)]
    )
