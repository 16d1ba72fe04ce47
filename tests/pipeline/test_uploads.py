from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.attempt.folder import MARKER, AttemptFolder, newest_complete, step_of
from rlhf.errors import StageError
from rlhf.pipeline import uploads
from rlhf.pipeline.uploads import clear_checkpoints, fetch_attempts, read_newest, uploading
from rlhf.store import Store, digest_of, objects
from tests.buckets import Bucket
from tests.pipeline.helpers import until
from tests.pipeline.stepping import write_checkpoint
from tests.store.helpers import files_under

KEY = digest_of("a key")


@pytest.fixture
def machine(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Store]:
    """Opens the store from a machine, by its name; uploads look for news all the time."""
    monkeypatch.setattr(uploads, "LOOK_SECONDS", 0.05)
    return lambda name: Store.open(bucket.uri, scratch=tmp_path / name)


def uploaded(bucket: Bucket) -> list[int]:
    """The steps whose checkpoints are whole in the bucket."""
    return sorted(step_of(Path(name).parent) for name in bucket.names("work") if name.endswith(MARKER))


def quiet(line: str) -> None:
    raise AssertionError(line)


def test_another_machine_goes_on_from_the_newest_checkpoint(bucket: Bucket, machine: Callable[[str], Store]):
    """What was uploaded while the stage ran is all that is left of it, and is enough: checkpoint, metrics, order."""
    first, told = machine("first"), list[str]()
    attempt = first.new_attempt(KEY)
    with uploading(first, attempt, "sft", quiet):
        for step in (1, 2):
            write_checkpoint(attempt, step)
            until(lambda step=step: uploaded(bucket) == [step], f"the upload of step {step} and the end of the others")

    second = machine("second")
    fetch_attempts(second, KEY, "sft", told.append)
    assert told == [f"sft: fetched the checkpoint of step 2 from {bucket.uri}"]
    newest = newest_complete(second.attempts(KEY))
    assert newest is not None
    assert newest == AttemptFolder(second.root / "work" / KEY / attempt.name).checkpoint(2)
    assert (newest / "deep" / "shard-1").read_bytes() == b"2 of 1"
    assert (newest.parents[1] / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [path.name for path in second.attempts(KEY)] == [attempt.name]
    assert second.new_attempt(KEY).name.startswith("000002-")
    fetch_attempts(second, KEY, "sft", quiet)  # what is here is not fetched again
    assert not (AttemptFolder(attempt).upload).exists()


def test_a_checkpoint_that_was_cut_off_is_not_fetched(bucket: Bucket, machine: Callable[[str], Store]):
    """Without its marker, which comes last and after the metrics, the one before it counts."""
    first = machine("first")
    attempt = first.new_attempt(KEY)
    bucket.endpoint.served.clear()
    with uploading(first, attempt, "sft", quiet):
        write_checkpoint(attempt, 1)
        until(lambda: uploaded(bucket) == [1], "the upload")
    written = [request.rpartition("/")[2] for request in bucket.endpoint.served if request.startswith("PUT")]
    assert written.index(MARKER) > max(written.index(name) for name in ("shard-0", "shard-1", "metrics.jsonl"))
    for name in ("shard-0", "deep/shard-1"):
        bucket.write(f"work/{KEY}/{attempt.name}/checkpoints/checkpoint-9/{name}", b"9")
    second = machine("second")
    fetch_attempts(second, KEY, "sft", lambda line: None)
    newest = newest_complete(second.attempts(KEY))
    assert newest is not None
    assert step_of(newest) == 1
    assert not AttemptFolder(newest.parents[1]).checkpoint(9).exists()


def test_what_is_newer_here_is_kept(bucket: Bucket, machine: Callable[[str], Store]):
    """A machine that has gone further than it could upload goes on from where it was."""
    store = machine("first")
    attempt = store.new_attempt(KEY)
    with uploading(store, attempt, "sft", quiet):
        write_checkpoint(attempt, 1)
        until(lambda: uploaded(bucket) == [1], "the upload")
    write_checkpoint(attempt, 2)
    fetch_attempts(store, KEY, "sft", quiet)
    assert newest_complete(store.attempts(KEY)) == AttemptFolder(attempt).checkpoint(2)


def test_a_stage_goes_on_while_nothing_can_be_uploaded(
    bucket: Bucket, machine: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
):
    """One line says so, however long it lasts; what is newest then is uploaded as soon as it can be."""
    monkeypatch.setattr(objects, "PATIENCE_SECONDS", 0.05)
    store, told = machine("first"), list[str]()
    attempt = store.new_attempt(KEY)
    bucket.endpoint.fail("drops")
    with uploading(store, attempt, "sft", told.append):
        write_checkpoint(attempt, 1)
        until(lambda: bool(told), "the line")
        write_checkpoint(attempt, 2)
        until(lambda: bucket.endpoint.refused > 20, "more tries")
        bucket.endpoint.calm()
        until(lambda: uploaded(bucket) == [2], "the upload")
    assert len(told) == 1
    assert told[0].startswith("sft goes on, and nothing of it is uploaded for now: ")


def test_a_checkpoint_that_the_stage_deletes_while_it_is_uploaded_arrives_whole(
    bucket: Bucket, machine: Callable[[str], Store]
):
    """However slow the network is beside the stage, some checkpoint gets through."""
    store = machine("first")
    attempt = store.new_attempt(KEY)
    bucket.endpoint.latency = 0.2
    with uploading(store, attempt, "sft", quiet):
        folder = write_checkpoint(attempt, 1)
        written = files_under(folder)
        until(lambda: (AttemptFolder(attempt).upload / MARKER).exists(), "the beginning of the upload")
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        until(lambda: uploaded(bucket) == [1], "the upload")
    arrived = bucket.files(f"work/{KEY}/{attempt.name}/checkpoints/checkpoint-1/")
    assert {name.partition("checkpoint-1/")[2]: data for name, data in arrived.items()} == written


def test_a_stage_that_ends_while_it_is_uploaded_says_nothing_of_it(bucket: Bucket, machine: Callable[[str], Store]):
    """The upload is cut off, which is no trouble of the store's: what the stage made is committed next."""
    store, told = machine("first"), list[str]()
    attempt = store.new_attempt(KEY)
    bucket.endpoint.latency = 0.5
    with uploading(store, attempt, "sft", told.append):
        write_checkpoint(attempt, 1)
        until(lambda: (AttemptFolder(attempt).upload / MARKER).exists(), "the beginning of the upload")
    assert told == []
    assert uploaded(bucket) == []


def test_a_failed_stage_uploads_its_last_checkpoint_and_logs(
    bucket: Bucket, machine: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
):
    """The machine may be gone when the stage is run again."""
    monkeypatch.setattr(uploads, "LOOK_SECONDS", 60)
    store = machine("first")
    attempt = store.new_attempt(KEY)

    def failing() -> None:
        write_checkpoint(attempt, 3)
        (attempt / "log-0.txt").write_text("why")
        raise StageError("failed")

    with pytest.raises(StageError), uploading(store, attempt, "sft", quiet):
        failing()
    assert uploaded(bucket) == [3]
    assert bucket.files("work")[f"work/{KEY}/{attempt.name}/log-0.txt"] == b"why"


def test_a_failed_stage_whose_last_checkpoint_cannot_be_uploaded_says_so(
    bucket: Bucket, machine: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
):
    """Whoever goes on elsewhere would go on from an earlier one."""
    monkeypatch.setattr(objects, "PATIENCE_SECONDS", 0.05)
    store, told = machine("first"), list[str]()
    attempt = store.new_attempt(KEY)
    write_checkpoint(attempt, 3)
    bucket.endpoint.fail("drops")
    with pytest.raises(StageError), uploading(store, attempt, "sft", told.append):
        raise StageError("failed")
    assert told[-1].startswith("sft: its last files are on this machine alone: ")


def test_after_the_commit_the_checkpoints_are_deleted_and_the_logs_stay(
    bucket: Bucket, machine: Callable[[str], Store], monkeypatch: pytest.MonkeyPatch
):
    """Those of earlier attempts too; and a bucket that cannot be reached then does not undo the commit."""
    monkeypatch.setattr(objects, "PATIENCE_SECONDS", 0.05)
    store = machine("first")
    for step in (1, 2):
        attempt = store.new_attempt(KEY)
        with uploading(store, attempt, "sft", quiet):
            write_checkpoint(attempt, step)
            until(lambda step=step: uploaded(bucket) == [step], "the upload")
    (attempt / "log-0.txt").write_text("all is well")
    bucket.endpoint.fail("drops")
    clear_checkpoints(store, KEY, attempt)
    bucket.endpoint.calm()
    assert uploaded(bucket) == [2]
    clear_checkpoints(store, KEY, attempt)
    names = {Path(name).name for name in bucket.names("work")}
    assert names == {"metrics.jsonl", "log-0.txt"}


def test_no_name_in_a_bucket_leads_out_of_the_scratch_folder(bucket: Bucket, machine: Callable[[str], Store]):
    """Whoever may write to the bucket must not write elsewhere on this machine by it."""
    store = machine("first")
    attempt = "000001-20260101T000000Z-00000000"
    for name in ("checkpoints/checkpoint-1/../../../../../out", "../../../out", "..", "deep/other"):
        bucket.write(f"work/{KEY}/{attempt}/{name}", b"x")
    bucket.write(f"work/{KEY}/{attempt}/metrics.jsonl", b"")
    fetch_attempts(store, KEY, "sft", quiet)
    assert [path.name for path in (store.root / "work").rglob("*") if path.is_file()] == ["metrics.jsonl"]


def test_a_store_in_a_folder_needs_none_of_it(tmp_path: Path):
    """Its attempts lie in it already: nothing is copied, and nothing is deleted."""
    store = Store.open(tmp_path)
    attempt = store.new_attempt(KEY)
    fetch_attempts(store, KEY, "sft", quiet)
    with uploading(store, attempt, "sft", quiet):
        checkpoint = write_checkpoint(attempt, 1)
    clear_checkpoints(store, KEY, attempt)
    assert newest_complete(store.attempts(KEY)) == checkpoint


def test_how_far_a_stage_is_can_be_read_on_another_machine(bucket: Bucket, machine: Callable[[str], Store]):
    """Of the newest attempt, wherever it is; an older one's files are not taken for it."""
    first, second = machine("first"), machine("second")
    assert read_newest(second, KEY, "progress.json") is None
    old = second.new_attempt(KEY)
    (old / "progress.json").write_text("old")
    assert read_newest(second, KEY, "progress.json") == "old"
    fetch_attempts(first, KEY, "sft", quiet)
    bucket.write(f"work/{KEY}/{old.name}/progress.json", b"old")
    fetch_attempts(first, KEY, "sft", quiet)
    attempt = first.new_attempt(KEY)
    with uploading(first, attempt, "sft", quiet):
        (attempt / "resources.json").write_text("{}")
        until(lambda: bool([name for name in bucket.names("work") if attempt.name in name]), "the first upload")
        assert read_newest(second, KEY, "progress.json") is None
        (attempt / "progress.json").write_text("new")
        write_checkpoint(attempt, 1)
        until(lambda: uploaded(bucket) == [1], "the upload")
    assert read_newest(second, KEY, "progress.json") == read_newest(first, KEY, "progress.json") == "new"
