"""What runs left, as it is read back: in a folder and in a bucket, whole, cut and damaged."""

import json
import math
from pathlib import Path

import pytest

from rlhf.attempt.folder import AttemptFolder, Progress
from rlhf.errors import StageError
from rlhf.history.reading import Lines, attempts_at, earlier_results, joined, stage_history
from rlhf.pipeline import uploads
from rlhf.store import Store
from rlhf.tracking import MetricsLog
from tests.buckets import Bucket
from tests.pipeline.helpers import made, make, planned, until, write_pipeline

KEY = "ab" * 32


def write_attempt(path: Path) -> AttemptFolder:
    """Metrics with a non-finite number, samples of two versions, a note, progress."""
    folder = AttemptFolder(path)
    log = MetricsLog(folder.metrics)
    log.log(1, {"loss": 2.0})
    log.log(2, {"loss": math.inf, "kl": math.nan})
    rows = [
        {"step": 1, "prompt": "p", "response": "r\u2028\x1b[2J", "score": math.nan},
        {"step": 2, "prompt": "p", "response": "🙂", "score": 1.5, "watched": True, "tokens": [["🙂", 0.1, 0.2]]},
    ]
    folder.samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.note_lines.write_text(json.dumps({"note": "an alarm"}) + "\n")
    folder.progress.write(Progress("step 2/4", 2, 4, 20.0, ((10.0, 1), (20.0, 2))))
    return folder


def test_an_attempt_is_read_back_as_it_was_written(tmp_path: Path):
    """Non-finite numbers, characters that end lines elsewhere, and fields of newer versions survive."""
    store = Store.open(tmp_path)
    write_attempt(store.new_attempt(KEY))
    (attempt,) = attempts_at(KEY, store)
    assert attempt.metrics.rows[1]["loss"] == math.inf
    assert math.isnan(attempt.metrics.rows[1]["kl"])
    assert attempt.samples.rows[0]["response"] == "r\u2028\x1b[2J"
    assert attempt.samples.rows[1]["watched"] is True
    assert [row["note"] for row in attempt.notes.rows] == ["an alarm"]
    assert attempt.progress is not None
    assert (attempt.progress.done, attempt.failure) == (2, None)
    assert attempt.metrics.damaged == attempt.samples.damaged == attempt.notes.damaged == 0


def test_lines_that_cannot_be_read_are_left_out_and_counted(tmp_path: Path):
    """Wherever a metrics file is cut or overwritten, the other lines are read."""
    store = Store.open(tmp_path)
    folder = write_attempt(store.new_attempt(KEY))
    whole = folder.metrics.read_bytes()
    for cut in range(len(whole)):
        lines = Lines.parse(whole[:cut])
        assert len(lines.rows) == whole[:cut].count(b"\n")
        assert lines.damaged == (not whole[:cut].endswith(b"\n") and cut > 0)
    bad = [b"\xff\x00", b"3", b'{"step": "2"}', b'{"loss": 1}', b"[" * 100_000, b""]
    huge = b'{"step": 0, "loss": 1%s, "kl": true}\n' % (b"0" * 400)
    folder.metrics.write_bytes(b"\n".join([*bad, huge + whole]))
    folder.samples.write_bytes(b'{"step": 1, "prompt": "p"}\n')
    folder.progress.path.write_bytes(b'{"message": ')
    folder.error.path.write_bytes(b"[]")
    (attempt,) = attempts_at(KEY, store)
    assert [row["step"] for row in attempt.metrics.rows] == [0, 1, 2]
    assert attempt.metrics.rows[0] == {"step": 0, "kl": True}  # what no float can hold is left out
    assert attempt.metrics.damaged == len(bad)
    assert (attempt.samples.rows, attempt.samples.damaged) == ((), 1)
    assert attempt.progress is None
    assert attempt.failure is None


def test_a_later_attempt_replaces_an_earlier_one_from_its_first_step_on():
    """No step of a killed attempt after its checkpoint stays, and none before it is lost."""
    first, second = ([{"step": step, "of": number} for step in steps] for number, steps in enumerate([[1, 2, 3], [3]]))
    assert [(row["step"], row["of"]) for row in joined([first, [], second])] == [(1, 0), (2, 0), (3, 1)]
    assert joined([first, [{"step": 1, "of": 1}]]) == ({"step": 1, "of": 1},)


def test_a_stage_is_known_by_its_plan_and_its_attempts(tmp_path: Path):
    """Never run, running, failed, done, and done again with other settings: the earlier result is found both ways."""
    path = write_pipeline(tmp_path)
    store = Store.open(tmp_path / "store")
    words = planned(path)["words"]
    assert words.key is not None
    assert (stage_history(words, store).state, stage_history(words, store).attempts) == ("missing", ())
    with store.lease(words.key):
        assert stage_history(words, store).state == "running"
    attempt = AttemptFolder(store.new_attempt(words.key))
    attempt.error.write(StageError("it broke", "rank 0", "mend it"))
    history = stage_history(words, store)
    assert (history.state, history.why) == ("failed", "it broke (rank 0)")
    assert str(history.attempts[-1].failure) == "it broke\n  where: rank 0\n  next:  mend it"
    make(path)
    done = planned(path)["words"]
    assert stage_history(done, store).state == "cached"
    assert earlier_results(done, store) == []


def test_earlier_results_are_those_of_the_same_instance(tmp_path: Path):
    """Found from the first result, the last and a missing one; a result of another chain is not among them."""
    path, store = write_pipeline(tmp_path), Store.open(tmp_path / "store")
    previous = None
    for number, text in enumerate(("a", "b", "c")):
        one = planned(path, f"words.left={text}")["words"]
        previous = made(one, store, previous=previous, finished=f"2026-01-0{number + 1}").key
        store.set_ref("toy", "words", previous)
    made(planned(path, "words.left=other")["words"], store, previous=None)

    def found(text: str) -> list[str]:
        results = earlier_results(planned(path, f"words.left={text}")["words"], store)
        return [record.settings["left"] for record in results]

    assert (found("c"), found("new")) == (["a", "b"], ["a", "b", "c"])
    store.set_ref("toy", "words", str(planned(path, "words.left=a")["words"].key))
    assert found("a") == ["b", "c"]


def test_a_run_on_another_machine_is_read_from_the_bucket(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its attempt, with the error that ended it, which is written after the uploads have ended."""
    monkeypatch.setattr(uploads, "LOOK_SECONDS", 0.05)
    there, here = (Store.open(bucket.uri, scratch=tmp_path / name) for name in ("there", "here"))
    with uploads.uploading(there, there.new_attempt(KEY), "sft", lambda _: None):
        folder = write_attempt(there.attempts(KEY)[0])
        until(lambda: len(attempts_at(KEY, here)) == 1 and bool(attempts_at(KEY, here)[0].notes.rows), "the upload")
    folder.error.write(StageError("it broke"))
    uploads.upload_failure(there, folder.path)
    (attempt,) = attempts_at(KEY, here)
    assert [row["step"] for row in attempt.metrics.rows] == [1, 2]
    assert attempt.failure is not None
    assert attempt.failure.what == "it broke"
    assert here.attempts(KEY) == []
