"""A store in a bucket that is gone for a while or for ever, slow, or busy; each round at another request."""

import io
import random
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.cluster.session import Session
from rlhf.config.pipeline import load_pipeline
from rlhf.errors import StoreUnreachableError
from rlhf.pipeline import uploads
from rlhf.pipeline.plan import plan
from rlhf.pipeline.runner import Runner
from rlhf.store import Store, lease, objects
from rlhf.terminal import Display
from tests.buckets import Bucket, Fault
from tests.pipeline.helpers import until
from tests.pipeline.stepping import KNOWN
from tests.store.helpers import KEY, commit, files_under, small_payload

GONE: list[Fault] = ["drops", "busy", "loses"]
SECONDS = 2.0


@pytest.fixture
def store(bucket: Bucket, tmp_path: Path) -> Store:
    return Store.open(bucket.uri, scratch=tmp_path / "scratch")


@pytest.mark.rounds(1, 10)
@pytest.mark.parametrize("fault", GONE)
def test_a_store_that_comes_back_is_waited_for(bucket: Bucket, store: Store, tmp_path: Path, fault: Fault, seed: int):
    """From some request of a commit on nothing is served for seconds: the commit takes longer, and is the same."""
    bucket.endpoint.fail(fault, seconds=SECONDS, after=random.Random(seed).randrange(12))
    record = commit(store)
    assert bucket.endpoint.refused > 1
    bucket.endpoint.calm()
    assert store.lookup(KEY) == record
    assert files_under(store.checkout(record.artifact, tmp_path / "out")) == small_payload("one")
    assert store.verify().damaged == []


@pytest.mark.rounds(1, 10)
@pytest.mark.parametrize("fault", ["drops", "busy", "hangs"])
def test_a_store_that_stays_away_is_an_error_at_its_deadline(
    bucket: Bucket, store: Store, monkeypatch: pytest.MonkeyPatch, fault: Fault, seed: int
):
    """Not before, and not much later: what, where, and what to do; and the same again works once it is back."""
    monkeypatch.setattr(objects, "PATIENCE_SECONDS", SECONDS)
    monkeypatch.setattr(objects, "_ANSWER_SECONDS", 0.5)
    hasty = Store.open(bucket.uri, scratch=store.root)
    bucket.endpoint.fail(fault, after=random.Random(seed).randrange(12))
    began = time.monotonic()
    with pytest.raises(StoreUnreachableError, match="has not served a request for 2 seconds") as caught:
        commit(hasty)
    assert SECONDS <= time.monotonic() - began < SECONDS + 10
    assert caught.value.exit_status == 75
    assert bucket.endpoint.url in caught.value.where
    assert "run the same command again" in caught.value.next_step
    bucket.endpoint.calm()
    assert commit(store) == store.lookup(KEY)


@pytest.mark.rounds(1, 10)
def test_a_slow_store_is_only_slow(bucket: Bucket, store: Store, seed: int):
    """Each answer takes long, and every second one in some rounds fails too: nothing is given up."""
    bucket.endpoint.latency = 0.1 + 0.1 * random.Random(seed).random()
    bucket.endpoint.fail("busy", requests=seed % 4)
    record = commit(store)
    assert store.lookup(KEY) == record


def run(session: Session, bucket: Bucket, scratch: Path, *overrides: str) -> tuple[float, str]:
    """Run the stepping stage; the step that it began at, and what the user saw."""
    path = scratch.parent / "stepping.yaml"
    path.write_text(f"store: {{uri: {bucket.uri}, scratch: {scratch}}}\nstepping: {{}}\n")
    config = load_pipeline(path, overrides, {name: stage.settings for name, stage in KNOWN.items()})
    text = io.StringIO()
    display = Display(Console(file=text, width=300), list(config.instances))
    store = Store.open(config.store.uri, scratch=config.store.scratch)
    record = Runner(config, KNOWN, store, session, display).run(())["stepping"].record
    assert record is not None
    assert plan(config, KNOWN, store)["stepping"].state == "cached"
    return record.metrics["first"], text.getvalue()


@pytest.mark.slow
@pytest.mark.rounds(1, 10)
def test_a_stage_outlasts_a_store_that_is_away_for_longer_than_a_request_waits(
    session: Session, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
):
    """Neither the lease nor the uploads end it, and it is committed once the store is back."""
    monkeypatch.setattr(objects, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(uploads, "LOOK_SECONDS", 0.1)
    gate = tmp_path / "gate"

    def fault() -> None:
        until(lambda: Path(f"{gate}.started").exists(), "the stage's start")
        bucket.endpoint.fail(random.Random(seed).choice(GONE[:2]))
        time.sleep(SECONDS)
        bucket.endpoint.calm()
        gate.touch()

    thread = threading.Thread(target=fault)
    thread.start()
    first, shown = run(session, bucket, tmp_path / "scratch", f"stepping.gate={gate}")
    thread.join()
    assert first == 1
    assert shown.count("goes on, and nothing of it is uploaded for now") == 1
    assert bucket.files("leases") == {}


@pytest.mark.slow
@pytest.mark.rounds(1, 10)
def test_a_run_whose_store_is_gone_at_the_commit_goes_on_from_its_checkpoint(
    session: Session, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
):
    """It ends with status 75 at the deadline; run again, the stage repeats no step that it had a checkpoint of."""
    gate = tmp_path / "gate"
    monkeypatch.setattr(uploads, "LOOK_SECONDS", 0.1)

    def fault() -> None:
        until(lambda: Path(f"{gate}.started").exists(), "the stage's start")
        bucket.endpoint.fail(random.Random(seed).choice(GONE[:2]))
        monkeypatch.setattr(objects, "PATIENCE_SECONDS", 0.5)
        gate.touch()

    thread = threading.Thread(target=fault)
    thread.start()
    with pytest.raises(StoreUnreachableError) as caught:
        run(session, bucket, tmp_path / "scratch", f"stepping.gate={gate}")
    thread.join()
    assert caught.value.exit_status == 75
    bucket.endpoint.calm()
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.2)  # this process lives on, and its lease has to go stale
    first, _ = run(session, bucket, tmp_path / "scratch")
    assert first == 5
