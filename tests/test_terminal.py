import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, RenderableType

from rlhf.errors import DiskFullError, SettingsError
from rlhf.pipeline.reporting import Eta
from rlhf.terminal import (
    Display,
    StageRow,
    duration,
    key_values,
    leaderboard_table,
    plan_table,
    print_error,
    samples_table,
    short_key,
    stages_table,
)

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?[39][0-7](?:;[0-9;]*)?m")
KEY = "3f9a1c07" * 8


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def make_console(width: int = 80, *, terminal: bool = False) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width, force_terminal=terminal, color_system="standard" if terminal else None), file


def render(renderable: RenderableType, width: int = 80) -> list[str]:
    console, file = make_console(width)
    console.print(renderable)
    return [line.rstrip() for line in file.getvalue().splitlines()]


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_live_table_looks_like_this():
    """The whole picture, once: columns, shortened keys, times, measured time left."""
    rows = [
        StageRow("data", "done", KEY, "new", seconds=20),
        StageRow("sft", "running", "41b07e" + KEY, "new", 72, "step 90/120", 90, 120, "loss 3.21"),
        StageRow("rm"),
    ]
    assert render(stages_table(rows, {"sft": 25.0}, 80)) == [
        "stage  state    key      why  time  progress",
        "data   done     3f9a1c…  new  0:20",
        "sft    running  41b07e…  new  1:12  eta 0:25   step 90/120  loss 3.21",
        "rm     waiting",
    ]


@given(
    width=st.integers(40, 200),
    why=st.text(max_size=120),
    message=st.text(max_size=120),
    state=st.sampled_from(["running", "failed", "cached"]),
)
def test_whatever_is_said_a_stage_is_one_line_with_its_whole_key(width: int, why: str, message: str, state: str):
    """Long reasons, wide letters and control characters are cut or replaced; neither the table nor the key is."""
    rows = [StageRow("evaluate", state, KEY, why, 3725, message)]  # type: ignore[arg-type]  hypothesis gives str
    lines = render(stages_table(rows, {}, width), width)
    assert len(lines) == 2
    assert lines[1].startswith(f"evaluate  {state}  3f9a1c…")
    assert "1:02:05" in lines[1]
    assert all(cell_len(line) <= width for line in lines)
    assert not CONTROL.search("".join(lines))


def test_at_80_columns_the_progress_is_whole_and_the_reason_is_cut():
    """Where not both fit, the numbers that change go first."""
    row = StageRow("evaluate", "running", KEY, "sft.learning_rate 0.0001 -> 0.0003", 72, "step 90/120  loss 3.21")
    (_, line) = render(stages_table([row], {"evaluate": 25.0}, 80))
    assert line.endswith("1:12  eta 0:25   step 90/120  loss 3.21")
    assert "…  1:12" in line


def test_a_long_progress_leaves_a_stub_of_the_reason_where_there_is_room():
    """Neither of the two columns can push the other out of an ordinary terminal."""
    (_, line) = render(stages_table([StageRow("sft", "running", KEY, "w" * 99, 72, "p" * 99)], {}, 80))
    assert re.search(r"w{9}…  1:12  p{30,}…$", line)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (20, "0:20"), (59.6, "1:00"), (72.4, "1:12"), (3599.7, "1:00:00"), (3723, "1:02:03")],
)
def test_durations_read_as_a_clock_does(seconds: float, text: str):
    """Minutes and seconds, hours where there are any, and no 60 after rounding."""
    assert duration(seconds) == text


def test_short_keys_keep_six_digits():
    """Six digits tell a pipeline's keys apart; no key shows nothing."""
    assert short_key(KEY) == "3f9a1c…"
    assert short_key(None) == ""


@given(first=st.integers(0, 500), seen=st.integers(3, 50), step=st.floats(0.01, 100), slow=st.floats(0, 1000))
def test_the_time_left_knows_neither_the_slow_first_step_nor_the_steps_before_a_resume(
    first: int, seen: int, step: float, slow: float
):
    """Wherever a run resumes and however long its first step takes, steady steps give the exact time left."""
    eta = Eta()
    total = first + seen + 100
    eta.observe(0, first, total)
    for index in range(1, seen + 1):
        eta.observe(slow + index * step, first + index, total)
    now = slow + seen * step
    assert eta.remaining(now) == pytest.approx(100 * step)
    assert eta.remaining(now + 3 * step) == pytest.approx(97 * step)
    assert eta.remaining(now + 1000 * step) == 0


def test_the_time_left_follows_the_last_part_of_the_steps():
    """A run that became slower half-way is measured by its present pace."""
    eta = Eta()
    for done in range(101):
        eta.observe(done if done <= 50 else 50 + 3 * (done - 50), done, 200)
    assert eta.remaining(200) == pytest.approx(300)


def test_no_time_left_is_shown_before_two_steps_were_measured():
    """One step is the slow one, a repeated report is none, and a restart begins anew."""
    eta = Eta()
    assert eta.remaining(0) is None
    for now, done in ((0, 0), (60, 1), (61, 1), (62, 1)):
        eta.observe(now, done, 10)
        assert eta.remaining(now) is None
    eta.observe(63, 2, 10)
    assert eta.remaining(63) is not None
    eta.observe(70, 1, 10)
    assert eta.remaining(70) is None


def run_a_stage(display: Display, clock: Clock, *, steps: int, seconds_per_step: float) -> None:
    with display:
        display.update("data", state="cached", key=KEY, why="unchanged")
        display.update("sft", state="running", key="41b07e" + KEY, why="new")
        for step in range(1, steps + 1):
            clock.now += seconds_per_step
            display.update("sft", message=f"step {step}/{steps}", done=step, total=steps)
        display.line("sft: [2] rows are over-long")
        display.update("sft", state="done", message="eval/loss 3.21")


def test_in_a_pipe_a_run_is_plain_lines():
    """A CI log has one line when a stage starts, one at every tenth, one when it ends, and no control code."""
    console, file = make_console()
    clock = Clock()
    run_a_stage(Display(console, ["data", "sft"], clock), clock, steps=20, seconds_per_step=1)
    lines = file.getvalue().splitlines()
    assert lines[:4] == [
        "data  cached   3f9a1c…  unchanged",
        "sft   running  41b07e…  new  0:00",
        "sft   running  41b07e…  0:02  step 2/20",
        "sft   running  41b07e…  0:04  eta 0:16   step 4/20",
    ]
    assert lines[-2:] == ["sft: [2] rows are over-long", "sft   done     41b07e…  new  0:20  eval/loss 3.21"]
    assert len(lines) == 2 + 10 + 2
    assert not CONTROL.search(file.getvalue())


def test_in_a_pipe_a_slow_stage_reports_every_15_seconds_and_a_quick_one_does_not_chatter():
    """A thousand slow steps and a thousand quick ones both leave a log that a person can read."""
    for seconds_per_step, expected in ((10, 500), (0.001, 10)):
        console, file = make_console()
        clock = Clock()
        run_a_stage(Display(console, ["data", "sft"], clock), clock, steps=1000, seconds_per_step=seconds_per_step)
        assert file.getvalue().count("step") == pytest.approx(expected, rel=0.1)


def test_plain_lines_are_never_folded():
    """Whoever greps a log finds a stage's whole line, however narrow the console claims to be."""
    console, file = make_console(width=20)
    with Display(console, ["data"]) as display:
        display.update("data", state="failed", key=KEY, why="a reason of more than twenty columns")
        display.line("/a/path/that/is/longer/than/the/line")
    assert len(file.getvalue().splitlines()) == 2


def test_on_a_terminal_the_table_is_redrawn_in_colour_and_stays():
    """The last picture remains on the screen, with notes above it."""
    console, file = make_console(terminal=True)
    clock = Clock()
    run_a_stage(Display(console, ["data", "sft"], clock), clock, steps=5, seconds_per_step=1)
    text = file.getvalue()
    assert COLOUR.search(text)
    last_picture = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", text).replace("\r", "").split("stage  state")[-1]
    assert [line.split()[:2] for line in last_picture.splitlines()[1:3]] == [["data", "cached"], ["sft", "done"]]
    assert "over-long" not in last_picture
    assert "sft: [2] rows are over-long" in text


def test_a_running_stage_has_its_detail_below_the_table_at_each_step():
    """It goes when the stage ends; a pipe never asks for it."""
    asked: list[int] = []

    def detail(row: StageRow) -> str:
        asked.append(row.done)
        return f"detail of step {row.done}"

    console, file = make_console(width=60, terminal=True)
    clock = Clock()
    run_a_stage(Display(console, ["data", "sft"], clock, detail), clock, steps=5, seconds_per_step=1)
    assert asked == [1, 2, 3, 4, 5]
    assert "detail of step" not in file.getvalue().split("stage  state")[-1]
    console, file = make_console(width=60, terminal=True)
    display = Display(console, ["sft"], clock, detail)
    with display:
        display.update("sft", state="running", key=KEY, why="x" * 60, message="step 2/9  loss 1", done=2, total=9)
    picture = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", file.getvalue()).splitlines()
    assert picture[-3:] == ["", "sft  step 2/9  loss 1", "detail of step 2"]
    console, file = make_console()
    run_a_stage(Display(console, ["data", "sft"], clock, detail), clock, steps=5, seconds_per_step=1)
    assert len(asked) == 6


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch):
    """NO_COLOR takes the colours and leaves the live table."""
    monkeypatch.setenv("NO_COLOR", "1")
    console, file = make_console(terminal=True)
    clock = Clock()
    run_a_stage(Display(console, ["data", "sft"], clock), clock, steps=5, seconds_per_step=1)
    print_error(console, SettingsError("wrong"))
    assert "\x1b[" in file.getvalue()
    assert not COLOUR.search(file.getvalue())


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch):
    """A terminal that cannot move its cursor is treated like a pipe."""
    monkeypatch.setenv("TERM", "dumb")
    console, file = make_console(terminal=True)
    clock = Clock()
    run_a_stage(Display(console, ["data", "sft"], clock), clock, steps=20, seconds_per_step=1)
    assert len(file.getvalue().splitlines()) == 14


def test_a_stage_nobody_named_is_our_own_mistake():
    """A misspelt stage or field must not vanish."""
    console, _ = make_console()
    display = Display(console, ["data"])
    with pytest.raises(KeyError):
        display.update("date", state="done")
    with pytest.raises(TypeError):
        display.update("data", stat="done")


def test_an_error_is_its_three_lines_unbroken_and_red_only_on_a_terminal():
    """Paths and commands can be copied whole, square brackets are text, and a pipe gets no codes."""
    path = "/data/" + "long/" * 30
    error = DiskFullError("[sft] has no room \x1b[2J", path, "rlhf gc --keep 1")
    console, file = make_console(width=40)
    print_error(console, error)
    assert file.getvalue() == f"error: [sft] has no room �[2J\n  where: {path}\n  next:  rlhf gc --keep 1\n"
    console, file = make_console(width=40, terminal=True)
    print_error(console, error)
    assert file.getvalue().startswith("\x1b[1;31merror:\x1b[0m ")


def test_samples_stand_side_by_side_and_cannot_repaint_the_terminal():
    """A model's answer is shown as text, whatever it wrote: markup, line breaks and escape codes included."""
    fields: list[str] = ["prompt", "before", "after", "score_before", "score_after"]
    samples = [("A", "dull\n\nfilm", "a [bold]fine[/bold] film", -0.04, 0.918), ("B", "\x1b[31mred", "", 0.5, -1.0)]
    rows = [dict(zip(fields, sample, strict=True)) for sample in samples]
    lines = [line for line in render(samples_table(rows), 100) if line]
    assert [line.split() for line in lines] == [
        ["score", "before", "score", "after"],
        ["A"],
        ["-0.04", "dull", "film", "+0.92", "a", "[bold]fine[/bold]", "film"],
        ["B"],
        ["+0.50", "�[31mred", "-1.00"],
    ]


def stage_entry(**changes: object) -> dict[str, object]:
    empty = {
        "stage": "data",
        "state": "missing",
        "key": None,
        "artifact": None,
        "why": "",
        "needs": [],
        "metrics": None,
    }
    return {**empty, "seconds": None, **changes}


def test_the_plan_folds_its_reasons_and_leaves_out_what_it_does_not_know():
    """At 80 columns every word of a sentence is there, beside whole keys; empty columns are not."""
    why = "ppo.kl.target changed from 6 to 8, and the reward model is another one than at the last run of this stage"
    lines = render(
        plan_table(
            [
                stage_entry(state="cached", key=KEY, why="unchanged", seconds=20.2),
                stage_entry(stage="ppo", state="blocked", why=why, needs=["sft", "rm"]),
            ]
        )
    )
    assert lines[0].split() == ["stage", "state", "key", "time", "why"]
    assert lines[1].split() == ["data", "cached", "3f9a1c…", "0:20", "unchanged"]
    assert " ".join(lines[2:]).split() == ["ppo", "blocked", *why.split()]
    assert all(len(line) <= 80 for line in lines)


def test_the_status_shows_final_metrics_one_a_line():
    """Each keeps its full name, by which one searches a dashboard; a plan, which asks what will run, has none."""
    metrics = {"objective/scores_first": -0.0412345, "objective/kl": 4.91, "rows": 3, "more": 1.0, "still more": 2.0}
    stages = [stage_entry(stage="ppo", state="cached", key=KEY, why="unchanged", metrics=metrics)]
    assert [line.split() for line in render(plan_table(stages, metrics=True))[1:]] == [
        ["ppo", "cached", "3f9a1c…", "unchanged"],
        ["objective/scores_first", "-0.04123"],
        ["objective/kl", "4.91"],
        ["rows", "3"],
        ["…", "2", "more"],
    ]
    assert len(render(plan_table(stages))) == 2


def test_a_summary_is_one_name_and_value_a_line():
    """Numbers are rounded for reading, text stays as it is."""
    assert render(key_values({"store": "[store]/", "prompts": 64, "kl": 4.912345})) == [
        "store    [store]/",
        "prompts  64",
        "kl       4.912",
    ]


def test_a_leaderboard_of_one_set_says_that_its_intervals_are_unknown() -> None:
    """Where there is no number there is a word, and no crash."""
    row = {"model": "a", "elo": 12.0, "standard_error": None, "low": None, "high": None, "comparisons": 3.0}
    console = Console(width=80)
    with console.capture() as capture:
        console.print(leaderboard_table([row]))
    assert capture.get().splitlines()[1].split() == ["a", "+12", "unknown", "3"]
