import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.errors import DamageError
from rlhf.tracking import MetricsLog, read_metrics


def steps_in(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def test_what_is_logged_is_read_back_with_its_step_and_a_utc_time(tmp_path: Path):
    """A row keeps every metric exactly, integers as integers, and says when it was written."""
    log = MetricsLog(tmp_path / "attempt" / "metrics.jsonl")
    log.log(1, {"objective/kl": 0.1, "episode": 48})
    (row,) = read_metrics(log.path)
    assert row.pop("time").endswith("+00:00")
    assert row == {"step": 1, "objective/kl": 0.1, "episode": 48}
    assert isinstance(row["episode"], int)


@given(value=st.floats())
@settings(max_examples=50)
def test_every_line_is_strict_json_and_every_float_survives(value: float, tmp_path_factory: pytest.TempPathFactory):
    """Non-finite values neither make the file invalid JSON for strict readers nor get lost."""
    log = MetricsLog(tmp_path_factory.mktemp("log") / "metrics.jsonl")
    log.log(0, {"loss": value})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(log.path.read_text(), parse_constant=refuse)
    (row,) = read_metrics(log.path)
    assert row["loss"] == value or (math.isnan(row["loss"]) and math.isnan(value))


@given(killed_after=st.integers(1, 20), checkpoint=st.integers(-1, 20))
@settings(max_examples=25)
def test_after_a_resume_the_file_has_each_step_once(
    killed_after: int, checkpoint: int, tmp_path_factory: pytest.TempPathFactory
):
    """Wherever a run dies and whichever checkpoint it resumes from, the file ends up as if it had never died."""
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    checkpoint = min(checkpoint, killed_after - 1)
    first = MetricsLog(path)
    for step in range(killed_after):
        first.log(step, {"loss": 1.0})
    second = MetricsLog(path)
    second.rewind(checkpoint)
    for step in range(checkpoint + 1, 21):
        second.log(step, {"loss": 2.0})
    assert steps_in(path) == list(range(21))
    assert [row["loss"] for row in read_metrics(path)] == [1.0] * (checkpoint + 1) + [2.0] * (20 - checkpoint)


@pytest.mark.parametrize("lost", range(1, 30))
def test_a_half_written_last_line_is_ignored_and_then_repaired(lost: int, tmp_path: Path):
    """A kill in the middle of a write costs that one line, wherever it was cut, and never the next one."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log(1, {"loss": 3.0})
    log.log(2, {"loss": 2.0})
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-lost])
    assert steps_in(log.path) == [1]

    resumed = MetricsLog(log.path)
    resumed.log(2, {"loss": 2.5})
    assert [row["loss"] for row in read_metrics(log.path)] == [3.0, 2.5]
    assert len(log.path.read_bytes().splitlines()) == 2


def test_rewinding_keeps_the_kept_lines_byte_for_byte(tmp_path: Path):
    """Rewinding must not touch what was measured, non-finite values and times included."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(5):
        log.log(step, {"loss": math.inf, "lr": 1e-5 / 3})
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.rewind(2)
    assert log.path.read_bytes() == b"".join(lines[:3])
    assert sorted(tmp_path.iterdir()) == [log.path]


def test_a_step_may_come_twice_but_never_goes_backwards(tmp_path: Path):
    """Training and evaluation report apart; a resumed run that forgot to rewind is told so, a new process's too."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log(3, {"loss": 1.0})
    log.log(3, {"eval/loss": 1.0})
    with pytest.raises(ValueError, match="rewind first"):
        MetricsLog(log.path).log(2, {"loss": 1.0})
    assert steps_in(log.path) == [3, 3]


@pytest.mark.parametrize("name", ["step", "time"])
def test_a_metric_cannot_hide_the_step_or_the_time(name: str, tmp_path: Path):
    """The two names that every row carries belong to the log."""
    with pytest.raises(ValueError, match=name):
        MetricsLog(tmp_path / "metrics.jsonl").log(1, {name: 2.0})


def test_damage_before_the_last_line_names_the_line(tmp_path: Path):
    """Only a kill's torn tail is forgiven: anything else is damage, and its place is told."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DamageError) as caught:
        read_metrics(path)
    assert caught.value.where == f"{path}:2"
