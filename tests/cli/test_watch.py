"""rlhf watch and rlhf samples on the command line."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from rlhf.attempt.folder import AttemptFolder
from rlhf.history.reading import evaluated_samples, stage_history
from rlhf.store import Store
from tests.cli.conftest import Ask
from tests.pipeline.helpers import end, install_toys, planned, start

ROWS: list[dict[str, Any]] = [
    {"step": 1, "prompt": "Why is rain wet?", "response": "one\u2028\x1b[2J", "score": 0.5, "ended": True},
    {"step": 1, "prompt": "fixed", "response": "two", "score": float("nan"), "watched": True},
    {"step": 2, "prompt": "Who?", "response": "three", "score": -1.0, "ended": False},
    {"step": 2, "prompt": "fixed", "response": "four", "score": 2.0, "watched": True, "tokens": [["four", 0.1, 0.2]]},
]


@pytest.fixture
def kept(made: Path) -> Path:
    """Samples of a stage, the last line cut."""
    key = planned(made)["count"].key
    assert key is not None
    (attempt,) = Store.open(made.parent / "store").attempts(key)
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    AttemptFolder(attempt).samples.write_text("\n".join([*lines, '{"step": 3, "pro']), encoding="utf-8")
    return made


@pytest.mark.parametrize(
    ("words", "responses"),
    [
        ((), ["three", "four"]),
        (("count", "--iteration", "1"), ["one\u2028\x1b[2J", "two"]),
        (("--worst",), ["two", "three", "one\u2028\x1b[2J", "four"]),
        (("--best", "--iteration", "2"), ["four", "three"]),
        (("--prompt", "FIXED"), ["two", "four"]),
        (("--prompt", "w"), ["three", "one\u2028\x1b[2J"]),
    ],
)
def test_samples_are_chosen_by_iteration_score_and_prompt(ask: Ask, kept: Path, words: Any, responses: list[str]):
    """Of all, or by default of the last iteration; --json has the rows as they were written, NaN as a text."""
    answer = ask("samples", *words, "--json")
    assert (answer.status, answer.err) == (0, "")
    assert answer.document["stage"] == "count"
    rows = answer.document["samples"]
    assert [row["response"] for row in rows] == responses
    assert all(str(row).replace("'NaN'", "nan") in map(str, ROWS) for row in rows)
    assert ": NaN" not in answer.out
    shown = ask("samples", *words)
    assert shown.status == 0
    assert "\x1b" not in shown.out
    assert shown.out.count("score") == len(responses)


@pytest.mark.parametrize(
    ("words", "what", "following"),
    [
        (("total",), "total has kept no samples", "name evaluate, or the stage that tuned the policy"),
        (("--iteration", "7"), "no sample of count fits", "another --iteration"),
        (("--worst", "--best"), "exclude each other", "give one of them"),
        (("count", "total"), "one stage", "rlhf samples ppo"),
        (("words.left=other",), "no stage has kept samples yet", "rlhf run words.left=other"),
        (("total", "words.left=other"), "total has kept no samples", "rlhf run total words.left=other"),
    ],
)
def test_what_has_no_samples_is_refused_with_what_to_do(ask: Ask, kept: Path, words: Any, what: str, following: str):
    """Never run, collected, no such iteration, contradictions."""
    answer = ask("samples", *words)
    assert (answer.status, answer.out) == (2, "")
    assert what in answer.err
    assert f"next:  {following}" in answer.err


def test_samples_of_an_evaluation_are_those_of_its_result(made: Path, tmp_path: Path):
    """Each has the response after training as its response; a damaged line is counted."""
    store, row = Store.open(made.parent / "store"), {"prompt": "p", "before": "b", "after": "a"}
    folder = tmp_path / "report"
    folder.mkdir()
    scores = {"score_before": 1.0, "score_after": 2.0}
    (folder / "samples.jsonl").write_text(f"{json.dumps(row | scores)}\n{json.dumps(row)}\n")
    history = stage_history(planned(made)["total"], store)
    assert history.record is not None
    assert evaluated_samples(history.record, store).rows == ()
    history.record.__dict__["artifact"] = store.put_artifact(folder, "report").digest
    lines = evaluated_samples(history.record, store)
    assert lines.rows == (row | scores | {"response": "a", "score": 2.0},)
    assert lines.damaged == 1


def test_a_closed_pipe_and_ctrl_c_end_it_without_a_word(kept: Path, tmp_path: Path):
    """`rlhf samples | head -1` and leaving a watch are no errors to report."""
    site = install_toys(tmp_path / "site")
    watch = start(site, "watch", "words.left=other", "--config", kept)
    samples = start(site, "samples", "--config", kept)
    try:
        assert samples.stdout is not None
        assert samples.stderr is not None
        samples.stdout.close()
        assert samples.wait(20) == 1
        assert samples.stderr.read() == ""
        assert watch.stdout is not None
        assert watch.stdout.readline().startswith("nothing runs")
        watch.send_signal(signal.SIGINT)
        assert watch.communicate(timeout=20) == ("", "")
        assert watch.returncode == 130
    finally:
        end(watch)
        end(samples)


def test_a_watch_of_what_is_done_shows_it_and_ends(ask: Ask, made: Path):
    """There is nothing to wait for."""
    answer = ask("watch")
    assert answer.status == 0
    assert [line.split()[:2] for line in answer.out.splitlines()] == [
        ["words", "cached"],
        ["count", "cached"],
        ["total", "cached"],
    ]
