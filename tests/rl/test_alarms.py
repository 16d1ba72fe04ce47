import math

import pytest
import torch

from rlhf.errors import DivergedError
from rlhf.rl.metrics import Watched, alarm_metrics, alarms, check_finite, check_health, out_of_range

FIRST = {
    "policy/approxkl_first": 0.0,
    "objective/kl": 0.0,
    "objective/kl_stderr": 0.1,
    "val/num_eos_tokens": 60.0,
    "length/mean": 20.0,
    "length/max": 40.0,
    "policy/entropy_avg": 2.0,
}
WATCHED = Watched(FIRST, "fp32", max_new_tokens=64, rollouts=64)
HEALTHY = FIRST | {"objective/kl": 3.0, "policy/entropy_avg": 1.5, "length/mean": 30.0, "val/num_eos_tokens": 55.0}


def test_a_healthy_run_raises_no_alarm() -> None:
    """Neither in its first iteration nor in a later one; every alarm's metric is there, and 0."""
    for now in (FIRST, HEALTHY):
        assert alarms(now, WATCHED) == {}
    assert set(alarm_metrics({}).values()) == {0.0}


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("ratio", {"policy/approxkl_first": 1e-4}, "ratio was not 1"),
        ("sampler", {"rollout/kl_to_trained": 4e-4, "rollout/largest_gap": 0.1}, "not sampled from the policy"),
        ("sampler", {"rollout/kl_to_trained": -4e-4, "rollout/largest_gap": 0.1}, "not sampled from the policy"),
        ("negative_kl", {"objective/kl": -0.5}, "negative beyond noise"),
        ("eos", {"val/num_eos_tokens": 2.0}, "no longer end"),
        ("length", {"length/mean": 63.0}, "grown to the limit"),
        ("entropy", {"policy/entropy_avg": 0.1}, "entropy collapsed"),
        ("score_range", {"score/out_of_range": 0.4}, "outside the range"),
    ],
)
def test_each_symptom_raises_its_own_alarm(name: str, wrong: dict[str, float], words: str) -> None:
    """One line that says what was seen, and a metric of 1."""
    raised = alarms(HEALTHY | wrong, WATCHED)
    assert list(raised) == [name]
    assert words in raised[name]
    assert alarm_metrics(raised)[f"alarm/{name}"] == 1.0


def test_noise_is_no_alarm() -> None:
    """A mean KL a little below 0, and bf16's rounding of the first ratio."""
    assert not alarms(HEALTHY | {"objective/kl": -0.3}, WATCHED)
    bf16 = Watched(FIRST, "bf16", max_new_tokens=64, rollouts=64)
    assert not alarms(HEALTHY | {"policy/approxkl_first": 1.5e-4}, bf16)
    assert not alarms(HEALTHY | {"rollout/kl_to_trained": 1e-5}, WATCHED)
    assert not alarms(HEALTHY | {"rollout/kl_to_trained": -0.02}, bf16)


def test_what_was_so_from_the_start_is_no_alarm() -> None:
    """A policy that seldom ended its responses, or always filled the limit, has not got worse."""
    first = FIRST | {"val/num_eos_tokens": 1.0, "length/mean": 64.0}
    assert not alarms(first, Watched(first, "fp32", max_new_tokens=64, rollouts=64))


def test_responses_that_never_end_raise_an_alarm_from_the_start() -> None:
    """With an EOS that the policy does not know it would be so for good."""
    first = FIRST | {"val/num_eos_tokens": 0.0}
    raised = alarms(first, Watched(first, "fp32", max_new_tokens=64, rollouts=64))
    assert list(raised) == ["eos"]
    assert "no response ends within 64 tokens" in raised["eos"]


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stops_before_the_update_and_names_the_row(junk: float) -> None:
    """On real tokens; under padding anything may lie."""
    mask = torch.tensor([[True, True], [True, False]])
    fine = torch.tensor([[0.0, 1.0], [2.0, junk]])
    check_finite(mask, scores=torch.zeros(2), logprobs=fine)
    with pytest.raises(DivergedError, match="values of 1 of 2 responses") as error:
        check_finite(mask, values=torch.tensor([[0.0, 1.0], [junk, 0.0]]))
    assert error.value.where == "response 1 of the iteration"
    with pytest.raises(DivergedError, match="scores of 1 of 2"):
        check_finite(mask, scores=torch.tensor([junk, 0.0]))


def test_a_run_that_cannot_be_saved_stops() -> None:
    """A mean KL beyond its limit, or one that is no number, and responses that are a lone EOS."""
    check_health(HEALTHY, FIRST, 200.0)
    for kl in (201.0, math.nan):
        with pytest.raises(DivergedError, match="drifted"):
            check_health(HEALTHY | {"objective/kl": kl}, FIRST, 200.0)
    collapsed = HEALTHY | {"length/mean": 1.0, "length/max": 1.0}
    with pytest.raises(DivergedError, match="lone EOS"):
        check_health(collapsed, FIRST, 200.0)
    check_health(collapsed, FIRST | {"length/mean": 1.4}, 200.0)
    check_health(collapsed, collapsed, 200.0)


@pytest.mark.parametrize(
    ("name", "first", "still_fine", "too_much"),
    [
        ("ratio", {}, {"policy/approxkl_first": 5e-9}, {"policy/approxkl_first": 5.1e-9}),
        ("negative_kl", {}, {"objective/kl": -0.4}, {"objective/kl": -0.401}),
        (
            "negative_kl",
            {},
            {"objective/kl": -1e-3, "objective/kl_stderr": 0.0},
            {"objective/kl": -1.1e-3, "objective/kl_stderr": 0.0},
        ),
        ("eos", {"val/num_eos_tokens": 20.0}, {"val/num_eos_tokens": 6.0}, {"val/num_eos_tokens": 5.0}),
        ("length", {"length/mean": 79.0}, {"length/mean": 95.0}, {"length/mean": 95.1}),
        ("entropy", {}, {"policy/entropy_avg": 0.2}, {"policy/entropy_avg": 0.19}),
        ("entropy", {"policy/entropy_avg": 0.06}, {"policy/entropy_avg": 0.006}, {"policy/entropy_avg": 0.005}),
        ("score_range", {}, {"score/out_of_range": 0.1}, {"score/out_of_range": 0.11}),
    ],
)
def test_an_alarm_is_raised_beyond_its_bound_and_not_at_it(
    name: str, first: dict[str, float], still_fine: dict[str, float], too_much: dict[str, float]
) -> None:
    """The bounds are those of docs/ppo.md."""
    watched = Watched(FIRST | first, "fp32", max_new_tokens=100, rollouts=100)
    healthy = HEALTHY | {"val/num_eos_tokens": 90.0} | first
    assert not alarms(healthy | still_fine, watched)
    assert list(alarms(healthy | too_much, watched)) == [name]


@pytest.mark.parametrize(
    ("first", "now"),
    [
        ({"val/num_eos_tokens": 19.0}, {"val/num_eos_tokens": 1.0}),
        ({"length/mean": 80.0}, {"length/mean": 100.0}),
        ({"policy/entropy_avg": 0.05}, {"policy/entropy_avg": 0.0}),
    ],
)
def test_what_was_nearly_so_from_the_start_is_no_alarm(first: dict[str, float], now: dict[str, float]) -> None:
    """Few responses that ended, long ones, and a policy that was sure of itself."""
    watched = Watched(FIRST | first, "fp32", max_new_tokens=100, rollouts=100)
    assert not alarms(HEALTHY | {"val/num_eos_tokens": 90.0} | first | now, watched)


def test_bf16_is_given_its_own_rounding() -> None:
    """Three digits make the first ratio differ by more, and an alarm beyond that all the same."""
    bf16 = Watched(FIRST, "bf16", max_new_tokens=64, rollouts=64)
    assert not alarms(HEALTHY | {"policy/approxkl_first": 5e-3}, bf16)
    assert list(alarms(HEALTHY | {"policy/approxkl_first": 5.1e-3}, bf16)) == ["ratio"]


def test_alarms_say_how_much_it_is_and_was() -> None:
    """Shares of the responses and of the limit, not their numbers alone."""
    raised = alarms(HEALTHY | {"val/num_eos_tokens": 2.0, "length/mean": 63.0}, WATCHED)
    assert "3% have an EOS, and 94% had at first" in raised["eos"]
    assert "63 of 64 tokens on average, and 20 at first" in raised["length"]


def test_the_limits_themselves_are_no_divergence() -> None:
    """A KL at the limit, and a length at half the first, or at 1.5 tokens where that is less."""
    check_health(HEALTHY | {"objective/kl": 200.0}, FIRST, 200.0)
    for first, length in ((20.0, 1.5), (2.0, 1.0)):
        check_health(HEALTHY | {"length/mean": length}, FIRST | {"length/mean": first}, 200.0)
        with pytest.raises(DivergedError, match="lone EOS"):
            check_health(HEALTHY | {"length/mean": length - 0.01}, FIRST | {"length/mean": first}, 200.0)


def test_scores_at_the_ends_of_the_range_are_inside_it() -> None:
    """The share of those beyond, on both sides."""
    scores = torch.tensor([-2.1, -2.0, 0.0, 1.0, 1.1, 5.0, 0.5, 0.5])
    assert out_of_range(scores, -2.0, 1.0) == {"score/out_of_range": 3 / 8}
