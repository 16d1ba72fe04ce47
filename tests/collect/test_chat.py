"""A language model as the judge, played by a service on this machine."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf import rewards
from rlhf.attempt.context import Context
from rlhf.collect.judges import ChatJudge, verdict_in
from rlhf.config.collect import ChatSettings, CompareSettings
from rlhf.data.records import ComparisonSet, Message, ResponseSet
from rlhf.errors import PreflightError, RewardError, TryAgainError
from tests.rewards.server import Answer, Service, serving

SETS = [
    ResponseSet(prompt="p", responses=["long answer", "short", "mid one"], models=["x", "y", "z"]),
    ResponseSet(prompt=[Message(role="user", content="q")], responses=["same", "same", "other text"]),
]
INSTRUCTIONS = "<{prompt}|{first}|{second}>"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "FIRST_WAIT_S", 0.01)


def said(text: str) -> Answer:
    return Answer(json.dumps({"choices": [{"message": {"content": text}}]}).encode())


def shown(document: Any) -> tuple[str, str, str]:
    """Prompt, first and second response of a request."""
    content = document["messages"][0]["content"]
    found = re.fullmatch(r"<(.*)\|(.*)\|(.*)>", content, re.DOTALL)
    assert found is not None, content
    return found[1], found[2], found[3]


def by_length(document: Any) -> Answer:
    """A fair judge, to whom the longer response is the better one."""
    _, first, second = shown(document)
    verdict = "A" if len(first) > len(second) else "B" if len(first) < len(second) else "C"
    return said(f"I thought of [[C]] first, but: [[{verdict}]]")


def context(attempt: Path, *earlier: Path) -> Context[CompareSettings]:
    attempt.mkdir(parents=True, exist_ok=True)
    settings = CompareSettings(function="f.py:f")
    return Context("compare", "key", settings, {}, attempt, attempt, attempt, attempts=(*earlier, attempt))


def judge_at(service: Service, **settings: Any) -> ChatJudge:
    values: dict[str, Any] = {"url": service.url, "model": "m", "instructions": INSTRUCTIONS} | settings
    return ChatJudge(ChatSettings(**values))


def compared(
    answer: Callable[[Any], Answer], attempt: Path, *earlier: Path, **settings: Any
) -> tuple[list[ComparisonSet], dict[str, float], list[Any]]:
    """The sets with winners, the judge's metrics, and what was asked."""
    with serving(answer) as service:
        judge = judge_at(service, **settings)
        found = list(judge.compare(SETS, context(attempt, *earlier)))
    return found, judge.metrics(), service.documents


def test_a_fair_judge_s_preferences_become_winners(tmp_path: Path) -> None:
    """Each pair is asked in both orders; two equal responses are a tie that nobody is asked about."""
    found, metrics, asked = compared(by_length, tmp_path / "1")
    assert [one.winners for one in found] == [
        [[0, 1, 1], [0, 2, 1], [1, 2, 0]],
        [[0, 1, 0.5], [0, 2, 0], [1, 2, 0]],
    ]
    assert [one.models for one in found] == [["x", "y", "z"], None]
    assert sorted(map(shown, asked)) == sorted(
        [("p", a, b) for a in SETS[0].responses for b in SETS[0].responses if a != b]
        + 2 * [("user: q", "same", "other text"), ("user: q", "other text", "same")]
    )
    assert metrics == {"judge/verdicts": 10, "judge/none": 0, "judge/consistent": 1, "judge/first": 0.5}
    assert asked[0]["model"] == "m"
    assert asked[0]["temperature"] == 0


def test_a_judge_that_goes_by_place_prefers_nobody(tmp_path: Path) -> None:
    """Position bias cancels: all pairs are ties, and the report says how biased the judge is."""
    found, metrics, _ = compared(lambda _: said("[[A]]"), tmp_path / "1")
    assert {outcome for one in found for *_, outcome in one.winners or []} == {0.5}
    assert (metrics["judge/consistent"], metrics["judge/first"]) == (0, 1)


def test_a_tie_in_one_order_is_no_win(tmp_path: Path) -> None:
    """A response wins only if it is preferred in both orders."""

    def half(document: Any) -> Answer:
        _, first, second = shown(document)
        return said("[[A]]" if len(first) > len(second) else "[[C]]")

    found, _, _ = compared(half, tmp_path / "1")
    assert {outcome for one in found for *_, outcome in one.winners or []} == {0.5}


def test_no_verdict_is_paid_for_twice(tmp_path: Path) -> None:
    """A run that the service let down keeps what it had; the next one asks for the rest, with the same result."""
    whole, metrics, _ = compared(by_length, tmp_path / "whole")
    answered = 0

    def dying(document: Any) -> Answer:
        nonlocal answered
        answered += 1
        return by_length(document) if answered <= 4 else Answer(status=503)

    with pytest.raises(TryAgainError, match=r"the judge's service did not answer in 2 tries") as caught:
        compared(dying, tmp_path / "1", retries=1, at_once=1)
    assert "goes on where it was" in caught.value.next_step
    journal = tmp_path / "1" / "verdicts.jsonl"
    assert len(journal.read_text().splitlines()) == 4
    with journal.open("a") as file:
        file.write('["torn')
    found, after, asked = compared(by_length, tmp_path / "2", tmp_path / "1")
    assert (found, after) == (whole, metrics)
    assert len(asked) == 10 - 4


def test_a_judge_of_nonsense_is_stopped_and_quoted(tmp_path: Path) -> None:
    """More pairs without a verdict than allowed: status 1, with the last answer; no winner is made up."""
    with pytest.raises(RewardError) as caught:
        compared(lambda _: said("As a language model, I cannot."), tmp_path / "1", at_once=1, max_bad_fraction=0.2)
    assert caught.value.what == (
        "the judge gave no verdict to 3 of 3 questions; its last answer: 'As a language model, I cannot.'"
    )
    assert "chat.max_bad_fraction" in caught.value.next_step


def test_too_many_answers_without_a_verdict_stay_too_many_when_it_is_run_again(tmp_path: Path) -> None:
    """What an earlier run got no verdict on is asked again, so that the limit cannot be passed by repeating."""

    def mostly(document: Any) -> Answer:
        return said("hm") if shown(document)[1] == "mid one" else by_length(document)

    attempts = [tmp_path / str(number) for number in range(4)]
    for number, attempt in enumerate(attempts[:3]):
        with pytest.raises(RewardError, match="no verdict"):
            compared(mostly, attempt, *attempts[:number], at_once=1)
    found, metrics, _ = compared(by_length, attempts[3], *attempts[:3])
    assert metrics["judge/none"] == 0
    assert found[0].winners == [[0, 1, 1], [0, 2, 1], [1, 2, 0]]


def test_pairs_without_a_verdict_are_left_out_and_counted(tmp_path: Path) -> None:
    """Below the share that is allowed."""

    def mostly(document: Any) -> Answer:
        return said("hm") if shown(document)[1] == "mid one" else by_length(document)

    found, metrics, _ = compared(mostly, tmp_path / "1", max_bad_fraction=0.5)
    assert found[0].winners == [[0, 1, 1]]
    assert metrics["judge/none"] == pytest.approx(0.2)


@pytest.mark.parametrize("document", [{}, {"choices": []}, {"choices": [{"text": "A"}]}, ["A"]])
def test_a_service_of_another_kind_is_refused(tmp_path: Path, document: Any) -> None:
    """JSON without a message is no answer of chat completions."""
    with pytest.raises(RewardError, match="answered JSON without a message"):
        compared(lambda _: Answer(json.dumps(document).encode()), tmp_path / "1")


def test_a_service_that_takes_too_long_is_a_reason_to_try_again(tmp_path: Path) -> None:
    """Status 75 after the tries that the settings allow."""
    import time

    def slow(document: Any) -> Answer:
        time.sleep(0.3)
        return by_length(document)

    with pytest.raises(TryAgainError, match=r"no whole answer in 0.05 s"):
        compared(slow, tmp_path / "1", timeout_s=0.05, retries=1)


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("[[A]]", "A"),
        ("first [[A]], no: [[ B ]].", "B"),
        ("b", "B"),
        (" C. ", "C"),
        ("", None),
        ("[A]", None),
        ("A is better", None),
        ("[[D]]", None),
    ],
)
def test_the_last_verdict_counts(reply: str, verdict: str | None) -> None:
    """In double brackets, or as all that the judge says."""
    assert verdict_in(reply) == verdict


def test_what_responses_hold_is_text_and_no_place_for_others(tmp_path: Path) -> None:
    """A response that reads like a part of the instructions is shown as it is."""
    sets = [ResponseSet(prompt="{first}", responses=["{second}", "b"])]
    with serving(lambda _: said("[[A]]")) as service:
        judge = judge_at(service)
        list(judge.compare(sets, context(tmp_path / "1")))
    assert sorted(map(shown, service.documents)) == [("{first}", "b", "{second}"), ("{first}", "{second}", "b")]


def test_the_token_is_needed_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preflight makes the judge, and with it looks for the token."""
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    with pytest.raises(PreflightError, match="JUDGE_TOKEN with the token of the judge's service is not set"):
        ChatJudge(ChatSettings(url="http://localhost:1/", model="m", token_variable="JUDGE_TOKEN"))


def test_instructions_must_show_what_is_compared() -> None:
    """A text without one of the responses would be answered by chance."""
    with pytest.raises(ValidationError, match=r"must hold \{second\}"):
        ChatSettings(url="http://localhost:1/", model="m", instructions="{prompt} {first}")
