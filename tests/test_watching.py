"""The block of a running stage, and a run as another process watches it."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from rlhf.attempt.folder import AttemptFolder, Progress
from rlhf.errors import RlhfError, StageError, TryAgainError
from rlhf.history.reading import attempts_at
from rlhf.store import Store
from rlhf.terminal import Display
from rlhf.tracking import MetricsLog
from rlhf.watching import Follower, curve, prompt_text, raised_alarms, samples_view, stage_block
from tests.pipeline.helpers import made, planned, write_pipeline
from tests.test_terminal import CONTROL, Clock, make_console, render

KEY = "cd" * 32
HOSTILE = "\x1b[2J\u202egro\u05e9\u05dc\u05d5\u05dd 👩‍👩‍👧 [bold]\r\n\x9b1m\ud800 "


@given(st.lists(st.floats(width=64), min_size=1, max_size=200), st.integers(1, 80))
def test_a_curve_has_a_bar_for_each_stretch_and_shows_what_is_not_finite(values: list[float], width: int):
    """Never wider than asked, whatever the numbers; equal or rising values never fall."""
    line = curve(values, width)
    assert len(line) == min(width, len(values))
    assert ("!" in line) == (not all(map(math.isfinite, values)))
    rising = curve(sorted(filter(math.isfinite, values)), width)
    assert list(rising) == sorted(rising)


def test_the_highest_and_the_lowest_value_are_the_highest_and_the_lowest_bar():
    """The curve fills its height; a constant is a line in the middle."""
    assert curve([1, 2, 1.5, 1], 10) == "▁█▅▁"
    assert curve([0.1] * 50, 7) == "▅" * 7
    assert curve([-1.7e308, 1.7e308, math.nan], 3) == "▁█!"
    assert curve([0, 2, 9, 9], 2) == "▁█"


def test_a_curve_of_several_lines_is_the_same_curve_with_finer_bars():
    """Each line goes on where the one below is full; what is not finite stands at the bottom."""
    assert curve([0, 4, 8, 16, math.inf], 10, height=2) == "  ▁█ \n▁▅██!"
    assert curve([1.0, 1.0], 10, height=3) == "  \n▅▅\n██"


@pytest.mark.parametrize("width", [40, 80, 160])
def test_a_block_holds_any_text_within_its_width(tmp_path: Path, width: int):
    """Of 100,000 characters a few lines are shown, no control character passes, markup is text."""
    store = Store.open(tmp_path)
    folder = AttemptFolder(store.new_attempt(KEY))
    log = MetricsLog(folder.metrics)
    for step in range(1, 100):
        log.log(
            step, {"objective/scores": step, "objective/kl": math.inf, "length/mean": 30.0, "alarm/length": step > 50}
        )
    text = HOSTILE + "x" * 100_000
    rows = [{"step": step, "prompt": text, "response": text, "score": math.nan} for step in (98, 99)]
    folder.samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = render(stage_block(attempts_at(KEY, store), width) or "", width)
    assert max(map(cell_len, lines)) <= width
    assert not CONTROL.search("\n".join(lines))
    assert len(lines) < 14
    shown = "\n".join(lines)
    for part in ("score", "▁", "!!!", "99", "sample of iteration 99, score +nan", "[bold]", "alarm length since"):
        assert part in shown


def test_alarms_say_since_when():
    """One that is over is not shown as if it still were."""
    rows = [{"step": step, "alarm/kl": step in (2, 3), "alarm/eos": step == 4, "alarm/no": 0} for step in (1, 2, 3, 4)]
    assert raised_alarms(rows) == [
        "alarm kl since iteration 2, last at 3",
        "alarm eos since iteration 4, and still",
    ]


def test_samples_are_shown_below_their_prompt():
    """A prompt that repeats is shown once; messages by their last; a long text with what was left out."""
    messages = [{"role": "user", "content": "before"}, {"role": "user", "content": "the question"}]
    rows = [
        {"step": 1, "prompt": messages, "response": HOSTILE, "score": 0.5, "ended": False},
        {"step": 2, "prompt": messages, "response": "y" * 100_000, "score": None},
        {"step": 2, "prompt": messages, "response": "z", "score": 3e300, "finished": True},
        {"prompt": "other", "before": "old", "score_before": 1.0, "response": "new", "score": 2.0},
    ]
    lines = render(samples_view(rows), 40)
    shown = "\n".join(lines)
    assert not CONTROL.search(shown)
    assert max(map(cell_len, lines)) <= 40
    assert [line for line in lines if line and not line.startswith(" ")] == ["the question", "other"]
    facts = [line.strip() for line in lines if re.match("  (iteration|before|after)", line)]
    assert facts[:2] == ["iteration 1, score +0.50, not ended", "iteration 2, score None"]
    assert facts[2:] == ["after the last update, score +3e+300", "before, score +1.00", "after, score +2.00"]
    assert "… 98000 more characters" in " ".join(shown.split())
    assert prompt_text([]) == "[]"


class Scene:
    """A watcher of a pipeline of toys, and what happens between its looks."""

    def __init__(self, tmp_path: Path) -> None:
        self.path, self.store, self.clock = write_pipeline(tmp_path), Store.open(tmp_path / "store"), Clock()
        self.leases = ExitStack()

    def attempt(self, name: str) -> AttemptFolder:
        """Begin to work on a stage."""
        one = planned(self.path)[name]
        assert one.key is not None
        self.leases.enter_context(self.store.lease(one.key))
        return AttemptFolder(self.store.new_attempt(one.key))

    def commit(self, name: str) -> None:
        self.store.set_ref("toy", name, made(planned(self.path)[name], self.store).key)
        self.leases.close()

    def watch(self, events: Iterator[Any]) -> tuple[list[str], RlhfError | None]:
        """Follow while the events happen, one after each look; return the lines and the error of the end."""

        def sleep(seconds: float) -> None:
            self.clock.now += seconds
            assert self.clock.now < 1000, "the watch does not end"
            next(events, None)

        console, file = make_console()
        error = None
        with self.leases:
            display = Display(console, list(planned(self.path)), self.clock)
            try:
                Follower([], lambda: planned(self.path), self.store, display, self.clock).follow(sleep)
            except RlhfError as raised:
                error = raised
        return file.getvalue().splitlines(), error


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def progress(done: int) -> Progress:
    """Of a clock that is far from the watcher's, ten seconds a step."""
    return Progress(
        f"step {done}/9", done, 9, 1e6 + 10.0 * done, tuple((1e6 + 10.0 * n, n) for n in range(1, done + 1))
    )


def test_a_run_is_watched_from_before_its_begin_to_its_end(scene: Scene):
    """States, steps, measured time left and notes appear; the watch ends with the last result."""

    def events() -> Iterator[None]:
        folder = scene.attempt("words")
        folder.progress.write(progress(4))
        folder.note_lines.write_text('{"note": "an \\u001balarm"}\n')
        yield
        yield scene.commit("words")
        yield scene.commit("count")
        yield scene.commit("total")
        raise AssertionError("the watch has not ended")

    lines, error = scene.watch(events())
    assert error is None
    assert lines[0].startswith("nothing runs; waiting")
    assert lines[1] == "words: an �alarm"
    assert re.fullmatch(r"words  running  \w{6}…  new  0:0\d  eta 0:50   step 4/9", lines[2])
    assert [line.split()[:2] for line in lines[3:]] == [["words", "done"], ["count", "done"], ["total", "done"]]


def test_the_error_that_ends_a_run_is_that_of_the_watch(scene: Scene):
    """An old failure is not: a new run may have begun."""

    def events() -> Iterator[None]:
        old = scene.attempt("words")
        old.error.write(StageError("an old error"))
        scene.leases.close()
        yield
        folder = scene.attempt("words")
        folder.progress.write(progress(1))
        yield
        folder.error.write(StageError("it broke", "rank 0", "mend it"))
        yield scene.leases.close()
        raise AssertionError("the watch has not ended")

    lines, error = scene.watch(events())
    assert str(error) == "it broke\n  where: rank 0\n  next:  mend it"
    assert [line.split()[1] for line in lines if line.startswith("words ")] == ["failed", "running", "failed"]


@pytest.mark.parametrize(("silent", "seconds"), [(False, (10, 15)), (True, (40, 50))])
def test_a_run_that_is_gone_ends_the_watch(scene: Scene, monkeypatch: pytest.MonkeyPatch, silent: bool, seconds: Any):
    """Killed here, its lease has no holder; on another machine it only falls silent."""
    monkeypatch.setattr("rlhf.store.lease.Holder.is_gone", lambda _: False)

    def events() -> Iterator[None]:
        scene.attempt("words").progress.write(progress(2))
        yield
        if silent:
            key = planned(scene.path)["words"].key
            holder = scene.store.holder(str(key))
            monkeypatch.setattr(scene.store, "holder", lambda one: holder if one == key else None)
        else:
            scene.leases.close()
        yield

    _, error = scene.watch(events())
    assert isinstance(error, TryAgainError)
    assert "the run was interrupted or killed" in error.what
    assert "words" in error.what
    assert seconds[0] <= scene.clock.now <= seconds[1]


def test_a_pipeline_that_never_runs_is_not_waited_for_without_end(scene: Scene):
    """The error names the next command."""
    lines, error = scene.watch(iter(()))
    assert isinstance(error, TryAgainError)
    assert "no run has begun" in error.what
    assert error.next_step == "rlhf run"
    assert len(lines) == 1
