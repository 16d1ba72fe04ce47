import io
import json
import socket
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.attempt.context import Context
from rlhf.cluster.session import Session
from rlhf.cluster.worker import Call
from rlhf.cluster.worker_group import run_task
from rlhf.errors import KilledError, PreflightError, RecordError, RlhfError, StageError
from rlhf.pipeline.documents import status_document
from rlhf.pipeline.plan import Planned, plan
from rlhf.pipeline.runner import Runner
from rlhf.store import Store
from rlhf.terminal import Display
from tests.pipeline.helpers import load_toy, make, planned, states, write_pipeline
from tests.pipeline.toys import KNOWN, TotalSettings

pytestmark = pytest.mark.slow


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_pipeline(tmp_path)


def run(session: Session, path: Path, *overrides: str, targets: tuple[str, ...] = ()) -> tuple[dict[str, Planned], str]:
    """Run the pipeline; the plan afterwards, and what the user saw in a pipe."""
    config = load_toy(path, *overrides)
    text = io.StringIO()
    display = Display(Console(file=text, width=200), list(config.instances))
    runner = Runner(config, KNOWN, Store.open(config.store.uri), session, display)
    return runner.run(targets), text.getvalue()


def failing(session: Session, path: Path, behaviour: str) -> tuple[RlhfError, Path]:
    """Run a pipeline whose last stage goes wrong; its error, and the folder of its attempt."""
    with pytest.raises(RlhfError) as caught:
        run(session, path, f"total.behaviour={behaviour}")
    found = planned(path)
    assert states(found) == {"words": "cached", "count": "cached", "total": "missing"}
    key = found["total"].key
    assert key is not None
    store = Store.open(path.parent / "store")
    assert store.holder(key) is None, "the lease outlived the failure"
    attempts = store.attempts(key)
    assert len(attempts) == 1
    assert not (attempts[0] / "inputs").exists()
    status = status_document(load_toy(path), planned(path), store)["stages"][-1]
    assert status["state"] == "failed"
    assert caught.value.what in status["why"]
    return caught.value, attempts[0]


def test_a_run_commits_every_stage_and_the_next_is_nothing_but_hits(session: Session, path: Path, tmp_path: Path):
    """Results, metrics and logs are in the store; notes and progress reached the display; no scratch is left."""
    found, shown = run(session, path)
    assert states(found) == {"words": "cached", "count": "cached", "total": "cached"}
    total = found["total"].record
    assert total is not None
    assert total.metrics == {"total/value": 2.0}
    assert total.provenance["versions"]["ray"]
    store = Store.open(tmp_path / "store")
    assert json.loads(store.read_file(total.artifact, "config.json")) == 2.0

    assert "words: wrote 'one two'" in shown
    assert "adding up" in shown
    assert [line.split()[:2] for line in shown.splitlines() if " done " in line] == [
        ["words", "done"],
        ["count", "done"],
        ["total", "done"],
    ]
    attempt = tmp_path / "store" / "work" / total.key / total.attempt
    assert sorted(file.name for file in attempt.iterdir()) == [
        "device-0.json",
        "log-0.txt",
        "notes.jsonl",
        "progress.json",
        "resources.json",
        "result.json",
    ]
    assert len(list((tmp_path / "store" / "work").iterdir())) == 3
    assert list((tmp_path / "store" / "leases").iterdir()) == []

    again, shown = run(session, path)
    assert {name: one.key for name, one in again.items()} == {name: one.key for name, one in found.items()}
    assert [line.split()[:2] for line in shown.splitlines()] == [[name, "cached"] for name in KNOWN if name != "group"]


def test_only_what_is_asked_for_and_what_it_needs_is_run(session: Session, path: Path):
    """A target's consumers are left alone."""
    found, _ = run(session, path, targets=("count",))
    assert list(found) == ["words", "count"]
    assert states(planned(path)) == {"words": "cached", "count": "cached", "total": "missing"}


def test_an_equal_result_of_a_changed_stage_is_where_the_run_ends(session: Session, path: Path):
    """Early cut-off while running: words and count run again, and total, blocked at first, is then a hit."""
    make(path)
    found, shown = run(session, path, "words.left=five six")
    assert set(states(found).values()) == {"cached"}
    done = [line.split()[:2] for line in shown.splitlines() if line.split()[1] in ("done", "cached")]
    assert done == [["words", "done"], ["count", "done"], ["total", "cached"]]


def test_a_commit_is_blobs_then_manifest_then_action_then_ref(session: Session, path: Path, tmp_path: Path):
    """The action record is the commit: whatever it rests on lies in the store before it, and its ref comes after."""
    made: list[str] = []
    root = str(tmp_path / "store")
    watching = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        # Files come to their names by a link or a rename, whose second argument is the new name.
        if watching and event in ("os.link", "os.rename") and str(arguments[1]).startswith(root):
            made.append(Path(str(arguments[1])).relative_to(root).parts[0])

    sys.addaudithook(hook)
    try:
        run(session, path, targets=("words",))
    finally:
        watching = False
    order = [name for name in made if name in ("blobs", "manifests", "actions", "refs")]
    assert order == ["blobs", "blobs", "manifests", "actions", "refs"]


def test_a_stages_own_error_reaches_the_user_unchanged(session: Session, path: Path):
    """What, where and next of an error raised on a worker, and its class, are those of the stage."""
    error, _ = failing(session, path, "refuses")
    assert type(error) is RecordError
    assert error.args == ("a row is malformed", "rows.jsonl:7", "correct it")


def test_any_other_exception_is_a_stage_error_that_names_the_log(session: Session, path: Path):
    """One line says what happened on which rank of which host; the traceback is in the log."""
    error, attempt = failing(session, path, "raises")
    assert type(error) is StageError
    assert error.what == "total failed: KeyError: 'no such thing'"
    log = attempt / "log-0.txt"
    assert str(log) in error.where
    assert "rank 0 on " in error.where
    assert str(log) in error.next_step
    assert "Traceback (most recent call last)" in log.read_text()


def test_a_worker_that_dies_is_a_stage_error_that_names_the_log(session: Session, path: Path):
    """A killed process tells nothing itself; what it printed before is in the log."""
    error, attempt = failing(session, path, "exits")
    assert type(error) is KilledError
    assert error.what == "total died without a word, as if killed (SIGKILL)"
    assert str(attempt / "log-0.txt") in error.where
    assert (attempt / "log-0.txt").read_text() == "last words\n"
    assert len(str(error).splitlines()) == 3


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [("pickles", "may be a pickle"), ("writes nothing", "is empty"), ("returns nan", "nan")],
)
def test_a_result_that_no_artifact_may_hold_fails_its_stage(session: Session, path: Path, behaviour: str, told: str):
    """The stage is at fault and not the request: status 1, and nothing is committed."""
    error, _ = failing(session, path, f"'{behaviour}'")
    assert type(error) is StageError
    assert error.exit_status == 1
    assert told in error.what


def test_a_stage_that_returns_no_metrics_fails(session: Session, path: Path):
    """A forgotten return is a mistake of the stage, told like any other."""
    error, _ = failing(session, path, "'returns nothing'")
    assert "AttributeError" in error.what


def test_what_a_stage_noted_before_it_failed_is_shown(session: Session, path: Path):
    """The last notes are often what explains a failure."""
    config = load_toy(path, "total.behaviour=raises")
    text = io.StringIO()
    display = Display(Console(file=text, width=200), list(config.instances))
    with pytest.raises(StageError):
        Runner(config, KNOWN, Store.open(config.store.uri), session, display).run(())
    lines = text.getvalue().splitlines()
    assert "total: about to write" in lines
    assert lines[-1].split()[:2] == ["total", "failed"]


def test_a_failed_stage_is_run_again_and_then_no_longer_failed(session: Session, path: Path):
    """A failure is never cached: the same key gets a second attempt."""
    _, first = failing(session, path, "raises")
    found, _ = run(session, path)
    record = found["total"].record
    assert record is not None
    assert record.attempt != first.name
    assert record.attempt.startswith("000002-")


def test_more_ranks_than_the_cluster_has_are_refused_before_anything_runs(session: Session, path: Path):
    """Ray would wait for ever; and no stage upstream is run for a group that can never start."""
    path.write_text(path.read_text() + "group: {workers: {count: 3, cpus: 1}}\n")
    with pytest.raises(PreflightError, match="3 ranks of 1 CPU cores") as caught:
        run(session, path)
    assert caught.value.next_step == "group.workers.count=2"
    assert planned(path)["words"].state == "missing"
    assert not (path.parent / "store" / "work").exists()


def test_a_preflight_stops_the_run_before_its_group_starts(session: Session, path: Path, tmp_path: Path):
    """It sees what the stage will be given. Its refusal leaves nothing behind, and its own mistake only a log."""
    path.write_text(path.read_text() + "group: {workers: {cpus: 1}}\n")
    work = tmp_path / "store" / "work"
    with pytest.raises(PreflightError, match=r"a policy of 2\.0 is too small"):
        run(session, path)
    found = planned(path)
    assert states(found) == {"words": "cached", "count": "cached", "total": "cached", "group": "missing"}
    keys = {str(one.key) for one in found.values() if one.record is not None}
    assert {folder.name for folder in work.iterdir()} == keys

    with pytest.raises(StageError, match="ValueError: a mistake in the check itself") as caught:
        run(session, path, "group.check=raises")
    (left,) = [folder for folder in work.iterdir() if folder.name not in keys]
    (log,) = [file for file in left.rglob("*") if file.suffix == ".txt"]
    assert str(log) in caught.value.where
    assert "Traceback" in log.read_text()
    assert not list(left.rglob("inputs"))


def test_a_worker_that_does_not_see_the_store_says_so(session: Session, tmp_path: Path):
    """On a cluster without a shared file system the error is about that, not about a worker that died."""
    gone = tmp_path / "gone"
    context = Context("total", "key", TotalSettings(), {}, gone / "output", gone, tmp_path)
    with pytest.raises(PreflightError, match="does not see the store"):
        run_task(Call("tests.pipeline.toys:total", context), 1, lambda: None)


def test_a_stage_that_was_damaged_meanwhile_is_made_again(session: Session, path: Path, tmp_path: Path):
    """A run makes anew what it finds damaged, and tells the user what was moved where."""
    make(path)
    store = Store.open(tmp_path / "store")
    record = plan(load_toy(path), KNOWN, store)["count"].record
    assert record is not None
    sha256 = store.manifest(record.artifact).files[0].sha256
    blob = tmp_path / "store" / "blobs" / "sha256" / sha256[:2] / sha256
    blob.chmod(0o644)
    blob.write_text("a longer text")
    found, shown = run(session, path)
    assert set(states(found).values()) == {"cached"}
    assert "quarantine" in shown
    assert store.verify().damaged == []


def test_a_result_knows_what_it_took_and_what_failed_before_it(session: Session, path: Path):
    """Ranks, GPUs, hosts, the time of failed attempts, and the result that the stage had before."""
    first = run(session, path)[0]["total"].record
    assert first is not None
    with pytest.raises(RlhfError):
        run(session, path, "total.factor=2.0", "total.behaviour=raises")
    second = run(session, path, "total.factor=2.0")[0]["total"].record
    assert second is not None
    made = second.provenance
    assert (made["ranks"], made["gpus"], made["devices"]) == (1, 0, ["CPU"])
    assert made["hosts"] == [socket.gethostname()]
    (failed,) = made["earlier_attempts"]
    assert (failed["ranks"], failed["gpus"]) == (1, 0)
    assert 0 < failed["seconds"] < 60
    assert failed["attempt"] < second.attempt
    assert made["previous"] == first.key
    assert first.provenance["previous"] is None
    assert first.provenance["earlier_attempts"] == []
