import gzip
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rlhf import rewards as service_module
from rlhf.config.rewards import EndpointSettings
from rlhf.errors import PreflightError, RewardError, RlhfError, TryAgainError
from rlhf.rewards import EndpointReward
from tests.rewards.server import Answer, Service, lengths, scored, serving

PROMPTS: list[Any] = ["a", [{"role": "user", "content": "b"}], "c", "d", "e"]
RESPONSES = ["1", "22", "333", "4444", "5\ud800"]

Serve = Callable[[Callable[[Any], Answer]], Service]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "FIRST_WAIT_S", 0.01)


def ask(service: Service, **settings: Any) -> list[float]:
    values: dict[str, Any] = {"url": service.url, "batch_size": 2} | settings
    return EndpointReward(EndpointSettings(**values))(PROMPTS, RESPONSES)


def refused(answer: Callable[[Any], Answer], kind: type[RlhfError] = RewardError, **settings: Any) -> tuple[str, int]:
    """The error that an answer leads to, and how many requests it took."""
    with serving(answer) as service, pytest.raises(kind) as caught:
        ask(service, **settings)
    return str(caught.value), len(service.documents)


def in_turn(*answers: Callable[[Any], Answer]) -> Callable[[Any], Answer]:
    """Answers one after the other, the last one for ever."""
    waiting = list(answers)
    return lambda document: (waiting.pop(0) if len(waiting) > 1 else waiting[0])(document)


def test_rows_go_out_in_batches_and_come_back_in_order() -> None:
    """Prompts travel as they are, text or messages, and text that is no valid Unicode travels too."""
    with serving(lengths) as service:
        assert ask(service) == [1.0, 2.0, 3.0, 4.0, 2.0]
    assert [document["prompts"] for document in service.documents] == [PROMPTS[:2], PROMPTS[2:4], PROMPTS[4:]]
    assert [document["responses"] for document in service.documents] == [RESPONSES[:2], RESPONSES[2:4], RESPONSES[4:]]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_tried_again_and_loses_no_row(status: int) -> None:
    """The row scores are those of a service that never failed, and the failed request alone is repeated."""
    with serving(in_turn(lengths, lambda _: Answer(status=status), lengths)) as service:
        assert ask(service) == [1.0, 2.0, 3.0, 4.0, 2.0]
    assert len(service.documents) == 4
    assert service.documents[1] == service.documents[2]


def test_a_service_that_always_fails_is_a_reason_to_try_again() -> None:
    """After the tries that the settings allow: status 75, and no score was made up."""
    message, requests = refused(lambda _: Answer(status=500), TryAgainError, retries=2)
    assert requests == 3
    assert "did not answer in 3 tries; the last one: status 500" in message
    assert "rows 0 to 1" in message


def test_a_service_that_is_not_there_is_a_reason_to_try_again() -> None:
    """Nobody listens at the port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/score"
    reward = EndpointReward(EndpointSettings(url=url, retries=1))
    with pytest.raises(TryAgainError, match="ConnectError"):
        reward(PROMPTS, RESPONSES)


def test_waits_between_tries_grow_and_never_exceed_eight_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tries are allowed."""
    waits: list[float] = []
    monkeypatch.setattr(service_module, "FIRST_WAIT_S", 0.5)
    monkeypatch.setattr(service_module.time, "sleep", waits.append)
    refused(lambda _: Answer(status=500), TryAgainError, retries=7)
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


@pytest.mark.parametrize("status", [400, 401, 404, 413])
def test_a_refusal_is_told_at_once(status: int) -> None:
    """A request that the service refuses would be refused again."""
    message, requests = refused(lambda _: Answer(status=status))
    assert requests == 1
    assert f"refused the request with status {status}" in message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>", "no JSON"),
        (b"", "no JSON"),
        (b"\xff\xfe\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[1, 2]", 'without "scores"'),
        (b'{"score": [1, 2]}', 'without "scores"'),
        (b'{"scores": null}', "are no list"),
        (b'{"scores": {"0": 1, "1": 2}}', "are no list"),
        (b'{"scores": "12"}', "are no list"),
    ],
)
def test_what_is_no_list_of_scores_is_refused(body: bytes, said: str) -> None:
    """With the rows that were asked about, and what to answer instead."""
    message, requests = refused(lambda _: Answer(body))
    assert requests == 1
    assert said in message
    assert "rows 0 to 1" in message


@pytest.mark.parametrize("score", ["NaN", "Infinity", "-Infinity", "1e999", "1e39", '"1"', "null", "true", "[1]"])
def test_a_score_that_is_no_finite_number_is_refused_by_its_row_in_the_whole_batch(score: str) -> None:
    """Python's JSON reads NaN and infinities, and single precision makes one of 1e39; neither is a score."""
    bad = Answer(f'{{"scores": [1, {score}]}}'.encode())
    message, _ = refused(in_turn(lengths, lambda _: bad))
    assert "score of response 3 is" in message
    assert message.splitlines()[1].endswith("/score, row 3")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_scores_than_of_responses_is_refused(count: int) -> None:
    """Of each request for itself: too many in one and too few in another would move scores to other rows."""
    message, _ = refused(in_turn(lengths, lambda _: scored([0.0] * count)))
    assert f"answered {count} scores for 2 responses" in message
    assert "rows 2 to 3" in message


def test_an_answer_is_read_up_to_its_limit_only() -> None:
    """A service cannot fill the memory, whatever length it announces."""
    message, requests = refused(lambda _: scored(["x" * 5000, 0]), max_bytes=1000)
    assert requests == 1
    assert "more than 1000 bytes" in message


def test_a_compressed_answer_is_not_unpacked() -> None:
    """A few bytes could unpack to any number; the service is told so and must not compress."""
    packed = Answer(gzip.compress(b'{"scores": [1, 2]}'), headers={"Content-Encoding": "gzip"})
    message, _ = refused(lambda _: packed)
    assert "no JSON" in message


def test_a_service_that_is_too_slow_is_tried_again_and_then_given_up() -> None:
    """The time limit is of one request, and the error says that time ran out."""
    done = threading.Event()

    def slow(_: Any) -> Answer:
        done.wait(5)
        return scored([0, 0])

    with serving(slow) as service:
        with pytest.raises(TryAgainError, match="no whole answer in 1 s"):
            ask(service, timeout_s=1.0, retries=1)
        done.set()
    assert len(service.documents) == 2


@pytest.fixture(params=["HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", "HTTP/1.1 200 OK\r\nX-Long: "])
def dripping(request: pytest.FixtureRequest) -> Iterator[str]:
    """A service that sends its answer or its headers a byte at a time, each well within the time limit."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(request.param.encode())
                while not stop.wait(0.05):
                    try:
                        connection.sendall(b" ")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        stop.set()
        thread.join()


def test_a_service_that_sends_little_by_little_runs_out_of_time_too(dripping: str) -> None:
    """The limit is of the whole answer, and not of each part of it."""
    reward = EndpointReward(EndpointSettings(url=dripping, timeout_s=0.3, retries=0))
    with pytest.raises(TryAgainError, match=r"no whole answer in 0\.3 s"):
        reward(["a"], ["b"])


def test_a_redirect_is_refused_and_nothing_is_sent_where_it_leads() -> None:
    """Rows and token go to the one address that the settings allow."""
    with serving(lengths) as other:
        moved = Answer(status=307, headers={"Location": other.url})
        message, _ = refused(lambda _: moved)
    assert other.documents == []
    assert "answered with a redirect (status 307)" in message


def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would see every row."""
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(lengths) as service:
        assert len(ask(service)) == 5


def test_the_token_is_sent_and_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a bearer token; no error of the service's repeats it. Without a variable none is sent."""
    monkeypatch.setenv("SCORES_TOKEN", "hush-hush")
    with serving(in_turn(lengths, lengths, lengths, lambda _: Answer(status=403))) as service:
        ask(service, token_variable="SCORES_TOKEN")
        with pytest.raises(RewardError) as caught:
            ask(service, token_variable="SCORES_TOKEN")
        with pytest.raises(RewardError):
            ask(service)
    assert service.headers[0]["Authorization"] == "Bearer hush-hush"
    assert "hush-hush" not in str(caught.value)
    assert "Authorization" not in service.headers[-1]


@pytest.mark.parametrize("value", [None, "", "  ", "two words", "naïve", "a\nb"])
def test_a_token_that_is_not_there_or_cannot_be_sent_is_refused_before_anything_is(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    """The variable is named, and what it holds is not."""
    if value is None:
        monkeypatch.delenv("SCORES_TOKEN", raising=False)
    else:
        monkeypatch.setenv("SCORES_TOKEN", value)
    with serving(lengths) as service, pytest.raises(PreflightError, match="SCORES_TOKEN") as caught:
        ask(service, token_variable="SCORES_TOKEN")
    assert service.documents == []
    if value and value.strip():
        assert value not in str(caught.value)


def test_what_the_address_asks_with_its_query_is_not_told() -> None:
    """People put keys there."""
    with serving(lambda _: Answer(status=404)) as service:
        service.url += "?key=hush-hush"
        with pytest.raises(RewardError) as caught:
            ask(service)
    assert service.paths == ["/score?key=hush-hush"]
    assert "hush-hush" not in str(caught.value)
