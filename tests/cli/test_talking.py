"""Talking to models: what a person sees on a terminal, what is saved, and what is counted."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rlhf.cli.comparing import pairs_of, side_by_side
from rlhf.cli.main import main
from rlhf.cli.talking import _interrupt_as_event, speak  # pyright: ignore[reportPrivateUsage] - its contract is tested
from rlhf.collect.annotation import shown_order
from rlhf.collect.collection import name_of
from rlhf.collect.comparison_file import ComparisonFile
from rlhf.data.records import ComparisonSet, ResponseSet
from rlhf.errors import LeaseHeldError, RecordError
from rlhf.textstats import win_rate
from tests.models.tiny import SHAPE, make_tiny_llama
from tests.pipeline.helpers import REPOSITORY


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("talking") / "tiny")


def test_ctrl_c_stops_an_answer_and_not_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    """The piece that was being written is the last."""

    def answer():
        yield "one "
        signal.raise_signal(signal.SIGINT)
        yield "two "
        yield "three"

    before = signal.getsignal(signal.SIGINT)
    with _interrupt_as_event() as stopped:
        speak(answer(), stopped)  # pyright: ignore[reportArgumentType] - an iterator of pieces is all that is read
    assert capsys.readouterr().out == "one two \n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_conversation_on_a_terminal(tiny: Path) -> None:
    """Ctrl-C at the prompt ends nothing, what cannot be answered is told and forgotten, Ctrl-D ends."""
    person, program = pty.openpty()
    command = [sys.executable, "-m", "rlhf", "chat", str(tiny), "--max-new-tokens", "8", "--config", "/nowhere.yaml"]
    chat = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=program, stdout=program, stderr=program, start_new_session=True
    )
    os.close(program)
    seen = bytearray()

    def read() -> None:
        try:
            while part := os.read(person, 4096):
                seen.extend(part)
        except OSError:
            return  # the other end is closed

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def wait_for_prompt(count: int) -> None:
        end = time.monotonic() + 60
        while seen.count(b"> ") < count:
            assert time.monotonic() < end, seen.decode(errors="replace")
            time.sleep(0.02)

    wait_for_prompt(1)
    chat.send_signal(signal.SIGINT)
    wait_for_prompt(2)
    os.write(person, b"a film of two halves " * 20 + b"\n")
    wait_for_prompt(3)
    os.write(person, b"a film\n")
    wait_for_prompt(4)
    os.write(person, b"\x04")
    assert chat.wait(60) == 0
    reader.join(10)
    os.close(person)
    shown = seen.decode(errors="replace")
    assert "do not fit the context of 64" in shown
    assert "cut after 8 tokens" in shown


def test_policies_are_compared_by_keys_and_saved(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A session that ends early goes on where it was; the file names the policies, wherever they were shown."""
    other = make_tiny_llama(tmp_path / "other", SHAPE.model_copy(update={"layers": 1}))
    (tmp_path / "prompts.txt").write_text("a film\n\nthe joy\ndull\nagain\n")
    saved = tmp_path / "saved.jsonl"
    words = ["compare", str(tiny), str(other), "--by", "person", "--blind", "--file", str(tmp_path / "prompts.txt")]
    words += ["--save", str(saved), "--config", "/nowhere.yaml", "--max-new-tokens", "4", "--seed", "1"]
    for keys in ("a\n?\nt\n", "a\ns\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(keys))
        assert main(words) == 0
    shown = capsys.readouterr().out
    assert str(other) not in shown.split("against")[0]
    assert "3 of 4 prompts compared by person" in shown
    rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a film", "the joy", "dull"]
    assert all(row["models"] == [str(tiny), str(other)] and len(set(row["responses"])) == 2 for row in rows)
    assert rows[1]["winners"] == [[0, 1, 0.5]]
    firsts = [shown_order("1", name_of(ComparisonSet.model_validate(row)), 2)[0] for row in (rows[0], rows[2])]
    assert [row["winners"][0][0] for row in (rows[0], rows[2])] == firsts
    assert set(firsts) == {0, 1}


SET = ResponseSet(prompt="a", responses=["b", "c"], models=["x", "y"])
COMPARED = ComparisonSet(**dict(SET), winners=[[0, 1, 1]])


def test_a_session_that_was_killed_in_a_line_loses_that_line_alone(tmp_path: Path) -> None:
    """And a file without its last line end loses nothing; one line that is no set is named."""
    path = tmp_path / "saved.jsonl"
    with ComparisonFile(path) as file:
        file.append(COMPARED)
        with pytest.raises(LeaseHeldError):
            ComparisonFile(path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    with ComparisonFile(path) as file:
        assert file.saved(SET) == COMPARED
        assert file.saved(SET.model_copy(update={"models": ["y", "x"]})) is None
    assert path.read_bytes() == whole
    path.write_bytes(whole.rstrip())
    with ComparisonFile(path) as file:
        file.append(COMPARED)
    assert path.read_bytes() == whole * 2
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(RecordError) as caught:
        ComparisonFile(path)
    assert caught.value.where == f"{path}:1"


def test_wins_are_counted_whichever_policy_is_named_first() -> None:
    """Of three policies each pair by itself; a verdict on some of the pairs counts for these."""
    verdicts = [[[0, 1, 1], [2, 0, 0], [1, 2, 0.5]], [[1, 0, 1], [1, 2, 1]]]
    pairs = {(pair["first"], pair["second"]): pair for pair in pairs_of(["x", "y", "z"], verdicts)}
    counts = {names: (pair["won"], pair["tied"], pair["lost"]) for names, pair in pairs.items()}
    assert counts == {("x", "y"): (1, 0, 1), ("x", "z"): (1, 0, 0), ("y", "z"): (1, 1, 0)}
    assert pairs["y", "z"]["win_rate"] == 0.75


@pytest.mark.parametrize("truth", [0.1, 0.5, 0.9])
def test_the_interval_of_a_win_rate_holds_the_truth_as_often_as_it_says(truth: float) -> None:
    """In 95 of 100 sets of 30 coins, about; and it has a width where all coins fall alike."""
    coins = np.random.default_rng(0).random((2000, 30)) < truth
    intervals = [win_rate(row.astype(float).tolist()) for row in coins]
    assert 0.92 < np.mean([interval.low <= truth <= interval.high for interval in intervals]) < 0.985
    assert win_rate([1.0] * 5).low < 0.7


def test_answers_stand_below_each_other_in_a_narrow_terminal() -> None:
    """40 columns are too few for two; control characters are replaced in both forms."""
    from rich.console import Console

    for width, together in ((40, False), (100, True)):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(side_by_side(["a", "b"], ["one\x1b[2J", "two"], width))
        lines = console.export_text().splitlines()
        assert any("one�[2J" in line for line in lines)
        assert any("one" in line and "two" in line for line in lines) == together
        assert all(len(line) <= width for line in lines)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["compare", "one"], "two or more different policies"),
        (["compare", "one", "two", "--by", "chance"], "nobody is called 'chance'"),
        (["compare", "one", "two", "--blind", "--by", "reward"], "--blind hides names from a person"),
        (["compare", "one", "two", "--by", "person", "--json"], "in the place of --json"),
        (["generate", "./none", "--prompt", "a"], "there is no folder ./none"),
        (["generate", "TINY", "--prompt", " "], "a prompt is empty"),
        (["generate", "TINY", "--prompt", "\udcff"], "bytes that are not UTF-8"),
        (["generate", "TINY", "--prompt", "a", "--file", "b"], "both are given"),
        (["generate", "TINY", "--file", "none.txt"], "the file cannot be read"),
    ],
)
def test_what_cannot_be_done_is_refused(
    words: list[str], problem: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a model is loaded."""
    assert main([str(tiny) if word == "TINY" else word for word in words] + ["--config", "/nowhere.yaml"]) == 2
    said = capsys.readouterr()
    assert problem in said.out + said.err
